"""Log-likelihoods of target tokens without the (tokens x vocabulary) logits.

Shape letters: N scored positions, C positions of a chunk, H hidden size, W words of a block of the
vocabulary, B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_routing.engine.linear import linear


class Blocks(NamedTuple):
    """How many positions and words of the vocabulary are worked on at once."""

    positions: int
    words: int


CPU_BLOCKS = Blocks(256, 1024)
"""A megabyte of single-precision logits: they stay in cache from the product to the sum."""
ACCELERATOR_BLOCKS = Blocks(1024, 1 << 20)
"""The whole vocabulary: on a GPU what counts is the number of kernels."""
LOG2_E = math.log2(math.e)
SAFE_LOG_TOTAL = 60.0
"""Single precision overflows at exp(88) and underflows at exp(-87): what is lost beside a sum of
at least exp(-60) is beyond its last digit."""


def target_log_likelihoods(
    head: nn.Linear, hidden_NH: Tensor, target_N: Tensor, *, greedy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the log-likelihood of each target and whether it is the most likely token.

    Args:
        head: the model's output embedding.
        hidden_NH: final hidden states at the positions that predict the targets.
        target_N: target ids.
        greedy: whether to tell the most likely token; of equal ones the first counts.

    Returns:
        Log-likelihoods in nats, (N,), and booleans, (N,), or None without ``greedy``. Logits of
        half precision are turned to float32 before the softmax.
    """
    blocks = CPU_BLOCKS if hidden_NH.device.type == "cpu" else ACCELERATOR_BLOCKS
    parts = zip(hidden_NH.split(blocks.positions), target_N.split(blocks.positions), strict=True)
    results = [_chunk(head, *part, blocks.words, greedy=greedy) for part in parts]
    likelihood_N = torch.cat([likelihood_C for likelihood_C, _ in results])
    return likelihood_N, torch.cat([best_C for _, best_C in results]) if greedy else None


def _chunk(
    head: nn.Linear, hidden_CH: Tensor, target_C: Tensor, words: int, *, greedy: bool
) -> tuple[Tensor, Tensor | None]:
    """Go through the vocabulary block by block, then join the blocks."""
    within, log_totals, firsts, tops = [], [], [], []
    for start in range(0, head.weight.shape[0], words):
        block = slice(start, start + words)
        bias_W = None if head.bias is None else head.bias[block]
        compute = partial(linear, hidden_CH, head.weight[block], bias_W)
        logits_CW = compute()
        place_C = (target_C - start).clamp(0, logits_CW.shape[1] - 1)
        within.append(logits_CW.gather(1, place_C[:, None])[:, 0])
        if greedy:
            tops.append(logits_CW.amax(1))
            firsts.append(_is_first(logits_CW, place_C, within[-1] == tops[-1]))
        log_totals.append(_log_total(logits_CW, compute))
    home_C1 = (target_C // words)[:, None]
    log_total_C = torch.stack(log_totals, 1).logsumexp(1)
    likelihood_C = torch.stack(within, 1).gather(1, home_C1)[:, 0] - log_total_C
    if not greedy:
        return likelihood_C, None
    first_C = torch.stack(firsts, 1).gather(1, home_C1)[:, 0]
    return likelihood_C, first_C & (torch.stack(tops, 1).argmax(1) == home_C1[:, 0])


def _log_total(logits_CW: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """Return the log-sum-exp of each row, in float32 or better.

    On the CPU the logits are overwritten, and the largest is neither looked for nor taken off,
    unless a sum then leaves the range in which no term that counts is lost to overflow or
    underflow: ``again`` computes the logits for that case.
    """
    wide = torch.promote_types(logits_CW.dtype, torch.float32)
    if logits_CW.device.type == "cpu":
        # Powers of 2 are torch's own; those of e come from MKL, on AMD in four times the time.
        log_total_C = logits_CW.to(wide).mul_(LOG2_E).exp2_().sum(1).log_()
        if bool((log_total_C.abs() < SAFE_LOG_TOTAL).all()):
            return log_total_C
        logits_CW = again()
    return logits_CW.to(wide).logsumexp(1)


def _is_first(logits_CW: Tensor, place_C: Tensor, is_top_C: Tensor) -> Tensor:
    """Say whether the word at a place, which may be a most likely one, is the first of these.

    Finding the largest value is fast, finding its place is not: it is looked for only where the
    word has that value.
    """
    row_M = is_top_C.nonzero()[:, 0]
    is_top_C[row_M] = logits_CW[row_M].argmax(1) == place_C[row_M]
    return is_top_C
