"""Measured time: medians over interleaved repeats, and their ratio to the baseline's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from moe_routing.errors import InputError
from moe_routing.statistics.bootstrap import Array
from moe_routing.statistics.comparison import named_rng
from moe_routing.statistics.contrasts import ResultRow

COLUMNS = ("strategy", "repeat", "seconds", "tokens")


def timing_rows(
    table: pd.DataFrame, baseline: str, confidence: float, resamples: int, seed: int
) -> list[ResultRow]:
    """Return one row per strategy: median seconds, and the median ratio to the baseline.

    Repeats are interleaved: in each one, every strategy reads the same text once. The ratio is
    taken within repeats, so that a slow minute of the machine counts for both. Intervals are
    percentiles of the bootstrap over repeats; from few repeats they reach from the smallest to the
    largest.

    Args:
        table: ``efficiency/timing.csv``: strategy, repeat, seconds, tokens.
        baseline: the strategy that ratios are over.
        confidence: level of the intervals.
        resamples: number of bootstrap resamples.
        seed: seed of the study.

    Raises:
        InputError: a column is missing, the baseline was not timed, or a strategy lacks a repeat.

    >>> rows = [("stock", 0, 2.0, 10), ("stock", 1, 4.0, 10), ("a", 0, 1.0, 10), ("a", 1, 2.0, 10)]
    >>> found = timing_rows(pd.DataFrame(rows, columns=list(COLUMNS)), "stock", 0.95, 100, 0)
    >>> [(row["strategy"], row["median_seconds"], row["ratio"]) for row in found]
    [('stock', 3.0, 1.0), ('a', 1.5, 0.5)]
    """
    lacking = [name for name in COLUMNS if name not in table]
    if lacking:
        raise InputError(
            f"efficiency/timing.csv lacks the column '{lacking[0]}'; needed: {', '.join(COLUMNS)}"
        )
    seconds_RS = table.pivot_table(index="repeat", columns="strategy", values="seconds", sort=False)
    if baseline not in seconds_RS:
        raise InputError(f"efficiency/timing.csv has no row of the baseline '{baseline}'")
    lacking = seconds_RS.columns[seconds_RS.isna().any()]
    if len(lacking):
        raise InputError(
            f"efficiency/timing.csv: '{lacking[0]}' lacks a repeat; every strategy has the same"
        )
    tokens = table.groupby("strategy")["tokens"].first()
    values_RS = seconds_RS.to_numpy()
    ratio_RS = values_RS / seconds_RS[[baseline]].to_numpy()
    repeats = len(values_RS)
    drawn = named_rng(seed, "timing").integers(0, repeats, size=(resamples, repeats))
    limits, ratios = (_limits(x_RS, drawn, confidence) for x_RS in (values_RS, ratio_RS))
    return [
        {
            "strategy": name,
            "repeats": repeats,
            "median_seconds": float(np.median(values_RS[:, s])),
            "low": limits[0][s],
            "high": limits[1][s],
            "seconds_per_1000_tokens": 1000 * float(np.median(values_RS[:, s])) / tokens[name],
            "ratio": float(np.median(ratio_RS[:, s])),
            "ratio_low": ratios[0][s],
            "ratio_high": ratios[1][s],
        }
        for s, name in enumerate(map(str, seconds_RS.columns))
    ]


def _limits(value_RS: Array, drawn: np.ndarray, confidence: float) -> tuple[Array, Array]:
    """Return percentiles of resampled medians, each (S,)."""
    tail = (1 - confidence) / 2
    median_BS = np.median(value_RS[drawn], axis=1)
    low_S, high_S = np.quantile(median_BS, [tail, 1 - tail], axis=0)
    return low_S, high_S


def seconds_of(rows: list[ResultRow]) -> Mapping[str, float]:
    """Return the seconds per 1,000 tokens of each timed strategy, the cost of a Pareto front."""
    return {row["strategy"]: row["seconds_per_1000_tokens"] for row in rows}
