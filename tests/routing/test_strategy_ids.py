from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_routing.errors import InputError
from moe_routing.routing.nulls import NULLS
from moe_routing.routing.strategies import Ranked, controls, families, parse_strategy
from moe_routing.vocabulary import WEIGHTINGS, NeededId


@st.composite
def strategy_objects(draw: st.DrawFn):
    """Any strategy with any legal parameters, made without an id."""
    cls = draw(st.sampled_from(list(families().values())))
    values = {}
    # One of a free parameter and a budget is given; layered has no other than a budget.
    free = getattr(cls, "free", None)
    left_out = draw(st.sampled_from([free, "budget"])) if free in cls.codes else free
    for name in cls.codes:
        if name == left_out and free is not None:
            continue
        if name == "budget":
            values[name] = draw(st.integers(200, 999)) / 100
        elif cls.is_fraction(name):
            digits = draw(st.integers(1, 5))
            values[name] = draw(st.integers(1, 10**digits - 1)) / 10**digits
        elif name == "min_k":
            values[name] = draw(st.integers(1, 2))
        else:
            values[name] = draw(st.integers(10, 128))
    for word in (*cls.words, *cls.common_words):
        values[word] = draw(st.sampled_from(cls.choices(word)))
    if not values.get("null", "needed").startswith("needed"):
        del values["score"]  # other nulls test the logits
    base = cls(**values)
    if issubclass(cls, Ranked) and draw(st.booleans()):
        control = draw(st.sampled_from(list(controls().values())))
        seed = {"seed": draw(st.integers(0, 9))} if "seed" in control.codes else {}
        return control(base=base, **seed)
    return base


@given(strategy_objects())
def test_every_id_names_its_strategy_and_fits_a_file_name(strategy):
    assert parse_strategy(strategy.id) == strategy
    assert parse_strategy(strategy.id).id == strategy.id
    assert re.fullmatch(r"[a-z0-9_.-]+", strategy.id)


