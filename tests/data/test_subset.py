"""Seeded subsets."""

from __future__ import annotations

import pytest

from moe_routing.data.items import Item, document_item
from moe_routing.data.subset import data_rng, seeded_subset
from moe_routing.errors import InputError


def _items(count: int) -> list[Item]:
    return [document_item("d", row, f"text {row}", f"text {row}") for row in range(count)]


def test_same_seed_same_items_another_seed_others() -> None:
    items = _items(100)
    first = seeded_subset(items, 20, data_rng(1, "d"))
    assert seeded_subset(items, 20, data_rng(1, "d")) == first
    assert seeded_subset(items, 20, data_rng(2, "d")) != first
    assert seeded_subset(items, 20, data_rng(1, "e")) != first


def test_subset_keeps_the_order_and_ignores_that_of_the_input() -> None:
    items = _items(100)
    subset = seeded_subset(items, 20, data_rng(1, "d"))
    assert len(subset) == 20
    assert subset == sorted(subset, key=lambda item: item.id)
    reversed_subset = seeded_subset(items[::-1], 20, data_rng(1, "d"))
    assert reversed_subset == subset[::-1]


def test_smaller_lies_within_larger() -> None:
    items = _items(100)
    small = seeded_subset(items, 10, data_rng(1, "d"))
    large = seeded_subset(items, 40, data_rng(1, "d"))
    assert set(small) < set(large)


def test_every_item_is_drawn_equally_often() -> None:
    items = _items(10)
    draws = [seeded_subset(items, 3, data_rng(seed, "d")) for seed in range(2000)]
    for item in items:
        # Binomial(2000, 0.3): four standard deviations are 82.
        assert abs(sum(item in draw for draw in draws) - 600) < 82


def test_size_none_takes_all_and_too_many_is_an_error() -> None:
    items = _items(5)
    assert seeded_subset(items, None, data_rng(1, "d")) == items
    assert seeded_subset(items, 5, data_rng(1, "d")) == items
    with pytest.raises(InputError, match="items is 6; the data set has 5"):
        seeded_subset(items, 6, data_rng(1, "d"))
