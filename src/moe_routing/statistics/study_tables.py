"""From the cells of a study to ``statistics/*.csv``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from moe_routing.config.study import Control, StatisticsConfig, StudyConfig
from moe_routing.errors import InputError
from moe_routing.files import atomic_path, read_json
from moe_routing.routing.budget import left_out
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import control_kinds, parse_strategy, static_families
from moe_routing.statistics.cells import Panel, cell_path, load_cells, make_panel
from moe_routing.statistics.columns import ITEMS, TABLES
from moe_routing.statistics.contrasts import (
    ResultRow,
    contrasts,
    noninferiority_rows,
    paired_rows,
    power_rows,
)
from moe_routing.statistics.controls import control_rows, numerics_rows
from moe_routing.statistics.levers import lever_rows, reference_of
from moe_routing.statistics.matched import matched_rows
from moe_routing.statistics.multiplicity import adjust
from moe_routing.statistics.overview import friedman_rows, pareto_rows
from moe_routing.statistics.verdict import verdict
from moe_routing.vocabulary import DATASETS

MATCHED_COLUMNS = (
    "status", "static_family", "k_low", "k_high", "difference", "low", "high", "p_adjusted",
    "chord_excess", "verdict",
)  # fmt: skip
"""What ``primary.csv`` takes from ``matched_compute.csv``, under names with ``matched_``."""

Rows = list[ResultRow]
_KEY = ["strategy", "dataset", "metric"]


def write_statistics(config: StudyConfig, results_dir: Path | str) -> None:
    """Compute every table from ``cells/`` and write it to ``statistics/``.

    Needs ``comparison/full_routing_results.csv``, and ``controls.csv`` and ``levers.csv`` if there
    are any, for families and costs, and ``model.json``: strategies that are the same routing on
    this model are tested once (:meth:`moe_routing.config.study.StudyConfig.duplicates`). Cells of
    the config that do not exist are left out and listed in ``missing.csv``. Of the tables only
    ``pareto_time.csv`` depends on timings.

    Args:
        config: the study.
        results_dir: its folder, ``results/<study>``.

    Raises:
        InputError: no data set has a baseline, cells do not hold the same items, or the table of
            cells is missing or lacks a column.
    """
    results = Path(results_dir)
    comparison = results / "comparison"
    overview = [_read_overview(comparison / "full_routing_results.csv")]
    for name in ("controls", "levers"):
        if getattr(config, name):
            overview.append(_read_overview(comparison / f"{name}.csv"))
    rule = ModelRule.of(read_json(results / "model.json"))
    duplicates = config.duplicates(rule)
    tables = study_tables(
        results / "cells",
        pd.concat(overview, ignore_index=True),
        strategies=[name for name in config.strategies if name not in duplicates],
        datasets={name: DATASETS[name].task for name in config.datasets},
        settings=config.statistics,
        seed=config.seed,
        main=config.main_metrics,
        controls={
            name: control._replace(base=duplicates.get(control.base, control.base))
            for name, control in config.control_of.items()
            if name not in duplicates
        },
        numerics={arm.name: arm.changed for arm in config.numerics},
        levers=[*static_points(config, rule), *config.levers] if config.levers else (),
    )
    absent = tables["missing"]
    planned = {(name, dataset) for dataset in config.datasets for name in config.scored_on(dataset)}
    pairs = zip(absent["strategy"], absent["dataset"], strict=True)
    tables["missing"] = absent[np.array([pair in planned for pair in pairs], bool)]
    for name, table in {**tables, "columns": data_dictionary()}.items():
        with atomic_path(results / "statistics" / f"{name}.csv") as temporary:
            # Ten digits hide the last bits, in which linear algebra libraries differ.
            table.to_csv(temporary, index=False, float_format="%.10g", lineterminator="\n")


def static_points(config: StudyConfig, rule: ModelRule) -> list[str]:
    """Return the strategies and controls that levers start from: the model's top k with fewer k.

    Args:
        config: the study.
        rule: the model's own routing rule.
    """
    found = {}
    for name in (*config.strategies, *config.controls):
        strategy = config.parsed[name]
        if not strategy.family.static_weighting:
            continue
        resolved = strategy.resolved(rule)
        if resolved.weighting_kind == rule.weighting and resolved.max_experts < rule.top_k:
            found.setdefault(resolved.id, name)
    return list(found.values())


def study_tables(
    cells: Path,
    overview: pd.DataFrame,
    *,
    strategies: Sequence[str],
    datasets: Mapping[str, str],
    settings: StatisticsConfig,
    seed: int,
    main: Mapping[str, str] | None = None,
    controls: Mapping[str, Control] | None = None,
    numerics: Mapping[str, str] | None = None,
    levers: Sequence[str] = (),
) -> dict[str, pd.DataFrame]:
    """Return every table by name, with the columns of :mod:`moe_routing.statistics.columns`.

    Args:
        cells: folder of cells; those of numerics arms are in the folder ``numerics`` beside it.
        overview: one row per cell, controls included, with strategy, family, k, weighting, dataset,
            mean_experts and, if measured, tokens_per_second.
        strategies: strategy ids, in the order of the tables.
        datasets: task of each data set.
        settings: baseline, primary contrast, levels and margins.
        seed: seed of the study.
        main: main metric of data sets, where it is not the first of their task.
        controls: the controls by id; of the other tables they are in matched_compute and on the
            Pareto fronts only, as points of static curves and as rivals.
        numerics: what each numerics arm changes.
        levers: strategies of the table ``levers``.

    Raises:
        InputError: see :func:`write_statistics`.
    """
    main, controls, numerics = main or {}, controls or {}, numerics or {}
    present, missing = find_cells(cells, [*strategies, *controls], datasets, settings.baseline)
    if not present:
        raise InputError(f"{cells}: no data set has a cell of the baseline '{settings.baseline}'")
    panels = [
        make_panel(load_cells(cells, names, {dataset: datasets[dataset]}), main.get(dataset))
        for dataset, names in present.items()
    ]
    costs = _Costs(overview)
    rows = _all_rows(panels, costs, settings, seed, controls)
    tables = {name: pd.DataFrame(rows[name]) for name in rows}
    margins = add_margin_verdicts(tables.pop("control_margins"), settings)
    tables["controls"] = add_verdicts(tables["controls"], settings, margins)
    with_baseline = {dataset: datasets[dataset] for dataset in present}
    arms, missing_arms = _numerics(cells, with_baseline, settings, seed, numerics, main)
    tables["numerics"] = pd.DataFrame(arms)
    missing += missing_arms
    found, missing_levers = _levers(cells, with_baseline, settings, seed, levers, costs)
    tables["levers"] = pd.DataFrame(found)
    missing += missing_levers
    tables["noninferiority"] = add_margin_verdicts(tables["noninferiority"], settings)
    tables["paired"] = add_verdicts(tables["paired"], settings, tables["noninferiority"])
    tables["matched_compute"] = add_verdicts(tables["matched_compute"], settings, secondary=True)
    tables["primary"] = _primary(tables, costs, settings)
    tables["missing"] = pd.DataFrame(missing)
    return {name: tables[name].reindex(columns=list(columns)) for name, columns in TABLES.items()}


def find_cells(
    cells: Path, strategies: Sequence[str], datasets: Mapping[str, str], baseline: str
) -> tuple[dict[str, list[str]], Rows]:
    """Return the strategies that each data set has, and rows about what is missing.

    A data set without its baseline is left out as a whole.
    """
    present, missing = {}, []
    folder = cells.parent / "calibration"
    absent = left_out(folder, map(parse_strategy, strategies)) if folder.is_dir() else {}
    for dataset in datasets:
        names = [
            name
            for name in strategies
            if name not in absent and cell_path(cells, name, dataset).is_file()
        ]
        usable = baseline in names
        if usable:
            present[dataset] = names
        missing += [
            {
                "dataset": dataset,
                "strategy": name,
                "reason": "baseline has no cell" if name in names else absent.get(name, "no cell"),
            }
            for name in strategies
            if not usable or name not in names
        ]
    return present, missing


def _numerics(
    cells: Path,
    datasets: Mapping[str, str],
    settings: StatisticsConfig,
    seed: int,
    numerics: Mapping[str, str],
    main: Mapping[str, str],
) -> tuple[Rows, Rows]:
    """Return the rows of the numerics arms, and rows about what is missing."""
    folder, baseline = cells.parent / "numerics", settings.baseline
    rows: Rows = []
    missing: Rows = []
    for dataset, task in datasets.items():
        arms = [arm for arm in numerics if cell_path(folder, arm, dataset).is_file()]
        missing.extend(
            {"dataset": dataset, "strategy": baseline, "reason": f"no cell of numerics arm '{arm}'"}
            for arm in numerics
            if arm not in arms
        )
        if arms:
            usual = load_cells(cells, [baseline], {dataset: task})
            own = load_cells(folder, arms, {dataset: task})
            panel = make_panel(usual + own, main.get(dataset))
            rows += numerics_rows(panel, numerics, settings, seed)
    return rows, missing


def _levers(
    cells: Path,
    datasets: Mapping[str, str],
    settings: StatisticsConfig,
    seed: int,
    levers: Sequence[str],
    costs: _Costs,
) -> tuple[Rows, Rows]:
    """Return the rows of the levers, and rows about what is missing."""
    if not levers:
        return [], []
    present, missing = find_cells(cells, [settings.baseline, *levers], datasets, settings.baseline)
    references = {name: reference_of(name, settings.baseline) for name in levers}
    rows: Rows = []
    for dataset, names in present.items():
        panel = make_panel(load_cells(cells, names, {dataset: datasets[dataset]}))
        rows += lever_rows(panel, references, settings, seed, costs.experts(dataset))
    return rows, missing


def data_dictionary() -> pd.DataFrame:
    """Return table, column and description of ``statistics/`` and of the items of cells."""
    tables = {f"{name}.csv": columns for name, columns in TABLES.items()}
    rows = [
        {"table": table, "column": column, "description": description}
        for table, columns in (tables | {"cells/<strategy>/<dataset>.parquet": ITEMS}).items()
        for column, description in columns.items()
    ]
    return pd.DataFrame(rows)


def add_verdicts(
    table: pd.DataFrame,
    settings: StatisticsConfig,
    margins: pd.DataFrame | None = None,
    *,
    secondary: bool = False,
) -> pd.DataFrame:
    """Add family, adjusted p-value and verdict to a table of differences.

    Args:
        table: columns strategy, dataset, metric, main, difference, p_value, higher_is_better,
            identical.
        settings: the primary contrast and the level.
        margins: the table of non-inferiority with its adjusted p-values, if verdicts depend on it.
        secondary: whether the table is about another question than the primary contrast, so that
            all of it is exploratory.
    """
    table = _with_families(table, settings, secondary=secondary)
    if table.empty:
        return table
    if margins is None or margins.empty:
        p_margin = pd.Series(np.nan, index=table.index)
    else:
        found = margins.set_index(_KEY)["p_adjusted"]
        p_margin = pd.Series(found.reindex(pd.MultiIndex.from_frame(table[_KEY])).to_numpy())
    rows = cast("Iterable[Any]", table.itertuples())
    table["verdict"] = [
        str(
            verdict(
                row.difference,
                row.p_adjusted,
                higher_is_better=row.higher_is_better,
                confidence=settings.confidence,
                p_noninferior=p,
                identical=row.identical,
            )
        )
        if np.isfinite(row.p_adjusted)
        else None
        for row, p in zip(rows, p_margin, strict=True)
    ]
    return table


def add_margin_verdicts(table: pd.DataFrame, settings: StatisticsConfig) -> pd.DataFrame:
    """Add family, adjusted p-values and conclusions to the table of non-inferiority."""
    table = _with_families(table, settings)
    if not table.empty:
        table["p_tost_adjusted"] = adjust(table["p_tost"], table["family"])
        table["noninferior"] = table["p_adjusted"] <= table["alpha"]
        table["equivalent"] = table["p_tost_adjusted"] <= table["alpha"]
    return table


def _with_families(
    table: pd.DataFrame, settings: StatisticsConfig, *, secondary: bool = False
) -> pd.DataFrame:
    """Add the family of each row and the p-value adjusted within it.

    The primary family is a single test, at the whole level: the paired difference of the primary
    contrast on the main metric of its data set. Its test of non-inferiority costs no level: "no
    difference" and "a loss of the margin or more" cannot both be true, so at most one of the two
    can be rejected wrongly (Shaffer 1986). Its comparison at matched compute is about another
    difference and is exploratory.
    """
    if table.empty:
        return table
    table = table.copy()
    primary = _is_primary(table, settings) & (not secondary)
    table["family"] = np.where(primary, "primary", "exploratory")
    if "p_value" not in table:  # every strategy lies outside the curve
        table["p_value"] = np.nan
    table["p_adjusted"] = adjust(table["p_value"], table["family"])
    return table


def _is_primary(table: pd.DataFrame, settings: StatisticsConfig) -> pd.Series:
    return _in_contrast(table, settings) & table["main"].astype(bool)


def _in_contrast(table: pd.DataFrame, settings: StatisticsConfig) -> pd.Series:
    """Mark strategy and data set of the primary contrast, with every metric."""
    contrast = settings.primary
    return (table["strategy"] == contrast.strategy) & (table["dataset"] == contrast.dataset)


def _all_rows(
    panels: Sequence[Panel],
    costs: _Costs,
    settings: StatisticsConfig,
    seed: int,
    controls: Mapping[str, Control],
) -> dict[str, Rows]:
    """Return the rows of every table; ``control_margins`` are the non-inferiority of controls."""
    names = ("paired", "noninferiority", "matched_compute", "pareto", "pareto_time", "power")
    rows: dict[str, Rows] = {name: [] for name in (*names, "controls", "control_margins")}
    compared, kinds = [], control_kinds()
    for everything in panels:
        panel = everything.only(s for s in everything.strategies if s not in controls)
        compared.append(panel)
        for contrast in contrasts(panel, settings, seed):
            rows["paired"] += paired_rows(contrast)
            rows["noninferiority"] += noninferiority_rows(contrast)
            rows["power"] += power_rows(contrast)
        experts, seconds = costs.experts(panel.dataset), costs.seconds(panel.dataset)
        on_curves = everything.only(
            s
            for s in everything.strategies
            if s not in controls or kinds[controls[s].kind].on_curves
        )
        rows["matched_compute"] += matched_rows(
            on_curves, settings, seed, costs.static, costs.curve_of, experts
        )
        found, margins = control_rows(everything, controls, settings, seed, experts)
        rows["controls"] += found
        rows["control_margins"] += margins
        rows["pareto"] += pareto_rows(on_curves, settings, seed, experts, "mean_experts")
        time = "seconds_per_1000_tokens"
        rows["pareto_time"] += pareto_rows(on_curves, settings, seed, seconds, time)
    rows["friedman"] = friedman_rows(compared, settings)
    return rows


@dataclass(frozen=True)
class _Costs:
    """What the table of cells says about families and costs."""

    table: pd.DataFrame

    @property
    def static(self) -> dict[str, dict[str, float]]:
        """Experts of each strategy of a static curve, by the family of the curve."""
        static = {entry.name for entry in static_families().values()}
        rows = self.table[self.table["family"].isin(static)]
        curves = rows["strategy"].map(self.curve_of)
        return {
            str(family): dict(zip(curve["strategy"], curve["k"].astype(float), strict=True))
            for family, curve in rows.groupby(curves)
        }

    @property
    def curve_of(self) -> dict[str, str]:
        """Family of the static curve with each strategy's weights, where there is one."""
        static = {weighting: entry.name for weighting, entry in static_families().items()}
        rows = self.table[self.table["weighting"].isin(static)]
        families = rows["weighting"].map(static)
        return dict(zip(rows["strategy"], families, strict=True))

    def experts(self, dataset: str) -> dict[str, float]:
        """Mean experts per token of each strategy."""
        return self._column(dataset, self.table["mean_experts"])

    def seconds(self, dataset: str) -> dict[str, float]:
        """Seconds per 1,000 tokens of each strategy."""
        if "tokens_per_second" not in self.table:
            return {}
        return self._column(dataset, 1000 / self.table["tokens_per_second"])

    def _column(self, dataset: str, values: pd.Series) -> dict[str, float]:
        chosen = (self.table["dataset"] == dataset) & np.isfinite(values.astype(float))
        names = self.table.loc[chosen, "strategy"]
        return dict(zip(names, values[chosen].astype(float), strict=True))


