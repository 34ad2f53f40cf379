"""Sentences about the null ``needed``, each both ways."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from moe_routing.reporting import findings_needed as needed
from moe_routing.reporting.article import Article

LEVELS = (0.01, 0.05, 0.1)


def cell(fdr, *, half=0.2, layer="0", alpha=0.05, **keys):
    """A rate with an interval of ``half`` times the rate to either side."""
    return {
        "text": "calibration", "procedure": "bh", "part": "rule", "alpha": alpha, "layer": layer,
        "fdr": fdr, "low": (1 - half) * fdr, "high": (1 + half) * fdr, "mean_rejected": 5.0,
        "empty_proportion": 0.1, "cap_proportion": 0.2, "fewest": 1, "n_tokens": 300,
        "n_documents": 128,
    } | keys  # fmt: skip


def rates(by_layer, overall, *, levels=LEVELS, **keys):
    """Rates as multiples of alpha, the same at every level."""
    rows = [
        cell(share * alpha, layer=str(layer), alpha=alpha, **keys)
        for alpha in levels
        for layer, share in enumerate(by_layer)
    ]
    rows += [cell(overall * alpha, layer="all", alpha=alpha, **keys) for alpha in levels]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("by_layer", "overall", "verdict", "said"),
    [
        ([0.9, 1.2], 1.0, "kept", "No single layer is above alpha. The widest interval"),
        ([0.9, 1.3], 1.1, "exceptions", ". The widest interval of a layer reaches 2.6 percentage"),
        ([1.5, 1.5], 1.5, "exceeded", "Over all layers it is above alpha at 0.01, 0.05 and 0.1."),
    ],
)
def test_rates_that_keep_alpha_and_those_that_do_not(by_layer, overall, verdict, said):
    (finding,) = needed.held_out(rates(by_layer, overall))
    assert finding.verdict == verdict
    assert said in finding.text
    assert finding.text.startswith(
        "On calibration text, 300 tokens of 128 documents were held out. The false discovery rate "
        f"of BH over all layers is {overall:.1f} % ["
    )
    assert "] at 0.05 and " in finding.text
    assert ("layer 1 at 0.05 (6.5 % [5.2, 7.8])" in finding.text) == (verdict == "exceptions")
    many = "Above alpha by themselves: 2 of 2 layers at alpha 0.01, 2 of 2 layers at 0.05 and"
    assert (many in finding.text) == (verdict == "exceeded")


def test_every_text_has_its_sentence_and_levels_left_out_are_named():
    table = pd.concat(
        [
            rates([1.0], 1.0),
            rates([1.0], 1.0, text="lambada", levels=(0.05, 0.1)),
            rates([9.0], 9.0, part="routed"),
            rates([9.0], 9.0, procedure="by"),
        ]
    )
    own, lambada = needed.held_out(table)
    assert "resolution" not in own.text
    assert lambada.text.startswith("On LAMBADA, 300 tokens of")
    assert lambada.text.endswith("Alpha 0.01 is below the resolution of the calibration.")
    assert (own.verdict, lambada.verdict) == ("kept", "kept")


@pytest.mark.parametrize(("share", "verdict"), [(0.9, "kept"), (2.0, "exceeded")])
def test_the_routed_set_has_a_rate_of_its_own(share, verdict):
    table = pd.concat([rates([1.0], 1.0), rates([share], share, part="routed")])
    finding = needed.routed(table)
    assert finding.verdict == verdict
    assert "The floor decides for 10.0 % of the tokens and the cap for 20.0 %" in finding.text
    assert f"{5 * share:.1f} %" in finding.text
    assert needed.routed(rates([1.0], 1.0)) is None


@pytest.mark.parametrize(
    ("share", "verdict", "said"),
    [
        (1.1, "kept", "is nowhere above alpha; its intervals overlap those on calibration text."),
        (2.0, "exceeded", "above alpha on LAMBADA at 0.01, 0.05 and 0.1."),
        (0.2, "kept", "Against calibration text it is lower on LAMBADA at 0.01, 0.05 and 0.1."),
    ],
)
def test_other_text_is_compared_with_alpha_and_with_calibration_text(share, verdict, said):
    table = pd.concat([rates([1.0], 1.0), rates([share], share, text="lambada")])
    finding = needed.shift(table)
    assert finding.verdict == verdict
    assert said in finding.text
    assert ("it is higher on LAMBADA at" in finding.text) == (share == 2.0)
    assert needed.shift(rates([1.0], 1.0)) is None


@pytest.mark.parametrize(
    ("by", "verdict", "said"),
    [(0.2, "kept", "Neither is above alpha."), (1.5, "exceeded", "One of them is above alpha.")],
)
def test_what_is_a_theorem_and_what_is_measured(by, verdict, said):
    table = pd.concat(
        [
            rates([1.0], 1.0),
            rates([by], by, procedure="by"),
            rates([0.4], 0.4, procedure="block_exact", levels=(0.05, 0.1)).assign(fewest=4),
        ]
    )
    finding = needed.guarantee(table, 64)
    assert finding.verdict == verdict
    assert (
        "That of BH is at most 4.74 alpha. That BH keeps alpha itself is no theorem" in finding.text
    )
    assert "block-exact p-values is 2.0 % [1.6, 2.4] at alpha 0.05 and " in finding.text
    assert "no fewer than 4 and 4 experts" in finding.text
    assert finding.text.endswith(said)


@pytest.mark.parametrize(
    ("start", "verdict", "said"),
    [
        (0.8, "kept", "is 0.8 to 1.2 % at alpha 0.01, 4.0 to 6.0 % at 0.05 and 8.0 to 12.0 % at"),
        (1.1, "exceeded", "; at 0.01, 0.05 and 0.1 every one is above alpha."),
    ],
)
def test_the_spread_of_resampled_calibrations(start, verdict, said):
    table = pd.DataFrame(
        {"calibration": number, "alpha": alpha, "layer": "all", "fdr": alpha * (start + step)}
        for alpha in LEVELS
        for number, step in enumerate((0.0, 0.2, 0.4))
    )
    finding = needed.spread(table)
    assert finding.verdict == verdict
    assert "Over 3 calibrations whose documents are drawn with replacement" in finding.text
    assert said in finding.text
    assert needed.spread(pd.DataFrame()) is None


def worst(joint_low, rows=7):
    return pd.DataFrame(
        {"layer": 2, "expert": number, "slots": 20, "toggled": 18, "not_needed": 0.5, "low": 0.3,
         "high": 0.7, "joint_low": joint_low, "joint_high": 0.9, "alpha": 0.05, "max_k": 8,
         "n_experts": 600}
        for number in range(rows)
    )  # fmt: skip


def test_worst_experts_are_named_only_if_they_are_above_alpha_at_once():
    named, none = needed.worst_experts(worst(0.06)), needed.worst_experts(worst(0.04))
    assert (named.verdict, none.verdict) == ("named", "none")
    assert "Of 600 experts with enough tested slots, at least 7 are above alpha 0.05" in named.text
    assert "(Bonferroni)" in named.text
    assert "not needed are expert 0 of layer 2 (50 %), expert 1 of" in named.text
    assert "expert 3" not in named.text
    assert "none is above alpha 0.05 by itself" in none.text
    assert "The nearest to it, by slots that are not needed, are expert 0 of layer 2" in none.text
    mixed = pd.concat([worst(0.06, 1), worst(0.0, 3)])
    assert "slots, 1 is above alpha 0.05 by itself" in needed.worst_experts(mixed).text
    assert needed.worst_experts(pd.DataFrame()) is None


def dead_layers(share, by=0.2):
    parts = []
    for procedure, times, levels in (("bh", share, LEVELS), ("by", by, (0.05, 0.1))):
        table = rates([times] * 3, times, procedure=procedure, levels=levels)
        parts.append(table.rename(columns={"fdr": "any_proportion"}))
    table = pd.concat(parts).assign(spread_low=0.9 * share, spread_high=share)
    return pd.concat([table.assign(score=score) for score in ("probability", "mean_norm")])


@pytest.mark.parametrize(("share", "verdict"), [(1.0, "kept"), (1.6, "exceeded")])
def test_dead_layers_select_at_most_alpha_or_more(share, verdict):
    findings = needed.dead_layers(dead_layers(share))
    assert [finding.verdict for finding in findings] == [verdict] * 2
    assert "the score is the router's probability. The proportion of tokens" in findings[0].text
    assert "the score is probability times mean norm." in findings[1].text
    assert f"{5 * share:.1f} % [{4 * share:.1f}, {6 * share:.1f}]" in findings[0].text
    assert "selects something, averaged over layers, is" in findings[0].text
    assert "with resampled documents it is" in findings[0].text
    assert "With BY it is 1.0 % [0.8, 1.2] at alpha 0.05 and" in findings[0].text
    assert needed.dead_layers(pd.DataFrame()) == []


@pytest.mark.parametrize(("share", "verdict"), [(1.0, "kept"), (1.6, "exceeded")])
def test_dead_experts_are_within_alpha_or_not(share, verdict):
    table = rates([share] * 2, share).assign(
        dead_slots=0.04, dead_slots_low=0.03, dead_slots_high=0.05, dead=0.125
    )
    finding = needed.dead_experts(table)
    assert finding.verdict == verdict
    assert finding.text.startswith("In every layer, 12.5 % of the experts are dead. The null")
    assert (
        "Of the slots that it keeps, dead experts have 4.0 % [3.0, 5.0] at alpha 0.01, 4.0 %"
        in (finding.text)
    )
    assert needed.dead_experts(pd.DataFrame()) is None


def test_the_article_reads_the_tables(planted, tmp_path):
    article = Article(replace(planted, folder=tmp_path))
    assert article.say("held_out", "None.") == article.say("dead", "None.") == "None."
    assert "Not made" in str(article.table("tbl-rates"))
    verdict = {
        "null": "pooled", "call": "valid", "n_designs": 4, "worst_size": 0.05,
        "worst_design": "t4", "worst_layer_size": 0.06, "worst_layer_low": 0.04,
        "worst_layer_high": 0.08, "worst_layer": 3, "worst_layer_design": "normal",
        "noise_size": 0.07, "noise_design": "real_copula", "verdict": "pooled keeps its size.",
    }  # fmt: skip
    own = rates([0.9, 1.3], 1.1)
    dead = own.assign(dead_slots=0.04, dead_slots_low=0.03, dead_slots_high=0.05, dead=0.125)
    tables = {
        needed.RATES: pd.concat([own, rates([2.0] * 2, 2.0, part="routed"),
                                 rates([0.2] * 2, 0.2, procedure="by", levels=(0.05, 0.1))]),
        needed.WORST_EXPERTS: worst(0.06),
        needed.DEAD_LAYERS: dead_layers(1.0),
        needed.DEAD_EXPERTS: dead,
        "validity/verdict.csv": pd.DataFrame([verdict, {**verdict, "noise_size": None}]),
    }  # fmt: skip
    (tmp_path / "validity").mkdir()
    for name, table in tables.items():
        table.to_csv(tmp_path / name, index=False)
    article = Article(replace(planted, folder=tmp_path))
    assert "Above alpha by themselves: layer 1 at 0.01" in article.say("held_out")
    assert "at alpha 0.01, 0.05 and 0.1." in str(article.text("verified"))
    body = str(article.table("tbl-rates"))
    assert "| Calibration text | 0.05 | 5.5 [4.4, 6.6] | 1 of 2 | layer 1: 6.5 [5.2, 7.8] |" in body
    assert "| resolution | resolution |" in body.split("0.01 |")[1].splitlines()[0]
    dead_body = str(article.table("tbl-dead"))
    assert "4.0 [3.0, 5.0]" in dead_body
    assert "5.0 [4.0, 6.0]; 3 of 3" in dead_body
    assert "| 2 | 0 | 20 | 18 | 50 [30, 70] | [6, 90] |" in str(article.table("tbl-worst"))
    sizes = str(article.table("tbl-size"))
    assert "7.0 (real copula)" in sizes
    assert "no such design" in sizes
