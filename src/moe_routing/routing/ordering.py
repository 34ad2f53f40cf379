"""Sort the experts of every token, exactly and fast.

Shape letters: T tokens, K slots a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def order_experts(value_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row downwards; of equal values the lower index comes first.

    Value and index share one 64-bit key, so that ties are settled by the sort itself and the key
    carries the permutation. On the CPU numpy sorts such keys with vector instructions: several
    times faster than ``torch.sort`` or ``torch.topk`` on rows of 64.

    Args:
        value_TE: float32, (tokens, experts); infinities are ordered, NaN is not allowed.

    Returns:
        The sorted values, float32, and the experts in that order, int64, both (tokens, experts).
    """
    value_TE = value_TE.detach()
    experts = value_TE.shape[1]
    index_bits = _index_bits(experts)
    key_TE = _falling_bits(value_TE).long().bitwise_left_shift_(index_bits)
    key_TE |= torch.arange(experts, device=value_TE.device)
    order_TE = sort_rows(key_TE).bitwise_and_((1 << index_bits) - 1)
    return value_TE.gather(1, order_TE), order_TE


def top_experts(probability_TE: Tensor, k: int) -> Tensor:
    """Return what ``probability_TE.topk(k)`` calls indices, on the CPU in less than half the time.

    Non-negative floats are ordered as integers are, so that one sort of keys of value and index
    does it. Which of equal values comes first is torch's own affair: it is asked about the tokens
    that have any among their first k + 1.

    Args:
        probability_TE: float32, non-negative, (tokens, experts).
        k: experts a token.

    Returns:
        Expert ids, int64, (tokens, k).
    """
    experts = probability_TE.shape[1]
    if probability_TE.device.type != "cpu" or k == experts:
        return probability_TE.topk(k, dim=-1).indices
    index_bits = _index_bits(experts)
    key_TE = probability_TE.detach().view(torch.int32).long().bitwise_left_shift_(index_bits).neg_()
    key_TE |= torch.arange(experts)
    key_TK = sort_rows(key_TE)[:, : k + 1]
    value_TK = key_TK >> index_bits
    index_TK = key_TK[:, :k] & ((1 << index_bits) - 1)
    tied_TK = value_TK[:, 1:] == value_TK[:, :-1]
    if bool(tied_TK.any()):
        row_R = tied_TK.any(1).nonzero()[:, 0]
        index_TK[row_R] = probability_TE[row_R].topk(k, dim=-1).indices
    return index_TK


def sort_rows(value_TE: Tensor) -> Tensor:
    """Sort each row of a scratch tensor upwards; on the CPU the tensor itself is sorted."""
    if value_TE.device.type != "cpu":
        return value_TE.sort(dim=-1).values
    value_TE.numpy().sort(axis=-1)
    return value_TE


def sort_down(value_TE: Tensor) -> Tensor:
    """Return each row sorted downwards, without the order: half the bytes of a key with index."""
    return sort_rows(0.0 - value_TE).neg_()


def _index_bits(experts: int) -> int:
    return max(1, (experts - 1).bit_length())


def _falling_bits(value: Tensor) -> Tensor:
    """Map float32 to int32 that rise as the values fall."""
    # Read as integers, floats of one sign are ordered; flipping the other bits of the negative
    # ones orders them all. 0 - x reverses the order and makes one zero of 0.0 and -0.0.
    bits = (0.0 - value).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
