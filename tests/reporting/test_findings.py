"""Each sentence both ways, from tables written by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from moe_routing.reporting import findings, findings_routing
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy

ROW = {
    "order": 1, "confirmatory": True, "strategy": "bh_k8_b4", "against": "mixture.bh_k8_b4",
    "dataset": "wikipedia", "metric": "nats_per_token", "difference": -0.004, "low": -0.006,
    "high": -0.002, "p_value": 0.004, "n_items": 120, "margin": 0.01, "equivalent": False,
    "mean_experts": 4.05, "against_mean_experts": 4.05, "verdict": "better",
    "minimum_detectable_difference": 0.005,
}  # fmt: skip


def primary(**changes):
    return pd.DataFrame([{**ROW, **changes}])


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("better", "predicted better than fixed numbers of experts mixed to the same mean"),
        ("worse", "predicted worse than fixed numbers of experts mixed to the same mean"),
        ("worse within margin", "predicted worse than fixed numbers"),
        ("non-inferior", "no difference between BH routing and fixed numbers of experts"),
        ("inconclusive", "no difference between BH routing and fixed numbers of experts"),
        ("identical", "had the same result on every item"),
    ],
)
def test_every_verdict_of_a_declared_contrast_has_its_sentence(verdict, said):
    (finding,) = findings.primary(primary(verdict=verdict), "softmax")
    assert said in finding.text
    assert finding.text.startswith("On Wikipedia, ")
    assert " Both use 4.05 experts per token." in finding.text
    (claim,) = finding.claims
    assert (claim.strategy, claim.dataset, claim.metric) == (
        "bh_k8_b4", "wikipedia", "nats_per_token"
    )  # fmt: skip
    assert claim.key == (("against", "mixture.bh_k8_b4"),)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verdict": "inconclusive"}, " A loss of 0.01 nats per token is not ruled out."),
        ({"verdict": "non-inferior"}, " A loss of 0.01 nats per token is ruled out."),
        ({"verdict": "worse within margin"}, " A loss of 0.01 nats per token is ruled out."),
        ({"verdict": "worse"}, " A loss of 0.01 nats per token is not ruled out."),
        ({"equivalent": True}, " A difference of 0.01 nats per token is ruled out in both"),
    ],
)
def test_what_the_margin_rules_out_is_said(changes, said):
    assert said in findings.primary(primary(**changes), "softmax")[0].text


def test_arms_with_other_numbers_of_experts_say_so():
    (finding,) = findings.primary(primary(against_mean_experts=8.0), "softmax")
    assert " They use 4.05 and 8 experts per token." in finding.text


def test_without_a_margin_and_after_an_open_contrast():
    (finding,) = findings.primary(primary(margin=float("nan"), confirmatory=False), "softmax")
    assert "ruled out" not in finding.text
    assert "This contrast is exploratory, because an earlier one showed no difference." in (
        finding.text
    )


@pytest.mark.parametrize(
    ("size", "verdict", "said"),
    [
        (
            0.02,
            "too small",
            "more than the margin of 0.01 nats per token: a smaller difference may",
        ),
        (0.002, "large enough", " The margin is 0.01 nats per token."),
    ],
)
def test_power_is_that_of_the_pilot(size, verdict, said):
    finding = findings.power(primary(minimum_detectable_difference=size))
    assert finding.verdict == verdict
    assert said in finding.text
    assert "judged by the spread between controls at the same budget" in finding.text
    assert findings.power(primary(minimum_detectable_difference=float("nan"))) is None


def paired(**verdicts):
    rows = [
        {"strategy": name, "dataset": "lambada", "metric": "accuracy", "main": True, "verdict": v}
        for name, v in verdicts.items()
    ]
    return pd.DataFrame(rows)


def test_the_baseline_is_told_by_every_metric_and_the_same_routing_once():
    table = paired(a="better", b="worse", c="worse within margin", d="identical", e="inconclusive")
    again = table.iloc[:1].assign(strategy="z", same_as="a")
    other = table.assign(metric="gold_bits_per_byte", main=False, verdict="worse")
    table = pd.concat([table.assign(same_as=None), other.assign(same_as=None), again])
    (finding,) = findings.against_baseline(table, margins(a=True, b=False))
    assert finding.verdict == "some better"
    assert finding.text.startswith(
        "Of 5 other settings on LAMBADA, by accuracy, 1 was better (`a`), 2 worse (`b` and `c`), 1 "
        "the same on every item (`d`) and 1 not shown to differ. A loss of 1 percentage point is "
        "ruled out for 1 setting. By bits per byte of the right continuation, all were worse."
    )
    assert {claim.metric for claim in finding.claims} == {"accuracy", "gold_bits_per_byte"}


def margins(equal=(), **safe):
    rows = [
        {"strategy": name, "dataset": "lambada", "metric": "accuracy", "main": True,
         "margin": 0.01, "noninferior": value, "equivalent": name in equal}
        for name, value in safe.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


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
    assert "were compared with the model's own raw softmax weights, in the main" in finding.text


def test_weights_are_compared_with_those_of_the_model():
    """On a model that renormalises, raw softmax weights are the foreign ones."""
    table = paired(regular_k8="worse", normalized_k8="better")
    finding = findings.weighting(table, ModelRule(8, "renormalised"))
    assert "Raw softmax weighting (`regular_k8`) was worse on LAMBADA." in finding.text
    assert "normalized_k8" not in finding.text
    assert "were compared with the model's own renormalised weights, in the main" in finding.text


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
        (0.0, 0.0, ["at chance"]),
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
    assert " There the floor gave the token 1 expert." in finding.text


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
         "dataset": "wikipedia", "metric": "nats_per_token", "low": -0.03, "high": -0.01,
         "chord_excess": excess}
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
    assert (f"so the {unsure} gains are not evidence" in finding.text) == bool(unsure)
    assert ("We did not measure every fixed k and interpolated" in finding.text) == bool(unsure)
    (one,) = findings_routing.matched_summary(table.iloc[1:], {"bh_k8_a005": "bh"})
    assert ("so the gain is not evidence" in one.text) == bool(unsure)


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
        f"Adaptive was better than {renormalised} in 1 of 1 comparison. 1 more cell had no static "
        "neighbours on both sides."
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
    sure = f"in at least {100 * findings_routing.SURE:.0f} % of resamples."
    assert f"`regular_k4` {sure} The baseline, `regular_k8`, is not on it." in beaten.text
    (tied,) = findings_routing.pareto(pd.DataFrame(rows).assign(value=0.0), "regular_k8")
    assert tied.verdict == "no difference"
    assert "front of mean experts and quality" in beaten.text
    (timed,) = findings_routing.pareto(pd.DataFrame(rows), "regular_k8", "seconds_per_1000_tokens")
    assert "front of measured time and quality" in timed.text
    assert (beaten.source, timed.source) == (
        "statistics/pareto.csv",
        "statistics/pareto_time.csv",
    )


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
    assert ("4 experts for every token were shown to lose less than" in finding.text) == safe


def test_missing_tables_are_said_to_be_missing():
    empty = pd.DataFrame()
    assert findings.primary(empty, "softmax")[0].verdict == "missing"
    assert findings.power(empty) is None
    assert findings.against_baseline(empty, empty)[0].verdict == "missing"
    assert findings_routing.matched_summary(empty, {})[0].verdict == "missing"
    assert findings_routing.pareto(empty, "regular_k8", "seconds_per_1000_tokens") == []
