"""From final hidden states to logits, and to log-likelihoods of target tokens.

Where the output layer is all there is between the two, log-likelihoods are computed without the
(tokens x vocabulary) logits.

Shape letters: N scored positions, C positions of a chunk, H hidden size, V vocabulary, W words of a
block of the vocabulary, B blocks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from moe_routing.engine.linear import linear
from moe_routing.engine.module_types import is_plain
from moe_routing.engine.offload import input_device


class Blocks(NamedTuple):
    """How many positions and words of the vocabulary are computed at once."""

    positions: int
    words: int


CPU_BLOCKS = Blocks(256, 1024)
"""A megabyte of single-precision logits, which stay in cache from the product to the sum."""
ACCELERATOR_BLOCKS = Blocks(1024, 1 << 20)
"""The whole vocabulary: on a GPU the number of kernels dominates."""
LOG2_E = math.log2(math.e)
SAFE_LOG_TOTAL = 60.0
"""Single precision overflows at exp(88) and underflows at exp(-87): a term that underflows is below
the last digit of a sum of at least exp(-60)."""
PROBE_LOGIT = 100.0
"""Largest logit when a head is probed, so that a cap of 30 or 50 on the logits shows."""


class _Given(nn.Module):
    """A model body that always returns the same final hidden states."""

    def __init__(self, hidden_NH: Tensor) -> None:
        super().__init__()
        self.output = MoeModelOutputWithPast(last_hidden_state=hidden_NH[None])

    def forward(self, *_: object, **__: object) -> MoeModelOutputWithPast:
        return self.output


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """Return a causal language model's output layer: a linear one, or what takes its place."""
    return cast("nn.Linear", model.get_output_embeddings())


def logits_of(model: PreTrainedModel, hidden_NH: Tensor) -> Tensor:
    """Return a model's logits for final hidden states, (N, V).

    The model's own forward computes them, including scales, caps and accelerate's hooks. It runs on
    a shallow copy whose body returns the states, because the model itself may be in use.

    Args:
        model: the model.
        hidden_NH: final hidden states, on any device.
    """
    weight = output_layer(model).weight
    device = input_device(model) if weight.is_meta else weight.device
    twin = copy.copy(model)
    twin._modules = {**model._modules, model.base_model_prefix: _Given(hidden_NH.to(device))}
    ids = torch.zeros(1, hidden_NH.shape[0], dtype=torch.int64, device=device)
    return type(model).forward(twin, input_ids=ids).logits[0]


@torch.inference_mode()
def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """Return a model's output layer if it alone maps final hidden states to logits.

    None if there is anything else: a scale, a cap, an adapter, a hook, quantised or offloaded
    weights.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or not is_plain(head.weight) or head.weight.is_meta:
        return None
    weight_VH = head.weight
    probe_NH = torch.linspace(-1, 1, head.in_features, device=weight_VH.device)[None].to(weight_VH)
    probe_NH *= PROBE_LOGIT / F.linear(probe_NH, weight_VH).abs().amax().clamp(min=1e-6)
    alone_NV, whole_NV = F.linear(probe_NH, weight_VH, head.bias), logits_of(model, probe_NH)
    rounding = PROBE_LOGIT * max(1e-4, torch.finfo(weight_VH.dtype).eps)
    same = whole_NV.shape == alone_NV.shape and torch.allclose(
        whole_NV.to(alone_NV), alone_NV, rtol=0, atol=rounding, equal_nan=True
    )
    return head if same else None


def logit_log_likelihoods(
    logits_NV: Tensor, target_N: Tensor, *, greedy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the same as :func:`target_log_likelihoods`, from whole rows of logits."""
    likelihoods, best = [], []
    chunks = (part.split(CPU_BLOCKS.positions) for part in (logits_NV, target_N))
    for logits_CV, target_C in zip(*chunks, strict=True):
        wide = torch.promote_types(logits_CV.dtype, torch.float32)
        log_probability_CV = logits_CV.log_softmax(1, dtype=wide)
        likelihoods.append(log_probability_CV.gather(1, target_C[:, None])[:, 0])
        if greedy:
            best.append(logits_CV.argmax(1) == target_C)
    return torch.cat(likelihoods), torch.cat(best) if greedy else None


def target_log_likelihoods(
    head: nn.Linear, hidden_NH: Tensor, target_N: Tensor, *, greedy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the log-likelihood of each target and whether it is the most likely token.

    Args:
        head: the model's output embedding.
        hidden_NH: final hidden states at the positions that predict the targets.
        target_N: target ids.
        greedy: whether to report if the target is the most likely token; of equal ones, the first.

    Returns:
        Log-likelihoods in nats, (N,), and booleans, (N,), or None without ``greedy``. Logits of
        half precision are converted to float32 before the softmax.
    """
    blocks = CPU_BLOCKS if hidden_NH.device.type == "cpu" else ACCELERATOR_BLOCKS
    parts = zip(hidden_NH.split(blocks.positions), target_N.split(blocks.positions), strict=True)
    results = [_chunk(head, *part, blocks.words, greedy=greedy) for part in parts]
    likelihood_N = torch.cat([likelihood_C for likelihood_C, _ in results])
    best = [best_C for _, best_C in results if best_C is not None]
    return likelihood_N, torch.cat(best) if greedy else None


def _chunk(
    head: nn.Linear, hidden_CH: Tensor, target_C: Tensor, words: int, *, greedy: bool
) -> tuple[Tensor, Tensor | None]:
    """Process the vocabulary in blocks, then combine them."""
    within, log_totals, firsts, tops = [], [], [], []
    for start in range(0, head.weight.shape[0], words):
        block = slice(start, start + words)
        bias_W = None if head.bias is None else head.bias[block]
        compute = partial(linear, hidden_CH, head.weight[block], bias_W)
        logits_CW = compute()
        index_C = (target_C - start).clamp(0, logits_CW.shape[1] - 1)
        within.append(logits_CW.gather(1, index_C[:, None])[:, 0])
        if greedy:
            tops.append(logits_CW.amax(1))
            firsts.append(_is_first(logits_CW, index_C, within[-1] == tops[-1]))
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

    On the CPU the logits are overwritten and the largest is not subtracted. If a sum then leaves
    the range that is safe from overflow and underflow, ``again`` recomputes the logits.
    """
    wide = torch.promote_types(logits_CW.dtype, torch.float32)
    if logits_CW.device.type == "cpu":
        # torch computes powers of 2 itself; powers of e come from MKL, four times slower on AMD.
        log_total_C = logits_CW.to(wide).mul_(LOG2_E).exp2_().sum(1).log_()
        if bool((log_total_C.abs() < SAFE_LOG_TOTAL).all()):
            return log_total_C
        logits_CW = again()
    return logits_CW.to(wide).logsumexp(1)


def _is_first(logits_CW: Tensor, index_C: Tensor, is_top_C: Tensor) -> Tensor:
    """Return whether the word at an index, if it is a most likely one, is the first of those.

    Finding the largest value is fast, finding its index is not; the index is computed only where
    the word has that value.
    """
    row_M = is_top_C.nonzero()[:, 0]
    is_top_C[row_M] = logits_CW[row_M].argmax(1) == index_C[row_M]
    return is_top_C