def _read_overview(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"{path}: no such file; the statistics need the table of cells")
    table = pd.read_csv(path)
    for name in ("strategy", "family", "k", "weighting", "dataset", "mean_experts"):
        if name not in table:
            raise InputError(f"{path}: column '{name}' is missing")
    return table


def _primary(
    tables: Mapping[str, pd.DataFrame], costs: _Costs, settings: StatisticsConfig
) -> pd.DataFrame:
    """Return what all tables say about the primary contrast, on every metric of its data set."""
    paired = tables["paired"]
    if paired.empty:
        return paired
    chosen = paired[_in_contrast(paired, settings)]
    experts = costs.experts(settings.primary.dataset)
    chosen = chosen.assign(
        mean_experts=experts.get(settings.primary.strategy, np.nan),
        baseline_mean_experts=experts.get(settings.baseline, np.nan),
    )
    margins = {
        **{n: n for n in ("margin", "loss", "upper_bound", "noninferior", "equivalent")},
        "p_adjusted": "p_noninferiority",
    }
    matched = {name: f"matched_{name}" for name in MATCHED_COLUMNS}
    detectable = "minimum_detectable_difference"
    for table, renamed in (
        ("noninferiority", margins),
        ("matched_compute", matched),
        ("power", {detectable: detectable}),
    ):
        part = tables[table].reindex(columns=[*_KEY, *renamed]).rename(columns=renamed)
        chosen = chosen.merge(part, on=_KEY, how="left")
    return chosen
