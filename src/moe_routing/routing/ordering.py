"""Sort the experts of every token, exactly and fast.

Shape letters: T tokens, K slots a token, E experts, P (token, expert) pairs.
"""

from __future__ import annotations

import numpy as np
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
    does it. Which of equal values comes first is torch's own affair: where there are any among the
    first k + 1 of a token, torch is asked.

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
    if bool((value_TK[:, 1:] == value_TK[:, :-1]).any()):
        return probability_TE.topk(k, dim=-1).indices
    return key_TK[:, :k] & ((1 << index_bits) - 1)


def sort_rows(value_TE: Tensor) -> Tensor:
    """Sort each row of a scratch tensor upwards; on the CPU the tensor itself is sorted."""
    if value_TE.device.type != "cpu":
        return value_TE.sort(dim=-1).values
    value_TE.numpy().sort(axis=-1)
    return value_TE


def sort_down(value_TE: Tensor) -> Tensor:
    """Return each row sorted downwards, without the order: half the bytes of a key with index."""
    return sort_rows(0.0 - value_TE).neg_()


def first_experts(value_TE: Tensor, sorted_TE: Tensor, count_T: Tensor) -> tuple[Tensor, bool]:
    """Return each token's ``count_T`` experts with the largest values, in order, on the CPU.

    Equal to the first columns of :func:`order_experts`, but only what is selected is ordered: all
    pairs of all tokens in one sort, with token, value and index in one 64-bit key. Worth it where
    few are selected.

    Args:
        value_TE: float32, (tokens, experts).
        sorted_TE: its rows sorted downwards.
        count_T: experts to select, int64, (tokens,).

    Returns:
        Expert ids, int64, (tokens, largest count), padded with E; and whether equal values had to
        be ordered by index.
    """
    tokens, experts = value_TE.shape
    if tokens == 0:
        return count_T.new_empty(0, 0), False
    index_bits = _index_bits(experts)
    last_T1 = sorted_TE.gather(1, (count_T[:, None] - 1).clamp_(min=0))
    flat_P = np.flatnonzero((value_TE >= last_T1).numpy())
    bits_P = _falling_bits(value_TE.flatten()[torch.from_numpy(flat_P)]).numpy()
    token_P, key_P = np.divmod(flat_P, experts)
    # Integer ranks from 0: adding 2^31 keeps the sign out of the token's bits.
    ranked_P = (token_P << 32) + (bits_P.astype(np.int64) + (1 << 31))
    key_P += ranked_P << index_bits
    key_P.sort()
    expert_P, ranked_P = key_P & ((1 << index_bits) - 1), key_P >> index_bits
    token_P, count = ranked_P >> 32, count_T.numpy()
    found_T = np.bincount(token_P, minlength=tokens)
    slot_P = np.arange(key_P.size) - np.repeat(found_T.cumsum() - found_T, found_T)
    kept_P = slot_P < count[token_P]
    index_TK = np.full((tokens, count.max()), experts)
    index_TK[token_P[kept_P], slot_P[kept_P]] = expert_P[kept_P]
    return torch.from_numpy(index_TK), bool((ranked_P[1:] == ranked_P[:-1]).any())


def _index_bits(experts: int) -> int:
    return max(1, (experts - 1).bit_length())


def _falling_bits(value: Tensor) -> Tensor:
    """Map float32 to int32 that rise as the values fall."""
    # Read as integers, floats of one sign are ordered; flipping the other bits of the negative
    # ones orders them all. 0 - x reverses the order and makes one zero of 0.0 and -0.0.
    bits = (0.0 - value).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
