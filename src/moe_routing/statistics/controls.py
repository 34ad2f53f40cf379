"""Controls against their bases, and the baseline against itself.

Both are the paired comparison of :mod:`moe_routing.statistics.contrasts` with another reference.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_routing.config.study import Control, StatisticsConfig
from moe_routing.statistics.cells import Panel
from moe_routing.statistics.contrasts import ResultRow, contrasts, noninferiority_rows, paired_rows


def control_rows(
    panel: Panel,
    controls: Mapping[str, Control],
    settings: StatisticsConfig,
    seed: int,
    mean_experts: Mapping[str, float],
) -> tuple[list[ResultRow], list[ResultRow]]:
    """Compare the controls of a data set with their bases.

    Args:
        panel: the cells of one data set, controls among them.
        controls: the controls by id, in the order of the rows; one without its base is left out.
        settings: levels and margins.
        seed: seed of the study.
        mean_experts: mean experts per token on this data set; strategies may be absent.

    Returns:
        Rows of ``controls.csv`` without adjusted p-values and verdicts, which need all data sets,
        and the rows of non-inferiority that verdicts take into account.
    """
    there = [
        name for name, control in controls.items() if {name, control.base} <= set(panel.strategies)
    ]
    rows, margins = [], []
    for base in dict.fromkeys(controls[name].base for name in there):
        names = [name for name in there if controls[name].base == base]
        against_base = settings.model_copy(update={"baseline": base})
        for contrast in contrasts(panel.only([base, *names]), against_base, seed, "controls"):
            margins += noninferiority_rows(contrast)
            rows += [
                {
                    **row,
                    "kind": controls[row["strategy"]].kind,
                    "base": base,
                    "base_value": row["baseline_value"],
                    "control_value": row["value"],
                    "base_mean_experts": mean_experts.get(base, np.nan),
                    "control_mean_experts": mean_experts.get(row["strategy"], np.nan),
                }
                for row in paired_rows(contrast)
            ]
    rows.sort(key=lambda row: there.index(row["strategy"]))
    return rows, margins


def numerics_rows(
    panel: Panel, changed: Mapping[str, str], settings: StatisticsConfig, seed: int
) -> list[ResultRow]:
    """Compare the baseline under changed settings with itself.

    Args:
        panel: the baseline's cell of one data set, and that of every numerics arm.
        changed: what each arm changes.
        settings: the baseline's id and levels.
        seed: seed of the study.
    """
    likelihood_NS = np.stack([items["log_likelihood"] for items in panel.items], axis=1)
    largest_S = np.abs(likelihood_NS - likelihood_NS[:, :1]).max(0)
    largest = dict(zip(panel.strategies, largest_S, strict=True))
    rows = [
        {
            **row,
            "arm": row["strategy"],
            "changed": changed[row["strategy"]],
            "arm_value": row["value"],
            "flips": row["lost"] + row["gained"] if "lost" in row else np.nan,
            "largest_item_difference": largest[row["strategy"]],
        }
        for contrast in contrasts(panel, settings, seed, "numerics")
        for row in paired_rows(contrast)
    ]
    measures = panel.measures
    order = [(name, metric.name) for name in changed for metric in measures]
    return sorted(rows, key=lambda row: order.index((row["arm"], row["metric"])))
