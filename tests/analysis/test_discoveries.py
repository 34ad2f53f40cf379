"""False discovery proportions equal a count by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moe_routing.analysis.discoveries import (
    false_discoveries,
    labelled,
    weight_and_importance,
)
from moe_routing.statistics.proportions import wilson_interval


def removal(document, layer, change, *, discovered=True, position=0, weight=0.1, beyond=0):
    return {
        "arm": "bh", "null": "pooled", "alpha": 0.05, "document": document, "position": position,
        "layer": layer, "expert": 0, "rank": 0, "discovered": discovered, "weight": weight,
        "change": change, "change_window": 2 * change, "noise_floor": 1e-6,
        "beyond": beyond,
    }  # fmt: skip


@pytest.fixture
def removals():
    return pd.DataFrame(
        [
            removal("a", 0, 0.001),
            removal("a", 0, 0.5),
            removal("a", 3, -0.2),
            removal("b", 0, 0.009),
            removal("b", 3, 0.0, discovered=False),
            removal("c", 3, 0.3),
        ]
    )


def pick(table, **keys):
    for name, value in keys.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_proportion_and_rate_by_hand(removals):
    table = false_discoveries(removals, [0.01, 0.25], confidence=0.95)
    row = pick(table, scope="own", epsilon=0.01, layer="all")
    assert row["n_discoveries"] == 5
    assert row["n_undiscovered"] == 1
    assert row["fdp"] == pytest.approx(2 / 5)
    # Decisions: (a, 0) has 1 of 2, (a, 3) 0 of 1, (b, 0) 1 of 1, (b, 3) nothing found, (c, 3) 0.
    assert row["n_decisions"] == 5
    assert row["fdr"] == pytest.approx((0.5 + 0 + 1 + 0 + 0) / 5)
    assert row["any_proportion"] == pytest.approx(4 / 5)
    assert row["harmful"] == pytest.approx(1 / 5)
    assert row["mean_change"] == pytest.approx((0.001 + 0.5 - 0.2 + 0.009 + 0.3) / 5)
    wider = pick(table, scope="own", epsilon=0.25, layer="all")
    assert wider["fdp"] == pytest.approx(3 / 5)
    assert pick(table, scope="window", epsilon=0.01, layer="all")["fdp"] == pytest.approx(1 / 5)


def test_discoveries_beyond_what_was_selected_are_counted_once_a_decision():
    rows = [
        removal("a", 0, 0.0, beyond=3),
        removal("a", 0, 0.5, beyond=3),  # the same decision
        removal("a", 1, 0.5, beyond=1),
        removal("b", 0, 0.5, beyond=2),
    ]
    table = false_discoveries(pd.DataFrame(rows), [0.01], confidence=0.95)
    assert pick(table, scope="own", layer="all")["n_beyond"] == 6
    assert pick(table, scope="own", layer=0)["n_beyond"] == 5
    assert pick(table, scope="own", layer="all")["n_discoveries"] == 4


def test_one_set_of_removals_is_labelled_by_every_rule():
    removals = pd.DataFrame(
        [
            {"arm": "stock", "document": name, "position": 9, "layer": layer, "expert": expert}
            for name in "ab"
            for layer in (0, 1)
            for expert in (4, 7)
        ]
    )
    found = [("strict", "a", 0, 7), ("mild", "a", 0, 7), ("mild", "a", 0, 5), ("mild", "b", 1, 3)]
    found += [("mild", "b", 0, 4), ("mild", "b", 0, 7)]
    discoveries = pd.DataFrame(found, columns=["arm", "document", "layer", "expert"])
    arms = [("strict", "pooled", 0.01), ("mild", "pooled", 0.1), ("silent", "within_token", 0.1)]
    table = labelled(removals, discoveries.assign(position=9), arms)
    assert table.groupby("arm").size().to_dict() == dict.fromkeys(
        ["stock", "strict", "mild", "silent"], len(removals)
    )
    stock = table[table["arm"] == "stock"]
    assert stock["discovered"].all()
    assert set(stock["null"]) == {"none"}
    for arm, *_ in arms:
        for row in table[table["arm"] == arm].itertuples():
            own = [x[3] for x in found if x[:3] == (arm, row.document, row.layer)]
            assert row.discovered == (row.expert in own)
            assert row.beyond == len(set(own) - {4, 7})


def test_layers_have_rows_of_their_own(removals):
    table = false_discoveries(removals, [0.01], confidence=0.95)
    assert pick(table, scope="own", layer=0)["fdp"] == pytest.approx(2 / 3)
    assert pick(table, scope="own", layer=3)["fdp"] == 0.0


def test_an_arm_that_finds_nothing_has_no_proportion_and_a_rate_of_zero():
    rows = [removal(name, 0, 0.0, discovered=False) for name in "abc"]
    row = false_discoveries(pd.DataFrame(rows), [0.01], confidence=0.95).iloc[0]
    assert row["n_discoveries"] == 0
    assert np.isnan(row["fdp"])
    assert row["fdr"] == 0.0
    assert row["fdr_high"] > 0.3


def test_the_interval_is_wilsons_for_independent_documents(rng):
    changes = np.where(rng.random(300) < 0.3, 0.001, 0.5)
    table = pd.DataFrame([removal(f"d{place}", 0, x) for place, x in enumerate(changes)])
    row = false_discoveries(table, [0.01], confidence=0.9).iloc[0]
    low, high = wilson_interval((changes < 0.01).sum(), 300, 0.9)
    assert row["fdp_low"] == pytest.approx(low, abs=0.003)
    assert row["fdp_high"] == pytest.approx(high, abs=0.003)


def test_equal_changes_within_documents_widen_the_interval(rng):
    changes = np.repeat(np.where(rng.random(30) < 0.3, 0.001, 0.5), 10)
    documents = np.repeat(np.arange(30), 10)
    rows = [
        removal(document, 0, change, position=place)
        for place, (document, change) in enumerate(zip(documents, changes, strict=True))
    ]
    table = pd.DataFrame(rows)
    clustered = false_discoveries(table, [0.01], confidence=0.95).iloc[0]
    table["document"] = np.arange(300)
    independent = false_discoveries(table, [0.01], confidence=0.95).iloc[0]
    assert clustered["fdp"] == independent["fdp"]
    width = clustered["fdp_high"] - clustered["fdp_low"]
    assert width > 2 * (independent["fdp_high"] - independent["fdp_low"])


def test_weight_that_predicts_the_change_is_found_by_layer(rng):
    rows = []
    for place in range(200):
        weight = rng.random()
        document = f"d{place % 20}"
        rows.append(removal(document, 0, weight * rng.choice([-1, 1]), weight=weight))
        rows.append(removal(document, 1, rng.normal(), weight=weight))
    table = weight_and_importance(
        pd.DataFrame(rows), confidence=0.95, resamples=300, rng=rng
    ).set_index("layer")
    assert table.loc[0, "rho"] == pytest.approx(1.0)
    assert table.loc[1, "low"] < 0 < table.loc[1, "high"]
    assert table.loc[1, "n_removals"] == 200