@pytest.mark.parametrize(
    ("strategy_id", "meaning"),
    [
        ("regular_k8", {"k": 8}),
        ("bh_k16_a005", {"max_k": 16, "alpha": 0.05, "null": "needed", "min_k": 1}),
        ("bh_k16_a005_within-token", {"max_k": 16, "alpha": 0.05, "null": "within_token"}),
        ("bh_k16_a010_m2_per-expert_mass-matched", {"alpha": 0.1, "min_k": 2}),
        ("ebh_k64_a0125_random-direction", {"alpha": 0.125, "null": "random_direction"}),
        ("minp_k8_t010", {"max_k": 8, "ratio": 0.1}),
        ("topp_k16_p090_renormalised", {"mass": 0.9, "weighting": "renormalised"}),
        ("dynskip_k8_q050", {"proportion": 0.5}),
        ("perlayer_k6", {"mean_k": 6}),
        ("shuffle_s3.bh_k16_a005", {"seed": 3}),
        ("regular_k4_norm", {"k": 4, "score": "norm", "dropped": "omitted"}),
        ("regular_k4_norm_compensated", {"score": "norm", "dropped": "compensated"}),
        ("stock_k4_mean-norm_own_compensated_scaled", {"candidates": "own", "scale": "scaled"}),
        ("minp_k8_t010_sqrt-mass-matched_exact-norm", {"weighting": "sqrt_mass_matched"}),
        ("absolute_k8_b4", {"budget": 4.0, "threshold": None, "candidates": "own"}),
        ("absolute_k8_b35_all", {"budget": 3.5, "candidates": "all"}),
        ("absolute_k8_t000001_consequence", {"threshold": 1e-5, "score": "consequence"}),
        ("certified_k8_m001", {"margin": 0.01, "score": "consequence", "candidates": "own"}),
        ("certified_k8_m001_probability_all_omitted", {"score": "probability"}),
        ("shuffle.absolute_k8_b4_norm", {"score": "norm", "candidates": "own"}),
        ("bh_k8_b4", {"budget": 4.0, "alpha": None, "null": "needed"}),
        ("topp_k8_b25", {"budget": 2.5, "mass": None}),
        ("minp_k8_b3_m2", {"budget": 3.0, "ratio": None, "min_k": 2}),
        ("entropy_k8", {"budget": None, "lowest": None, "min_experts": 4}),
        ("entropy_k8_b3_m1", {"budget": 3.0, "lowest": None, "min_experts": 1}),
        ("dynskip_k8_b3_renormalised", {"budget": 3.0, "proportion": None}),
        ("threshold_k8_b3_per-expert", {"budget": 3.0, "alpha": None, "null": "per_expert"}),
        ("layered_k8_b4_norm", {"budget": 4.0, "thresholds": None, "candidates": "own"}),
        ("mixture_b35", {"budget": 3.5, "min_experts": 3, "max_experts": 4, "seed": 0}),
        ("mixture_b35_s2_norm_own", {"seed": 2, "score": "norm"}),
        ("mixture_s1.bh_k8_b4_norm", {"needs_cell": "bh_k8_b4_norm", "score": "probability"}),
        ("counts.absolute_k8_b4_norm", {"needs_cell": "absolute_k8_b4_norm", "score": "norm"}),
        ("layermean.topp_k8_b2", {"needs_budget": "topp_k8_b2", "needs_calibration": False}),
        ("absolute_k8_b4_norm_scaled", {"needs_budget": "absolute_k8_b4_norm"}),
        ("mixture.bh_k8_b4", {"needs_budget": None, "needs_null": None, "uses_calibration": False}),
        ("adaptive_k8_model", {"weighting": "model"}),
    ],
)
def test_ids_mean_what_they_say(strategy_id, meaning):
    strategy = parse_strategy(strategy_id)
    assert strategy.id == strategy_id
    assert {name: getattr(strategy, name) for name in meaning} == meaning


@pytest.mark.parametrize(
    ("strategy_id", "null"),
    [
        ("bh_k8_a005", "needed"),
        ("bh_k8_a005_norm", "needed_norm"),
        ("bh_k8_a005_probability", "needed_probability"),
        ("by_k8_a005_needed-e1e4_mean-norm_compensated", "needed_e1e4_mean_norm_compensated"),
        ("bh_k8_a005_needed-loss_compensated", "needed_loss_compensated"),
        ("shuffle.bh_k8_a005_norm", "needed_norm"),
        ("bh_k8_a005_pooled_compensated", "pooled"),
    ],
)
def test_the_null_has_the_score_and_the_substitute_of_the_strategy(strategy_id, null):
    strategy = parse_strategy(strategy_id)
    assert strategy.id == strategy_id
    assert strategy.needs_null == null
    assert str(NeededId.parse(null) or null) == null
    if "shuffle" not in strategy_id:
        assert type(strategy).against(null, max_k=8, alpha=0.05).needs_null == null


def test_every_null_and_weighting_can_be_named():
    for null in NULLS:
        assert parse_strategy(f"bh_k8_a005_{null.replace('_', '-')}").null == null
    for weighting in WEIGHTINGS:
        word = weighting.replace("_", "-")
        assert parse_strategy(f"bh_k8_a005_{word}").weighting == weighting


