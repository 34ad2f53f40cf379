"""What an audited rule discovers is what its definition says, on the stock model's logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from whole_documents import losses, slow_change

from moe_routing.analysis.ablation import (
    Probe,
    ablation_arms,
    find_discoveries,
    router_inputs,
    run_ablation,
    spaced_layers,
)
from moe_routing.config.analyses import AnalysisConfig
from moe_routing.engine.adapters import find_routers
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.routed import routed
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import fit_null
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.types import RouterInputs

NULLS = ["needed", "within_token", "pooled", "random_direction"]
LAYERS = [0, 2]
PLACE = ["arm", "document", "position", "layer"]


@pytest.fixture
def probes(tokenizer, texts):
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in (texts[0], texts[2])]
    return [Probe("a", ids[0], (3, 9, 10)), Probe("b", ids[1], tuple(range(2, 37)))]


@pytest.fixture
def loaded(tiny, tokenizer):
    return LoadedModel(tiny, tokenizer, {})


@pytest.fixture
def fitted(tiny_calibration):
    sample, toggles = tiny_calibration.sample, tiny_calibration.toggles
    return Calibration(sample, {name: fit_null(name, sample, toggles) for name in NULLS}, toggles)


def by_hand(p_values, alpha):
    """Benjamini and Hochberg (1995), word for word."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    passing = [i for i, e in enumerate(order, 1) if p_values[e] <= i * alpha / len(p_values)]
    return set(order[: max(passing, default=0)])


@torch.no_grad()
def seen_by_routers(model, ids):
    """Return each router's inputs, by applying it to what reaches it."""
    hidden = []
    routers = find_routers(model)
    handles = [
        r.module.register_forward_hook(lambda _, x, __: hidden.append(x[0])) for r in routers
    ]
    model(ids[None, :-1])
    for handle in handles:
        handle.remove()
    weights = [router.module.weight for router in routers]
    flat = [x.reshape(-1, x.shape[-1]) for x in hidden]
    return [
        RouterInputs(layer, F.linear(x, w), x, w)
        for layer, (x, w) in enumerate(zip(flat, weights, strict=True))
    ]


@pytest.mark.parametrize("null", NULLS)
def test_discoveries_are_those_of_the_definition(loaded, fitted, probes, null):
    """For a null that does not rank experts by their logits, too."""
    name = null.replace("_", "-")
    arm = parse_strategy("bh_k8_a030" if null == "needed" else f"bh_k8_a030_{name}")
    found = find_discoveries(loaded, [arm], fitted, probes, LAYERS)
    assert not found.duplicated([*PLACE, "expert"]).any()
    assert set(found["alpha"]) == {0.3}
    by_decision = found.groupby(PLACE)["expert"].agg(set)
    sizes = []
    for probe in probes:
        seen = seen_by_routers(loaded.model, probe.ids_S)
        for layer in LAYERS:
            p_TE = fitted.null(null).p_values(seen[layer])
            for position in probe.positions:
                expected = by_hand(p_TE[position].tolist(), arm.alpha)
                place = (arm.id, probe.document, position, layer)
                assert by_decision.get(place, set()) == expected
                sizes.append(len(expected))
    assert min(sizes) == 0 < max(sizes)


def test_the_floor_discovers_nothing(loaded, fitted, probes):
    arm = parse_strategy("bh_k8_a030_pooled")
    floored = arm.model_copy(update={"min_k": 4})
    with_floor, without = (
        find_discoveries(loaded, [x], fitted, probes, LAYERS).drop(columns="arm")
        for x in (floored, arm)
    )
    assert with_floor.equals(without)


def test_what_routes_the_model_does_not_matter_to_its_first_layer(loaded, fitted, probes):
    """Another router changes the states of later layers; the ablation reads the stock model's."""
    arm = parse_strategy("bh_k8_a030")
    stock = find_discoveries(loaded, [arm], fitted, probes, LAYERS)
    with routed(loaded.model, arm, calibration=fitted):
        other = find_discoveries(loaded, [arm], fitted, probes, LAYERS)
    first = [table[table["layer"] == 0].reset_index(drop=True) for table in (stock, other)]
    assert first[0].equals(first[1])
    assert not stock.equals(other)


def test_arms_have_no_cap_that_hides_discoveries():
    class Study:
        analysis = AnalysisConfig()

    arms = ablation_arms(Study, ["pooled", "within_token"], 64)
    assert {arm.max_k for arm in arms} == {64}
    assert [arm.alpha for arm in arms] == 2 * Study.analysis.ablation.alpha


def test_changes_are_those_of_whole_documents(loaded, probes):
    horizon = 4
    ids = {probe.document: probe.ids_S for probe in probes}
    found = run_ablation(loaded, probes, LAYERS, horizon)
    for row in found.sample(40, random_state=0).itertuples():
        slow_S = slow_change(loaded.model, ids[row.document], row.position, row.layer, row.expert)
        own_S = slow_S[row.position :][:horizon]
        assert row.followed == len(own_S)
        assert row.change == pytest.approx(float(own_S[0]), abs=2e-5)
        assert row.change_window == pytest.approx(float(own_S.sum()), abs=5e-5)
        assert abs(row.change) > 10 * row.noise_floor
    assert found["followed"].min() == 1
    assert found["noise_floor"].max() < 1e-5
    assert found["change"].abs().max() > 0.01


def test_every_selected_expert_is_removed_once(loaded, probes):
    found = run_ablation(loaded, probes, LAYERS, 1)
    selected = {}
    handles = [
        router.module.register_forward_hook(
            lambda _, __, output, layer=router.layer: selected.update({layer: output[1:]})
        )
        for router in find_routers(loaded.model)
    ]
    rows = []
    for probe in probes:
        losses(loaded.model, probe.ids_S)
        for position in probe.positions:
            for layer in LAYERS:
                weights, experts = (part[position].tolist() for part in selected[layer])
                for rank, pair in enumerate(zip(experts, weights, strict=True)):
                    rows.append((probe.document, position, layer, rank, *pair))
    for handle in handles:
        handle.remove()
    columns = ["document", "position", "layer", "rank", "expert", "weight"]
    *places, weights = zip(*rows, strict=True)
    assert [found[name].tolist() for name in columns[:-1]] == [list(place) for place in places]
    assert found["weight"].tolist() == pytest.approx(weights, rel=1e-4)


def test_batches_do_not_change_what_is_found(loaded, probes, monkeypatch):
    whole = run_ablation(loaded, probes, LAYERS, 3)
    monkeypatch.setattr("moe_routing.engine.branches.BATCH_ROWS", 100)
    parts = run_ablation(loaded, probes, LAYERS, 3)
    same = ["document", "position", "layer", "expert", "rank", "followed"]
    assert parts[same].equals(whole[same])
    assert (parts["change_window"] - whole["change_window"]).abs().max() < 1e-4


def test_layers_are_spread_over_the_model():
    assert spaced_layers(16, 4) == [0, 5, 10, 15]
    assert spaced_layers(16, 1) == [0]
    assert spaced_layers(3, 9) == [0, 1, 2]


def test_nulls_see_the_weights_of_a_model_that_renormalises(make_model, tokenizer):
    model = make_model("Qwen3Moe", vocab_size=len(tokenizer), norm_topk_prob=True)
    probe = Probe("a", torch.arange(3, 15), (4, 9))
    seen = router_inputs(LoadedModel(model, tokenizer, {}), [probe], [1])[1]
    top_TK = seen.own_weight_TE.topk(2).values
    torch.testing.assert_close(top_TK.sum(1), torch.ones(2))
