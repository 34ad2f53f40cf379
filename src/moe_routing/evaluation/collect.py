"""All cells of a study as one table, and controls and levers beside them as others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from moe_routing.evaluation.record import CellRecord
from moe_routing.files import atomic_path
from moe_routing.statistics.estimate import Estimate
from moe_routing.vocabulary import TASKS

if TYPE_CHECKING:
    from moe_routing.config.study import StudyConfig

NOT_APPLICABLE = "none"
ROUTING = (
    "mean_experts", "sd_experts", "floor_proportion", "cap_proportion", "empty_proportion",
    "router_entropy", "max_weight", "tokens",
)  # fmt: skip
"""Columns that are fields of :class:`moe_routing.evaluation.record.RoutingSummary`."""


def collect_cells(config: StudyConfig, results: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of cells, one row each in config order, and the long table of metrics.

    Controls and levers are among both, after the strategies.

    Raises:
        InputError: a cell is missing, or its record lacks a key.
    """
    cells, metrics = [], []
    for strategy in config.scored:
        for dataset in config.datasets:
            record = CellRecord.read(results / "cells" / strategy / f"{dataset}.json")
            cells.append(_cell_row(record, config.main_metrics[dataset]))
            metrics += [
                {"strategy": strategy, "dataset": dataset, **_interval(estimate)}
                for estimate in record.metrics
            ]
    return pd.DataFrame(cells), pd.DataFrame(metrics)


def write_tables(config: StudyConfig, results: Path) -> None:
    """Write ``full_routing_results.csv``, ``controls.csv``, ``levers.csv``, ``all_metrics.csv``.

    The last one is of all of them.
    """
    cells, metrics = collect_cells(config, results)
    tables = {
        "full_routing_results": cells[cells["strategy"].isin(config.strategies)],
        "controls": cells[cells["strategy"].isin(config.controls)],
        "levers": cells[cells["strategy"].isin(config.levers)],
        "all_metrics": metrics,
    }
    for name, table in tables.items():
        with atomic_path(results / "comparison" / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)


def _interval(estimate: Estimate) -> dict[str, object]:
    return {
        "metric": estimate.metric,
        "value": estimate.value,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "n": estimate.n,
    }


def _cell_row(record: CellRecord, main: str) -> dict[str, object]:
    """Return one row; timings come last, because only they differ between equal runs."""
    strategy = record.strategy
    rule = strategy.get("base", strategy)  # a control has the counts of another strategy
    shown = TASKS[record.task].shown(main)
    estimate = _interval(next(one for one in record.metrics if one.metric == shown))
    return {
        "strategy": strategy["id"],
        "family": strategy["family"],
        "k": rule.get("k", rule.get("max_k", rule.get("mean_k"))),
        "alpha": rule.get("alpha", NOT_APPLICABLE),
        "null": rule.get("null", NOT_APPLICABLE),
        "weighting": strategy["weighting"],
        "dataset": record.dataset,
        "task": record.task,
        "n_items": record.n_items,
        **{name: estimate[name] for name in ("metric", "value", "ci_low", "ci_high")},
        **{name: getattr(record.routing, name) for name in ROUTING},
        "tokens_per_second": record.timings.tokens_per_second,
        "wall_seconds": record.timings.wall_seconds,
    }
