"""Where the time of a finished study went: reads its folder, runs nothing.

    python benchmarks/study.py                                   # results/default
    python benchmarks/study.py --results results/default --json study.json

From the files under ``benchmarks/`` that Snakemake writes at the end of each job, and the timings
in ``cells/``:

- rules: jobs, wall and CPU seconds, and the highest peak of memory (resident set) of a job.
  Snakemake looks at a job every half minute, so that CPU seconds are of the last look: too few.
- scoring: for the jobs that score, what is left of their wall time when scoring itself is taken
  off: process start-up, loading the model, and writing.
- study: wall clock from the start of the first of these jobs to the end of the last; of use if the
  study ran in one go. Rules that take no time worth measuring write no such file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from measure import show

from moe_routing.cli import run
from moe_routing.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {"s": "wall seconds", "cpu_time": "CPU seconds", "max_rss": "peak MB"}
SCORING_RULE = "evaluate"
SCORING_SECONDS = ("wall_seconds", "divergence_seconds")
"""Timings of a cell: scoring its items, and comparing a subset with the baseline, where it is."""


def read_jobs(results: Path) -> pd.DataFrame:
    """Return one row a job: rule, job, seconds, peak memory, and when it ended.

    A job of ``benchmarks/<rule>.tsv`` is named like its rule; one of
    ``benchmarks/<rule>/<job>.tsv`` by its wildcards. Memory is missing for jobs too short to be
    looked at.

    Raises:
        InputError: no such files, or one without Snakemake's columns.
    """
    folder = results / "benchmarks"
    files = sorted(folder.rglob("*.tsv"))
    if not files:
        raise InputError(f"{folder}: no .tsv file; Snakemake writes them when jobs end")
    jobs = []
    for path in files:
        table = pd.read_csv(path, sep="\t", na_values=["-", "NA"])
        missing = [name for name in COLUMNS if name not in table.columns]
        if missing:
            raise InputError(f"{path}: column '{missing[0]}' is missing; is it Snakemake's?")
        rule, *rest = path.relative_to(folder).with_suffix("").parts
        row = table.iloc[-1][list(COLUMNS)].rename(COLUMNS).astype(float)
        jobs.append(
            {"rule": rule, "job": "/".join(rest) or rule, **row, "end": path.stat().st_mtime}
        )
    return pd.DataFrame(jobs)


def rules_table(jobs: pd.DataFrame) -> list[dict]:
    """Sum the jobs by rule, the dearest rule first, and in all."""
    groups = jobs.groupby("rule")
    rules = groups[["wall seconds", "CPU seconds"]].sum()
    rules["peak MB"] = groups["peak MB"].max()
    rules.insert(0, "jobs", groups.size())
    rules = rules.sort_values("wall seconds", ascending=False)
    rules["share of wall"] = rules["wall seconds"] / rules["wall seconds"].sum()
    rows = _records(rules.reset_index())
    total = {**rules.sum(), "jobs": len(jobs), "peak MB": float(rules["peak MB"].max())}
    return [*rows, {"rule": "all", **total}]


def scoring_table(jobs: pd.DataFrame, results: Path) -> list[dict]:
    """Split the wall time of the scoring jobs; no row if the study has none.

    Every cell records the wall seconds of its scoring.
    """
    walls = jobs.loc[jobs["rule"] == SCORING_RULE, "wall seconds"]
    if walls.empty:
        return []
    cells = sorted((results / "cells").glob("*/*.json"))
    timings = [json.loads(path.read_text(encoding="utf-8"))["timings"] for path in cells]
    inside = sum(cell.get(name, 0.0) for cell in timings for name in SCORING_SECONDS)
    wall = walls.sum()
    return [
        {
            "jobs": len(walls),
            "cells": len(cells),
            "wall seconds": wall,
            "scoring seconds": inside,
            "start-up and loading": wall - inside,
            "its share": (wall - inside) / wall,
        }
    ]


def study_table(jobs: pd.DataFrame) -> list[dict]:
    """Return the study's wall clock and the sum of its jobs', minutes."""
    start = (jobs["end"] - jobs["wall seconds"]).min()
    total = jobs["wall seconds"].sum()
    wall = jobs["end"].max() - start
    return [{"wall minutes": wall / 60, "job minutes": total / 60, "jobs at a time": total / wall}]


def _records(frame: pd.DataFrame) -> list[dict]:
    """Return rows, with None for what is missing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def main(argv: Sequence[str] | None = None) -> None:
    """Read, sum, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "default")
    parser.add_argument("--json", type=Path, help="write everything here too")
    arguments = parser.parse_args(argv)
    jobs = read_jobs(arguments.results)
    record = {"arguments": vars(arguments), "rules": rules_table(jobs)}
    record["scoring"] = scoring_table(jobs, arguments.results)
    record["study"] = study_table(jobs)
    record["jobs"] = _records(jobs.sort_values("wall seconds", ascending=False))
    show(record, arguments.json)


if __name__ == "__main__":
    run(main)
