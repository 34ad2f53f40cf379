"""Size, the bound of marginal nulls, what binds, and the verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from moe_routing.analysis.designs import DESIGNS, samples
from moe_routing.analysis.null_size import (
    ALL_LAYERS,
    NOT_SHOWN,
    NOT_VALID,
    VALID,
    Evidence,
    attainable,
    binding_rows,
    call_designs,
    call_nulls,
    examine,
    fails_above,
    harmonic,
    size_row,
)
from moe_routing.errors import InputError
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import NULLS, sample_inputs
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.strategies.testing import BH
from moe_routing.statistics.proportions import wilson_interval

RULE = {"level": 0.05, "largest_size": 0.06, "confidence": 0.95}


@pytest.fixture
def real(rng):
    """Two layers in which 4 of 32 experts of every token stand out."""
    logits = rng.normal(0, 1, (2, 1500, 32))
    strong = np.argsort(rng.random(logits.shape), axis=-1)[..., :4]
    np.put_along_axis(logits, strong, np.take_along_axis(logits, strong, -1) + 5, -1)
    logits_LTE = torch.from_numpy(logits.astype(np.float32))
    return CalibrationSample(
        logits_LTE=logits_LTE,
        permuted_LTE=logits_LTE,
        input_norm_LT=torch.ones(2, 1500),
        permuted_norm_LT=torch.ones(2, 1500),
        centred_norm_LE=torch.ones(2, 32),
        hidden_size=64,
        rule=ModelRule(4, "softmax"),
        fingerprint="none",
    )


def loop_bh(p_TE, alpha):
    """BH by its definition, from p-values in any order."""
    counts = []
    for row in p_TE.double().sort(1).values.tolist():
        passing = [i for i, p in enumerate(row, start=1) if p <= i * alpha / len(row)]
        counts.append(max(passing, default=0))
    return counts


def test_rejections_equal_a_loop(rng):
    p_TE = torch.from_numpy(rng.beta(0.4, 1, (200, 16))).float()
    assert Evidence.of_p_values(p_TE).rejections(0.1).tolist() == loop_bh(p_TE, 0.1)


@pytest.mark.parametrize("null", NULLS)
def test_statistics_against_critical_values_say_what_p_values_say(real, null):
    fitted = NULLS[null].fit(real)
    p_TE = fitted.p_values(sample_inputs(real, 1))
    evidence = Evidence.of(fitted, real, 1, [0.05, 0.1])
    for alpha in (0.05, 0.1):
        assert evidence.rejections(alpha).tolist() == loop_bh(p_TE, alpha)


def test_uniform_p_values_have_size_alpha(rng):
    evidence = Evidence.of_p_values(torch.from_numpy(rng.random((6000, 64))))
    row = size_row(evidence.rejections(0.05), 0.95)
    assert abs(row["size"] - 0.05) <= 3 * np.sqrt(0.05 * 0.95 / 6000)
    assert row["low"] < row["size"] < row["high"]


def test_small_p_values_show_up_in_size(rng):
    evidence = Evidence.of_p_values(torch.from_numpy(rng.random((500, 64)) ** 2))
    assert size_row(evidence.rejections(0.05), 0.95)["size"] > 0.5


@pytest.mark.parametrize(
    ("null", "alpha"),
    [
        ("pooled", 0.01),
        *((null, alpha) for null in ("pooled", "per_expert") for alpha in (0.05, 0.1, 0.2)),
    ],
)
def test_marginal_nulls_select_rarely_however_strong_the_signal(real, null, alpha):
    fitted = NULLS[null].fit(real)
    rows = binding_rows(fitted, real, [alpha], min_k=1, max_k=8)
    assert len(rows) == real.num_layers
    assert (rows["bound"] == min(1, alpha * harmonic(32))).all()
    assert (rows["any_proportion"] <= rows["bound"]).all()


def test_levels_that_the_draws_cannot_reach_are_left_out(real):
    """1,500 draws per expert: alpha 0.05 of 32 experts needs 640, alpha 0.02 needs 1,600."""
    levels = [0.01, 0.02, 0.05]
    for name, left in (("per_expert", [0.05]), ("pooled", levels)):
        null = NULLS[name].fit(real)
        assert examine(null, real, levels, 0.95)["alpha"].unique().tolist() == left
        rows = binding_rows(null, real, levels, min_k=1, max_k=8)
        assert sorted(rows["alpha"].unique()) == left


@pytest.mark.parametrize("alpha", [0.01, 0.02, 32 / 1500, 0.05])
def test_routing_refuses_exactly_the_levels_that_are_left_out(real, alpha):
    null = NULLS["per_expert"].fit(real)
    strategy = BH(max_k=8, alpha=alpha, null="per_expert")
    calibration = Calibration(real, {"per_expert": null})
    if alpha > 0.02:
        assert attainable(null, [alpha], 32) == [alpha]
        strategy.selector(calibration, 32)
    else:
        assert attainable(null, [alpha], 32) == []
        with pytest.raises(InputError, match="has 1500 calibration draws"):
            strategy.selector(calibration, 32)


def test_a_null_that_sees_the_signal_exceeds_that_bound(real):
    rows = binding_rows(NULLS["within_token"].fit(real), real, [0.05], min_k=1, max_k=8)
    assert (rows["any_proportion"] > 0.9).all()


def test_binding_shares_equal_a_loop(real):
    null = NULLS["within_token"].fit(real)
    rows = binding_rows(null, real, [0.1], min_k=3, max_k=4)
    for layer, row in rows.iterrows():
        counts = loop_bh(null.p_values(sample_inputs(real, layer)), 0.1)
        assert row["floor_proportion"] == pytest.approx(np.mean([count < 3 for count in counts]))
        assert row["cap_proportion"] == pytest.approx(np.mean([count > 4 for count in counts]))
        assert row["empty_proportion"] == pytest.approx(np.mean([count == 0 for count in counts]))
        assert row["mean_rejected"] == pytest.approx(np.mean(counts))


def test_examine_covers_every_layer_and_all_of_them(real, rng):
    first, second = samples(DESIGNS["normal"], real, 400, rng)
    sizes = examine(NULLS["pooled"].fit(first), second, [0.05, 0.1], 0.95)
    assert sizes.groupby("alpha")["layer"].apply(list).tolist() == [[0, 1, ALL_LAYERS]] * 2
    at = sizes[sizes["alpha"] == 0.05].set_index("layer")
    assert at.loc[ALL_LAYERS, "size"] == pytest.approx(at.loc[[0, 1], "size"].mean())
    assert at.loc[ALL_LAYERS, "n_tokens"] == 800


@pytest.mark.parametrize("null", ["pooled", "within_token", "per_expert"])
def test_nulls_called_valid_hold_their_size_in_noise(real, rng, null):
    first, second = samples(DESIGNS["normal"], real, 6000, rng)
    sizes = examine(NULLS[null].fit(first), second, [0.05], 0.95)
    overall = sizes.loc[sizes["layer"] == ALL_LAYERS, "size"].item()
    assert 0.03 <= overall <= RULE["largest_size"]


def test_a_selected_null_is_shown_failing(real, rng):
    first, second = samples(DESIGNS["normal"], real, 600, rng)
    sizes = examine(NULLS["unselected"].fit(first), second, [0.05], 0.95)
    call = call_nulls(call_designs(sizes.assign(null="unselected", design="normal"), **RULE))
    assert not call["valid"].item()
    assert call["worst_size"].item() > 0.8
    assert call["failing_layers"].item() == "0 1"
    assert (
        "unselected does not keep its size under the complete null (weak control)"
        in call["verdict"].item()
    )


def _sizes(by_layer, tokens=2000, design="d"):
    rows = [
        {"layer": layer, "size": size, "n_tokens": tokens} for layer, size in enumerate(by_layer)
    ]
    rows.append(
        {"layer": ALL_LAYERS, "size": np.mean(by_layer), "n_tokens": tokens * len(by_layer)}
    )
    return pd.DataFrame(rows).assign(null="n", design=design, alpha=0.05, low=0.0, high=1.0)


@pytest.mark.parametrize(
    ("by_layer", "outcome", "failing", "unshown"),
    [
        ([0.05] * 8, VALID, "", ""),
        ([0.05] * 7 + [0.06], VALID, "", ""),
        ([0.05] * 7 + [0.065], NOT_SHOWN, "", "7"),  # within the noise of 2,000 tokens
        ([0.04] * 7 + [0.15], NOT_VALID, "7", ""),  # fine on average, but not in the last layer
        ([0.065, 0.15], NOT_VALID, "1", "0"),
        ([0.12, 0.01, 0.23, 0.01], NOT_VALID, "0 2", ""),
        ([0.063] * 4, NOT_SHOWN, "", "0 1 2 3"),
        # no single layer beyond chance, but all of them together
        ([0.068] * 8, NOT_VALID, "", "0 1 2 3 4 5 6 7"),
        ([0.08] * 8, NOT_VALID, "0 1 2 3 4 5 6 7", ""),
    ],
)
def test_verdict_follows_its_rule(by_layer, outcome, failing, unshown):
    designs = call_designs(_sizes(by_layer), **RULE)
    call = call_nulls(designs).iloc[0]
    for table in (designs.iloc[0], call):
        assert table["call"] == outcome
        assert table["valid"] == (outcome == VALID)
        assert table["failing_layers"] == failing
        assert table["unshown_layers"] == unshown
    assert call["assumption_call"] == outcome
    assert call["valid_under_assumption"] == (outcome == VALID)
    assert call["layers_above"] == len(failing.split())
    assert call["worst_layer_size"] == max(by_layer)
    assert call["worst_layer"] == np.argmax(by_layer)
    assert call["worst_layer_low"] < max(by_layer) < call["worst_layer_high"]
    edge = call["layer_fails_above"]
    assert (max(by_layer) > edge) == bool(failing)


@pytest.mark.parametrize(
    ("by_layer", "lead", "said"),
    [
        ([0.05] * 8, "n keeps its size ", "a layer counts as failing if its rate exceeds 7.5 %."),
        (
            [0.05] * 7 + [0.065],
            "n was not shown to keep its size ",
            "Above 6 %, but not by more than chance: layer 7.",
        ),
        (
            [0.063, 0.05, 0.062],
            "n was not shown to keep its size ",
            "Above 6 %, but not by more than chance: layers 0, 2.",
        ),
        ([0.15, 0.12], "n does not keep its size ", "It fails in every layer."),
        (
            [0.15, 0.05, 0.12],
            "n does not keep its size ",
            "It fails in 2 of 3 layers (layers 0, 2).",
        ),
        (
            [0.15, 0.05, 0.065],
            "n does not keep its size ",
            "(layer 0). Above 6 %, but not by more than chance: layer 2.",
        ),
    ],
)
def test_sentences_follow_the_verdict(by_layer, lead, said):
    sentence = call_nulls(call_designs(_sizes(by_layer), **RULE)).iloc[0]["verdict"]
    assert sentence.startswith(f"{lead}under the complete null (weak control), where no expert ")
    assert f"for {100 * max(by_layer):.1f} % of the tokens in the worst layer" in sentence
    assert "in the worst of 1 designs (d). Allowed is 6 %, which leaves room for chance" in sentence
    assert "With 2,000 tokens, a layer counts as failing if its rate exceeds 7." in sentence
    assert sentence.endswith(said)


@pytest.mark.parametrize(("tokens", "confidence"), [(300, 0.95), (2048, 1 - 0.05 / 80)])
def test_a_layer_fails_exactly_above_its_operating_point(tokens, confidence):
    edge = fails_above(0.06, tokens, confidence)
    below, above = (
        wilson_interval((edge + step) * tokens, tokens, confidence)[0] for step in (-1e-6, 1e-6)
    )
    assert below < 0.06 < above


def test_more_layers_widen_the_limits_of_each():
    few = call_designs(_sizes([0.05] * 2), **RULE)
    many = call_designs(_sizes([0.05] * 40), **RULE)
    assert few["worst_layer_high"].item() < many["worst_layer_high"].item()
    low, high = wilson_interval(100, 2000, 1 - 0.05 / 41)  # 40 layers, and all of them
    assert many[["worst_layer_low", "worst_layer_high"]].iloc[0].tolist() == [low, high]


@pytest.mark.parametrize(
    ("size", "tokens", "outcome"),
    [
        (0.05, 20_000, VALID),
        (0.05, 300, NOT_SHOWN),  # too few tokens to show anything
        (0.0625, 20_000, NOT_SHOWN),  # an excess that is too small to show
        (0.12, 2000, NOT_VALID),
    ],
)
def test_few_tokens_show_neither_that_a_size_holds_nor_that_it_does_not(rng, size, tokens, outcome):
    size_L = np.full(16, 0.05)
    size_L[3] = size
    calls = [
        call_designs(_sizes(rng.binomial(tokens, size_L) / tokens, tokens), **RULE)["call"].item()
        for _ in range(100)
    ]
    assert calls.count(outcome) >= 80
    if size == 0.05:
        assert NOT_VALID not in calls


def test_verdict_looks_at_one_level_and_at_the_worst_design():
    bad = _sizes([0.05, 0.2, 0.05], design="other")
    other_level = _sizes([0.9] * 3).assign(alpha=0.1)
    designs = call_designs(pd.concat([_sizes([0.05] * 3), bad, other_level]), **RULE)
    assert designs[["design", "valid"]].to_numpy().tolist() == [["d", True], ["other", False]]
    call = call_nulls(designs).iloc[0]
    assert (call["worst_design"], call["worst_layer_design"]) == ("other", "other")
    assert call["worst_size"] == pytest.approx(0.1)
    assert call["n_designs"] == 2


@pytest.mark.parametrize(
    ("kept", "broken", "under_assumption"), [(0.05, 0.2, True), (0.2, 0.2, False)]
)
def test_a_broken_assumption_is_named_but_is_no_excuse(kept, broken, under_assumption):
    sizes = pd.concat([_sizes([kept] * 3), _sizes([broken] * 3, design="skewed")])
    designs = call_designs(
        sizes, **RULE, breaks=lambda null, design: "symmetry" if design == "skewed" else ""
    )
    call = call_nulls(designs).iloc[0]
    assert not call["valid"]
    assert call["valid_under_assumption"] == under_assumption
    sentence = (
        "only where its assumption is broken: skewed (symmetry). Where that holds (d), the worst "
        f"layer has {100 * kept:.1f} %."
    )
    assert (sentence in call["verdict"]) == under_assumption


def test_a_null_without_a_design_that_keeps_its_assumption_has_no_call_under_it():
    designs = call_designs(_sizes([0.05] * 3), **RULE, breaks=lambda *_: "symmetry")
    call = call_nulls(designs).iloc[0]
    assert (call["call"], call["assumption_call"]) == (VALID, "")
    assert not call["valid_under_assumption"]


@pytest.mark.parametrize(("judged", "noise"), [(0.05, 0.9), (0.9, 0.05)])
def test_designs_of_real_logits_are_shown_and_take_no_part_in_the_verdict(judged, noise):
    sizes = pd.concat([_sizes([judged] * 3), _sizes([noise] * 3, design="real")])
    designs = call_designs(sizes, **RULE, if_noise=lambda design: design == "real")
    assert designs["if_noise"].tolist() == [False, True]
    call = call_nulls(designs).iloc[0]
    assert call["call"] == (VALID if judged < 0.06 else NOT_VALID)
    assert (call["n_designs"], call["worst_design"], call["noise_design"]) == (1, "d", "real")
    assert call["noise_size"] == pytest.approx(noise)
    said = f"noise (real), it would be {100 * noise:.1f} %; this takes no part in the verdict."
    assert call["verdict"].endswith(f"If all of the real logits were {said}")


@pytest.fixture
def skewed(real, rng):
    """Layers whose law leans down (0) and up (1)."""
    square = rng.standard_normal((2, 1500, 32)) ** 2
    square[0] *= -1
    return replace(real, logits_LTE=torch.from_numpy(square.astype(np.float32)))


def _judged(null, real, rng, design):
    first, second = samples(DESIGNS[design], real, 1500, rng)
    sizes = examine(NULLS[null].fit(first), second, [0.05], 0.95)
    breaks = DESIGNS[design].breaks.get(null, "")
    sizes = sizes.assign(null=null, design=design)
    return call_designs(sizes, **RULE, breaks=lambda *_: breaks).iloc[0]


def test_the_mirror_fails_on_a_law_that_leans_up_and_is_silent_where_it_leans_down(skewed, rng):
    judged = _judged("within_token", skewed, rng, "real_marginal")
    assert not judged["valid"]
    assert judged["failing_layers"] == "1"
    assert judged["worst_layer_size"] > 0.5
    assert judged["breaks"] == "symmetric tails"
    assert judged["size"] == pytest.approx(judged["worst_layer_size"] / 2, abs=0.01)


@pytest.mark.parametrize(
    ("null", "design"),
    [
        ("within_token", "symmetric_marginal"),
        ("within_token", "shared_centre"),
        ("pooled", "real_marginal"),
    ],
)
def test_the_same_layers_are_no_trouble_where_the_assumption_holds(skewed, rng, null, design):
    judged = _judged(null, skewed, rng, design)
    assert judged["call"] != NOT_VALID
    assert judged["size"] < 0.06
    assert judged["breaks"] == ""


@pytest.fixture
def grouped(real, rng):
    """A layer that leans up, in which groups of 4 experts rise together."""
    group, own = rng.standard_normal((2, 2, 1500, 8)), rng.standard_normal((2, 1500, 32))
    normal = np.sqrt(0.7) * group[0].repeat(4, axis=-1) + np.sqrt(0.3) * own
    return replace(real, logits_LTE=torch.from_numpy(np.exp(normal).astype(np.float32)))


@pytest.mark.parametrize(
    ("null", "design", "outcome"),
    [
        ("pooled", "real_copula", "holds"),
        ("per_expert", "real_copula", "holds"),
        ("within_token", "symmetric_copula", "holds"),
        ("within_token", "real_copula", "fails"),
    ],
)
def test_dependence_alone_is_no_trouble_and_a_lean_is(grouped, rng, null, design, outcome):
    judged = _judged(null, grouped, rng, design)
    assert (judged["size"] < 0.06) == (outcome == "holds")
    assert (judged["call"] == NOT_VALID) == (outcome == "fails")
    assert bool(judged["breaks"]) == (outcome == "fails")


def test_norms_reach_the_random_direction_null(real, rng):
    first, second = samples(DESIGNS["random_directions"], real, 800, rng)
    null = NULLS["random_direction"].fit(first)
    size = examine(null, second, [0.05], 0.95).iloc[-1]["size"]
    assert size == pytest.approx(0.05, abs=0.025)
    longer = replace(second, logits_LTE=second.logits_LTE * 1.5)
    assert examine(null, longer, [0.05], 0.95).iloc[-1]["size"] > 0.3
