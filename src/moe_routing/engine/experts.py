"""Dropless experts: computation and memory scale with the selected (token, expert) pairs.

Shape letters: T tokens, K slots per token, P selected pairs, token by token, S the same pairs,
expert by expert, N pairs of one expert, E experts, H hidden size, I expert size, J all experts'
sizes (E * I).

Unused slots of a token hold the sentinel expert id ``E``. Stock ``grouped_mm`` leaves the rows of
such slots uninitialised and ``batched_mm`` indexes out of range; here a padded slot has no row.
Importing this module registers the implementation under :data:`EXPERTS_IMPLEMENTATION` in the
experts interface of transformers.

Three kernels compute the same sum. Which one is used follows from measurements
(``benchmarks/engine.py``):

- grouped: two grouped matrix products over all pairs; differentiable, on every device and dtype.
- tiled: for inference on the CPU, one tile of tokens at a time, which keeps the number of rows low.
  The rows of a tile also come from grouped products or, where oneDNN is the faster library
  (:mod:`moe_routing.engine.linear`), from a loop over experts.
- dense: every expert on every token, with weight 0 where it is not selected. For inference on the
  CPU when most experts are selected anyway: there is nothing to sort, gather or scatter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_routing.engine.context import current_context
from moe_routing.engine.linear import linear, prefers_onednn
from moe_routing.engine.module_types import Experts, is_plain
from moe_routing.errors import InputError

EXPERTS_IMPLEMENTATION = "dropless"
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
"""Dtypes of weights that are not quantised."""
ROWS_STEP = 64
"""Rows of an expert are padded to a multiple of this: oneDNN prepares each new size anew."""
MIN_PAIRS_PER_EXPERT = 192
"""With fewer pairs per expert, on average, the loop over experts costs more than oneDNN saves."""
MIN_PAIRS_PER_EXPERT_CONCURRENT = 448
"""The same for concurrent batches: the loop holds the GIL, for which the other batches wait."""
DENSE_PROPORTION = 0.6
"""Above this proportion of all (token, expert) pairs, computing all of them is faster."""
DENSE_TILE = 256
"""Tokens per tile when computing all pairs."""
GATHER_NUMBERS = 1 << 26
"""Most elements of gathered rows at once when summing in half precision or on a GPU."""
MIN_DENSE_TOKENS = 64
"""With fewer tokens, concatenating the down projections costs more than it saves."""


class Tile(NamedTuple):
    """Size of a tile in inference on the CPU.

    ``bytes`` of hidden states of pairs, but on average at least ``pairs_per_expert`` pairs, to
    amortise reading the weights.
    """

    bytes: int
    pairs_per_expert: int


GROUPED_TILE = Tile(8 << 20, 256)
LOOP_TILE = Tile(24 << 20, 512)


class Pairs(NamedTuple):
    """The selected pairs, token by token, in the order of a token's slots.

    ``bound_B`` holds the start of each token's pairs and the end of the last one's, (tokens + 1,);
    a token has at most ``slots`` pairs.
    """

    token_P: Tensor
    expert_P: Tensor
    weight_P: Tensor
    bound_B: Tensor
    slots: int


def select_pairs(index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Pairs:
    """Drop the padded slots (id ``num_experts``).

    This synchronises with an accelerator once per layer, so that memory scales with the pairs.
    """
    tokens, slots = index_TK.shape
    expert_P, weight_P = index_TK.reshape(-1), weight_TK.reshape(-1)
    keep_TK = index_TK < num_experts
    slot_P = _true_indices(keep_TK)
    if slot_P.numel() == index_TK.numel():
        token_T = torch.arange(tokens + 1, device=index_TK.device)
        token_P = token_T[:-1, None].expand(-1, slots).reshape(-1)
        return Pairs(token_P, expert_P, weight_P, token_T * slots, slots)
    expert_P, weight_P = expert_P.index_select(0, slot_P), weight_P.index_select(0, slot_P)
    bound_B = F.pad(keep_TK.sum(1).cumsum(0), (1, 0))
    return Pairs(slot_P // slots, expert_P, weight_P, bound_B, slots)


def _true_indices(keep_TK: Tensor) -> Tensor:
    """Return the flat indices of true elements; on the CPU by numpy, three times faster."""
    if keep_TK.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(keep_TK.numpy()))
    return keep_TK.reshape(-1).nonzero()[:, 0]


def _order(expert_S: Tensor, num_experts: int) -> Tensor:
    """Return the stable sorting order of expert ids, 0 ... ``num_experts``."""
    # One-byte ids are sorted by radix, nine times faster on the CPU. There numpy sorts, because
    # torch uses radix sort only from 32,768 ids on.
    small_S = expert_S.to(torch.uint8) if num_experts < 256 else expert_S
    if small_S.device.type == "cpu":
        return torch.from_numpy(np.argsort(small_S.numpy(), kind="stable"))
    return small_S.argsort(stable=True)


def _inverse(order_S: Tensor) -> Tensor:
    """Return the index of each pair in an order."""
    row_P = torch.empty_like(order_S)
    row_P[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    return row_P


def _sum_rows(rows_SH: Tensor, row_P: Tensor, bound_B: Tensor, slots: int) -> Tensor:
    """Sum the rows of each token's pairs."""
    if rows_SH.device.type == "cpu" and rows_SH.dtype in (torch.float32, torch.float64):
        return F.embedding_bag(row_P, rows_SH, bound_B, mode="sum", include_last_offset=True)
    # A few tokens at a time: gathering all rows at once would double their memory.
    tokens = max(1, GATHER_NUMBERS // (slots * rows_SH.shape[1]))
    parts = zip(bound_B[:-1].split(tokens), bound_B[1:].split(tokens), strict=True)
    return torch.cat([_gather_and_sum(rows_SH, row_P, *part, slots) for part in parts])


def _gather_and_sum(
    rows_SH: Tensor, row_P: Tensor, start_N: Tensor, end_N: Tensor, slots: int
) -> Tensor:
    """Sum as :func:`_sum_rows` does, half precisions in float32 like the stock model."""
    pair_NK = start_N[:, None] + torch.arange(slots, device=start_N.device)
    none_NK = pair_NK >= end_N[:, None]
    picked_NKH = rows_SH[row_P[pair_NK.clamp_(max=row_P.numel() - 1)]]
    picked_NKH.masked_fill_(none_NK[..., None], 0.0)
    total_dtype = torch.promote_types(rows_SH.dtype, torch.float32)
    return picked_NKH.sum(1, dtype=total_dtype).to(rows_SH.dtype)


class _Dispatch(torch.autograd.Function):
    """Copy each token's hidden state to the rows of its pairs; the backward pass sums."""

    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        hidden_TH: Tensor,
        token_S: Tensor,
        row_P: Tensor,
        bound_B: Tensor,
        slots: int,
    ) -> Tensor:
        ctx.save_for_backward(row_P, bound_B)
        ctx.slots = slots
        return hidden_TH.index_select(0, token_S)

    @staticmethod
    def backward(ctx, grad_SH: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN001
        row_P, bound_B = ctx.saved_tensors
        return _sum_rows(grad_SH, row_P, bound_B, ctx.slots), None, None, None, None


class _Combine(torch.autograd.Function):
    """Sum the rows of a token's pairs; the backward pass copies."""

    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        out_SH: Tensor,
        token_S: Tensor,
        row_P: Tensor,
        bound_B: Tensor,
        slots: int,
    ) -> Tensor:
        ctx.save_for_backward(token_S)
        return _sum_rows(out_SH, row_P, bound_B, slots)

    @staticmethod
    def backward(ctx, grad_TH: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN001
        return grad_TH.index_select(0, *ctx.saved_tensors), None, None, None, None


class Weights(NamedTuple):
    """The experts' weights as right-hand factors: gate and up concatenated, and down.

    Biases, (experts, outputs), where the experts have some.
    """

    up_EHI: Tensor
    down_EIH: Tensor
    up_bias_EI: Tensor | None = None
    down_bias_EH: Tensor | None = None


def supports_dropless(module: nn.Module) -> TypeGuard[Experts]:
    """Return whether the experts of a module can be computed here.

    Not those of other classes than transformers' experts interface dispatches, such as those of
    quantised checkpoints, and not those with a norm after the experts.
    """
    marks = ("has_gate", "has_bias", "is_transposed", "config")  # set by transformers' decorator
    if not all(hasattr(module, mark) for mark in marks) or module.has_post_expert_norm:
        return False
    names = tensor_names(cast("Experts", module))[:2]
    tensors = [getattr(module, name, None) for name in names]
    return all(is_plain(t) and t.dtype in FLOATS and t.ndim == 3 for t in tensors)


def tensor_names(module: Experts) -> tuple[str, ...]:
    """Return the names of a module's tensors, in the order of :class:`Weights`."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    biases = (f"{up}_bias", "down_proj_bias") if module.has_bias else ()
    return (up, "down_proj", *biases)


def right_hand_weights(module: Experts, tensors: Sequence[Tensor]) -> Weights:
    """Return tensors of a module, in the order of :func:`tensor_names`, as right-hand factors.

    Raises:
        InputError: see :func:`supports_dropless`.
    """
    if not supports_dropless(module):
        raise InputError(
            f"{type(module).__name__}: experts that cannot be computed one by one; allowed: "
            "experts of transformers' experts interface, not quantised, without a norm after them"
        )
    up, down, *biases = tensors
    if module.is_transposed:
        return Weights(up, down, *biases)
    return Weights(up.transpose(1, 2), down.transpose(1, 2), *biases)


def activate(module: Experts, up: Tensor) -> Tensor:
    """Return what the down projections read, from the outputs of the up projections."""
    return module._apply_gate(up) if module.has_gate else module.act_fn(up)


def _grouped(module: Experts, hidden_TH: Tensor, pairs: Pairs, weights: Weights) -> Tensor:
    """Compute all experts in two grouped products."""
    order_S = _order(pairs.expert_P, module.num_experts)
    expert_S, weight_S1 = pairs.expert_P[order_S], pairs.weight_P[order_S, None]
    expert_E = torch.arange(module.num_experts, device=order_S.device)
    ends_E = torch.searchsorted(expert_S, expert_E, right=True).to(torch.int32)
    where = (pairs.token_P[order_S], _inverse(order_S), pairs.bound_B, pairs.slots)
    rows_SH = _Dispatch.apply(hidden_TH, *where)
    up_SI = _grouped_product(rows_SH, weights.up_EHI, ends_E)
    if weights.up_bias_EI is not None:
        up_SI = up_SI + weights.up_bias_EI[expert_S]
    inner_SI = activate(module, up_SI)
    # Applying the weight here costs I products per pair; after the down projection, H. Weights that
    # the router does not round are not rounded here either.
    inner_SI = (inner_SI * weight_S1).to(inner_SI.dtype)
    out_SH = _grouped_product(inner_SI, weights.down_EIH, ends_E)
    if weights.down_bias_EH is not None:
        out_SH = out_SH + (weights.down_bias_EH[expert_S] * weight_S1).to(out_SH.dtype)
    return _Combine.apply(out_SH, *where)


def _grouped_product(rows_SX: Tensor, weight_EXY: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the rows of each expert's pairs by that expert's weight."""
    # torch has no grouped product in double precision, nor of rows that do not fill 16 bytes.
    widths = [size * rows_SX.element_size() for size in weight_EXY.shape[1:]]
    if rows_SX.dtype != torch.float64 and not any(width % 16 for width in widths):
        return F.grouped_mm(rows_SX, weight_EXY, offs=ends_E)
    ends = ends_E.tolist()
    groups = zip([0, *ends[:-1]], ends, weight_EXY, strict=True)
    return torch.cat([rows_SX[start:end] @ weight_XY for start, end, weight_XY in groups])


Kernel = Callable[[Experts, Tensor, Pairs, Weights], Tensor]
"""From experts, hidden states, pairs and weights to the sums, (T, H)."""
Rows = Callable[[Experts, Tensor, Tensor, Tensor, Weights], Tensor]
"""From experts, hidden states, tokens (S,), pairs by expert (E,) and weights to outputs (S, H)."""


def _tiled(rows: Rows, tile: Tile) -> Kernel:
    """Return a kernel that computes a tile of tokens at a time, for inference on the CPU."""

    def compute(module: Experts, hidden_TH: Tensor, pairs: Pairs, weights: Weights) -> Tensor:
        row = hidden_TH.element_size() * hidden_TH.shape[1]
        most = max(tile.bytes // row, tile.pairs_per_expert * module.num_experts)
        tiles = max(1, -(-pairs.expert_P.numel() // most))
        step = -(-hidden_TH.shape[0] // tiles)  # equal tiles: a small last one is mostly overhead
        sums = []
        for first in range(0, hidden_TH.shape[0], step):
            bound_B = pairs.bound_B[first : first + step + 1]
            start, end = bound_B[[0, -1]].tolist()
            token_P, expert_P, weight_P = (part[start:end] for part in pairs[:3])
            order_S = _order(expert_P, module.num_experts)
            count_E = torch.bincount(expert_P, minlength=module.num_experts)
            sums.append(
                F.embedding_bag(
                    _inverse(order_S),
                    rows(module, hidden_TH, token_P[order_S], count_E, weights),
                    bound_B - start,
                    mode="sum",
                    per_sample_weights=weight_P.to(hidden_TH.dtype),
                    include_last_offset=True,
                )
            )
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    return compute


def _grouped_rows(
    module: Experts, hidden_TH: Tensor, token_S: Tensor, count_E: Tensor, weights: Weights
) -> Tensor:
    """Compute all experts in two grouped products."""
    ends_E = count_E.cumsum(0).to(torch.int32)
    up_SI = _grouped_product(hidden_TH.index_select(0, token_S), weights.up_EHI, ends_E)
    return _grouped_product(activate(module, up_SI), weights.down_EIH, ends_E)


def _loop_rows(
    module: Experts, hidden_TH: Tensor, token_S: Tensor, count_E: Tensor, weights: Weights
) -> Tensor:
    """Compute one expert after another."""
    counts = count_E.tolist()
    rows_SH = hidden_TH.new_empty(token_S.numel(), hidden_TH.shape[1])
    # Rows after an expert's own are left from an earlier expert; their outputs are dropped.
    picked_NH = hidden_TH.new_zeros(_rounded(max(counts)), hidden_TH.shape[1])
    work = zip(token_S.split(counts), rows_SH.split(counts), *weights[:2], strict=True)
    for token_N, out_NH, up_HI, down_IH in work:
        if size := token_N.numel():
            torch.index_select(hidden_TH, 0, token_N, out=picked_NH[:size])
            up_NI = linear(picked_NH[: _rounded(size)], up_HI.t())[:size]
            torch.mm(activate(module, up_NI), down_IH, out=out_NH)
    return rows_SH


_grouped_tiled = _tiled(_grouped_rows, GROUPED_TILE)
_loop_tiled = _tiled(_loop_rows, LOOP_TILE)


def _rounded(rows: int) -> int:
    return -(-rows // ROWS_STEP) * ROWS_STEP


def _dense(module: Experts, hidden_TH: Tensor, pairs: Pairs, weights: Weights) -> Tensor:
    """Compute every expert for every token, a cache-sized tile of tokens at a time."""
    experts, hidden = module.num_experts, hidden_TH.shape[1]
    weight_TE = hidden_TH.new_zeros(hidden_TH.shape[0], experts)
    weight_TE[pairs.token_P, pairs.expert_P] = pairs.weight_P.to(hidden_TH.dtype)
    up_JH = weights.up_EHI.transpose(1, 2).reshape(-1, hidden)
    down_JH = weights.down_EIH.reshape(-1, hidden)
    out_TH = torch.empty_like(hidden_TH)
    for start in range(0, hidden_TH.shape[0], DENSE_TILE):
        part = slice(start, start + DENSE_TILE)
        up_TJ = linear(hidden_TH[part], up_JH)
        inner_TEI = activate(module, up_TJ.view(up_TJ.shape[0], experts, -1))
        inner_TEI = inner_TEI * weight_TE[part, :, None]
        torch.mm(inner_TEI.flatten(1), down_JH, out=out_TH[part])
    return out_TH


def select_kernel(module: Experts, hidden_TH: Tensor, pairs: int) -> Kernel:
    """Select by device, dtype, processor, concurrency and the number of selected pairs."""
    inference = not (torch.is_grad_enabled() and _needs_grad(module, hidden_TH))
    on_cpu = hidden_TH.device.type == "cpu" and hidden_TH.dtype in (torch.float32, torch.float64)
    if not (inference and on_cpu) or module.has_bias:
        return _grouped
    tokens, experts = hidden_TH.shape[0], module.num_experts
    if pairs >= DENSE_PROPORTION * tokens * experts and tokens >= MIN_DENSE_TOKENS:
        return _dense
    concurrent = current_context().concurrent
    enough = MIN_PAIRS_PER_EXPERT_CONCURRENT if concurrent else MIN_PAIRS_PER_EXPERT
    loop = prefers_onednn() and pairs >= enough * experts
    return _loop_tiled if loop else _grouped_tiled


def _needs_grad(module: Experts, hidden_TH: Tensor) -> bool:
    return hidden_TH.requires_grad or any(p.requires_grad for p in module.parameters())


@torch.compiler.disable
def dropless_experts_forward(
    module: Experts, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """Run the experts of the selected pairs only.

    ``torch.compile`` leaves this function out of its graphs: sizes depend on the routing, and
    grouped products cannot be traced in single precision.

    Args:
        module: an experts module of transformers, with fused 3-D weights.
        hidden_TH: hidden states, (tokens, hidden).
        index_TK: expert ids, (tokens, slots); the id E marks a padded slot.
        weight_TK: routing weights, (tokens, slots); ignored at padded slots.

    Returns:
        The weighted sum of expert outputs, (tokens, hidden), in the dtype of ``hidden_TH``.

    Raises:
        InputError: see :func:`supports_dropless`.
    """
    weights = right_hand_weights(module, [getattr(module, n) for n in tensor_names(module)])
    dtype, device = hidden_TH.dtype, hidden_TH.device.type
    if torch.is_autocast_enabled(device):
        # Autocast does not cover grouped products.
        lower = torch.get_autocast_dtype(device)
        hidden_TH = hidden_TH.to(lower)
        weights = Weights(*(part.to(lower) for part in weights if part is not None))
    pairs = select_pairs(index_TK, weight_TK, module.num_experts)
    if pairs.expert_P.numel() == 0:
        return torch.zeros_like(hidden_TH, dtype=dtype)
    kernel = select_kernel(module, hidden_TH, pairs.expert_P.numel())
    return kernel(module, hidden_TH, pairs, weights).to(dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, dropless_experts_forward)
