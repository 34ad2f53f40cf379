"""Which way is better, and whether items are right or wrong, are two facts of a metric."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moe_routing.config.study import StatisticsConfig
from moe_routing.statistics.cells import ScoredCell, make_panel
from moe_routing.statistics.comparison import compare, named_rng
from moe_routing.statistics.contrasts import Contrasts, noninferiority_rows
from moe_routing.vocabulary import METRICS

ACCURACY, NATS = METRICS["accuracy"], METRICS["nats_per_token"]
ERRORS = replace(ACCURACY, name="errors", column="wrong", higher_is_better=False)
LIKELIHOOD = replace(NATS, name="log_likelihood", sign=1.0, higher_is_better=True)
SETTINGS = StatisticsConfig(
    baseline="a", primary={"strategy": "b", "dataset": "lambada"}, resamples=400,
    margin_accuracy=0.05, margin_nats=0.05,
)  # fmt: skip


def items(proportion, nats):
    """200 items, of which the strategy has a share right, at so many nats per token."""
    rng = np.random.default_rng(round(100 * proportion))
    right = rng.permutation(np.arange(200) < 200 * proportion).astype(float)
    return pd.DataFrame(
        {
            "id": range(200), "cluster": range(200), "correct": right, "wrong": 1 - right,
            "log_likelihood": -rng.normal(nats, 0.2, 200), "tokens": 1,
        }
    )  # fmt: skip


def noninferiority(measure):
    cells = [ScoredCell(name, "lambada", "last_word", items(*given))
             for name, given in {"a": (0.6, 3.0), "b": (0.55, 3.04)}.items()]  # fmt: skip
    panel = make_panel(cells)
    value_NS = panel.values(measure)
    difference_NS = value_NS[:, [1]] - value_NS[:, [0]]
    comparison = compare(panel, measure, difference_NS, SETTINGS, named_rng(0, "test"))
    (row,) = noninferiority_rows(Contrasts(panel, measure, SETTINGS, (1,), 0, comparison))
    return row


@pytest.mark.parametrize(
    ("measure", "opposite"), [(ACCURACY, ERRORS), (NATS, LIKELIHOOD)], ids=["proportion", "nats"]
)
def test_a_loss_is_the_same_loss_in_the_opposite_metric(measure, opposite):
    one, other = noninferiority(measure), noninferiority(opposite)
    assert one["loss"] > 0.01
    assert one["test"] == other["test"]
    for name in ("loss", "upper_bound", "p_value", "p_clustered_t", "p_gain", "p_tost", "margin"):
        assert other[name] == pytest.approx(one[name], abs=1e-9), name
