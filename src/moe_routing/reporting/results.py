"""The results folder of a study, read once: the source of every text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from moe_routing.analysis.tables import read_csv, rows_of
from moe_routing.config.study import StudyConfig, load_config
from moe_routing.errors import InputError
from moe_routing.files import read_json, reading
from moe_routing.reporting.pages import CERTIFICATES
from moe_routing.routing.certificate import Certificate
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import Strategy, static_families
from moe_routing.statistics.chance import at_chance
from moe_routing.statistics.mixture import differences
from moe_routing.statistics.rules import with_kinds
from moe_routing.vocabulary import DIVERGENCE

SMALL_MODEL = 100_000_000
"""Below this many parameters the text calls a model small; published MoE models are larger."""

STATISTICS = (
    "paired", "noninferiority", "matched_compute", "pareto", "pareto_time", "power",
    "primary", "missing", "controls", "numerics", "matched_budgets", "levers", "timing",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """The model under study, as ``model.json`` describes it.

    Attributes:
        path: folder or hub id.
        revision: pinned commit of the hub, if any.
        architecture: class name.
        layers: number of layers.
        experts: experts per layer.
        rule: its own routing rule.
        parameters: number of weights, if known.
        weights_sha256: hash over its weight files.
    """

    path: str
    revision: str | None
    architecture: str
    layers: int
    experts: int
    rule: ModelRule
    parameters: int | None
    weights_sha256: str

    @property
    def top_k(self) -> int:
        """Experts per token that it was trained with."""
        return self.rule.top_k

    @property
    def name(self) -> str:
        """Last part of the path: OLMoE-1B-7B-0924."""
        return self.path.rstrip("/").split("/")[-1]

    @property
    def is_small(self) -> bool:
        """Whether it is far below the size of models in use."""
        return self.parameters is not None and self.parameters < SMALL_MODEL

    @property
    def phrase(self) -> str:
        """Its name in text, which calls a small model small."""
        if self.parameters is None or not self.is_small:
            return self.name
        return f"a small model ({self.name}, {self.parameters / 1e6:.0f} million parameters)"

    @property
    def topology(self) -> str:
        """Its numbers of layers and experts, in words."""
        return f"{self.layers} layers, {self.experts} experts per layer, top-{self.top_k}"


@dataclass(frozen=True)
class StudyResults:
    """The results of a study: config, model and all tables of its folder.

    Attributes:
        folder: the results folder.
        config: the resolved config.
        model: the model.
        cells: ``comparison/full_routing_results.csv``.
        metrics: ``comparison/all_metrics.csv``.
        statistics: tables under ``statistics/`` by name; empty if not written.
        controls: ``comparison/controls.csv``, the cells scored in addition to the comparison; empty
            if it was not written.
        levers: ``comparison/levers.csv``, the cells of levers; empty if it was not written.
    """

    folder: Path
    config: StudyConfig
    model: Model
    cells: pd.DataFrame
    metrics: pd.DataFrame
    statistics: dict[str, pd.DataFrame] = field(default_factory=dict)
    controls: pd.DataFrame = field(default_factory=pd.DataFrame)
    levers: pd.DataFrame = field(default_factory=pd.DataFrame)

    @classmethod
    def load(cls, folder: Path | str) -> StudyResults:
        """Read a results folder.

        Raises:
            InputError: the folder, its config, ``model.json`` or the table of cells is missing.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such results folder")
        comparison = folder / "comparison"
        return cls(
            folder=folder,
            config=load_config(folder / "config.yaml"),
            model=read_model(folder / "model.json"),
            cells=read_table(comparison / "full_routing_results.csv"),
            metrics=read_table(comparison / "all_metrics.csv"),
            statistics={
                name: _optional(folder / "statistics" / f"{name}.csv") for name in STATISTICS
            },
            controls=_optional(comparison / "controls.csv"),
            levers=_optional(comparison / "levers.csv"),
        )

    @property
    def baseline(self) -> str:
        """The strategy that all others are compared with."""
        return self.config.statistics.baseline

    @property
    def strategies(self) -> dict[str, Strategy]:
        """Every strategy that is scored by id, with what it leaves to the model filled in."""
        rule = self.model.rule
        return {name: strategy.resolved(rule) for name, strategy in self.config.parsed.items()}

    @property
    def duplicates(self) -> dict[str, str]:
        """Strategies that are the same routing as another on this model, which they map to."""
        return self.config.duplicates(self.model.rule)

    @property
    def distinct_cells(self) -> pd.DataFrame:
        """The cells of every compared strategy that is not a duplicate."""
        return self.cells[~self.cells["strategy"].isin(self.duplicates)]

    @property
    def datasets(self) -> list[str]:
        """Evaluation sets that have cells, in config order."""
        return list(self.cells["dataset"].drop_duplicates())

    @property
    def families(self) -> list[str]:
        """Families of strategies that have cells."""
        return list(self.cells["family"].drop_duplicates())

    @property
    def family_of(self) -> dict[str, str]:
        """Family of every strategy that has cells, controls, levers and budgets included."""
        parts = (self.cells, self.controls, self.levers, self.table("comparison/budgets.csv"))
        return {row.strategy: row.family for part in parts for row in rows_of(part)}

    @property
    def main_measures(self) -> dict[str, str]:
        """The main measure of each data set in tests, by the config."""
        main = self.config.main_metrics
        return {name: main[name] for name in self.datasets}

    def at_chance(self, dataset: str, metric: str) -> bool:
        """Return whether the baseline's accuracy cannot be distinguished from guessing."""
        rows = self.metrics
        own = rows[(rows["strategy"] == self.baseline) & (rows["dataset"] == dataset)]
        low = own.loc[own["metric"] == metric, "ci_low"]
        return any(at_chance(dataset, metric, value) for value in low)

    @property
    def static_curve(self) -> pd.DataFrame:
        """Cells of static top-k with the model's weighting, controls included, by ascending k."""
        parts = [part for part in (self.cells, self.controls) if not part.empty]
        static = [entry.name for entry in static_families().values()]
        both = pd.concat([part[part["family"].isin(static)] for part in parts])
        both = both[both["weighting"] == self.model.rule.weighting]
        both = both.drop_duplicates(["k", "dataset"])
        return both.sort_values("k", kind="stable").reset_index(drop=True)

    @property
    def budgets(self) -> pd.DataFrame:
        """``statistics/matched_budgets.csv`` with the kind of each row, stock left out."""
        table = self.statistics.get("matched_budgets", pd.DataFrame())
        return with_kinds(table, self.model.rule.weighting)

    @property
    def certificates(self) -> dict[str, Certificate]:
        """The certificate of each strategy that has one, by id, in config order."""
        folder = self.folder / CERTIFICATES
        paths = {name: folder / f"{name}.json" for name in self.config.scored}
        return {name: Certificate.load(path) for name, path in paths.items() if path.is_file()}

    @property
    def compared_metrics(self) -> pd.DataFrame:
        """Rows of ``metrics`` of the compared strategies, without controls."""
        return self.metrics[self.metrics["strategy"].isin(self.cells["strategy"])]

    @property
    def divergence(self) -> pd.Series:
        """KL divergence from the baseline in nats per token, by distinct strategy and data set."""
        rows = self.compared_metrics
        rows = rows[(rows["metric"] == DIVERGENCE.name) & ~rows["strategy"].isin(self.duplicates)]
        return rows.set_index(["strategy", "dataset"])["value"]

    def cell(self, strategy: str, dataset: str) -> pd.Series:
        """Return one row of the table of cells.

        Raises:
            InputError: there is no such cell.
        """
        rows = self.cells.query("strategy == @strategy and dataset == @dataset")
        if rows.empty:
            raise InputError(f"{self.folder}: no cell of '{strategy}' on '{dataset}'")
        return rows.iloc[0]

    def provenance(self) -> dict:
        """Return the provenance of the first cell; only the data differ between cells."""
        first = self.cells.iloc[0]
        path = self.folder / "cells" / first["strategy"] / f"{first['dataset']}.json"
        return read_json(path)["provenance"]

    @property
    def mixed(self) -> list[str]:
        """What differs between the cells in how they were made, as sentences; usually nothing."""
        made_with = self.table("comparison/provenance.csv")
        return [] if made_with.empty else differences(made_with)

    def table(self, path: str) -> pd.DataFrame:
        """Read another table of the folder; empty if it was not written."""
        return _optional(self.folder / path)


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that has rows.

    Raises:
        InputError: the file is missing or empty.
    """
    table = read_csv(path)
    if table.empty:
        raise InputError(f"{path}: the table has no rows")
    return table


def read_model(path: Path) -> Model:
    """Read ``model.json``.

    Raises:
        InputError: the file is missing, not JSON, or lacks a key.
    """
    values = read_json(path)
    try:
        return Model(
            path=values["path"],
            revision=values.get("revision"),
            architecture=values["architecture"],
            layers=values["num_layers"],
            experts=values["num_experts"],
            rule=ModelRule.of(values),
            parameters=values.get("parameters"),
            weights_sha256=values["weights_sha256"],
        )
    except KeyError as error:
        raise InputError(f"{path}: key {error} is missing") from error


def _optional(path: Path) -> pd.DataFrame:
    if not path.is_file():
        return pd.DataFrame()
    with reading(path, "a CSV table") as present:
        # What pandas writes of a table without columns.
        if present.read_bytes() == b"\n":
            return pd.DataFrame()
    return read_csv(path)
