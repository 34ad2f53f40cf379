"""Sort the experts of each token: exact, deterministic for ties, fast on the CPU.

Shape letters: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def order_experts(
    value_TE: Tensor, tie_break_TE: Tensor | None = None, *, num_ranks: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sort each row in descending order.

    Equal values are ordered by the larger tie break, if one is given, then by the lower index.

    Args:
        value_TE: float32, (tokens, experts); infinities are ordered, NaN is not allowed.
        tie_break_TE: a second key, any float dtype, (tokens, experts).
        num_ranks: how many ranks to return, without a tie break; None: all.

    Returns:
        The sorted values, float32, and the experts in that order, int64, both (tokens, ranks).
    """
    if tie_break_TE is None:
        return _order_by_value(value_TE, num_ranks)
    # An accelerator would have to wait for the number of rows with ties; the CPU sorts only those
    # rows by both keys.
    if value_TE.device.type != "cpu":
        return _order_by_both(value_TE, tie_break_TE)
    sorted_TE, order_TE = _order_by_value(value_TE)
    tied_TE = sorted_TE[:, 1:] == sorted_TE[:, :-1]
    if bool(tied_TE.any()):
        row_R = tied_TE.any(1).nonzero()[:, 0]
        sorted_TE[row_R], order_TE[row_R] = _order_by_both(value_TE[row_R], tie_break_TE[row_R])
    return sorted_TE, order_TE


def _order_by_value(value_TE: Tensor, num_ranks: int | None = None) -> tuple[Tensor, Tensor]:
    # Value and index share one 64-bit key: the sort itself breaks ties by index, and the sorted key
    # contains the permutation. On the CPU numpy sorts such keys with vector instructions, several
    # times faster than torch.sort or torch.topk on rows of 64.
    value_TE = value_TE.detach()
    experts = value_TE.shape[1]
    index_bits = _index_bits(experts)
    key_TE = _descending_bits(value_TE).long().bitwise_left_shift_(index_bits)
    key_TE |= torch.arange(experts, device=value_TE.device)
    # Only the ranks that are read are unpacked.
    order_TN = sort_ascending_(key_TE)[:, :num_ranks] & ((1 << index_bits) - 1)
    return value_TE.gather(1, order_TN), order_TN


def _order_by_both(value_TE: Tensor, tie_break_TE: Tensor) -> tuple[Tensor, Tensor]:
    _, by_tie_break_TE = _order_by_value(tie_break_TE.float())
    sorted_TE, index_TE = _order_by_value(value_TE.gather(1, by_tie_break_TE))
    return sorted_TE, by_tie_break_TE.gather(1, index_TE)


def top_experts(probability_TE: Tensor, k: int) -> Tensor:
    """Return ``probability_TE.topk(k).indices``, on the CPU in less than half the time.

    The bits of non-negative floats have the order of the floats, so one integer sort of
    (value, index) keys is enough. ``torch.topk`` does not document the order of equal values;
    tokens with equal values among their first k + 1 are therefore left to it.

    Args:
        probability_TE: float32, non-negative, (tokens, experts).
        k: experts per token.

    Returns:
        Expert ids, int64, (tokens, k).
    """
    experts = probability_TE.shape[1]
    if probability_TE.device.type != "cpu" or k == experts:
        return probability_TE.topk(k, dim=-1).indices
    index_bits = _index_bits(experts)
    key_TE = probability_TE.detach().view(torch.int32).long().bitwise_left_shift_(index_bits).neg_()
    key_TE |= torch.arange(experts)
    key_TK = sort_ascending_(key_TE)[:, : k + 1]
    value_TK = key_TK >> index_bits
    index_TK = key_TK[:, :k] & ((1 << index_bits) - 1)
    tied_TK = value_TK[:, 1:] == value_TK[:, :-1]
    if bool(tied_TK.any()):
        row_R = tied_TK.any(1).nonzero()[:, 0]
        index_TK[row_R] = probability_TE[row_R].topk(k, dim=-1).indices
    return index_TK


def sort_ascending_(value_TE: Tensor) -> Tensor:
    """Sort each row in ascending order; overwrites its input on the CPU."""
    if value_TE.device.type != "cpu":
        return value_TE.sort(dim=-1).values
    value_TE.numpy().sort(axis=-1)
    return value_TE


def sort_descending(value_TE: Tensor) -> Tensor:
    """Sort each row in descending order, without the permutation, so keys are half as large."""
    return sort_ascending_(0.0 - value_TE).neg_()


def _index_bits(experts: int) -> int:
    return max(1, (experts - 1).bit_length())


def _descending_bits(value: Tensor) -> Tensor:
    """Map float32 to int32 in the reverse order."""
    # As integers, positive floats are ordered and negative ones are in reverse; flipping all but
    # the sign bit of the negative ones orders them all. 0 - x reverses the order and turns -0.0
    # into 0.0.
    bits = (0.0 - value).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
