"""Sentences from controls and numerics arms, both ways, from tables written by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from moe_routing import wording
from moe_routing.reporting import findings_controls
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy

MAIN = {"wikipedia": "nats_per_token", "hellaswag": "accuracy_norm"}
BASES = {
    name: parse_strategy(name).resolved(ModelRule(8, "softmax"))
    for name in ("regular_k8", "bh_k8_a005", "bh_k16_a005", "bh_k8_a005_mass-matched")
}


def control(kind, verdict, dataset="hellaswag", **columns):
    base = {
        "strategy": f"{kind}.bh_k8_a005", "kind": kind, "base": "bh_k8_a005", "dataset": dataset,
        "metric": MAIN[dataset], "difference": -0.03, "low": -0.04, "high": -0.02,
        "base_mean_experts": 5.3, "control_mean_experts": 5.3, "verdict": verdict,
    }  # fmt: skip
    return base | columns


def table(*rows):
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("kind", "verdict", "outcome", "said"),
    [
        ("shuffle", "worse", "worse", "Which tokens get more experts matters."),
        ("shuffle", "inconclusive", "none", "Nothing shows that it matters which tokens"),
        ("shuffle", "better", "better", "Tokens drawn at random use the same experts better"),
        ("layermean", "worse", "worse", "carries more than a number for each layer"),
        ("layermean", "non-inferior", "none", "Nothing shows that numbers by token do better"),
        ("layermean", "better", "better", "Fixed numbers by layer do better"),
        ("randomid", "worse within margin", "worse", "cannot be told from the loss of"),
        ("randomid", "identical", "none", "Nothing shows that it matters which experts"),
        ("weighting", "better", "better", "These weights are better"),
        ("weighting", "worse", "worse", "These weights are worse"),
        ("weighting", "inconclusive", "none", "Nothing shows that the weights matter"),
        ("rival", "worse", "worse", "The rule does worse at the number of experts that it uses"),
        ("rival", "better", "better", "The rule does better at the number of experts"),
        ("rival", "inconclusive", "none", "Nothing shows that the rule does better or worse"),
    ],
)
def test_every_control_both_ways(kind, verdict, outcome, said):
    (finding,) = findings_controls.controls(table(control(kind, verdict)), MAIN, BASES)
    assert finding.verdict == outcome
    assert said in finding.text
    assert "`bh_k8_a005`" in finding.text
    assert finding.source == "statistics/controls.csv"


def test_a_shown_difference_has_its_numbers_and_an_unshown_one_is_said_to_be():
    rows = table(
        control("shuffle", "worse"),
        control("shuffle", "inconclusive", "wikipedia"),
        control("shuffle", "worse", metric="accuracy", difference=-0.5),  # not the main metric
    )
    (finding,) = findings_controls.controls(rows, MAIN, BASES)
    assert (
        "worse on HellaSwag. On Wikipedia it was not shown to differ. On HellaSwag, which tokens"
        in finding.text
    )


def test_a_loss_that_is_ruled_out_is_said_to_be():
    (finding,) = findings_controls.controls(
        table(control("layermean", "non-inferior")), MAIN, BASES
    )
    assert "not shown to differ on HellaSwag. On HellaSwag, a loss of the margin is ruled out." in (
        finding.text
    )


def test_data_sets_that_disagree_give_no_general_answer():
    rows = table(control("shuffle", "worse"), control("shuffle", "better", "wikipedia"))
    (finding,) = findings_controls.controls(rows, MAIN, BASES)
    assert finding.verdict == "mixed"
    assert "There is no general answer." in finding.text


def test_another_metric_that_shows_the_opposite_forbids_a_general_answer():
    """The weights are better on the main metric of one set, and worse in loss on another."""
    rows = table(
        control("weighting", "better"),
        control("weighting", "inconclusive", "wikipedia"),
        control("weighting", "worse", metric="gold_bits_per_byte"),
    )
    (finding,) = findings_controls.controls(rows, MAIN, BASES)
    assert finding.verdict == "mixed"
    assert "worse by bits per byte of the right continuation on HellaSwag" in finding.text
    assert "These weights are better" not in finding.text


def test_controls_with_another_number_of_experts_say_so():
    (finding,) = findings_controls.controls(
        table(control("layermean", "worse", control_mean_experts=6.1)), MAIN, BASES
    )
    assert "(6.1 experts per token instead of 5.3)" in finding.text
    (finding,) = findings_controls.controls(
        table(control("shuffle", "worse", control_mean_experts=5.4)), MAIN, BASES
    )
    assert "instead" not in finding.text


def test_random_experts_speak_through_the_pair_with_rescaled_weights():
    """The raw pair is silent beside it, and alone says that it measures something else."""
    rescaled = "bh_k8_a005_mass-matched"
    raw = control("randomid", "worse")
    fair = control("randomid", "inconclusive", strategy=f"randomid.{rescaled}", base=rescaled)
    other = control("randomid", "worse", strategy="randomid.bh_k16_a005", base="bh_k16_a005")
    found = findings_controls.controls(table(raw, fair, other), MAIN, BASES)
    assert [finding.verdict for finding in found] == ["none", "worse"]
    assert f"With the counts of `{rescaled}` but experts drawn at random" in found[0].text
    assert "cannot be told from the loss of most of the layer's output" in found[1].text
    assert "`bh_k16_a005`" in found[1].text
    (worse,) = findings_controls.controls(table(raw, {**fair, "verdict": "worse"}), MAIN, BASES)
    assert worse.text.endswith(" It matters which experts are chosen.")


def test_every_rival_has_a_sentence_of_its_own():
    rows = table(
        *(
            control("rival", verdict, strategy=name, base="regular_k8", base_mean_experts=8)
            for name, verdict in (("topp_k8_p050", "worse"), ("dynskip_k8_q030", "inconclusive"))
        )
    )
    worse, none = findings_controls.controls(rows, MAIN, BASES)
    assert worse.text.startswith(
        "With the rule of `topp_k8_p050` in place of that of `regular_k8` (5.3 experts per token "
        "instead of 8), quality was worse on HellaSwag"
    )
    assert (worse.verdict, none.verdict) == ("worse", "none")
    assert "`dynskip_k8_q030`" in none.text


def curve(*ks):
    return pd.DataFrame({"strategy": [f"regular_k{k}" for k in ks], "k": ks})


def static(k, verdict):
    return control("static", verdict, strategy=f"regular_k{k}", base="regular_k8")


@pytest.mark.parametrize(
    ("few", "many", "outcome", "said"),
    [
        ("worse", "worse", "more worse", "More static experts were worse at k = 32."),
        ("worse", "better", "more better", "More static experts were better at k = 32."),
        ("worse", "inconclusive", "more none", "were not shown to differ at k = 32."),
    ],
)
def test_static_curve(few, many, outcome, said):
    rows = table(static(1, few), static(2, "better"), static(32, many))
    (finding,) = findings_controls.static_curve(curve(1, 2, 32), rows, MAIN, 8)
    assert finding.verdict == outcome
    assert said in finding.text
    assert (
        "additional k were compared with `regular_k8` by length-normalised accuracy. Fewer static "
        "experts were worse at k = 1 and better at k = 2. " in finding.text
    )


def numerics(difference, flips, item, dataset="hellaswag", changed="dtype = bfloat16"):
    return {
        "arm": "arm", "changed": changed, "dataset": dataset, "metric": MAIN[dataset],
        "difference": difference, "flips": flips, "largest_item_difference": item, "n_items": 1500,
    }  # fmt: skip


def test_noise_is_the_largest_of_all_arms():
    rows = table(
        numerics(-0.002, 4, 0.1),
        numerics(0.001, 9, 0.1, changed="token_budget = 128"),
        numerics(3e-7, float("nan"), 0.1, "wikipedia"),
    )
    (finding,) = findings_controls.numerics(rows, MAIN)
    assert finding.verdict == "some"
    assert (
        "only the number format (bfloat16) or the number of tokens in a forward pass (128)."
        in finding.text
    )
    assert "HellaSwag by up to 0.2 percentage points (9 items flipped)" in finding.text
    assert f"Wikipedia by up to {wording.scientific(3e-7)} nats per token." in finding.text
    assert "A smaller difference is not a finding." in finding.text


def test_noise_without_any_change_hides_nothing():
    rows = table(numerics(0.0, 0, 0.0), numerics(0.0, float("nan"), 0.0, "wikipedia"))
    (finding,) = findings_controls.numerics(rows, MAIN)
    assert finding.verdict == "none"
    assert "no numerical noise was observed" in finding.text
    assert findings_controls.numerics(table(numerics(0.0, 0, 1e-6)), MAIN)[0].verdict == "some"


def paired(*differences):
    rows = [
        {"strategy": f"s{n}", "dataset": "hellaswag", "main": True, "verdict": "worse",
         "difference": value}
        for n, value in enumerate(differences)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_differences_within_the_noise_are_named():
    rows = table(numerics(-0.002, 4, 0.1))
    (within,) = findings_controls.beyond_noise_floor(rows, paired(-0.03, 0.001), MAIN)
    assert within.verdict == "within"
    assert "Of 2 differences shown" in within.text
    assert "1 (`s1` on HellaSwag) does not exceed the numerical noise" in within.text
    (beyond,) = findings_controls.beyond_noise_floor(rows, paired(-0.03, -0.04), MAIN)
    assert (beyond.verdict, "All 2 differences" in beyond.text) == ("beyond", True)
    assert (
        findings_controls.beyond_noise_floor(rows, paired().assign(main=[], verdict=[]), MAIN) == []
    )


def test_divergence_is_a_range_on_each_data_set():
    index = pd.MultiIndex.from_tuples(
        [(name, "lambada") for name in ("regular_k8", "regular_k4", "bh")]
        + [("regular_k4", "hellaswag")],
        names=["strategy", "dataset"],
    )
    finding = findings_controls.divergence(pd.Series([0.0, 0.1, 0.01, 0.3], index), "regular_k8")
    assert "It is 0.01 to 0.1 on LAMBADA and 0.3 on HellaSwag." in finding.text
    assert "0.2" not in finding.text  # the mean over unlike texts
    assert findings_controls.divergence(pd.Series([0.0], index[:1]), "regular_k8") is None


def test_without_tables_nothing_is_said():
    empty = pd.DataFrame()
    assert findings_controls.controls(empty, MAIN, BASES) == []
    assert findings_controls.static_curve(curve(1), empty, MAIN, 8) == []
    assert findings_controls.numerics(empty, MAIN) == []
    assert findings_controls.beyond_noise_floor(empty, paired(-0.03), MAIN) == []
