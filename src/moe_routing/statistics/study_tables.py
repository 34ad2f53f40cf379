"""From the cells of a study to ``statistics/*.csv``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from moe_routing.config.cells import TIMING_FILE
from moe_routing.config.study import Control, StatisticsConfig, StudyConfig
from moe_routing.errors import InputError
from moe_routing.files import atomic_path, read_json, reading
from moe_routing.routing.budget import left_out
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import control_kinds, parse_strategy, static_families
from moe_routing.statistics.budgets import budget_rows, lever_rows, reference_of
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
from moe_routing.statistics.matched import matched_rows
from moe_routing.statistics.multiplicity import EXPLORATORY, adjust
from moe_routing.statistics.overview import pareto_rows
from moe_routing.statistics.primary import Declared, primary_rows
from moe_routing.statistics.rules import SCALED, UNSCALED
from moe_routing.statistics.timing import seconds_of, timing_rows
from moe_routing.statistics.verdict import verdict
from moe_routing.vocabulary import DATASETS, RAW_WEIGHTING

Rows = list[ResultRow]
_KEY = ["strategy", "dataset", "metric"]


def write_statistics(config: StudyConfig, results_dir: Path | str) -> None:
    """Compute every table from ``cells/`` and write it to ``statistics/``.

    Needs ``comparison/full_routing_results.csv``, and ``controls.csv`` and ``levers.csv`` if there
    are any, for families and costs, and ``model.json``: strategies that are the same routing on
    this model are tested once (:meth:`moe_routing.config.study.StudyConfig.duplicates`). Cells of
    the config that do not exist are left out and listed in ``missing.csv``. Only ``timing.csv`` and
    ``pareto_time.csv`` depend on measured times, those of ``efficiency/timing.csv``.

    Args:
        config: the study.
        results_dir: its folder, ``results/<study>``.

    Raises:
        InputError: no data set has a baseline, cells do not hold the same items, or the table of
            cells is missing or lacks a column.
    """
    results = Path(results_dir)
    comparison = results / "comparison"
    contrasted = [name for names in config.contrasted.values() for name in names]
    parts = {
        "full_routing_results": config.strategies,
        "controls": [*config.controls, *contrasted],
        "levers": config.levers,
        "budgets": config.budgets,
    }
    overview = [_read_overview(comparison / f"{name}.csv") for name, ids in parts.items() if ids]
    rule = ModelRule.of(read_json(results / "model.json"))
    duplicates = config.duplicates(rule)
    settings = [*static_points(config, rule), *config.levers, *config.budgets]
    tables = study_tables(
        results / "cells",
        pd.concat(overview, ignore_index=True).drop_duplicates(["strategy", "dataset"]),
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
        budgets=[name for name in dict.fromkeys(settings) if name not in duplicates]
        if config.levers or config.budgets
        else (),
        own_weighting=rule.weighting,
        fits=_fits(results / "calibration" / "budgets"),
        declared=_declared(config),
        times=_read_times(results / TIMING_FILE),
    )
    absent = tables["missing"]
    planned = {(name, dataset) for dataset in config.datasets for name in config.scored_on(dataset)}
    pairs = zip(absent["strategy"], absent["dataset"], strict=True)
    tables["missing"] = absent[np.array([pair in planned for pair in pairs], bool)]
    for name, table in {**tables, "columns": data_dictionary()}.items():
        with atomic_path(results / "statistics" / f"{name}.csv") as temporary:
            # Ten digits hide the last bits, in which linear algebra libraries differ.
            table.to_csv(temporary, index=False, float_format="%.10g", lineterminator="\n")


def _declared(config: StudyConfig) -> list[Declared]:
    """Return the primary contrast, then the sequence after it."""
    main = config.main_metrics
    return [
        Declared(
            one.strategy, str(one.against), one.dataset, one.metric or main[one.dataset], one.margin
        )
        for one in config.statistics.contrasts
    ]


def _fits(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was fitted for each budget, by strategy."""
    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


