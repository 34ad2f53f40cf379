"""Sentences about levers, certificates and the law, both ways, from planted tables."""

from __future__ import annotations

import pandas as pd
import pytest
from planted_levers import (
    CERTIFIED,
    certificate,
    correlation_table,
    damage,
    law_table,
    levers,
    removals,
)

from moe_routing.reporting import findings_consequence, findings_levers
from moe_routing.reporting.wording import MINUS
from moe_routing.statistics.lever_kinds import with_kinds


def rows(**planted):
    planted.setdefault("datasets", ("wikipedia",))
    return with_kinds(levers(**planted), "softmax")


def test_a_lever_that_helps_beyond_scale_is_said_to():
    (found,) = findings_levers.cheapest(rows(), 8)
    assert found.verdict == "beyond scale"
    assert found.text.startswith(
        "On Wikipedia at a budget of 3 experts per token, one threshold by consequence, "
        "compensated (`absolute_k8_b3_consequence_compensated`, 3.05 used) has the lowest loss of "
        "8 rules other than top k by probability: +0.0099 nats per token [+0.0079, +0.0119] over "
        "`stock`, and top k by probability at as many experts +0.0646"
    )
    assert "it loses less." in found.text
    assert "over `stock_scaled` are +0.0064" in found.text
    assert found.text.endswith("scale does not explain the difference.")


@pytest.mark.parametrize(
    ("planted", "verdict", "said"),
    [
        ({"scale_explains": True}, "scale", "so a change of scale may explain it."),
        ({"helps": 0}, "none", "no difference could be shown there either."),
        ({"helps": -1, "width": 1e-4}, "worse", "it loses more, so no rule is better."),
        ({"width": 0.05}, "none", "no difference could be shown. At fitted scale"),
        ({"scaled_at": ()}, "not scaled", "so a change of scale may explain the difference."),
    ],
)
def test_otherwise_nothing_is_claimed_beyond_what_is_shown(planted, verdict, said):
    found = findings_levers.cheapest(rows(**planted), 8)[-1]
    assert found.verdict == verdict
    assert said in found.text
    assert "scale does not explain" not in found.text


def test_every_budget_is_told_if_none_or_all_were_scaled():
    for scaled_at in ((), (2, 3, 4)):
        found = findings_levers.cheapest(rows(scaled_at=scaled_at), 8)
        assert [finding.text.split(" experts")[0][-1] for finding in found] == ["2", "3", "4"]


def test_without_static_points_nothing_is_compared():
    table = rows()
    table = table[~table["strategy"].str.fullmatch(r"regular_k\d(_scaled)?")]
    assert findings_levers.cheapest(table, 8) == []
    assert findings_levers.plain_experts(table, 8) == []
    assert findings_levers.cheapest(with_kinds(pd.DataFrame(), "softmax"), 8) == []
    assert findings_levers.factors(with_kinds(pd.DataFrame(), "softmax"), 8) == []


def test_each_lever_is_judged_at_fitted_scale():
    found = findings_levers.factors(rows(datasets=("wikipedia", "hellaswag")), 8)
    assert [finding.verdict for finding in found] == ["matters"] * 4
    which, tokens, substitute, weights = (finding.text for finding in found)
    assert which.startswith("Which experts: ranking by predicted norm or consequence")
    assert (
        "at fitted scale in 3 of 4 comparisons on Wikipedia and 3 of 4 comparisons on He" in which
    )
    assert "in 2 no difference could be shown" in which
    assert which.endswith("which experts are kept matters, beyond scale.")
    assert "2 of 2 comparisons on Wikipedia" in tokens
    assert "3 of 3 comparisons on Wikipedia" in substitute
    assert "(as is, it lowered the loss in 6 of 6 comparisons)" in weights


@pytest.mark.parametrize(
    ("planted", "verdict", "said"),
    [
        ({"scale_explains": True}, "none", "nothing shows that"),
        ({"helps": 0}, "none", "nothing shows that"),
        ({"helps": -1}, "costs", "the change costs quality."),
        ({"scaled_at": ()}, "not scaled", "so a change of scale may explain this."),
    ],
)
def test_a_lever_is_not_credited_with_scale(planted, verdict, said):
    for finding in findings_levers.factors(rows(**planted), 8):
        assert finding.verdict == verdict
        assert said in finding.text
        assert "beyond scale" not in finding.text


def test_data_sets_that_disagree_have_no_general_answer():
    better, worse = rows(), rows(helps=-1, datasets=("hellaswag",))
    found = findings_levers.factors(pd.concat([better, worse]), 8)
    assert {finding.verdict for finding in found} == {"mixed"}
    assert "and raised it in 3 of 4 comparisons on HellaSwag" in found[0].text
    assert all("there is no general answer." in finding.text for finding in found)


