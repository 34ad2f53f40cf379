from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from slow_loops import ordered

from moe_routing.routing.ordering import (
    order_experts,
    sort_ascending_,
    sort_descending,
    top_experts,
)

VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 3e38]),
    st.floats(width=32, allow_nan=False),
)


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=70), elements=VALUES))
def test_order_is_by_value_then_by_index(values):
    sorted_TE, order_TE = order_experts(torch.from_numpy(values))
    for row, in_order, order in zip(
        values.tolist(), sorted_TE.tolist(), order_TE.tolist(), strict=True
    ):
        assert order == ordered(len(row), row)
        assert in_order == [row[e] for e in order]


@pytest.mark.parametrize("values", [3, 1000], ids=["ties", "few ties"])
def test_ties_are_broken_by_the_second_key_then_by_the_index(rng, values):
    value_TE = torch.from_numpy(rng.integers(0, values, (200, 16)).astype(np.float32))
    tie_break_TE = torch.from_numpy(rng.integers(0, 3, (200, 16)).astype(np.float32))
    sorted_TE, order_TE = order_experts(value_TE, tie_break_TE)
    rows = zip(value_TE.tolist(), tie_break_TE.tolist(), sorted_TE.tolist(), strict=True)
    for order, (first, then, in_order) in zip(order_TE.tolist(), rows, strict=True):
        assert order == ordered(16, first, then)
        assert in_order == [first[e] for e in order]


def test_input_is_left_alone_and_empty_input_is_legal():
    value_TE = torch.tensor([[1.0, 3.0, 2.0]])
    order_experts(value_TE)
    assert value_TE.tolist() == [[1.0, 3.0, 2.0]]
    sorted_TE, order_TE = order_experts(torch.empty(0, 5))
    assert sorted_TE.shape == order_TE.shape == (0, 5)


def test_stable_sort_of_torch_gives_the_same(rng):
    value_TE = torch.from_numpy(rng.integers(0, 9, (3000, 64)).astype(np.float32))
    by_torch = value_TE.sort(dim=1, descending=True, stable=True)
    sorted_TE, order_TE = order_experts(value_TE)
    assert torch.equal(sorted_TE, by_torch.values)
    assert torch.equal(order_TE, by_torch.indices)


def test_sort_ascending_is_the_sort_of_torch(rng):
    value_TE = torch.from_numpy(rng.standard_normal((7, 33)).astype(np.float32))
    assert torch.equal(sort_ascending_(value_TE.clone()), value_TE.sort(1).values)


def test_sort_descending_is_the_sort_of_torch_and_leaves_its_input_alone(rng):
    value_TE = torch.from_numpy(rng.standard_normal((50, 64)).astype(np.float32))
    value_TE[0, :3] = -math.inf
    before_TE = value_TE.clone()
    assert torch.equal(sort_descending(value_TE), value_TE.sort(1, descending=True).values)
    assert torch.equal(value_TE, before_TE)


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=70),
        elements=st.sampled_from([0.0, 1e-45, 0.25, 1.0]) | st.floats(0, 1, width=32),
    ),
    st.data(),
)
def test_top_experts_are_those_of_torch(values, data):
    k = data.draw(st.integers(1, values.shape[1]))
    value_TE = torch.from_numpy(values)
    assert torch.equal(top_experts(value_TE, k), value_TE.topk(k, dim=-1).indices)
    assert np.array_equal(value_TE.numpy(), values)


def test_torch_is_asked_where_values_are_equal_only(rng, monkeypatch):
    value_TE = torch.from_numpy(rng.permuted(np.tile(np.arange(64.0), (99, 1)), axis=1)).float()
    expected_TK = value_TE.topk(8, dim=-1).indices

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch's topk was asked")

    monkeypatch.setattr(torch.Tensor, "topk", refuse)
    assert torch.equal(top_experts(value_TE, 8), expected_TK)
