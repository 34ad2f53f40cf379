"""Sentences about certificates and the law, both ways, from planted tables."""

from __future__ import annotations

import pandas as pd
import pytest
from planted_consequence import (
    CERTIFIED,
    budgets,
    certificate,
    correlation_table,
    damage,
    law_table,
    removals,
)

from moe_routing.reporting import findings_consequence
from moe_routing.wording import MINUS

KEPT, OPEN, EXCEEDED = (0.007, 0.006, 0.009), (0.012, 0.008, 0.015), (0.02, 0.015, 0.03)


@pytest.mark.parametrize(
    ("held_out", "verdict", "said"),
    [
        ({"wikipedia": KEPT}, "kept", "On Wikipedia the interval is within the promise."),
        ({"wikipedia": KEPT, "hellaswag": OPEN}, "open",
         "On HellaSwag the interval contains 0.01, so it is open whether the promise"),
        ({"wikipedia": KEPT, "lambada": EXCEEDED}, "exceeded",
         "On LAMBADA it exceeds the promise, which does not cover text of another kind"),
    ],
)  # fmt: skip
def test_the_promise_stands_beside_the_damage(held_out, verdict, said):
    (found,) = findings_consequence.certified(
        {CERTIFIED: certificate()}, damage(**held_out), budgets()
    )
    assert found.verdict == verdict
    assert said in found.text
    assert found.text.startswith(
        "Certified routing (`certified_k8_m001`) promises an expected KL from the stock "
        "predictions of at most 0.01 nats per token, on documents like the 128 of its calibration. "
        "There it uses 3.1 experts per token."
    )
    assert "0.0070 [0.0060, 0.0090] on Wikipedia (3.06 experts)" in found.text


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
    assert holds.text.startswith("The law holds in all 6 layers (both slopes within 0.25 of 2,")
    assert "Log KL rises with log weight by a slope of 1.9" in holds.text
    fails = findings_consequence.law(law_table(removals(slope=1.0)))
    assert fails.verdict == "fails"
    assert "The law holds in no layer (" in fails.text
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
    assert null.text.startswith("The router's weight says hardly anything about the loss")
    assert "The norm adds to this" in null.text
    signed = (table["predictor"] == "weight") & (table["effect"] == "loss")
    table.loc[signed, "spearman"] = -0.4
    table.loc[table["effect"] == "kl", "spearman"] = 0.7
    other = findings_consequence.ranking(table)
    assert other.verdict == "signed, norm adds little"
    assert f"is {MINUS}0.40 on average" in other.text
    assert other.text.startswith("The router's weight says something about the loss")
    assert "The norm adds little to this" in other.text
    assert findings_consequence.ranking(pd.DataFrame()) is None
