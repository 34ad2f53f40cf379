"""Paired differences from the baseline, as the statistics of a study compute them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_routing.analysis.tables import rows_of
from moe_routing.commands.receipt import Section
from moe_routing.statistics.contrasts import contrasts, noninferiority_rows, paired_rows
from moe_routing.statistics.study_tables import add_margin_verdicts, add_verdicts

if TYPE_CHECKING:
    from moe_routing.config.study import StatisticsConfig
    from moe_routing.statistics.cells import Panel

NOTE = (
    "A difference is strategy minus baseline on the same items, with its {level:g} % interval, of "
    "accuracies in percentage points. P-values are adjusted: those of a task's main metric by Holm "
    "within the task, all others together by Benjamini and Hochberg. The verdicts 'non-inferior' "
    "and 'worse within margin' rule out a loss of {accuracy:g} percentage points or {nats:g} nats "
    "per token."
)


@dataclass(frozen=True)
class Differences:
    """Differences and tests of non-inferiority, one row per strategy, task and metric."""

    paired: pd.DataFrame
    noninferiority: pd.DataFrame

    @property
    def record(self) -> dict[str, object]:
        """Both tables as plain rows."""
        return {
            "differences": self.paired.to_dict("records"),
            "noninferiority": self.noninferiority.to_dict("records"),
        }


def differences(panels: Sequence[Panel], settings: StatisticsConfig, seed: int) -> Differences:
    """Compare every strategy with the baseline on every metric of every task."""
    paired: list[dict[str, Any]] = []
    margins: list[dict[str, Any]] = []
    for panel in panels:
        for contrast in contrasts(panel, settings, seed):
            paired += paired_rows(contrast)
            margins += noninferiority_rows(contrast)
    noninferiority = add_margin_verdicts(pd.DataFrame(margins))
    return Differences(add_verdicts(pd.DataFrame(paired), settings, noninferiority), noninferiority)


def difference_section(found: Differences, task: str, settings: StatisticsConfig) -> Section:
    """Return the table of one task's differences."""
    rows = [
        {
            "strategy": row.strategy,
            "metric": row.metric,
            "baseline": _value(row, row.baseline_value),
            "value": _value(row, row.value),
            "difference": f"{_value(row, row.difference, '+')} "
            f"[{_value(row, row.low, '+')}, {_value(row, row.high, '+')}]",
            "p": f"{row.p_adjusted:.3g}",
            "verdict": row.verdict,
            "lost": _count(row, "lost"),
            "gained": _count(row, "gained"),
            "McNemar p": f"{row.p_mcnemar:.3g}" if _has(row, "p_mcnemar") else "",
        }
        for row in rows_of(found.paired[found.paired["dataset"] == task])
    ]
    return Section(f"{task}: differences from {settings.baseline}", "", pd.DataFrame(rows))


def explanation(settings: StatisticsConfig) -> str:
    """Return what the tables of differences show."""
    return NOTE.format(
        level=100 * settings.confidence,
        accuracy=100 * settings.margin_accuracy,
        nats=settings.margin_nats,
    )


def _value(row: Any, value: float, sign: str = "") -> str:  # noqa: ANN401 (a row of a table)
    if _has(row, "lost"):
        return f"{100 * value:{sign}.2f}"
    return f"{value:{sign}.4f}"


def _count(row: Any, name: str) -> str:  # noqa: ANN401 (a row of a table)
    return f"{getattr(row, name):.0f}" if _has(row, name) else ""


def _has(row: Any, name: str) -> bool:  # noqa: ANN401 (a row of a table)
    return bool(np.isfinite(getattr(row, name, np.nan)))
