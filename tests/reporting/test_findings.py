"""Each sentence both ways, from tables written by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from moe_routing.reporting import findings, findings_routing
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy
from moe_routing.statistics.power import POWER
from moe_routing.statistics.verdict import Verdict

ROW = {
    "strategy": "bh_k8_a005", "baseline": "regular_k8", "dataset": "hellaswag",
    "metric": "accuracy_norm", "main": True, "difference": -0.004, "low": -0.006, "high": -0.002,
    "p_adjusted": 0.004, "n_items": 10042, "margin": 0.01, "upper_bound": 0.006,
    "p_noninferiority": 0.001, "mean_experts": 5.3, "baseline_mean_experts": 8.0,
    "matched_status": "matched", "matched_static_family": "regular",
    "matched_difference": 0.01, "matched_low": 0.005, "matched_high": 0.015,
    "matched_verdict": "better", "matched_k_low": 4, "matched_k_high": 6,
    "matched_p_adjusted": 0.002, "matched_chord_excess": 0.0, "equivalent": False,
    "minimum_detectable_difference": 0.005, "verdict": "worse within margin",
}  # fmt: skip


def primary_table(**changes):
    other = {**ROW, "metric": "accuracy", "main": False, "difference": 0.5, "verdict": "better"}
    return pd.DataFrame([other, {**ROW, **changes}])


def test_every_verdict_has_a_sentence_of_its_own():
    texts = {v: findings.primary(primary_table(verdict=str(v)), 0.95).text for v in Verdict}
    assert len(set(texts.values())) == len(Verdict)
    assert (
        "was less accurate than `regular_k8`, but a loss of 1 percentage point"
        in (texts[Verdict.WORSE_WITHIN_MARGIN])
    )
    assert "same result on every item" in texts[Verdict.IDENTICAL]


@pytest.mark.parametrize("safe", [True, False])
def test_identical_results_prove_no_more_than_their_number(safe):
    text = findings.primary(primary_table(verdict="identical", noninferior=safe), 0.95).text
    assert "same result on every item" in text
    assert ("a loss of 1 percentage point or more is not ruled out" in text) != safe


def test_the_main_metric_is_stated():
    assert "length-normalised accuracy: \N{MINUS SIGN}0.40 percentage points" in (
        findings.primary(primary_table(), 0.95).text
    )


def test_a_loss_beyond_the_margin_is_not_called_possible():
    text = findings.primary(primary_table(verdict="worse", low=-0.05, high=-0.02), 0.95).text
    assert ", by 1 percentage point or more." in text
    text = findings.primary(primary_table(verdict="worse", low=-0.05, high=-0.002), 0.95).text
    assert "a loss of 1 percentage point or more is not ruled out" in text


def test_loss_beyond_the_margin_in_nats_is_positive():
    changes = {"metric": "nats_per_token", "dataset": "wikitext", "verdict": "worse"}
    text = findings.primary(
        primary_table(**changes, difference=0.03, low=0.02, high=0.04), 0.95
    ).text
    assert "predicted worse than `regular_k8`, by 0.01 nats per token or more" in text
    assert "+0.030 nats per token [+0.020, +0.040]" in text


def test_no_margin_no_claim_about_it():
    text = findings.primary(primary_table(verdict="inconclusive", margin=float("nan")), 0.95).text
    assert "ruled out" not in text


@pytest.mark.parametrize(
    ("experts", "said"), [(5.3, "34 % fewer than"), (12, "50 % more than"), (8, "the same number")]
)
def test_compute(experts, said):
    assert said in findings.compute(primary_table(mean_experts=experts)).text


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (
            "better",
            "it was more accurate than static top-k with softmax weights and the same mean ",
        ),
        ("worse", "it was less accurate than static top-k with softmax weights"),
        (
            "inconclusive",
            "no difference from static top-k with softmax weights and the same mean of "
            "5.3 experts could be shown",
        ),
        ("identical", "it equals static top-k with softmax weights"),
    ],
)
def test_matched(verdict, said):
    finding = findings.matched(primary_table(matched_verdict=verdict))
    assert said in finding.text
    assert finding.verdict == verdict


def test_matched_compute_is_said_to_be_secondary():
    text = findings.matched(primary_table()).text
    assert "; p = 0.002, a secondary test, corrected together with the exploratory ones)" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"matched_chord_excess": 0.004}, "convexity of the curve allows (0.4 percentage points)."),
        (
            {"matched_chord_excess": 0.006},
            "worse than a convex curve by up to 0.6 percentage points; this may explain the diff",
        ),
        ({"matched_chord_excess": float("nan")}, "the difference this explains is not known."),
        (
            # In nats smaller is better: the least gain is 0.005.
            {"metric": "nats_per_token", "dataset": "wikitext", "matched_difference": -0.01,
             "matched_low": -0.015, "matched_high": -0.005, "matched_chord_excess": 0.006},
            "by up to 0.006 nats per token; this may explain the difference.",
        ),
        (
            {"metric": "nats_per_token", "dataset": "wikitext", "matched_difference": -0.01,
             "matched_low": -0.015, "matched_high": -0.005, "matched_chord_excess": 0.004},
            "exceeds what the convexity of the curve allows (0.004 nats per token).",
        ),
    ],
)  # fmt: skip
def test_a_gain_over_a_straight_line_is_qualified(changes, said):
    text = findings.matched(primary_table(**changes)).text
    assert "Between k = 4 and 6 the static curve is interpolated by a straight line" in text
    assert said in text


@pytest.mark.parametrize(
    "changes",
    [{"matched_k_high": 4}, {"matched_verdict": "worse"}, {"matched_verdict": "identical"}],
)
def test_no_line_no_qualification(changes):
    assert "straight line" not in findings.matched(primary_table(**changes)).text


@pytest.mark.parametrize("equal", [True, False])
def test_equivalence_is_said_where_it_was_shown(equal):
    text = findings.primary(primary_table(verdict="non-inferior", equivalent=equal), 0.95).text
    assert ("so is a gain of that size: the two are equivalent within the margin" in text) == equal


def test_matched_names_the_curve_of_the_strategy_s_own_weights():
    text = findings.matched(primary_table(matched_static_family="normalized")).text
    assert "than static top-k with renormalised weights and the same mean of 5.3 experts" in text


@pytest.mark.parametrize(
    ("status", "curve", "said"),
    [
        (
            "outside the curve",
            "uniform",
            "its mean of 5.3 experts lies outside the curve of static top-k with uniform weights.",
        ),
        ("no curve", None, "no static top-k has its weights."),
        ("unknown experts", None, "its experts were not counted."),
        (None, None, "it is static top-k itself."),
    ],
)
def test_matched_without_a_place_on_a_curve_says_nothing_about_quality(status, curve, said):
    changes = {"matched_status": status, "matched_static_family": curve, "matched_verdict": None}
    finding = findings.matched(primary_table(**changes))
    assert finding.verdict == "outside"
    assert "No comparison at matched compute for" in finding.text
    assert finding.text.endswith(said)


@pytest.mark.parametrize(("size", "verdict"), [(0.005, "large enough"), (0.02, "too small")])
def test_detectable(size, verdict):
    table = primary_table(minimum_detectable_difference=size)
    assert findings.detectable(table).verdict == verdict
    assert f"in {100 * POWER:.0f} % of runs" in findings.detectable(table).text


def paired(**verdicts):
    rows = [
        {"strategy": name, "dataset": "lambada", "metric": "accuracy", "main": True, "verdict": v}
        for name, v in verdicts.items()
    ]
    return pd.DataFrame(rows)


def margins(equal=(), **safe):
    rows = [
        {"strategy": name, "dataset": "lambada", "metric": "accuracy", "main": True,
         "margin": 0.01, "noninferior": value, "equivalent": name in equal}
        for name, value in safe.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_against_baseline_without_any_difference():
    table = paired(bh_k4_a005="inconclusive", uniform_k8="non-inferior")
    safe = margins(bh_k4_a005=False, uniform_k8=True)
    (finding,) = findings.against_baseline(table, safe, {"bh_k4_a005": "bh"}, "regular_k8")
    assert finding.verdict == "none shown"
    assert "none could be shown to differ from `regular_k8`." in finding.text
    assert "1 percentage point is ruled out for 1 setting, none of them BH." in finding.text


def test_against_baseline_with_one_of_each():
    table = paired(a="better", b="worse", c="worse within margin", d="identical", e="inconclusive")
    safe = margins(a=True, b=False, c=True, d=True, e=False)
    (finding,) = findings.against_baseline(table, safe, {"c": "bh"}, "regular_k8")
    assert finding.verdict == "some better"
    assert "1 (`a`) was better and 2 (`b` and `c`) were worse than `regular_k8`" in finding.text
    assert "for 1 no difference could be shown; 1 (`d`) gave the same result" in finding.text
    assert "ruled out for 3 settings, 1 of them BH." in finding.text
    safe = margins(a=True, b=False, c=True, d=True, e=False, equal=("c", "d"))
    (finding,) = findings.against_baseline(table, safe, {"c": "bh"}, "regular_k8")
    assert "for 3 settings, 1 of them BH, and a gain of that size too for 2." in finding.text


def test_against_baseline_all_worse_and_all_identical():
    (finding,) = findings.against_baseline(
        paired(a="worse", b="worse"), margins(), {}, "regular_k8"
    )
    assert "of 2 other settings, all were worse than `regular_k8`" in finding.text
    table = paired(a="identical", b="identical")
    (finding,) = findings.against_baseline(table, margins(a=False, b=False), {}, "regular_k8")
    assert finding.verdict == "identical"
    assert "every other setting gave the same result as `regular_k8` on every item" in finding.text
    assert "is ruled out for no setting." in finding.text


@pytest.mark.parametrize(
    ("normal", "uniform", "verdict"),
    [
        ("worse", "worse", "worse"),
        ("better", "worse", "mixed"),
        ("inconclusive", "non-inferior", "none"),
    ],
)
def test_weighting(normal, uniform, verdict):
    table = paired(normalized_k8=normal, uniform_k8=uniform, other="worse")
    finding = findings.weighting(table, ModelRule(8, "softmax"))
    assert finding.verdict == verdict
    assert ("could not be shown to differ" in finding.text) == (verdict == "none")
    assert finding.text.endswith(", compared with the model's own raw softmax weights.")


def test_weights_are_compared_with_those_of_the_model():
    """On a model that renormalises, raw softmax weights are the foreign ones."""
    table = paired(regular_k8="worse", normalized_k8="better")
    finding = findings.weighting(table, ModelRule(8, "renormalised"))
    assert "raw softmax weighting (`regular_k8`) was worse" in finding.text
    assert "normalized_k8" not in finding.text
    assert finding.text.endswith(", compared with the model's own renormalised weights.")


def test_weighting_is_silent_without_those_strategies():
    assert findings.weighting(paired(regular_k4="worse"), ModelRule(8, "softmax")) is None


def cells(**columns):
    base = {
        "strategy": "regular_k8", "family": "regular", "k": 8, "alpha": "none", "null": "none",
        "weighting": "softmax", "dataset": "hellaswag", "metric": "accuracy_norm", "value": 0.4,
        "ci_low": 0.35, "ci_high": 0.45, "mean_experts": 8.0, "empty_proportion": 0.0,
        "tokens": 100, "wall_seconds": 1.0,
    }  # fmt: skip
    return base | columns


@pytest.mark.parametrize(
    ("value", "low", "verdicts"),
    [
        (0.26, 0.22, ["at chance"]),
        (0.28, 0.26, ["wide margin"]),
        (0.4, 0.35, []),
        (0.0, 0.0, ["at zero"]),
    ],
)
def test_chance(value, low, verdicts):
    table = pd.DataFrame([cells(value=value, ci_low=low)])
    assert [x.verdict for x in findings.chance(table, "regular_k8", 0.01)] == verdicts


def bh(strategy="bh_k8_a005", **columns):
    return cells(
        strategy=strategy, family="bh", alpha="0.05", null="pooled", metric="accuracy", **columns
    )


@pytest.mark.parametrize(
    ("proportions", "verdict"),
    [
        ((0.9, 0.7), "floor decides"),
        ((0.9, 0.1), "floor decides in part"),
        ((0.3, 0.1), "test decides"),
    ],
)
def test_binding(proportions, verdict):
    rows = [
        bh(f"bh_k{k}_a005", empty_proportion=s) for k, s in zip((4, 8), proportions, strict=True)
    ]
    strategies = {row["strategy"]: parse_strategy(row["strategy"]) for row in rows}
    finding = findings_routing.binding(pd.DataFrame(rows), strategies)
    assert finding.verdict == verdict
    assert "`pooled`" in finding.text
    assert "; there the floor gave the token 1 expert." in finding.text


def test_binding_is_silent_without_bh():
    assert findings_routing.binding(pd.DataFrame([cells()]), {}) is None
    assert findings_routing.cap(pd.DataFrame([cells()])) is None


@pytest.mark.parametrize(("most", "verdict"), [(1.02, "inert"), (6.0, "binds")])
def test_cap(most, verdict):
    rows = [bh("bh_k8_a005", k=8, mean_experts=1.0), bh("bh_k64_a005", k=64, mean_experts=most)]
    assert findings_routing.cap(pd.DataFrame(rows)).verdict == verdict


def matched(*verdicts, strategy="bh_k8_a005", curve="regular", status="matched", excess=0.0):
    rows = [
        {"strategy": strategy, "main": True, "static_family": curve, "status": status, "verdict": v,
         "metric": "nats_per_token", "low": -0.03, "high": -0.01, "chord_excess": excess}
        for v in verdicts
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("verdicts", "outcome"),
    [
        (("better", "inconclusive"), "better"),
        (("worse", "worse"), "worse"),
        (("better", "worse"), "mixed"),
        (("inconclusive", "inconclusive"), "none"),
    ],
)
def test_matched_summary(verdicts, outcome):
    (finding,) = findings_routing.matched_summary(matched(*verdicts), {"bh_k8_a005": "bh"})
    assert finding.verdict == outcome
    assert ("could not be shown to differ from static" in finding.text) == (outcome == "none")
    assert "static top-k with softmax weights and the same mean number of experts" in finding.text


@pytest.mark.parametrize(
    ("excess", "unsure"), [(0.0, 0), (0.009, 0), (0.011, 2), (float("nan"), 2)]
)
def test_gains_that_a_bent_curve_could_explain_are_counted(excess, unsure):
    table = matched("better", "better", "worse", excess=excess)
    (finding,) = findings_routing.matched_summary(table, {"bh_k8_a005": "bh"})
    said = f"; the {unsure} gains may be explained by the linear interpolation between measured k"
    assert (said in finding.text) == bool(unsure)
    (one,) = findings_routing.matched_summary(table.iloc[1:], {"bh_k8_a005": "bh"})
    assert ("; the gain may be explained by" in one.text) == bool(unsure)
    both = pd.concat([table.iloc[:1], table.iloc[1:].assign(chord_excess=0.0)])
    (finding,) = findings_routing.matched_summary(both, {"bh_k8_a005": "bh"})
    assert ("; 1 of the 2 gains may be explained by" in finding.text) == bool(unsure)


def test_matched_summary_names_the_curve_of_each_family_s_weights():
    table = pd.concat(
        [
            matched("worse", "inconclusive"),
            matched("better", strategy="adaptive_k8", curve="normalized"),
            matched(None, strategy="adaptive_k2", curve="normalized", status="outside the curve"),
            matched("inconclusive", strategy="topp_k8_p050"),
            matched(None, strategy="minp_k8_t010", status="outside the curve"),
            matched(None, strategy="bh_k8_a005_mass-matched", curve=None, status="no curve"),
        ]
    )
    families = {name: name.split("_")[0] for name in table["strategy"]}
    bh, adaptive, topp, minp, unmatched = findings_routing.matched_summary(table, families)
    renormalised = "static top-k with renormalised weights and the same mean number of experts"
    assert bh.text.startswith("Benjamini-Hochberg was worse than static top-k with softmax weights")
    assert adaptive.text == (
        f"Adaptive was better than {renormalised} in 1 of 1 comparison (1 more cell had no static "
        "neighbours on both sides)."
    )
    assert topp.text.startswith("Top-p could not be shown to differ from static top-k")
    assert (
        "settings of static top-k with softmax weights on both sides of its mean experts."
        in minp.text
    )
    assert unmatched.text == (
        "Benjamini-Hochberg was not compared at matched compute: no static top-k has its weights."
    )
    assert [x.verdict for x in (bh, adaptive, topp, minp, unmatched)] == [
        "worse", "better", "none", "outside", "no curve",
    ]  # fmt: skip


@pytest.mark.parametrize(("p", "verdict"), [(0.01, "different"), (0.4, "not shown")])
def test_ranks(p, verdict):
    row = {
        "strategy": "a", "n_datasets": 3, "n_strategies": 5, "p_iman_davenport": p,
        "beyond_critical_difference": True,
    }  # fmt: skip
    finding = findings_routing.ranks(pd.DataFrame([row]), 0.95)
    assert finding.verdict == verdict
    assert "little power" in finding.text
    beyond = "; 1 strategy lies beyond the critical difference from the baseline"
    assert f"{beyond}{'.' if p < 0.05 else ', which by itself shows nothing.'}" in finding.text
    none = pd.DataFrame([row | {"beyond_critical_difference": False}])
    assert "; none lies beyond the critical difference" in findings_routing.ranks(none, 0.95).text


def test_ranks_are_tested_at_the_level_of_the_study():
    row = {
        "strategy": "a", "n_datasets": 9, "n_strategies": 5, "p_iman_davenport": 0.03,
        "beyond_critical_difference": True,
    }  # fmt: skip
    table = pd.DataFrame([row, row | {"strategy": "b"}])
    assert "; 2 strategies lie beyond" in findings_routing.ranks(table, 0.95).text
    found = {level: findings_routing.ranks(table, level).verdict for level in (0.95, 0.97, 0.99)}
    assert found == {0.95: "different", 0.97: "different", 0.99: "not shown"}


def test_pareto_says_whether_the_baseline_is_beaten():
    rows = [
        {"strategy": "regular_k8", "value": 0.4, "on_front": False, "front_proportion": 0.1},
        {"strategy": "regular_k4", "value": 0.5, "on_front": True, "front_proportion": 0.95},
    ]
    rows = [{"dataset": "lambada", **row} for row in rows]
    (beaten,) = findings_routing.pareto(pd.DataFrame(rows), "regular_k8")
    (front,) = findings_routing.pareto(pd.DataFrame(rows), "regular_k4")
    assert (beaten.verdict, front.verdict) == ("baseline beaten", "baseline on front")
    assert "1 of 2 settings is on the Pareto front" in beaten.text
    sure = f"in at least {100 * findings_routing.SURE:.0f} % of resamples; `regular_k8` is not"
    assert f"`regular_k4` {sure}" in beaten.text
    (tied,) = findings_routing.pareto(pd.DataFrame(rows).assign(value=0.0), "regular_k8")
    assert tied.verdict == "no difference"
    assert "front of mean experts and quality" in beaten.text
    (timed,) = findings_routing.pareto(pd.DataFrame(rows), "regular_k8", "seconds_per_1000_tokens")
    assert "front of measured time and quality" in timed.text
    assert (beaten.source, timed.source) == (
        "statistics/pareto.csv",
        "statistics/pareto_time.csv",
    )


def test_speed_never_claims_more_than_one_run():
    rows = [cells(), cells(strategy="regular_k4", wall_seconds=0.5)]
    finding = findings_routing.speed(pd.DataFrame(rows), "regular_k8")
    assert finding.verdict == "faster"
    assert "without repetition" in finding.text
    assert "2.00 times" in finding.text


@pytest.mark.parametrize(("safe", "verdict"), [(True, "fewer suffice"), (False, "none")])
def test_fewest_static(safe, verdict):
    table = pd.DataFrame([cells(strategy="regular_k4", k=4), cells()])
    margins = pd.DataFrame(
        [
            {"strategy": "regular_k4", "dataset": "hellaswag", "metric": "accuracy_norm",
             "main": True, "margin": 0.01, "noninferior": safe},
        ]
    )  # fmt: skip
    (finding,) = findings.fewest_static(margins, table, 8)
    assert finding.verdict == verdict
    assert ("is already ruled out for static top-4." in finding.text) == safe


def test_missing_tables_are_said_to_be_missing():
    empty = pd.DataFrame()
    assert findings.primary(empty, 0.95).verdict == "missing"
    assert findings.compute(empty).verdict == "missing"
    assert findings.matched(empty).verdict == "missing"
    assert findings.against_baseline(empty, empty, {}, "regular_k8")[0].verdict == "missing"
    assert findings_routing.matched_summary(empty, {})[0].verdict == "missing"
    assert findings.detectable(empty) is None
    assert findings_routing.ranks(empty, 0.95) is None
    assert findings_routing.pareto(empty, "regular_k8", "seconds_per_1000_tokens") == []
