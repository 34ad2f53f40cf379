"""Uniform numbers for each token that depend on the text read so far, not on how it is batched.

A token's key is a hash of the input ids of its request up to it, and of the first ids of the
request, lest the first tokens of all documents draw alike. The draws of a layer are a hash of the
key, a seed and the layer, so that forward passes may run in any order.

Shape letters: T tokens, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.routing.types import RouterInputs

FIRST = 8
"""Ids of a request that all its keys depend on; requests that share a context share as many."""
FACTOR = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2^64."""
INVERSE = pow(FACTOR, -1, 1 << 64)
MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Shifts and factors of splitmix64's finaliser (Steele, Lea & Flood 2014, OOPSLA)."""


def prefix_keys(ids_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a hash of the first ids and of the first t + 1 ids for each position t.

    The polynomial sum_s (id_s + 1) FACTOR^(t - s) modulo 2^64 over these ids.

    Args:
        ids_T: input ids of one request, (tokens,).
    """
    read = np.concatenate([ids_T[:FIRST], ids_T]).astype(np.uint64) + np.uint64(1)
    powers = [np.full(len(read), base, np.uint64) for base in (FACTOR, INVERSE)]
    for power in powers:
        power[:1] = 1
    up, down = (np.cumprod(power, dtype=np.uint64) for power in powers)
    keys = np.cumsum(read * down, dtype=np.uint64) * up
    return keys[len(ids_T[:FIRST]) :].view(np.int64)


def uniform(inputs: RouterInputs, seed: int) -> Tensor:
    """Return a number in [0, 1) for each token, float64, (tokens,).

    Args:
        inputs: of one layer. Without keys of the tokens (a forward pass outside the scorer) the
            bits of the router logits stand in for them.
        seed: seed.
    """
    key_T = inputs.key_T if inputs.key_T is not None else _logit_keys(inputs.logits_TE)
    key_T = key_T.to(inputs.logits_TE.device)
    stream = _signed(((seed << 20) + inputs.layer + 1) * FACTOR)
    return (_mixed(key_T + stream) >> 11).bitwise_and((1 << 53) - 1).double() * 2.0**-53


def _logit_keys(logits_TE: Tensor) -> Tensor:
    import torch

    bits_TE = logits_TE.detach().float().contiguous().view(torch.int32).long()
    factors = [_signed(pow(FACTOR, e + 1, 1 << 64)) for e in range(logits_TE.shape[1])]
    return (bits_TE * torch.tensor(factors, device=bits_TE.device)).sum(1)


def _mixed(key_T: Tensor) -> Tensor:
    """Return splitmix64's finaliser of 64-bit keys; products wrap around."""
    for shift, factor in MIXERS:
        key_T = (key_T ^ _shifted(key_T, shift)) * _signed(factor)
    return key_T ^ _shifted(key_T, 31)


def _shifted(key_T: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned numbers; torch's own shift repeats the sign."""
    return (key_T >> bits).bitwise_and((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Return the signed 64-bit number with the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
