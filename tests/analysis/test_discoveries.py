"""False, harmful and missing discoveries equal a count by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from planted_pairs import EXPERTS, LAYERS, TOP_K, WEIGHT, planted_pairs

from moe_routing.analysis.discoveries import (
    COLUMNS,
    Criterion,
    SelectedByRule,
    false_discoveries,
    false_kept,
    left_out,
    own_choice,
    selected,
)
from moe_routing.analysis.pairs import ToggledPairs
from moe_routing.errors import InputError
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import fit_null
from moe_routing.routing.procedures import bh_levels, step_up
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.strategies.testing import BH
from moe_routing.statistics.proportions import wilson_interval

KL, LOSS = Criterion("kl", 0.01), Criterion("loss", 0.01)
PRIMARY = {"kl": 0.01, "loss": 0.01}
SETTINGS = {"confidence": 0.95, "resamples": 300}
SHAPE = (LAYERS, 40, EXPERTS)


def found(selected_LTE, null="pooled", alpha=0.05):
    return SelectedByRule(null, alpha, selected_LTE, PRIMARY)


def table_of(pairs, chosen, rng, criteria=(KL, LOSS)):
    return false_discoveries(pairs, chosen, criteria, **SETTINGS, rng=rng)


def pick(table, **keys):
    for name, value in keys.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


@pytest.fixture
def effects(rng):
    """KL and gain of every expert, log-normal, the sign of the gain at random."""
    kl_LTE = 0.01 * np.exp(rng.normal(0, 2, SHAPE))
    return kl_LTE, rng.choice([-1, 1], SHAPE) * kl_LTE


def test_proportions_and_rates_by_hand(rng, effects):
    """With every expert toggled, in loops."""
    kl_LTE, gain_LTE = effects
    pairs = planted_pairs(kl_LTE, gain_LTE, per_document=2, toggle_all=True)
    chosen_LTE = rng.random(SHAPE) < 0.3
    table = table_of(pairs, found(chosen_LTE), rng)
    assert tuple(table) == COLUMNS
    assert len(table) == 2 * 3 * (LAYERS + 1)
    for part, experts in {"removed": range(TOP_K), "added": range(TOP_K, EXPERTS),
                          "all": range(EXPERTS)}.items():  # fmt: skip
        for name, layers in {"0": [0], "1": [1], "all": [0, 1]}.items():
            for effect, value_LTE in {"kl": kl_LTE, "loss": gain_LTE}.items():
                row = pick(table, part=part, layer=name, effect=effect)
                rates, false, harmful, count = [], 0, 0, 0
                for layer in layers:
                    for token in range(SHAPE[1]):
                        kept = [e for e in experts if chosen_LTE[layer, token, e]]
                        wrong = sum(value_LTE[layer, token, e] < 0.01 for e in kept)
                        harmful += sum(value_LTE[layer, token, e] <= -0.01 for e in kept)
                        rates.append(wrong / max(1, len(kept)))
                        false, count = false + wrong, count + len(kept)
                assert row["n_discoveries"] == row["n_toggled"] == count
                assert row["mean_discoveries"] == pytest.approx(count / len(rates))
                assert row["false"] == pytest.approx(false / count)
                assert row["false_low"] < row["false"] < row["false_high"]
                assert row["fdr"] == pytest.approx(np.mean(rates))
                assert row["fdr_low"] < row["fdr"] < row["fdr_high"]
                if effect == "loss":
                    assert row["harmful"] == pytest.approx(harmful / count)
                else:
                    assert np.isnan(row["harmful"])
                assert (row["n_decisions"], row["n_documents"]) == (len(rates), 20)


def test_the_loss_is_one_sided(rng):
    """An expert that raises the loss is a false discovery, however large its effect."""
    kl_LTE, gain_LTE = np.ones(SHAPE), np.full(SHAPE, -1.0)
    pairs = planted_pairs(kl_LTE, gain_LTE)
    row = pick(table_of(pairs, found(pairs.own_LTE), rng), effect="loss", part="removed", layer="1")
    assert (row["false"], row["harmful"]) == (1, 1)
    gain_LTE[0] = 1.0
    table = table_of(planted_pairs(kl_LTE, gain_LTE), found(pairs.own_LTE), rng)
    assert pick(table, effect="loss", part="removed", layer="0")["false"] == 0
    assert pick(table, effect="loss", part="removed", layer="all")["harmful"] == 0.5


def test_sampled_experts_count_with_their_weight(rng):
    """The rate of a sample of the added experts is that of all of them, on average."""
    shape = (LAYERS, 3000, EXPERTS)
    kl_LTE = np.where(rng.random(shape) < 0.3, 0.001, 0.1)
    chosen_LTE = rng.random(shape) < 0.5
    every, sample = (
        table_of(planted_pairs(kl_LTE, toggle_all=flag), found(chosen_LTE), rng, [KL])
        for flag in (True, False)
    )
    for part in ("added", "all"):
        for layer in ("0", "1", "all"):
            truth, guess = (pick(x, part=part, layer=layer) for x in (every, sample))
            assert truth["n_discoveries"] == guess["n_discoveries"]
            for name in ("fdr", "false"):
                assert guess[name] == pytest.approx(truth[name], abs=0.03)
                assert guess[f"{name}_low"] < truth[name] < guess[f"{name}_high"]
    removed = [pick(table, part="removed", layer="all") for table in (every, sample)]
    assert removed[0]["fdr"] == removed[1]["fdr"]
    naive = pick(sample, part="added", layer="all")
    assert naive["n_toggled"] == pytest.approx(naive["n_discoveries"] / WEIGHT, rel=0.05)


def test_a_rule_without_discoveries_has_no_proportion_and_a_rate_of_zero(rng, effects):
    pairs = planted_pairs(*effects)
    row = pick(
        table_of(pairs, found(np.zeros(SHAPE, dtype=bool)), rng),
        effect="kl", part="all", layer="all",
    )  # fmt: skip
    assert row["n_discoveries"] == row["any_proportion"] == row["fdr"] == 0
    assert np.isnan(row["false"])
    # 40 documents without one: the exact limit of no success in 40 trials.
    assert row["fdr_high"] == pytest.approx(1 - 0.025 ** (1 / 40))


def test_the_own_choice_is_the_reference(rng, effects):
    pairs = planted_pairs(*effects)
    table = table_of(pairs, own_choice(pairs, PRIMARY), rng)
    assert set(table["null"]) == {"none"}
    assert table["alpha"].isna().all()
    row = pick(table, effect="kl", part="removed", layer="all")
    assert row["false"] == pytest.approx((effects[0][..., :TOP_K] < 0.01).mean())
    assert pick(table, effect="kl", part="added", layer="all")["n_discoveries"] == 0


def test_the_text_speaks_of_one_epsilon_per_effect(rng, effects):
    pairs = planted_pairs(*effects)
    criteria = [KL, Criterion("kl", 0.1), LOSS, Criterion("loss", 0.2)]
    table = table_of(pairs, found(pairs.own_LTE), rng, criteria)
    assert set(table.loc[table["primary"], "epsilon"]) == {0.01}
    assert table.groupby("effect")["primary"].sum().tolist() == [9, 9]


def test_equal_effects_within_documents_widen_the_intervals(rng):
    kl_LTE = np.repeat(np.where(rng.random((LAYERS, 40, 1)) < 0.3, 0.001, 0.1), 10, axis=1)
    kl_LTE = np.broadcast_to(kl_LTE, (LAYERS, 400, EXPERTS))
    widths = []
    for per_document in (10, 1):
        pairs = planted_pairs(kl_LTE, per_document=per_document)
        row = pick(table_of(pairs, found(pairs.own_LTE), rng), effect="kl", part="removed",
                   layer="0")  # fmt: skip
        widths.append([row[f"{x}_high"] - row[f"{x}_low"] for x in ("false", "fdr")])
    assert (np.array(widths[0]) > 2 * np.array(widths[1])).all()


def test_the_interval_is_wilsons_for_independent_pairs(rng):
    kl_LTE = np.full((1, 300, EXPERTS), 0.1)
    kl_LTE[..., 0] = np.where(rng.random((1, 300)) < 0.3, 0.001, 0.1)
    chosen_LTE = np.zeros(kl_LTE.shape, dtype=bool)
    chosen_LTE[..., 0] = True
    row = pick(table_of(planted_pairs(kl_LTE), found(chosen_LTE), rng), effect="kl",
               part="removed", layer="all")  # fmt: skip
    limits = wilson_interval((kl_LTE[..., 0] < 0.01).sum(), 300, 0.95)
    assert (row["false_low"], row["false_high"]) == pytest.approx(limits, abs=0.003)


def test_needed_experts_that_are_left_out(rng, effects):
    kl_LTE, _ = effects
    pairs = planted_pairs(kl_LTE, toggle_all=True)
    chosen_LTE = rng.random(SHAPE) < 0.6
    table = left_out(pairs, found(chosen_LTE), [0.01, 0.05], confidence=0.95)
    for epsilon in (0.01, 0.05):
        needed_LTE = kl_LTE >= epsilon
        for part, last in {"removed": TOP_K, "all": EXPERTS}.items():
            wanted, lost = needed_LTE[..., :last], (needed_LTE & ~chosen_LTE)[..., :last]
            row = pick(table, epsilon=epsilon, part=part, layer="1")
            assert row["left_out"] == pytest.approx(lost[1].sum() / wanted[1].sum())
            row = pick(table, epsilon=epsilon, part=part, layer="all")
            assert row["left_out"] == pytest.approx(lost.sum() / wanted.sum())
            assert row["low"] < row["left_out"] < row["high"]
            assert row["mean_needed"] == pytest.approx(wanted.sum(-1).mean())
            effect = kl_LTE[..., :last]
            assert row["effect_left_out"] == pytest.approx(
                effect[lost].sum() / effect[wanted].sum()
            )


def test_of_all_experts_by_weight(rng):
    kl_LTE = np.full((LAYERS, 500, EXPERTS), 0.1)
    pairs = planted_pairs(kl_LTE)
    table = left_out(pairs, found(pairs.own_LTE), [0.01], confidence=0.95)
    row = pick(table, part="all", layer="all")
    assert row["mean_needed"] == pytest.approx(EXPERTS)
    assert row["left_out"] == pytest.approx((EXPERTS - TOP_K) / EXPERTS)
    assert pick(table, part="removed", layer="all")["left_out"] == 0


def test_false_experts_among_those_kept(rng, effects):
    kl_LTE, _ = effects
    pairs = planted_pairs(kl_LTE, toggle_all=True)
    kept_LTE = rng.random(SHAPE) < 0.7
    table = false_kept(pairs, kept_LTE, 0.01, **SETTINGS, rng=rng).set_index("layer")
    rates = []
    for layer in range(LAYERS):
        rate = [
            np.sum((kl_E < 0.01) & kept_E) / max(1, kept_E.sum())
            for kl_E, kept_E in zip(kl_LTE[layer], kept_LTE[layer], strict=True)
        ]
        rates.append(np.mean(rate))
        assert table.loc[str(layer), "fdr"] == pytest.approx(rates[-1])
    row = table.loc["all"]
    assert row["fdr"] == pytest.approx(np.mean(rates))
    assert row["low"] < row["fdr"] < row["high"]
    assert row["mean_kept"] == pytest.approx(kept_LTE.sum(-1).mean())
    sample = false_kept(planted_pairs(kl_LTE), kept_LTE, 0.01, **SETTINGS, rng=rng)
    guess = sample.set_index("layer").loc["all"]
    assert guess["low"] < row["fdr"] < guess["high"]


NULLS = ["needed", "within_token", "pooled", "random_direction"]


@pytest.fixture(scope="module")
def toggled(tiny_calibration):
    sample, toggles = tiny_calibration.sample, tiny_calibration.toggles
    nulls = {name: fit_null(name, sample, toggles) for name in NULLS}
    return Calibration(sample, nulls, toggles, tiny_calibration.outputs), toggles


@pytest.mark.parametrize("null", NULLS)
def test_discoveries_are_those_of_the_definition(toggled, null):
    """BH on the null's p-values, word for word, also for a null that does not rank by logits."""
    calibration, toggles = toggled
    experts = toggles.num_experts
    rule = BH.against(null, max_k=experts, alpha=0.3)
    chosen_LTE = selected(rule, calibration, toggles)
    sizes = []
    for layer in range(toggles.num_layers):
        seen = toggles.inputs(layer, calibration.sample.centred_norm_LE)
        p_TE = calibration.null(null).p_values(seen)
        for p_E, chosen_E in zip(p_TE.tolist(), chosen_LTE[layer], strict=True):
            order = sorted(range(experts), key=p_E.__getitem__)
            passing = [i for i, e in enumerate(order, 1) if p_E[e] <= i * 0.3 / experts]
            assert set(np.flatnonzero(chosen_E)) == set(order[: max(passing, default=0)])
            sizes.append(int(chosen_E.sum()))
    assert min(sizes) == 0 < max(sizes)


