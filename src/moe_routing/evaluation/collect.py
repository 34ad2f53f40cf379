"""All cells of a study as one table, and controls and levers beside them as others.

Metrics and their intervals are made here from the scored items, so that another number of resamples
or another confidence scores nothing again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_routing.errors import InputError
from moe_routing.evaluation.record import CellRecord
from moe_routing.evaluation.store import with_suffix
from moe_routing.files import atomic_path, read_parquet
from moe_routing.routing.budget import left_out
from moe_routing.statistics.chance import chance_warnings
from moe_routing.statistics.estimate import Estimate
from moe_routing.statistics.intervals import divergence_interval, metric_intervals
from moe_routing.statistics.mixture import differences
from moe_routing.vocabulary import TASKS

if TYPE_CHECKING:
    from moe_routing.config.study import StudyConfig

NOT_APPLICABLE = "none"
_CAPS = ("k", "max_k", "mean_k", "budget")
"""Parameters that say how many experts a strategy keeps, or keeps at most."""
ROUTING = (
    "mean_experts", "sd_experts", "floor_proportion", "cap_proportion", "empty_proportion",
    "router_entropy", "max_weight", "tokens",
)  # fmt: skip
"""Columns that are fields of :class:`moe_routing.evaluation.record.RoutingSummary`."""


def read_cells(config: StudyConfig, results: Path) -> list[CellRecord]:
    """Return the record of every cell in config order, without those that are left out.

    Raises:
        InputError: a cell is missing, its record lacks a key, or it is another cell's.
    """
    absent = left_out(results / "calibration", config.parsed.values())
    return [
        _read_cell(results / "cells" / strategy / f"{dataset}.json", strategy, dataset)
        for strategy in config.parsed
        for dataset in config.datasets
        if strategy in config.scored_on(dataset) and strategy not in absent
    ]


def _read_cell(path: Path, strategy: str, dataset: str) -> CellRecord:
    record = CellRecord.read(path)
    found = (record.strategy.get("id"), record.dataset)
    if found != (strategy, dataset):
        raise InputError(
            f"{path}: is the cell of {found[0]} on {found[1]}; remove it and run the workflow again"
        )
    return record


def collect_cells(
    config: StudyConfig, results: Path, records: Sequence[CellRecord]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of cells, one row each in their order, and the long table of metrics.

    Raises:
        InputError: the items of a cell are missing; see also :func:`metric_intervals`.
    """
    cells, metrics = [], []
    for record in records:
        strategy = record.strategy["id"]
        path = with_suffix(results / "cells" / strategy / record.dataset, ".parquet")
        estimates = estimates_of(read_parquet(path), record.task, config)
        cells.append(_cell_row(record, estimates, config.main_metrics[record.dataset]))
        metrics += [
            {"strategy": strategy, "dataset": record.dataset, **_interval(estimate)}
            for estimate in estimates
        ]
    return pd.DataFrame(cells), pd.DataFrame(metrics)


def estimates_of(items: pd.DataFrame, task: str, config: StudyConfig) -> list[Estimate]:
    """Return every metric of a cell with its interval, and the divergence if it was measured."""
    settings = {
        "confidence": config.statistics.confidence,
        "resamples": config.statistics.resamples,
    }
    metrics = metric_intervals(items, task, **settings, rng=np.random.default_rng(config.seed))
    if "kl" in items:
        rng = np.random.default_rng(config.seed)
        metrics = [*metrics, *divergence_interval(items, **settings, rng=rng)]
    return metrics


def write_tables(config: StudyConfig, results: Path) -> None:
    """Write ``full_routing_results.csv`` and the other tables of cells, and ``all_metrics.csv``.

    A cell is in every table whose section of the config has its strategy; ``controls.csv`` also has
    the static mixtures that a contrast needs. ``all_metrics.csv`` is of all of them.
    ``provenance.csv`` says what each cell was made with. Warnings on standard error say if that
    differs, and if a declared main metric is at chance.
    """
    records = read_cells(config, results)
    cells, metrics = collect_cells(config, results, records)
    made_with = provenance_table(records)
    contrasted = [name for names in config.contrasted.values() for name in names]
    for warning in (*differences(made_with), *_at_chance(config, metrics)):
        print(f"warning: {warning}", file=sys.stderr)
    tables = {
        "full_routing_results": cells[cells["strategy"].isin(config.strategies)],
        "controls": cells[cells["strategy"].isin([*config.controls, *contrasted])],
        "levers": cells[cells["strategy"].isin(config.levers)],
        "budgets": cells[cells["strategy"].isin(config.budgets)],
        "all_metrics": metrics,
        "provenance": made_with,
    }
    for name, table in tables.items():
        with atomic_path(results / "comparison" / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)


def _at_chance(config: StudyConfig, metrics: pd.DataFrame) -> list[str]:
    """Return a warning for each declared main metric at which the baseline guesses."""
    own = metrics[metrics["strategy"] == config.statistics.baseline]
    baseline: dict[str, dict[str, Estimate]] = {}
    for dataset, metric, value, low, high, n in own[
        ["dataset", "metric", "value", "ci_low", "ci_high", "n"]
    ].itertuples(index=False):
        baseline.setdefault(dataset, {})[metric] = Estimate(metric, value, low, high, n)
    return chance_warnings(baseline, config.main_metrics)


def provenance_table(records: Sequence[CellRecord]) -> pd.DataFrame:
    """Return what each cell was made with: commit, code (a hash), threads, device, torch."""
    return pd.DataFrame(
        {
            "strategy": record.strategy["id"],
            "dataset": record.dataset,
            "commit": record.provenance.commit,
            "code": record.provenance.code,
            "threads": record.provenance.threads,
            "device": record.provenance.device,
            "torch": record.provenance.packages.get("torch", "unknown"),
        }
        for record in records
    )


def _interval(estimate: Estimate) -> dict[str, object]:
    return {
        "metric": estimate.metric,
        "value": estimate.value,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "n": estimate.n,
    }


def _cell_row(record: CellRecord, estimates: Sequence[Estimate], main: str) -> dict[str, object]:
    """Return one row; timings come last, because only they differ between equal runs."""
    strategy = record.strategy
    rule = strategy.get("base", strategy)  # a control has the counts of another strategy
    shown = TASKS[record.task].shown(main)
    estimate = _interval(next(one for one in estimates if one.metric == shown))
    return {
        "strategy": strategy["id"],
        "family": strategy["family"],
        "k": next(rule[name] for name in _CAPS if name in rule),
        "alpha": rule.get("alpha") or NOT_APPLICABLE,  # a static mixture has no level
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
