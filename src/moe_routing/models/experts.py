"""Experts for ragged routing: work and memory follow the selected (token, expert) pairs.

Shape letters: T tokens, K slots a token, S selected pairs, N pairs of one expert, E experts,
H hidden size, I expert size, J all experts' sizes (E * I).

The slots of a token that select nothing carry the sentinel expert id ``E``. Stock ``grouped_mm``
leaves the rows of such slots uninitialised and ``batched_mm`` indexes out of range; here a padded
slot has no row. Importing this module registers the implementation under
:data:`EXPERTS_IMPLEMENTATION` in the experts interface of transformers.

There are three ways to the same sum, chosen by measurement (``benchmarks/engine.py``):

- grouped: two grouped matrix products over all pairs; differentiable, every device and dtype.
- by expert: one expert after the other, so that its rows stay in cache from gathering to the down
  projection; for inference on the CPU.
- dense: every expert on every token, weight 0 where it is not selected; for inference on the CPU
  when most experts are selected anyway: nothing to sort, gather or scatter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_routing.models.linear import linear, prefers_onednn

EXPERTS_IMPLEMENTATION = "ragged"
TILE_BYTES = 24 << 20
"""Output rows in work at once when computing by expert."""
TILE_PAIRS_AN_EXPERT = 512
"""Pairs an expert, on average, that a tile holds at least, so that reading weights pays."""
ROWS_STEP = 64
"""Rows of an expert are filled up to a multiple of this where oneDNN computes."""
PAIRS_AN_EXPERT = 192
"""With fewer pairs an expert, on average, the loop over experts costs more than it saves."""
PAIRS_AN_EXPERT_BESIDE = 448
"""The same where passes run beside each other: the loop takes Python's lock from the others."""
DENSE_SHARE = 0.6
"""From this share of all (token, expert) pairs on, computing all of them is faster."""
DENSE_TILE = 256
"""Tokens in work at once when computing all pairs."""
GATHER_NUMBERS = 1 << 26
"""Numbers of gathered rows in work at once when they are summed in half precision or on a GPU."""
MIN_DENSE_TOKENS = 64
"""With fewer tokens, bringing the down projections side by side costs more than it saves."""


class Pairs(NamedTuple):
    """The selected pairs in expert order.

    ``slot_S`` is the flat slot (token * K + k) and ``token_S`` the token of each pair, ``ends_E``
    where each expert's pairs end, ``row_TK`` the pair of each slot (S: the slot is padded).
    """

    slot_S: Tensor
    token_S: Tensor
    ends_E: Tensor
    row_TK: Tensor


def _order(expert_S: Tensor, num_experts: int) -> Tensor:
    """Return the stable order of expert ids, 0 ... ``num_experts``."""
    # Ids of one byte are sorted by radix: on the CPU in a ninth of the time, and by numpy, because
    # torch does so from 32,768 ids on only.
    small_S = expert_S.to(torch.uint8) if num_experts < 256 else expert_S
    if small_S.device.type == "cpu":
        return torch.from_numpy(np.argsort(small_S.numpy(), kind="stable"))
    return small_S.argsort(stable=True)


