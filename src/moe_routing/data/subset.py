"""Seeded subsets: the same items in every cell, so that all comparisons are paired."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_routing.data.items import Item
from moe_routing.errors import InputError


def data_rng(seed: int, name: str) -> np.random.Generator:
    """Return the generator of one data set, independent of the other sets in the study."""
    return np.random.default_rng([seed, *name.encode()])


def seeded_subset(items: Sequence[Item], size: int | None, rng: np.random.Generator) -> list[Item]:
    """Return ``size`` items drawn without replacement, in their original order; None takes all.

    The draw permutes the sorted ids, so it does not depend on the order of ``items``. From the same
    generator state a smaller subset is part of a larger one.

    Raises:
        InputError: fewer than ``size`` items.
    """
    if size is None:
        return list(items)
    if size > len(items):
        raise InputError(f"items is {size}; the data set has {len(items)}")
    chosen = set(rng.permutation(sorted(item.id for item in items))[:size].tolist())
    return [item for item in items if item.id in chosen]
