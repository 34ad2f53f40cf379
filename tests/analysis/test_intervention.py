"""A removal does what a slow, complete recomputation says, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_routing.analysis.audit import spaced_layers
from moe_routing.analysis.intervention import SelectionRecorder, loss_changes, removed
from moe_routing.models.adapters import find_routers
from moe_routing.models.patch import routed

ARMS = ["regular_k3", "bh_k8_a010", "bh_k8_a030_pooled"]


@pytest.fixture
def ids(tokenizer, texts):
    return torch.tensor(tokenizer(texts[2])["input_ids"][:24])


def losses(model, ids):
    with torch.inference_mode():
        logits = model(ids[None, :-1], use_cache=False).logits[0]
    return F.cross_entropy(logits.double(), ids[1:], reduction="none").numpy()


def slow_change(model, ids, position, removal):
    """Recompute the whole sequence with one weight set to 0, and compare all its losses."""
    before = losses(model, ids)
    router = find_routers(model)[removal.layer].module
    inner = router.forward

    def forward(hidden):
        logits, weights, index = inner(hidden)
        weights = weights.clone()
        for slot, expert in enumerate(index[position].tolist()):
            if expert == removal.expert:
                weights[position, slot] = 0.0
        return logits, weights, index

    router.forward = forward
    try:
        return losses(model, ids) - before
    finally:
        router.forward = inner


@pytest.mark.parametrize("arm", ARMS)
def test_changes_equal_a_complete_recomputation(tiny, tiny_calibration, ids, arm):
    recorder = SelectionRecorder()
    positions, horizon, largest = [5, 11], 4, 0.0
    with routed(tiny, arm, calibration=tiny_calibration, recorder=recorder):
        for found in loss_changes(tiny, ids, positions, [0, 2], horizon, recorder):
            position = found.position
            assert found.change_RS.shape == (len(found.removals), horizon)
            assert found.noise < 1e-4
            for removal, change_S in zip(found.removals, found.change_RS, strict=True):
                slow = slow_change(tiny, ids, position, removal)
                assert np.allclose(change_S, slow[position : position + horizon], atol=2e-5)
                # Attention is causal: what stands before cannot change.
                assert np.allclose(slow[:position], 0.0, atol=2e-5)
                largest = max(largest, np.abs(slow).max())
    assert largest > 0.01


def test_every_selected_pair_of_the_layers_is_removed_once(tiny, ids):
    recorder = SelectionRecorder()
    with routed(tiny, "regular_k3", recorder=recorder):
        (found,) = loss_changes(tiny, ids, [9], [0, 1, 2], 1, recorder)
        tiny(ids[None, :-1])
        expected = [
            (layer, expert)
            for layer in range(3)
            for expert in recorder.routings[layer].selection.index_TK[9].tolist()
        ]
    removals, change_RS = found.removals, found.change_RS
    assert [(removal.layer, removal.expert) for removal in removals] == expected
    assert all(removal.discovered and removal.weight > 0 for removal in removals)
    assert np.abs(change_RS).min() > 1e-5
    assert np.abs(change_RS).max() > 0.01


def test_experts_that_the_floor_put_in_are_no_discoveries(tiny, tiny_calibration, ids):
    recorder = SelectionRecorder()
    floor = "bh_k8_a001_m2"
    with routed(tiny, floor, calibration=tiny_calibration, recorder=recorder):
        found = list(loss_changes(tiny, ids, [6, 7, 8], [0, 1, 2], 1, recorder))
        rejected = {
            layer: routing.selection.rejected_T for layer, routing in recorder.routings.items()
        }
    assert set(rejected) == {0, 1, 2}
    removals = [removal for result in found for removal in result.removals]
    assert any(not removal.discovered for removal in removals)
    places = {(removal.layer, removal.place) for removal in removals}
    assert all((layer, 1) in places for layer in range(3))


def test_an_empty_removal_changes_nothing(tiny, ids):
    with routed(tiny, "regular_k3"):
        expected = losses(tiny, ids)
        with removed(find_routers(tiny), [], 4):
            assert np.array_equal(losses(tiny, ids), expected)


def test_the_model_is_restored_even_after_an_error(tiny, ids):
    stock = losses(tiny, ids)

    def stopped():
        recorder = SelectionRecorder()
        with routed(tiny, "regular_k3", recorder=recorder):
            for _ in loss_changes(tiny, ids, [5], [0], 2, recorder):
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert all("forward" not in vars(router.module) for router in find_routers(tiny))
    assert np.array_equal(losses(tiny, ids), stock)


def test_the_end_of_a_document_cuts_the_horizon(tiny, ids):
    recorder = SelectionRecorder()
    with routed(tiny, "regular_k3", recorder=recorder):
        (found,) = loss_changes(tiny, ids, [21], [0], 8, recorder)
    assert found.change_RS.shape == (3, 2)


def test_layers_are_spread_over_the_model():
    assert spaced_layers(16, 4) == [0, 5, 10, 15]
    assert spaced_layers(16, 1) == [0]
    assert spaced_layers(3, 9) == [0, 1, 2]


def test_losses_are_finer_than_half_precision_logits(tiny, ids):
    import copy

    half = copy.deepcopy(tiny).to(torch.bfloat16)
    recorder = SelectionRecorder()
    with routed(half, "regular_k3", recorder=recorder):
        (found,) = loss_changes(half, ids, [9], [0], 1, recorder)
    # A bfloat16 logit near 4 moves in steps of 1/64 or so; these changes do not.
    steps = found.change_RS * 256
    assert np.abs(steps - steps.round()).max() > 0.01
    assert found.noise < 0.2
