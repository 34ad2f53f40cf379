"""Read cells, and align those of one data set.

Shape letters: N items, C clusters, S strategies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from moe_routing.errors import InputError
from moe_routing.files import read_parquet
from moe_routing.statistics.bootstrap import Array, cluster_sums
from moe_routing.statistics.intervals import column, denominator
from moe_routing.vocabulary import METRICS, TASKS, Metric


@dataclass(frozen=True)
class ScoredCell:
    """One strategy on one data set.

    Attributes:
        strategy: strategy id.
        dataset: data set.
        task: perplexity, multiple_choice or last_word.
        items: one row per item; ids are unique.
    """

    strategy: str
    dataset: str
    task: str
    items: pd.DataFrame


def cell_path(folder: Path | str, strategy: str, dataset: str) -> Path:
    """Return where the items of a cell lie under ``results/<study>/cells``."""
    return Path(folder) / strategy / f"{dataset}.parquet"


def load_cells(
    folder: Path | str, strategies: Iterable[str], datasets: Mapping[str, str]
) -> list[ScoredCell]:
    """Read cells, data set by data set.

    Args:
        folder: ``results/<study>/cells``.
        strategies: strategy ids.
        datasets: task of each data set.

    Raises:
        InputError: a file is missing or no Parquet, lacks id or cluster, or repeats an id.
    """
    strategies = list(strategies)
    return [
        ScoredCell(strategy, dataset, task, _read_items(cell_path(folder, strategy, dataset)))
        for dataset, task in datasets.items()
        for strategy in strategies
    ]


def _read_items(path: Path) -> pd.DataFrame:
    items = read_parquet(path, "id", "cluster")
    if items.empty:
        raise InputError(f"{path}: no items; remove it and run the workflow again")
    repeated = items["id"][items["id"].duplicated()]
    if len(repeated):
        raise InputError(f"{path}: id '{repeated.iloc[0]}' occurs more than once")
    return items


@dataclass(frozen=True)
class Panel:
    """The strategies of one data set on the same items in the same order.

    Attributes:
        dataset: data set.
        task: its task.
        strategies: strategy ids.
        items: item table of each strategy, in the order of ``strategies``.
        main: name of the main metric of the data set.
    """

    dataset: str
    task: str
    strategies: tuple[str, ...]
    items: tuple[pd.DataFrame, ...]
    main: str

    @property
    def measures(self) -> list[Metric]:
        """Metrics by which strategies are compared, the main one first."""
        names = TASKS[self.task].compared
        return [METRICS[name] for name in dict.fromkeys((self.main, *names))]

    @property
    def main_measure(self) -> Metric:
        """The metric of comparison where only one can be shown."""
        return METRICS[self.main]

    def is_main(self, measure: Metric) -> bool:
        """Return whether a measure is the main one of the data set."""
        return measure.name == self.main

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.items[0])

    @property
    def clusters(self) -> np.ndarray:
        """Number of the cluster of each item, (N,)."""
        return pd.factorize(self.items[0]["cluster"])[0]

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return int(self.clusters.max()) + 1

    def only(self, strategies: Iterable[str]) -> Panel:
        """Return the panel of some strategies, in their order."""
        items = dict(zip(self.strategies, self.items, strict=True))
        names = tuple(strategies)
        return replace(self, strategies=names, items=tuple(items[name] for name in names))

    def joined(self, other: Panel | None) -> Panel:
        """Return this panel with the further strategies of another one of the same items."""
        if other is None:
            return self
        more = [name for name in other.strategies if name not in self.strategies]
        items = dict(zip(other.strategies, other.items, strict=True))
        return replace(
            self,
            strategies=(*self.strategies, *more),
            items=(*self.items, *(items[name] for name in more)),
        )

    @property
    def same_as(self) -> dict[str, str]:
        """Strategies whose items all have the log-likelihoods and experts of an earlier one.

        They route every token alike, and are counted once.
        """
        first: dict[bytes, str] = {}
        found = {}
        for name, items in zip(self.strategies, self.items, strict=True):
            columns = [c for c in ("log_likelihood", "mean_experts") if c in items]
            key = items[columns].to_numpy(dtype=float).tobytes()
            if first.setdefault(key, name) != name:
                found[name] = first[key]
        return found

    def values(self, metric: Metric) -> Array:
        """Return the numerator of a metric for each item and strategy, (N, S)."""
        columns = [
            column(items, metric.column, f"{strategy} on {self.dataset}")
            for strategy, items in zip(self.strategies, self.items, strict=True)
        ]
        return metric.sign * np.stack(columns, axis=1)

    def units(self, metric: Metric) -> Array:
        """Return the denominator of a metric for each item, (N,).

        Raises:
            InputError: strategies disagree, so that they cannot have scored the same text.
        """
        units = [
            denominator(items, metric.per, f"{strategy} on {self.dataset}")
            for strategy, items in zip(self.strategies, self.items, strict=True)
        ]
        for strategy, unit_N in zip(self.strategies, units, strict=True):
            if not np.array_equal(unit_N, units[0]):
                raise InputError(
                    f"{strategy} and {self.strategies[0]} on {self.dataset}: column "
                    f"'{metric.per}' differs; cells must score the same text"
                )
        return units[0]

    def value(self, metric: Metric, strategy: str) -> float:
        """Return a metric of one strategy."""
        items = self.items[self.strategies.index(strategy)]
        total = metric.sign * column(items, metric.column).sum()
        return float(total / self.units(metric).sum())

    def sums(self, values: Array, metric: Metric) -> tuple[Array, Array]:
        """Return values and units summed within clusters, both in the shape (C, S)."""
        value_CS = cluster_sums(values, self.clusters)
        unit_C = cluster_sums(self.units(metric), self.clusters)
        return value_CS, np.broadcast_to(unit_C[:, None], value_CS.shape)


def make_panel(cells: Iterable[ScoredCell], main: str | None = None) -> Panel:
    """Put the cells of one data set side by side, in the item order of the first.

    Args:
        cells: the cells.
        main: main metric of the data set; None: the first that its task is compared by.

    Raises:
        InputError: the items of two cells are not the same, or their clusters differ.
    """
    cells = list(cells)
    first = cells[0]
    aligned = tuple(_align(cell, first) for cell in cells)
    names = tuple(cell.strategy for cell in cells)
    main = main or TASKS[first.task].compared[0]
    return Panel(first.dataset, first.task, names, aligned, main)


def _align(cell: ScoredCell, first: ScoredCell) -> pd.DataFrame:
    label = f"{cell.strategy} and {first.strategy} on {first.dataset}"
    only_one = set(cell.items["id"]) ^ set(first.items["id"])
    if only_one:
        raise InputError(
            f"{label}: {len(only_one)} items are in one cell only, such as "
            f"'{min(map(str, only_one))}'; cells are compared on the same items"
        )
    items = cell.items.set_index("id", drop=False).loc[first.items["id"]].reset_index(drop=True)
    if not np.array_equal(items["cluster"].to_numpy(), first.items["cluster"].to_numpy()):
        raise InputError(f"{label}: column 'cluster' differs; cells are compared on the same items")
    return items