def sort_pairs(index_TK: Tensor, num_experts: int) -> Pairs:
    """Sort the slots by expert and cut off the padded ones (id ``num_experts``).

    Cutting waits for the device, once a layer. It is what makes memory follow the pairs.
    """
    slots, k = index_TK.numel(), index_TK.shape[1]
    expert_S = index_TK.reshape(-1)
    slot_S = _order(expert_S, num_experts)
    bounds_E = torch.arange(1, num_experts + 1, device=index_TK.device, dtype=expert_S.dtype)
    ends_E = torch.searchsorted(expert_S[slot_S], bounds_E).to(torch.int32)
    slot_S = slot_S[: int(ends_E[-1])]
    row_TK = slot_S.new_full((slots,), slot_S.numel())
    row_TK[slot_S] = torch.arange(slot_S.numel(), device=slot_S.device)
    return Pairs(slot_S, slot_S // k, ends_E, row_TK.view(-1, k))


def _sum_rows(rows_SH: Tensor, row_TK: Tensor) -> Tensor:
    """Sum, for each token, the rows that its slots point at; row number S means "no row"."""
    padding = rows_SH.shape[0]
    if rows_SH.device.type == "cpu" and rows_SH.dtype in (torch.float32, torch.float64):
        keep_TK = row_TK < padding
        ends_T = keep_TK.sum(1).cumsum(0)
        if int(ends_T[-1]) == row_TK.numel():
            return F.embedding_bag(row_TK, rows_SH, mode="sum")
        return F.embedding_bag(row_TK[keep_TK], rows_SH, F.pad(ends_T[:-1], (1, 0)), mode="sum")
    # A few tokens at a time: all slots' rows side by side would be as large as the rows again.
    tokens = max(1, GATHER_NUMBERS // (row_TK.shape[1] * rows_SH.shape[1]))
    return torch.cat([_gather_and_sum(rows_SH, row_NK) for row_NK in row_TK.split(tokens)])


def _gather_and_sum(rows_SH: Tensor, row_NK: Tensor) -> Tensor:
    """Sum as :func:`_sum_rows` does; half precisions in float32, as stock does."""
    last = rows_SH.shape[0] - 1
    picked_NKH = rows_SH[row_NK.clamp(max=last)].masked_fill_((row_NK > last)[..., None], 0.0)
    total_dtype = torch.promote_types(rows_SH.dtype, torch.float32)
    return picked_NKH.sum(1, dtype=total_dtype).to(rows_SH.dtype)


class _Dispatch(torch.autograd.Function):
    """Copy each token's hidden state to the rows of its pairs; backward sums."""

    @staticmethod
    def forward(ctx, hidden_TH: Tensor, token_S: Tensor, row_TK: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(row_TK)
        return hidden_TH.index_select(0, token_S)

    @staticmethod
    def backward(ctx, grad_SH: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        return _sum_rows(grad_SH, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    """Sum the rows of a token's pairs; backward copies."""

    @staticmethod
    def forward(ctx, out_SH: Tensor, token_S: Tensor, row_TK: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(token_S)
        return _sum_rows(out_SH, row_TK)

    @staticmethod
    def backward(ctx, grad_TH: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        return grad_TH.index_select(0, *ctx.saved_tensors), None, None


class Weights(NamedTuple):
    """The experts' weights as right-hand factors: up (gate and up side by side), then down."""

    up_EHI: Tensor
    down_EIH: Tensor


def _weights(module: nn.Module) -> Weights:
    if module.is_transposed:
        return Weights(module.gate_up_proj, module.down_proj)
    return Weights(module.gate_up_proj.transpose(1, 2), module.down_proj.transpose(1, 2))


def _grouped(
    module: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, weights: Weights
) -> Tensor:
    """Compute all experts in two grouped products."""
    pairs = sort_pairs(index_TK, module.num_experts)
    if pairs.slot_S.numel() == 0:
        return torch.zeros_like(hidden_TH)
    weight_S = weight_TK.reshape(-1)[pairs.slot_S]
    rows_SH = _Dispatch.apply(hidden_TH, pairs.token_S, pairs.row_TK)
    inner_SI = module._apply_gate(_grouped_product(rows_SH, weights.up_EHI, pairs.ends_E))
    # Folding the weight in here touches I numbers a pair; after the down projection, H.
    inner_SI = inner_SI * weight_S.unsqueeze(1).to(inner_SI.dtype)
    out_SH = _grouped_product(inner_SI, weights.down_EIH, pairs.ends_E)
    return _Combine.apply(out_SH, pairs.token_S, pairs.row_TK)


def _grouped_product(rows_SX: Tensor, weight_EXY: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the rows of each expert's pairs by that expert's weight."""
    # torch has no grouped product in double precision, nor of rows that do not fill 16 bytes.
    widths = [size * rows_SX.element_size() for size in weight_EXY.shape[1:]]
    if rows_SX.dtype != torch.float64 and not any(width % 16 for width in widths):
        return F.grouped_mm(rows_SX, weight_EXY, offs=ends_E)
    ends = ends_E.tolist()
    groups = zip([0, *ends[:-1]], ends, weight_EXY, strict=True)
    return torch.cat([rows_SX[start:end] @ weight_XY for start, end, weight_XY in groups])


def _by_expert(
    module: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, weights: Weights
) -> Tensor:
    """Compute expert after expert, a tile of tokens at a time."""
    row = hidden_TH.element_size() * hidden_TH.shape[1]
    slots = max(TILE_BYTES // row, TILE_PAIRS_AN_EXPERT * module.num_experts)
    tiles = max(1, -(-int((index_TK < module.num_experts).sum()) // slots))
    tile = -(-index_TK.shape[0] // tiles)  # equal tiles: a small last one is all overhead
    parts = zip(hidden_TH.split(tile), index_TK.split(tile), weight_TK.split(tile), strict=True)
    sums = [_tile_by_expert(module, *part, weights) for part in parts]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _tile_by_expert(
    module: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, weights: Weights
) -> Tensor:
    experts, k = module.num_experts, index_TK.shape[1]
    flat_S = index_TK.reshape(-1)
    counts = torch.bincount(flat_S, minlength=experts + 1)[:experts].tolist()
    slot_S = _order(flat_S, experts)[: sum(counts)]
    rows_SH = hidden_TH.new_empty(slot_S.numel(), hidden_TH.shape[1])
    # Rows behind an expert's own are left from an expert before it; what comes of them is cut off.
    picked_NH = hidden_TH.new_zeros(_rounded(max(counts)), hidden_TH.shape[1])
    work = zip((slot_S // k).split(counts), rows_SH.split(counts), *weights, strict=True)
    for token_N, out_NH, up_HI, down_IH in work:
        if pairs := token_N.numel():
            torch.index_select(hidden_TH, 0, token_N, out=picked_NH[:pairs])
            up_NI = linear(picked_NH[: _rounded(pairs)], up_HI.t())[:pairs]
            torch.mm(module._apply_gate(up_NI), down_IH, out=out_NH)
    row_S = slot_S.new_empty(flat_S.numel())
    row_S.scatter_(0, slot_S, torch.arange(slot_S.numel()))
    weight_TK = weight_TK.to(hidden_TH.dtype)
    return _weighted_sum(rows_SH, row_S.view(-1, k), index_TK < experts, weight_TK)


def _rounded(rows: int) -> int:
    """Round up, so that few sizes occur: oneDNN prepares each size that it meets anew."""
    return -(-rows // ROWS_STEP) * ROWS_STEP if prefers_onednn() else rows


def _weighted_sum(rows_SH: Tensor, row_TK: Tensor, keep_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Sum, for each token, its slots' rows times weights; slots that are not kept have no row."""
    if rows_SH.shape[0] == row_TK.numel():
        return F.embedding_bag(row_TK, rows_SH, mode="sum", per_sample_weights=weight_TK)
    starts_T = F.pad(keep_TK.sum(1).cumsum(0)[:-1], (1, 0))
    return F.embedding_bag(
        row_TK[keep_TK], rows_SH, starts_T, mode="sum", per_sample_weights=weight_TK[keep_TK]
    )


def _dense(
    module: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, weights: Weights
) -> Tensor:
    """Compute every expert for every token, a cache-sized tile of tokens at a time."""
    experts, hidden = module.num_experts, hidden_TH.shape[1]
    weight_TE = hidden_TH.new_zeros(hidden_TH.shape[0], experts + 1)
    weight_TE.scatter_(1, index_TK, weight_TK.to(hidden_TH.dtype))
    up_JH = weights.up_EHI.transpose(1, 2).reshape(-1, hidden)
    down_JH = weights.down_EIH.reshape(-1, hidden)
    out_TH = torch.empty_like(hidden_TH)
    for start in range(0, hidden_TH.shape[0], DENSE_TILE):
        part = slice(start, start + DENSE_TILE)
        up_TJ = linear(hidden_TH[part], up_JH)
        inner_TEI = module._apply_gate(up_TJ.view(up_TJ.shape[0], experts, -1))
        inner_TEI = inner_TEI * weight_TE[part, :experts, None]
        torch.mm(inner_TEI.flatten(1), down_JH, out=out_TH[part])
    return out_TH


def _best_way(module: nn.Module, hidden_TH: Tensor, index_TK: Tensor) -> Callable[..., Tensor]:
    """Choose by device, dtype and the number of selected pairs."""
    inference = not (torch.is_grad_enabled() and _needs_grad(module, hidden_TH))
    on_cpu = hidden_TH.device.type == "cpu" and hidden_TH.dtype in (torch.float32, torch.float64)
    if not (inference and on_cpu):
        return _grouped
    tokens, experts = hidden_TH.shape[0], module.num_experts
    pairs = int((index_TK < experts).sum())
    if pairs >= DENSE_SHARE * tokens * experts and tokens >= MIN_DENSE_TOKENS:
        return _dense
    beside = threading.current_thread() is not threading.main_thread()
    enough = PAIRS_AN_EXPERT_BESIDE if beside else PAIRS_AN_EXPERT
    return _by_expert if pairs >= enough * experts else _grouped


def _needs_grad(module: nn.Module, hidden_TH: Tensor) -> bool:
    return hidden_TH.requires_grad or any(p.requires_grad for p in module.parameters())


@torch.compiler.disable
def ragged_experts_forward(
    module: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """Run the experts of the selected pairs only.

    ``torch.compile`` leaves this function out of its graphs: sizes follow the routing, and
    grouped products cannot be traced in single precision.

    Args:
        module: an experts module of transformers (fused 3-D weights, gated, no bias).
        hidden_TH: hidden states, (tokens, hidden).
        index_TK: expert ids, (tokens, slots); the id E marks a padded slot.
        weight_TK: routing weights, (tokens, slots); ignored at padded slots.

    Returns:
        The weighted sum of expert outputs, (tokens, hidden), in the dtype of ``hidden_TH``.

    Raises:
        NotImplementedError: the experts have a bias, no gate, or a norm after the experts.
    """
    if module.has_bias or not module.has_gate or module.has_post_expert_norm:
        name = type(module).__name__
        raise NotImplementedError(f"{name}: ragged experts need gated experts without bias or norm")
    weights, dtype, device = _weights(module), hidden_TH.dtype, hidden_TH.device.type
    if torch.is_autocast_enabled(device):
        # Grouped products are not among the operations that autocast knows.
        lower = torch.get_autocast_dtype(device)
        hidden_TH, weights = hidden_TH.to(lower), Weights(*(part.to(lower) for part in weights))
    compute = _best_way(module, hidden_TH, index_TK)
    return compute(module, hidden_TH, index_TK, weight_TK, weights).to(dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, ragged_experts_forward)
