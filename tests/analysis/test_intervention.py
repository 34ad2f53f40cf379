"""A removal does what a slow, complete recomputation says, and nothing else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_routing.analysis.ablation import spaced_layers
from moe_routing.analysis.intervention import (
    Removal,
    SelectionRecorder,
    loss_changes,
    removed,
)
from moe_routing.engine.adapters import find_routers
from moe_routing.engine.patching import patched_forward
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError

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

    def without(inner):
        def forward(hidden):
            logits, weights, index = inner(hidden)
            weights = weights.clone()
            for slot, expert in enumerate(index[position].tolist()):
                if expert == removal.expert:
                    weights[position, slot] = 0.0
            return logits, weights, index

        return forward

    with patched_forward(router, without):
        return losses(model, ids) - before


@pytest.mark.parametrize("arm", ARMS)
def test_changes_equal_a_complete_recomputation(tiny, tiny_calibration, ids, arm):
    recorder = SelectionRecorder()
    positions, horizon, largest = [5, 11], 4, 0.0
    with routed(tiny, arm, calibration=tiny_calibration, recorder=recorder):
        for found in loss_changes(tiny, ids, positions, [0, 2], horizon, recorder):
            position = found.position
            assert found.change_RS.shape == (len(found.removals), horizon)
            assert found.noise_floor < 1e-4
            assert found.hit_R.all()
            for removal, change_S in zip(found.removals, found.change_RS, strict=True):
                slow = slow_change(tiny, ids, position, removal)
                assert np.allclose(change_S, slow[position : position + horizon], atol=2e-5)
                # Attention is causal: what stands before cannot change.
                assert np.allclose(slow[:position], 0.0, atol=2e-5)
                largest = max(largest, np.abs(slow).max())
    assert largest > 0.01


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Mixtral", {"sliding_window": 6}),
        ("Qwen2Moe", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    ],
)
def test_a_sliding_window_is_no_obstacle(make_model, family, settings):
    model = make_model(family, **settings)
    ids = torch.randint(3, 64, (24,), generator=torch.Generator().manual_seed(0))
    recorder, changes = SelectionRecorder(), []
    with routed(model, "regular_k2", recorder=recorder):
        for found in loss_changes(model, ids, [3, 12, 20], [0, 1], 3, recorder):
            assert found.noise_floor < 1e-4
            span = slice(found.position, found.position + 3)
            for removal, change_S in zip(found.removals, found.change_RS, strict=True):
                slow = slow_change(model, ids, found.position, removal)[span]
                assert np.allclose(change_S, slow, atol=2e-5)
                changes.append(np.abs(slow).max())
    assert max(changes) > 0.01


def test_scaled_logits_are_what_losses_are_made_of(tiny, ids):
    recorder = SelectionRecorder()
    scaled = copy.deepcopy(tiny)
    scaled.lm_head.register_forward_hook(lambda _, __, output: output / 3)
    with routed(scaled, "regular_k3", recorder=recorder):
        (found,) = loss_changes(scaled, ids, [9], [1], 2, recorder)
        slow = slow_change(scaled, ids, 9, found.removals[0])
    assert np.allclose(found.change_RS[0], slow[9:11], atol=2e-5)


def test_rotary_embeddings_that_depend_on_the_length_are_refused(make_model):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make_model("Olmoe", max_position_embeddings=16, rope_parameters=rope)
    recorder = SelectionRecorder()
    with routed(model, "regular_k2", recorder=recorder):
        assert list(loss_changes(model, torch.arange(3, 20), [4], [0], 1, recorder))
        with pytest.raises(
            InputError, match="ablation: a document of 17 tokens; allowed: at most 16"
        ):
            list(loss_changes(model, torch.arange(3, 21), [4], [0], 1, recorder))


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
    assert all(removal.weight > 0 for removal in removals)
    assert np.abs(change_RS).min() > 1e-5
    assert np.abs(change_RS).max() > 0.01


class Planted(SelectionRecorder):
    """Asks for an expert that was not selected, too; its weight is -1 to tell it apart."""

    def removals(self, token, layers):
        found = super().removals(token, layers)
        absent = sorted(set(range(8)) - {removal.expert for removal in found})[:1]
        return [*found, *(Removal(layers[0], expert, 8, -1.0) for expert in absent)]


@pytest.mark.parametrize("implementation", ["dropless", "eager", "batched_mm"])
def test_a_removal_of_an_expert_that_is_not_selected_is_a_miss(
    tiny, tiny_calibration, ids, implementation
):
    recorder = Planted()
    with routed(
        tiny,
        "bh_k8_a010",
        calibration=tiny_calibration,
        recorder=recorder,
        experts_implementation=implementation,
    ):
        found = list(loss_changes(tiny, ids, range(4, 20), [1], 2, recorder))
    planted = set()
    for result in found:
        assert result.hit_R.tolist() == [removal.weight > 0 for removal in result.removals]
        assert np.abs(result.change_RS[~result.hit_R]).max(initial=0.0) < 1e-5
        assert np.abs(result.change_RS[result.hit_R]).max() > 1e-4
        planted |= {removal.expert for removal in result.removals if removal.weight < 0}
    # Padded slots carry the id 0 under some implementations.
    assert 0 in planted


@pytest.mark.parametrize("position", [9, 12])
def test_losses_that_are_not_finite_are_one_line(tiny, ids, position):
    broken = copy.deepcopy(tiny)
    with torch.no_grad():
        broken.get_output_embeddings().weight[-1] = torch.nan
    recorder = SelectionRecorder()
    with (
        routed(broken, "regular_k3", recorder=recorder),
        pytest.raises(InputError, match=f"a loss at position {position} is not finite") as caught,
    ):
        list(loss_changes(broken, ids, [position], [0], 1, recorder))
    assert "\n" not in str(caught.value)


def test_an_empty_removal_changes_nothing(tiny, ids):
    with routed(tiny, "regular_k3"):
        expected = losses(tiny, ids)
        with removed(find_routers(tiny), [], 4) as hit_R:
            assert np.array_equal(losses(tiny, ids), expected)
        assert hit_R.numel() == 0


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
    half = copy.deepcopy(tiny).to(torch.bfloat16)
    recorder = SelectionRecorder()
    with routed(half, "regular_k3", recorder=recorder):
        (found,) = loss_changes(half, ids, [9], [0], 1, recorder)
    # A bfloat16 logit near 4 moves in steps of 1/64 or so; these changes do not.
    steps = found.change_RS * 256
    assert np.abs(steps - steps.round()).max() > 0.01
    assert found.noise_floor < 0.2