def test_floor_and_cap_are_discoveries_only_where_asked_for(toggled):
    calibration, toggles = toggled
    arm = parse_strategy("bh_k2_a030_pooled").model_copy(update={"min_k": 2})
    bounded = selected(arm, calibration, toggles, bounded=True)
    assert (bounded.sum(-1) == 2).all()
    free = selected(BH.against("pooled", max_k=8, alpha=0.3), calibration, toggles)
    seen = toggles.inputs(1, calibration.sample.centred_norm_LE)
    p_TE, _ = calibration.null("pooled").p_values(seen).sort(-1)
    assert free[1].sum(-1).tolist() == step_up(p_TE, bh_levels(8, 0.3)).tolist()


def test_pairs_are_those_of_the_toggles(toggled):
    _, toggles = toggled
    pairs, compensated = ToggledPairs.of(toggles), ToggledPairs.of(toggles, compensated=True)
    assert pairs.own_LTE.sum() == pairs.own_P.sum()
    assert set(pairs.own_LTE.sum(-1).ravel()) == {toggles.rule.top_k}
    assert np.array_equal(pairs.own_P, (toggles.rank_P < toggles.rule.top_k).numpy())
    assert np.array_equal(pairs.document_T[pairs.token_P], toggles.document_P.numpy())
    sign_P = np.where(pairs.own_P, 1, -1)
    assert np.array_equal(pairs.gain_P, sign_P * toggles.loss_change_P.numpy())
    assert np.array_equal(compensated.kl_P, toggles.compensated_kl_P.numpy())
    assert not np.array_equal(compensated.kl_P, pairs.kl_P)
    unmeasured = dataclasses.replace(toggles, compensated_kl_P=toggles.kl_P * torch.nan)
    ToggledPairs.of(unmeasured)
    with pytest.raises(InputError, match="compensated effects of removed experts are not all"):
        ToggledPairs.of(unmeasured, compensated=True)
    weights = pairs.weight_P[~pairs.own_P].sum() + pairs.own_P.sum()
    assert weights == pytest.approx(pairs.own_LTE.size)


def test_a_model_that_renormalises_is_read_with_its_own_weights(toggled):
    _, toggles = toggled
    rule = dataclasses.replace(toggles.rule, weighting="renormalised")
    renormalised = dataclasses.replace(toggles, rule=rule)
    top_TK = renormalised.inputs(0).own_weight_TE.topk(rule.top_k).values
    torch.testing.assert_close(top_TK.sum(1), torch.ones(len(top_TK)))
