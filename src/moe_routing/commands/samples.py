"""What lm-evaluation-harness logs for each document, ready to be compared.

A file ``samples_<task>_<date>.jsonl`` has one row per document and filter. A metric is a number, or
a log-likelihood with the words or bytes that it is divided by. The files do not say which way is
better, nor in which source documents were found: higher is better but for :data:`LOWER_IS_BETTER`,
and every document is a cluster of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moe_routing.data.rows import read_rows
from moe_routing.errors import InputError
from moe_routing.statistics.cells import Panel
from moe_routing.vocabulary import Metric

LOWER_IS_BETTER = frozenset({"brier_score", "nll", "ter", "wer"})
LIKELIHOODS = frozenset({"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"})
"""Metrics whose value for a document is a log-likelihood."""

Sample = Mapping[str, Any]
"""One document under one filter."""


@dataclass(frozen=True)
class SamplePanel(Panel):
    """The arms of one task on the same documents, by one metric of the harness."""

    metric: Metric

    @property
    def measures(self) -> list[Metric]:
        """The one metric."""
        return [self.metric]


def read_samples(path: Path) -> list[Sample]:
    """Read a file of samples.

    Raises:
        InputError: no such file, not JSON lines, or not the harness's samples.
    """
    rows = read_rows(path)
    for row in rows:
        if not isinstance(row.value("metrics"), list):
            raise row.error("metrics", "is no list; allowed: samples of lm-evaluation-harness")
        row.value("doc_id")
    return [row.values for row in rows]


def sample_panels(task: str, arms: Mapping[str, Sequence[Sample]]) -> list[SamplePanel]:
    """Put the samples of several arms side by side, metric by metric.

    Args:
        task: name of the task.
        arms: samples of each arm; the first is the baseline.

    Raises:
        InputError: two arms have other documents, or no metric is a number.
    """
    tables = {name: _by_metric(samples, f"{name}: {task}") for name, samples in arms.items()}
    first, *others = arms
    panels = []
    for key, table in tables[first].items():
        for other in others:
            if key not in tables[other]:
                raise InputError(f"{other}: {task}: no metric '{key}', which {first} has")
            _check_same(table, tables[other][key], f"{other} and {first}: {task}")
        frames = tuple(
            tables[name][key].set_index("id", drop=False).loc[table["id"]].reset_index(drop=True)
            for name in arms
        )
        metric = _metric(key, frames)
        panels.append(SamplePanel(task, "samples", tuple(arms), frames, key, metric))
    if not panels:
        raise InputError(f"{first}: {task}: no metric of single documents is a number")
    return panels


def _by_metric(samples: Sequence[Sample], origin: str) -> dict[str, pd.DataFrame]:
    """Return the documents' values by metric, ``metric`` or, of several filters, ``metric,filter``.

    Metrics whose values are no numbers are left out.
    """
    filters = {sample.get("filter", "none") for sample in samples}
    rows: dict[str, list[dict[str, object]]] = {}
    for sample in samples:
        suffix = f",{sample['filter']}" if len(filters) > 1 else ""
        for metric in sample["metrics"]:
            if (value := _number(sample.get(metric))) is not None:
                rows.setdefault(f"{metric}{suffix}", []).append(_row(sample, *value))
    tables = {key: pd.DataFrame(found) for key, found in rows.items()}
    for key, table in tables.items():
        repeated = table["id"][table["id"].duplicated()]
        if len(repeated):
            raise InputError(
                f"{origin}: document {repeated.iloc[0]} has metric '{key}' twice; allowed: the "
                "samples of one run (the harness appends to a file that exists)"
            )
    return tables


def _number(value: object) -> tuple[float, float] | None:
    """Return a value and what it is divided by; None for what is no number."""
    if isinstance(value, int | float):
        return float(value), 1.0
    if isinstance(value, list | tuple) and len(value) == 2:
        pair = [part for part in value if isinstance(part, int | float)]
        return (float(pair[0]), float(pair[1])) if len(pair) == 2 and pair[1] > 0 else None
    return None


def _row(sample: Sample, value: float, unit: float) -> dict[str, object]:
    return {
        "id": str(sample["doc_id"]),
        "cluster": str(sample["doc_id"]),
        "value": value,
        "unit": unit,
        "hashes": (sample.get("doc_hash"), sample.get("target_hash")),
    }


def _check_same(one: pd.DataFrame, other: pd.DataFrame, label: str) -> None:
    """Check that two arms answered the same documents.

    Raises:
        InputError: they did not.
    """
    hashes, others = (dict(zip(t["id"], t["hashes"], strict=True)) for t in (one, other))
    if alone := hashes.keys() ^ others.keys():
        raise InputError(
            f"{label}: {len(alone)} documents are in one of them only, such as {min(alone)}; "
            "allowed: the same documents"
        )
    changed = [name for name in hashes if hashes[name] != others[name]]
    if changed:
        raise InputError(
            f"{label}: document {changed[0]} is not the same; allowed: the same documents"
        )


def _metric(key: str, frames: Sequence[pd.DataFrame]) -> Metric:
    name = key.partition(",")[0]
    values = pd.concat([frame["value"] for frame in frames])
    if name in LIKELIHOODS:
        per = {"word_perplexity": "word", "perplexity": "document"}.get(name, "byte")
        return Metric(
            key, f"nats per {per} ({key})", column="value", per="unit", unit=f"nats per {per}"
        )
    higher = name not in LOWER_IS_BETTER
    proportion = higher and bool(values.isin([0.0, 1.0]).all())
    return Metric(
        key,
        key,
        column="value",
        sign=1.0,
        is_proportion=proportion,
        higher_is_better=higher,
        margin="accuracy" if proportion else None,
        unit="percentage points" if proportion else key,
    )


def task_of(path: Path) -> str:
    """Return the task that a file of samples is named after, or the whole name without suffix."""
    parts = path.stem.split("_")
    return "_".join(parts[1:-1]) if parts[0] == "samples" and len(parts) > 2 else path.stem


def named_files(arguments: Sequence[str]) -> dict[str, Path]:
    """Return files by label, from ``LABEL=FILE`` or ``FILE``.

    Raises:
        InputError: fewer than two, or two with the same label.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        label, equals, file = argument.partition("=")
        path = Path(file if equals else argument)
        if label in found:
            raise InputError(f"--samples has '{label}' twice; allowed: each label once")
        found[label] = path
    if len(found) < 2:
        raise InputError("--samples has one file; allowed: the baseline's and at least one other")
    return found
