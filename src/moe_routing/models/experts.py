"""Experts for ragged routing: work and memory follow the selected (token, expert) pairs.

Shape letters: T tokens, K slots a token, S selected pairs, E experts, H hidden size, I expert size.

The slots of a token that select nothing carry the sentinel expert id ``E``. Stock ``grouped_mm``
leaves the rows of such slots uninitialised and ``batched_mm`` indexes out of range; here no row of
a padded slot is ever read. Importing this module registers the implementation under
:data:`EXPERTS_IMPLEMENTATION` in the experts interface of transformers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS_IMPLEMENTATION = "ragged"


class Pairs(NamedTuple):
    """The selected pairs in expert order.

    ``slot_S`` is the flat slot (token * K + k) and ``token_S`` the token of each pair, ``ends_E``
    where each expert's pairs end, ``row_TK`` the pair of each slot (S: the slot is padded).
    """

    slot_S: Tensor
    token_S: Tensor
    ends_E: Tensor
    row_TK: Tensor


def sort_pairs(index_TK: Tensor, num_experts: int) -> Pairs:
    """Sort the slots by expert, padded ones (id ``num_experts``) last.

    On the CPU padded slots are cut off. On an accelerator they stay as a tail beyond
    ``ends_E[-1]`` that no slot points at, because cutting would need a host synchronisation.
    """
    slots, k = index_TK.numel(), index_TK.shape[1]
    expert_S, slot_S = index_TK.reshape(-1).sort(stable=True)
    bounds_E = torch.arange(1, num_experts + 1, device=index_TK.device, dtype=expert_S.dtype)
    ends_E = torch.searchsorted(expert_S, bounds_E).to(torch.int32)
    if index_TK.device.type == "cpu":
        slot_S = slot_S[: int(ends_E[-1])]
    row_TK = slot_S.new_full((slots,), slot_S.numel())
    row_TK[slot_S] = torch.arange(slot_S.numel(), device=slot_S.device)
    if index_TK.device.type != "cpu":
        row_TK.masked_fill_(index_TK.reshape(-1) >= num_experts, slots)
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
    # A zero row takes the padded slots; half precisions are summed in float32 as stock does.
    padded = torch.cat([rows_SH, rows_SH.new_zeros(1, rows_SH.shape[1])])
    total_dtype = torch.promote_types(rows_SH.dtype, torch.float32)
    return padded[row_TK].sum(1, dtype=total_dtype).to(rows_SH.dtype)


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


def _grouped_linear(rows_SX: Tensor, weight_EYX: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the rows of each expert's pairs by that expert's weight, transposed."""
    return F.grouped_mm(rows_SX, weight_EYX.transpose(1, 2), offs=ends_E)


def ragged_experts_forward(
    module: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """Run the experts of the selected pairs only.

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
    pairs = sort_pairs(index_TK, module.num_experts)
    if pairs.slot_S.numel() == 0:
        return torch.zeros_like(hidden_TH)
    up_proj, down_proj = module.gate_up_proj, module.down_proj
    if module.is_transposed:
        up_proj, down_proj = up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    weight_S = weight_TK.reshape(-1)[pairs.slot_S]
    if hidden_TH.device.type != "cpu":
        # Zero, and keep from the router's gradient, the tail that the kernels leave uninitialised.
        tail_S = torch.arange(weight_S.numel(), device=weight_S.device) >= pairs.ends_E[-1]
        weight_S = weight_S.masked_fill(tail_S, 0.0)
    rows_SH = _Dispatch.apply(hidden_TH, pairs.token_S, pairs.row_TK)
    inner_SI = module._apply_gate(_grouped_linear(rows_SH, up_proj, pairs.ends_E))
    # Folding the weight in here touches I numbers a pair; after the down projection, H.
    inner_SI = inner_SI * weight_S.unsqueeze(1).to(inner_SI.dtype)
    return _Combine.apply(
        _grouped_linear(inner_SI, down_proj, pairs.ends_E), pairs.token_S, pairs.row_TK
    )


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, ragged_experts_forward)