def static_points(config: StudyConfig, rule: ModelRule) -> list[str]:
    """Return the strategies and controls that budgets are judged by: the model's rule at fewer k.

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
    budgets: Sequence[str] = (),
    own_weighting: str = RAW_WEIGHTING,
    fits: Mapping[str, Mapping[str, Any]] | None = None,
    declared: Sequence[Declared] = (),
    times: pd.DataFrame | None = None,
) -> dict[str, pd.DataFrame]:
    """Return every table by name, with the columns of :mod:`moe_routing.statistics.columns`.

    Args:
        cells: folder of cells; those of numerics arms are in the folder ``numerics`` beside it.
        overview: one row per cell, controls included, with strategy, family, k, weighting, dataset,
            mean_experts and, if measured, tokens_per_second.
        strategies: strategy ids, in the order of the tables.
        datasets: task of each data set.
        settings: baseline, levels and margins.
        seed: seed of the study.
        main: main metric of data sets, where it is not the first of their task.
        controls: the controls by id; of the other tables they are in matched_compute and on the
            Pareto fronts only, as points of static curves and as rivals.
        numerics: what each numerics arm changes.
        budgets: strategies of the tables ``matched_budgets`` and ``levers``.
        own_weighting: the model's own weighting.
        fits: what was fitted for the budget of a strategy.
        declared: the declared contrasts, in their order.
        times: measured times: strategy, repeat, seconds, tokens.

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
    timed = _times(times, settings, seed)
    with_baseline = {dataset: datasets[dataset] for dataset in present}
    found, missing_budgets = _budget_panels(cells, with_baseline, settings, budgets, main)
    scored = {panel.dataset: panel for panel in found}
    rows = _all_rows(panels, scored, costs, settings, seed, controls, seconds_of(timed))
    tables = {name: pd.DataFrame(rows[name]) for name in rows}
    margins = add_margin_verdicts(tables.pop("control_margins"))
    tables["controls"] = add_verdicts(tables["controls"], settings, margins)
    arms, missing_arms = _numerics(cells, with_baseline, settings, seed, numerics, main)
    tables["numerics"] = pd.DataFrame(arms)
    for name, table in _budgets(found, settings, seed, costs, own_weighting, fits or {}).items():
        tables[name] = pd.DataFrame(table)
    missing += missing_arms + missing_budgets
    tables["noninferiority"] = add_margin_verdicts(tables["noninferiority"])
    tables["paired"] = add_verdicts(tables["paired"], settings, tables["noninferiority"])
    tables["matched_compute"] = add_verdicts(tables["matched_compute"], settings)
    everything = {
        panel.dataset: _with_compared(panel.joined(scored.get(panel.dataset)), cells, declared)
        for panel in panels
    }
    experts = {name: costs.experts(name) for name in everything}
    tables["primary"] = pd.DataFrame(
        primary_rows(everything, declared, controls, settings, seed, experts)
    )
    tables["timing"] = pd.DataFrame(timed)
    tables["missing"] = pd.DataFrame(missing).drop_duplicates()
    return {name: tables[name].reindex(columns=list(columns)) for name, columns in TABLES.items()}


def _with_compared(panel: Panel, cells: Path, declared: Sequence[Declared]) -> Panel:
    """Return a panel with the cells that only a declared contrast needs, if they are there."""
    wanted = {
        name
        for one in declared
        for name in (one.strategy, one.against)
        if one.dataset == panel.dataset and cell_path(cells, name, panel.dataset).is_file()
    }
    more = sorted(wanted - {*panel.strategies})
    if not more:
        return panel
    loaded = load_cells(cells, [panel.strategies[0], *more], {panel.dataset: panel.task})
    return panel.joined(make_panel(loaded, panel.main))


def _times(times: pd.DataFrame | None, settings: StatisticsConfig, seed: int) -> Rows:
    """Return the rows of measured times; none without them."""
    if times is None or times.empty:
        return []
    return timing_rows(times, settings.baseline, settings.confidence, settings.resamples, seed)


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


def _budget_panels(
    cells: Path,
    datasets: Mapping[str, str],
    settings: StatisticsConfig,
    budgets: Sequence[str],
    main: Mapping[str, str],
) -> tuple[list[Panel], Rows]:
    """Return the cells of budgets and of their references, and rows about what is missing."""
    if not budgets:
        return [], []
    references = [reference_of(scale, settings.baseline) for scale in (UNSCALED, SCALED)]
    wanted = list(dict.fromkeys([settings.baseline, *budgets]))
    present, missing = find_cells(cells, wanted, datasets, settings.baseline)
    panels = []
    for dataset, names in present.items():
        extra = [
            name
            for name in references
            if name not in names and cell_path(cells, name, dataset).is_file()
        ]
        loaded = load_cells(cells, [*names, *extra], {dataset: datasets[dataset]})
        panels.append(make_panel(loaded, main.get(dataset)))
    return panels, missing


