"""Sort the experts of every token, exactly and fast.

Shape letters: T tokens, E experts.
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
    index_bits = max(1, (experts - 1).bit_length())
    # Read as integers, floats of one sign are ordered; flipping the other bits of the negative
    # ones orders them all. 0 - x reverses the order and makes one zero of 0.0 and -0.0.
    bits_TE = (0.0 - value_TE).view(torch.int32)
    bits_TE ^= (bits_TE >> 31).bitwise_and_(0x7FFFFFFF)
    key_TE = bits_TE.long().bitwise_left_shift_(index_bits)
    key_TE |= torch.arange(experts, device=value_TE.device)
    order_TE = sort_rows(key_TE).bitwise_and_((1 << index_bits) - 1)
    return value_TE.gather(1, order_TE), order_TE


def sort_rows(value_TE: Tensor) -> Tensor:
    """Sort each row of a scratch tensor upwards; on the CPU the tensor itself is sorted."""
    if value_TE.device.type != "cpu":
        return value_TE.sort(dim=-1).values
    value_TE.numpy().sort(axis=-1)
    return value_TE