@pytest.mark.parametrize(
    ("strategy_id", "line"),
    [
        ("", "unknown strategy ''; allowed families: regular"),
        ("bhh_k8_a005", "unknown strategy 'bhh_k8_a005'; did you mean 'bh'?; allowed families:"),
        ("top_k8", "unknown strategy 'top_k8'; did you mean 'topp'?"),
        ("shufle.bh_k8_a005", "did you mean 'shuffle'?; allowed controls (before the dot): shuf"),
        ("bh.bh_k8_a005", "allowed controls (before the dot): shuffle, counts, layermean, mixture"),
        ("shuffle", "unknown strategy 'shuffle'; allowed families:"),
        ("shuffle.regular_k8", "'regular_k8' cannot have controls; allowed families after the"),
        ("shuffle.shuffle.bh_k8_a005", "'shuffle.bh_k8_a005' cannot have controls"),
        ("layermean_k1.bh_k8_a005", "unknown part 'k1'; allowed: s<number>"),
        ("bh_k8", "alpha (a) and budget (b): neither is given; allowed: one of them"),
        ("bh_k8_a005_b4", "alpha (a) and budget (b): both are given; allowed: one of them"),
        ("topp_k8_p050_b4", "mass (p) and budget (b): both are given; allowed: one of them"),
        ("entropy_k8_q050_b5", "lowest (q) and budget (b): both are given; allowed: one of them"),
        ("topp_k8_b85", "budget is 8.5; allowed: at most max_k = 8"),
        ("bh_k8_b3_m4", "budget is 3; allowed: at least 4, the fewest experts that it keeps"),
        ("minp_k8_b05", "budget is 0.5; allowed: at least 1, the fewest experts that it keeps"),
        ("entropy_k8_b3", "budget is 3; allowed: at least 4, the fewest experts that it keeps"),
        ("layered_k8", "thresholds and budget (b): neither is given; allowed: one of them"),
        ("regular_k8_b4", "unknown part 'b4'; allowed: k<number>, probability"),
        ("mixture.regular_k8", "'regular_k8' cannot have controls; allowed families after the"),
        ("bh_k8_a000", "strategy 'bh_k8_a000': alpha is 0.0; input should be greater than 0"),
        ("bh_k8_a1", "strategy 'bh_k8_a1': alpha is 1.0; input should be less than 1"),
        ("bh_k0_a005", "strategy 'bh_k0_a005': max_k is 0; input should be greater than or equal"),
        ("bh_k2_a005_m4", "max_k is 2; allowed: at least min_k = 4"),
        ("bh_k8_a005_poold", "unknown part 'poold'; allowed: k<number>, a<number>, b<number>, m<n"),
        ("bh_k8_k9_a005", "max_k is given twice; allowed: once"),
        ("minp_k8_t000", "ratio is 0.0; input should be greater than 0"),
        ("dynskip_k1_q050", "max_k is 1; input should be greater than or equal to 2"),
        ("regular_k-8", "unknown part 'k-8'; allowed: k<number>"),
        (
            "regular_k8_nrm",
            "unknown part 'nrm'; allowed: k<number>, probability, mean-norm, norm",
        ),
        ("bh_k8_a005_pooled_norm", "score is 'norm' under the null 'pooled'; allowed: a score und"),
        ("bh_k8_a005_needed-norm", "unknown part 'needed-norm'; allowed: k<number>, a<number>"),
        ("regular_k8_norm_norm", "score is given twice; allowed: once"),
        ("shuffle_norm.bh_k8_a005", "unknown part 'norm'; allowed: s<number>"),
        ("absolute_k8", "threshold (t) and budget (b): neither is given; allowed: one of them"),
        (
            "absolute_k8_t01_b4",
            "threshold (t) and budget (b): both are given; allowed: one of",
        ),
        ("absolute_k8_b9", "budget is 9; allowed: at most max_k = 8"),
        ("absolute_k8_b0", "budget is 0.0; input should be greater than 0"),
        ("certified_k8", "margin: Field required"),
    ],
)
def test_a_bad_id_ends_in_one_line_that_says_what_is_allowed(strategy_id, line):
    with pytest.raises(InputError) as error:
        parse_strategy(strategy_id)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_level_outside_the_unit_interval_is_refused_by_every_test(alpha):
    for cls in families().values():
        if "alpha" in cls.codes:
            with pytest.raises(ValueError, match="alpha"):
                cls(max_k=8, alpha=alpha)