def test_experts_of_static_top_k_that_lose_as_much():
    (found,) = findings_levers.plain_experts(rows(scaled_at=(2, 3, 4, 6)), 8)
    assert found.verdict == "fewer"
    assert found.text.startswith(
        "Compared with top k by probability on Wikipedia, by the estimates in nats per token: one "
        "threshold by consequence, compensated loses with 2.05 experts per token no more than with"
    )
    # 0.0099 lies between 0.0135 at 6 experts and 0 at the model's own 8.
    assert "with 3.05 experts per token no more than with 6.5 (at fitted scale 6.5)" in found.text
    (found,) = findings_levers.plain_experts(rows(), 8)
    assert found.verdict == "fewer as is"
    assert "6.5 (at fitted scale 3 to 8, with none scored between)" in found.text
    (found,) = findings_levers.plain_experts(rows(scale_explains=True), 8)
    assert "(at fitted scale at most 3, the fewest scored)" in found.text
    (found,) = findings_levers.plain_experts(rows(helps=-1), 8)
    assert found.verdict == "not fewer"


def test_a_rule_better_than_stock_is_worth_more_than_all_its_experts():
    (found,) = findings_levers.plain_experts(rows(helps=1.5), 8)
    assert "with more than the model's 8" in found.text


KEPT, OPEN, EXCEEDED = (0.007, 0.006, 0.009), (0.012, 0.008, 0.015), (0.02, 0.015, 0.03)


@pytest.mark.parametrize(
    ("held_out", "verdict", "said"),
    [
        ({"wikipedia": KEPT}, "kept", "On Wikipedia the interval is within the promise."),
        ({"wikipedia": KEPT, "hellaswag": OPEN}, "open",
         "On HellaSwag the interval contains the promise: no difference from it could be shown."),
        ({"wikipedia": KEPT, "lambada": EXCEEDED}, "exceeded",
         "On LAMBADA the damage exceeds the promise, which does not cover text of another kind"),
    ],
)  # fmt: skip
def test_the_promise_stands_beside_the_damage(held_out, verdict, said):
    (found,) = findings_consequence.certified(
        {CERTIFIED: certificate()}, damage(**held_out), levers()
    )
    assert found.verdict == verdict
    assert said in found.text
    assert found.text.startswith(
        "`certified_k8_m001` is certified for an expected damage of at most 0.01 nats per token "
        "(KL from stock) on documents like the 128 of the calibration, where it uses 3.1 experts"
    )
    assert "0.007 [0.006, 0.009] on Wikipedia (3.06 experts)" in found.text


def test_a_certificate_without_held_out_text_says_so():
    (found,) = findings_consequence.certified(
        {CERTIFIED: certificate()}, damage(wikipedia=KEPT).iloc[:0], pd.DataFrame()
    )
    assert found.verdict == "unmeasured"
    assert "was not measured on held-out text" in found.text
    assert findings_consequence.certified({}, damage(wikipedia=KEPT), pd.DataFrame()) == []


def test_a_law_that_holds_and_one_that_does_not():
    holds = findings_consequence.law(law_table(removals()))
    assert holds.verdict == "holds"
    assert holds.text.startswith("Over 6 layers, log KL rises with log weight by a slope of 1.9")
    assert "The law holds in every layer (both slopes within 0.25 of 2" in holds.text
    fails = findings_consequence.law(law_table(removals(slope=1.0)))
    assert fails.verdict == "fails"
    assert "The law holds in no layer" in fails.text
    both = pd.concat([law_table(removals(layers=1)), law_table(removals(slope=1.0, layers=2))])
    partly = findings_consequence.law(both)
    assert partly.verdict == "partly"
    assert "The law holds in 1 of 3 layers" in partly.text
    assert findings_consequence.law(pd.DataFrame()) is None


def test_what_ranks_experts_by_loss_and_by_kl():
    table = correlation_table(removals())
    null = findings_consequence.ranking(table)
    assert null.verdict == "null, norm adds"
    assert "% of the removals lower that loss" in null.text
    assert "the weight says hardly anything about the loss" in null.text
    assert "the norm adds to what it says" in null.text
    signed = (table["predictor"] == "weight") & (table["effect"] == "loss")
    table.loc[signed, "spearman"] = -0.4
    table.loc[table["effect"] == "kl", "spearman"] = 0.7
    other = findings_consequence.ranking(table)
    assert other.verdict == "signed, norm adds little"
    assert f"is {MINUS}0.40 on average" in other.text
    assert "the weight says something about the loss" in other.text
    assert findings_consequence.ranking(pd.DataFrame()) is None
