"""The contrasts that are declared before the run, tested in a fixed order.

Each is two-sided, so that it can go either way, with two one-sided tests of the margin beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from moe_routing.config.study import Control, StatisticsConfig
from moe_routing.statistics.bootstrap import ratio_with_error
from moe_routing.statistics.cells import Panel
from moe_routing.statistics.contrasts import (
    ResultRow,
    contrasts,
    margin_of,
    noninferiority_rows,
    paired_rows,
)
from moe_routing.statistics.power import detectable_difference
from moe_routing.statistics.verdict import SHOWN, Verdict, verdict
from moe_routing.vocabulary import METRICS

AT_EQUAL_BUDGET = ("mixture", "counts", "shuffle", "layermean")
"""Kinds of control that keep the mean number of experts of their base."""


@dataclass(frozen=True)
class Declared:
    """A declared contrast.

    Attributes:
        strategy: the arm.
        against: what it is compared with.
        dataset: evaluation set.
        metric: what is compared.
    """

    strategy: str
    against: str
    dataset: str
    metric: str


def primary_rows(
    panels: Mapping[str, Panel],
    declared: Sequence[Declared],
    controls: Mapping[str, Control],
    settings: StatisticsConfig,
    seed: int,
    experts: Mapping[str, Mapping[str, float]],
) -> list[ResultRow]:
    """Return the rows of ``primary.csv``, in the declared order; contrasts without cells left out.

    Each is tested at the whole level, the later ones as confirmatory only if every earlier one
    showed a difference (a fixed sequence: Maurer, Hothorn & Lehmacher 1995), so that no p-value is
    adjusted. Whether a difference of the margin is ruled out costs no level beside that: "no
    difference" and "a difference of the margin or more" cannot both be true (Shaffer 1986).

    Args:
        panels: the cells by data set.
        declared: the contrasts in their order.
        controls: the controls by id; those at equal budget are the pilot.
        settings: levels and margins.
        seed: seed of the study.
        experts: mean experts per token of each strategy, by data set.
    """
    rows: list[ResultRow] = []
    confirmatory = True
    for order, one in enumerate(declared, start=1):
        panel = panels.get(one.dataset)
        if panel is None or not {one.strategy, one.against} <= set(panel.strategies):
            confirmatory = False
            continue
        row = _row(panel, one, settings, seed)
        counted = experts.get(one.dataset, {})
        row |= {
            "order": order,
            "confirmatory": confirmatory,
            "mean_experts": counted.get(one.strategy, np.nan),
            "against_mean_experts": counted.get(one.against, np.nan),
            **_planned(panel, one, controls, settings),
        }
        rows.append(row)
        confirmatory = confirmatory and row["verdict"] in SHOWN
    return rows


def _row(panel: Panel, one: Declared, settings: StatisticsConfig, seed: int) -> ResultRow:
    against = settings.model_copy(update={"baseline": one.against})
    pair = panel.only([one.against, one.strategy])
    (contrast,) = [
        found
        for found in contrasts(pair, against, seed, "primary")
        if found.metric.name == one.metric
    ]
    (row,) = paired_rows(contrast)
    tests = noninferiority_rows(contrast)
    alpha = (1 - settings.confidence) / 2
    ruled_out = {"margin": np.nan, "p_noninferior": np.nan, "p_tost": np.nan}
    if tests:
        margins = tests[0]
        ruled_out = {
            "margin": margins["margin"],
            "p_noninferior": margins["p_value"],
            "p_tost": margins["p_tost"],
        }
    outcome = verdict(
        row["difference"], row["p_value"], higher_is_better=row["higher_is_better"],
        confidence=settings.confidence, p_noninferior=ruled_out["p_noninferior"],
        identical=row["identical"],
    )  # fmt: skip
    equivalent = bool(ruled_out["p_tost"] <= alpha) and outcome != Verdict.IDENTICAL
    renamed = {"against": row["baseline"], "against_value": row["baseline_value"]}
    return {**row, **renamed, **ruled_out, "equivalent": equivalent, "verdict": str(outcome)}


def _planned(
    panel: Panel, one: Declared, controls: Mapping[str, Control], settings: StatisticsConfig
) -> ResultRow:
    """Return the minimum detectable difference, from a pilot in which effects are small.

    The pilot is the pairs of controls that keep the mean experts of the declared strategy (its
    mixture, random counts, shuffle, layer means): routings that differ from token to token as much
    as the two arms do, and hardly in loss. The largest clustered standard error of their
    differences is taken. Neither the tested difference nor that of an arm with another budget
    enters: a large effect has a large spread, and would promise too little.
    """
    pilot = [
        name
        for name, control in controls.items()
        if control.base == one.strategy
        and control.kind in AT_EQUAL_BUDGET
        and name in panel.strategies
    ]
    metric = METRICS[one.metric]
    value_NS = panel.values(metric)
    column = panel.strategies.index
    found = []
    for first, second in combinations(pilot, 2):
        difference_N = value_NS[:, column(first)] - value_NS[:, column(second)]
        sums_C1, units_C1 = panel.sums(difference_N[:, None], metric)
        _, error_1 = ratio_with_error(sums_C1, units_C1)
        found.append((float(error_1[0]), f"{first} against {second}"))
    error, pair = max(found, default=(np.nan, None))
    detectable = detectable_difference(error or np.nan, confidence=settings.confidence)
    return {
        "pilot": pair,
        "pilot_standard_error": error,
        "minimum_detectable_difference": detectable,
        "margin": margin_of(metric, settings),
    }
