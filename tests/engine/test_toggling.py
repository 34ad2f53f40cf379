"""Branches are continuations of their documents with one expert toggled."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from families import TOGGLED, make
from whole_documents import losses, slow_change

from moe_routing.engine import branches
from moe_routing.engine.adapters import find_routers
from moe_routing.engine.branches import Probe
from moe_routing.engine.packable import Packable
from moe_routing.engine.patching import sole_replacement
from moe_routing.engine.routed import routed
from moe_routing.engine.toggling import Effects, Substitutes, toggling
from moe_routing.errors import InputError


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("Olmoe", num_hidden_layers=3, num_key_value_heads=1, norm_topk_prob=False)


def ids_of(length, seed):
    return torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed))


PROBES = (
    Probe(0, ids_of(20, 0), (0, 7, 18)),
    Probe(3, ids_of(9, 1), (5,)),
    Probe(4, ids_of(20, 2), (4, 16)),
)


def ranks(probes, layers, *chosen):
    tokens = sum(len(probe.positions) for probe in probes)
    return {layer: torch.tensor([chosen] * tokens) for layer in layers}


def run(model, probes, rank_LPA, **settings):
    with toggling(model, 20, "test") as toggle:
        return toggle(probes, rank_LPA, **settings)


@pytest.mark.parametrize("window", [None, 6])
def test_losses_after_a_removal_are_those_of_whole_documents(model, make_model, window):
    layers = (0, 1)
    if window:
        model = make_model("Mixtral", num_hidden_layers=3, sliding_window=window)
    found = run(model, PROBES, ranks(PROBES, layers, 0, 1))
    probed = [(probe, position) for probe in PROBES for position in probe.positions]
    assert found.change_LPA.shape == (2, 6, 2)
    for index, (probe, position) in enumerate(probed):
        for place, layer in enumerate(layers):
            for branch in range(2):
                expert = int(found.expert_LPA[place, index, branch])
                slow_S = slow_change(model, probe.ids_S, position, layer, expert)
                change = float(found.change_LPA[place, index, branch])
                assert change == pytest.approx(float(slow_S[position]), abs=2e-5)
    assert found.change_LPA.abs().amax((1, 2)).min() > 0.001


def test_a_document_is_alone_in_its_batch(model):
    together = run(model, PROBES, ranks(PROBES, (0, 1, 2), 0, 5))
    parts = [run(model, [probe], ranks([probe], (0, 1, 2), 0, 5)) for probe in PROBES]
    alone = Effects.concatenated(parts)
    assert torch.equal(together.expert_LPA, alone.expert_LPA)
    for name in ("weight_LPE", "hidden_LPH", "kl_LPA", "change_LPA", "stock_PH"):
        assert torch.allclose(getattr(together, name), getattr(alone, name), atol=1e-5), name


def test_layers_do_not_depend_on_each_other(model):
    whole = run(model, PROBES, ranks(PROBES, (0, 1, 2), 0, 5))
    part = run(model, PROBES, ranks(PROBES, (2, 1), 0, 5))
    assert torch.equal(part.expert_LPA, whole.expert_LPA[1:])
    assert torch.allclose(part.kl_LPA, whole.kl_LPA[1:], rtol=1e-3, atol=1e-10)


def test_a_toggle_of_weight_zero_is_rounding(model):
    for rank in (0, 5):
        found = run(model, PROBES, ranks(PROBES, (0, 1, 2), rank), weightless=True)
        assert found.kl_LPA.max() < 1e-10
        assert found.change_LPA.abs().max() < 1e-5


def test_branches_are_compared_with_given_states(model):
    rank_LPA = ranks(PROBES, (0, 1, 2), 0)
    found = run(model, PROBES, rank_LPA)
    again = run(model, PROBES, rank_LPA, stock_PH=found.stock_PH)
    moved = run(model, PROBES, rank_LPA, stock_PH=found.stock_PH.roll(1, 0))
    assert torch.equal(again.kl_LPA, found.kl_LPA)
    assert moved.kl_LPA.min() > 0.01


def test_weights_are_the_removed_and_the_added_ones(make_model):
    """Of the first layer, whose inputs are the same; renormalised, the chosen two add up to 1."""
    raw, normalised = (
        run(
            make_model("Olmoe", norm_topk_prob=flag), PROBES, ranks(PROBES, (0,), *range(8))
        ).weight_LPA[0]
        for flag in (False, True)
    )
    assert (raw.diff() <= 0).all()
    assert torch.allclose(raw.sum(-1), torch.ones(6))
    assert torch.allclose(normalised, raw / raw[:, :2].sum(-1, keepdim=True))


def test_of_equal_probabilities_the_chosen_experts_come_first(make_model):
    model = make_model("Olmoe")
    with torch.no_grad():
        find_routers(model)[0].module.weight.zero_()
    with torch.inference_mode():
        chosen_K = find_routers(model)[0].module(torch.zeros(1, 32))[2][0]
    found = run(model, PROBES, ranks(PROBES, (0,), *range(8)))
    assert set(found.expert_LPA[0, 0, :2].tolist()) == set(chosen_K.tolist())
    assert found.expert_LPA[0, 0].sort().values.tolist() == list(range(8))
    removed_PA, added_PA = found.kl_LPA[0].split([2, 6], -1)
    assert removed_PA.min() > 1e-8
    assert added_PA.min() > 1e-8


def test_the_model_is_restored_even_after_an_error(model):
    before = losses(model, PROBES[0].ids_S)

    def stopped():
        with toggling(model, 20, "test") as toggle:
            toggle(PROBES, ranks(PROBES, (0,), 0))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert torch.equal(losses(model, PROBES[0].ids_S), before)
    assert sole_replacement(model) is None
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_routed_model_is_refused(model):
    with (
        toggling(model, 20, "test") as toggle,
        pytest.raises(InputError, match="the model is routed by 'regular_k2' already"),
        routed(model, "regular_k2"),
    ):
        toggle(PROBES, ranks(PROBES, (0,), 0))


@pytest.mark.parametrize("strategy", ["minp_k4_t030", "minp_k8_t050_uniform", "uniform_k3"])
def test_experts_are_removed_from_a_routed_model(model, strategy):
    """Its own routing decides what a token has, and what later layers do."""
    counts = set()
    with routed(model, strategy), toggling(model, 20, "test", of_routed=True) as toggle:
        found = toggle(PROBES, ranks(PROBES, (0, 1, 2), *range(4)))
    probed = [(probe, position) for probe in PROBES for position in probe.positions]
    with routed(model, strategy):
        for index, (probe, position) in enumerate(probed):
            for layer in range(3):
                own_E = found.own_LPE[layer, index]
                counts.add(int(own_E.sum()))
                expert_A = found.expert_LPA[layer, index]
                # Its own experts come first, by probability.
                assert own_E[expert_A].tolist() == [rank < own_E.sum() for rank in range(4)]
                for branch in range(min(4, int(own_E.sum()))):
                    slow_S = slow_change(model, probe.ids_S, position, layer, int(expert_A[branch]))
                    change = found.change_LPA[layer, index, branch]
                    assert float(change) == pytest.approx(float(slow_S[position]), abs=2e-5)
    assert len(counts) > 1 or strategy == "uniform_k3"
    assert found.kl_LPA.max() > 1e-3


def test_documents_too_long_for_packed_attention_are_computed_by_plain_passes(make_model, capsys):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make_model("Olmoe", max_position_embeddings=16, rope_parameters=rope)
    for longest, packed in ((16, True), (17, False)):
        with toggling(model, longest, "test") as toggle:
            assert toggle.packed == packed
    assert capsys.readouterr().err.startswith(
        "test: documents of 17 tokens are not packed but computed by plain forward passes, which "
        "takes many times longer: rotary embeddings depend on the longest sequence from 16"
    )


@pytest.mark.parametrize("name", TOGGLED)
def test_toggles_of_every_family_are_those_of_whole_documents(name):
    model = make(name)
    probe = PROBES[0]
    layers = range(len(find_routers(model)))
    found = run(model, [probe], ranks([probe], layers, 0, 1))
    for index, position in enumerate(probe.positions):
        for layer in layers:
            for branch in range(2):
                expert = int(found.expert_LPA[layer, index, branch])
                slow_S = slow_change(model, probe.ids_S, position, layer, expert)
                change = float(found.change_LPA[layer, index, branch])
                assert change == pytest.approx(float(slow_S[position]), abs=1e-4)
    assert found.change_LPA.abs().max() > 0.01


@pytest.mark.parametrize("name", TOGGLED)
def test_half_precision_checkpoints_of_every_family_are_computed_in_single(name):
    """Some layers read the weights of others without calling them."""
    half = make(name).bfloat16()
    layers = range(len(find_routers(half)))
    narrow = run(half, PROBES[:1], ranks(PROBES[:1], layers, 0, 1))
    assert narrow.stock_PH.dtype == torch.float32
    wide = run(half.float(), PROBES[:1], ranks(PROBES[:1], layers, 0, 1))
    assert torch.equal(narrow.expert_LPA, wide.expert_LPA)
    torch.testing.assert_close(narrow.kl_LPA, wide.kl_LPA, rtol=1e-2, atol=1e-6)


def test_experts_whose_weights_have_factors_are_not_toggled():
    with (
        pytest.raises(InputError, match="router of layer 0 multiplies the weight of each expert"),
        toggling(make("gemma4_text"), 20, "test"),
    ):
        pass


@pytest.fixture
def unpacked(monkeypatch):
    """Let no model be packed."""
    monkeypatch.setattr(branches, "packable_attention", lambda _: Packable(0, "test"))


@pytest.mark.parametrize("substituted", [0, 1, 2])
def test_plain_passes_give_the_same_as_packed_batches(model, request, monkeypatch, substituted):
    mean_LEH = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0))
    settings = {"substitutes": Substitutes(mean_LEH, substituted)} if substituted else {}
    rank_LPA = ranks(PROBES, (2, 0, 1), 0, 1, 5)
    packed = run(model, PROBES, rank_LPA, **settings)
    request.getfixturevalue("unpacked")
    for rows in (branches.BATCH_ROWS, 90, 1):  # all copies at once, few, and one by one
        monkeypatch.setattr(branches, "BATCH_ROWS", rows)
        plain = run(model, PROBES, rank_LPA, **settings)
        for field in fields(Effects):
            expected, found = getattr(packed, field.name), getattr(plain, field.name)
            if expected is None or not expected.is_floating_point():
                assert expected is found or torch.equal(expected, found)
            else:
                assert torch.allclose(expected, found, rtol=1e-3, atol=1e-5), field.name


def test_half_precision_weights_are_back_and_their_results_single(make_model):
    half = make_model("Qwen2Moe").bfloat16()
    weights = dict(half.named_parameters())
    rank_LPA = ranks(PROBES, (0, 1), 0, 1, 4)
    narrow = run(half, PROBES, rank_LPA)
    assert all(weights[name] is weight for name, weight in half.named_parameters())
    assert narrow.stock_PH.dtype == torch.float32
    wide = run(half.float(), PROBES, rank_LPA)
    assert torch.allclose(narrow.kl_LPA, wide.kl_LPA, rtol=1e-3, atol=1e-10)


def test_hidden_states_are_those_that_the_router_reads(model):
    seen = {}

    def keep(_, inputs, __):
        seen["hidden"] = inputs[0]

    found = run(model, PROBES[1:2], ranks(PROBES[1:2], (1,), 0))
    handle = find_routers(model)[1].module.register_forward_hook(keep)
    losses(model, PROBES[1].ids_S)
    handle.remove()
    assert torch.allclose(found.hidden_LPH[0, 0], seen["hidden"][5], atol=1e-5)


def substitutes(model, branches, scale=1.0):
    shape = (len(find_routers(model)), 8, model.config.hidden_size)
    mean_LEH = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return Substitutes(scale * mean_LEH, branches)


def test_the_last_branches_are_compensated_and_the_others_are_not(model):
    layers, mean = (0, 1), substitutes(model, 2)
    plain = run(model, PROBES, ranks(PROBES, layers, 0, 5, 0, 5))
    found = run(model, PROBES, ranks(PROBES, layers, 0, 5, 0, 5), substitutes=mean)
    assert torch.equal(found.expert_LPA, plain.expert_LPA)
    for index in (0, 1, 3):  # a removal, an addition, the addition again: it has no substitute
        assert torch.allclose(found.kl_LPA[..., index], plain.kl_LPA[..., index], atol=1e-9)
    assert (found.kl_LPA[..., 2] - plain.kl_LPA[..., 2]).abs().min() > 1e-6
    assert (found.change_LPA - plain.change_LPA)[..., 2].abs().min() > 1e-6


def test_substitutes_of_nothing_change_nothing(model):
    rank_LPA = ranks(PROBES, (0, 2), 0, 1)
    plain = run(model, PROBES, rank_LPA)
    found = run(model, PROBES, rank_LPA, substitutes=substitutes(model, 2, scale=0.0))
    assert torch.equal(found.kl_LPA, plain.kl_LPA)