def _budgets(
    panels: Sequence[Panel],
    settings: StatisticsConfig,
    seed: int,
    costs: _Costs,
    own_weighting: str,
    fits: Mapping[str, Mapping[str, Any]],
) -> dict[str, Rows]:
    """Return the rows of rules at matched budgets, and of their levers."""
    tables: dict[str, Rows] = {"matched_budgets": [], "levers": []}
    for panel in panels:
        experts = costs.experts(panel.dataset)
        tables["matched_budgets"] += budget_rows(
            panel, settings, seed, experts, own_weighting, fits
        )
        tables["levers"] += lever_rows(panel, settings, seed, experts, own_weighting)
    return tables


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
    table: pd.DataFrame, settings: StatisticsConfig, margins: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Add adjusted p-values and verdicts to a table of differences.

    Args:
        table: columns strategy, dataset, metric, main, difference, p_value, higher_is_better,
            identical.
        settings: the level.
        margins: the table of non-inferiority with its adjusted p-values, if verdicts depend on it.
    """
    table = _adjusted(table)
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


def add_margin_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Add adjusted p-values and conclusions to the table of non-inferiority."""
    table = _adjusted(table)
    if not table.empty:
        table["p_tost_adjusted"] = adjust(table["p_tost"], table["family"])
        table["noninferior"] = table["p_adjusted"] <= table["alpha"]
        table["equivalent"] = table["p_tost_adjusted"] <= table["alpha"]
    return table


def _adjusted(table: pd.DataFrame) -> pd.DataFrame:
    """Add the family of each row and the p-value adjusted within it.

    The main metric of a data set is corrected by Holm within that data set; all other metrics
    together by the method of Benjamini and Hochberg. Declared contrasts are in ``primary.csv``.
    """
    if table.empty:
        return table
    table = table.copy()
    table["family"] = np.where(table["main"].astype(bool), table["dataset"], EXPLORATORY)
    if "p_value" not in table:  # every strategy lies outside the curve
        table["p_value"] = np.nan
    table["p_adjusted"] = adjust(table["p_value"], table["family"])
    return table


def _all_rows(
    panels: Sequence[Panel],
    scored: Mapping[str, Panel],
    costs: _Costs,
    settings: StatisticsConfig,
    seed: int,
    controls: Mapping[str, Control],
    seconds: Mapping[str, float],
) -> dict[str, Rows]:
    """Return the rows of every table; ``control_margins`` are the non-inferiority of controls.

    ``scored`` has the cells of budgets and levers by data set, which may be bases of controls.
    """
    names = ("paired", "noninferiority", "matched_compute", "pareto", "pareto_time", "power")
    rows: dict[str, Rows] = {name: [] for name in (*names, "controls", "control_margins")}
    kinds = control_kinds()
    for everything in panels:
        panel = everything.only(s for s in everything.strategies if s not in controls)
        for contrast in contrasts(panel, settings, seed):
            rows["paired"] += paired_rows(contrast)
            rows["noninferiority"] += noninferiority_rows(contrast)
        rows["power"] += power_rows(panel, settings)
        experts = costs.experts(panel.dataset)
        on_curves = everything.only(
            s
            for s in everything.strategies
            if s not in controls or kinds[controls[s].kind].on_curves
        )
        rows["matched_compute"] += matched_rows(
            on_curves, settings, seed, costs.static, costs.curve_of, experts
        )
        with_bases = everything.joined(scored.get(everything.dataset))
        found, margins = control_rows(with_bases, controls, settings, seed, experts)
        rows["controls"] += found
        rows["control_margins"] += margins
        rows["pareto"] += pareto_rows(on_curves, settings, seed, experts, "mean_experts")
        if seconds:
            time = "seconds_per_1000_tokens"
            rows["pareto_time"] += pareto_rows(on_curves, settings, seed, seconds, time)
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

    def _column(self, dataset: str, values: pd.Series) -> dict[str, float]:
        chosen = (self.table["dataset"] == dataset) & np.isfinite(values.astype(float))
        names = self.table.loc[chosen, "strategy"]
        return dict(zip(names, values[chosen].astype(float), strict=True))


def _read_times(path: Path) -> pd.DataFrame:
    """Return measured times; a study without the stage has none."""
    if not path.is_file():
        return pd.DataFrame()
    with reading(path, "a table of times"):
        return pd.read_csv(path)


def _read_overview(path: Path) -> pd.DataFrame:
    with reading(path, "the table of cells"):
        table = pd.read_csv(path)
    for name in ("strategy", "family", "k", "weighting", "dataset", "mean_experts"):
        if name not in table:
            raise InputError(f"{path}: column '{name}' is missing")
    return table
