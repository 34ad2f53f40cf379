"""Time and memory of a finished study by rule: reads its folder, runs nothing.

    python benchmarks/study.py                                   # results/default
    python benchmarks/study.py --results results/default --json study.json

Read from each job's log under ``logs/``, whose last line states what the job used:

- rules: jobs, wall and CPU seconds, the CPU seconds of start-up (Python and imports) and of loading
  the model, and the largest peak of a job's memory.
- study: wall clock from the start of the first job to the end of the last, meaningful if the study
  ran without interruption; CPU seconds of all jobs, and the proportion of start-up and loading.
  Snakemake's own time is in the wall clock only.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from measure import show

from moe_routing.cli import run
from moe_routing.errors import InputError
from moe_routing.usage import LINE, LOADING

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {
    "wall": "wall seconds",
    "cpu": "CPU seconds",
    "start": "start-up",
    "loading": "loading",
    "peak": "peak MB",
}
SUMS = list(COLUMNS.values())[:-1]


def read_jobs(results: Path) -> pd.DataFrame:
    """Return one row per job: rule, job, what it used, and when it ended.

    A job of ``logs/<rule>.log`` is named like its rule; one of ``logs/<rule>/<job>.log`` by its
    wildcards.

    Raises:
        InputError: no such files, or one of a job that did not succeed.
    """
    folder = results / "logs"
    files = sorted(folder.rglob("*.log"))
    if not files:
        raise InputError(f"{folder}: no .log file; the study's jobs write them")
    jobs = []
    for path in files:
        rule, *rest = path.relative_to(folder).with_suffix("").parts
        jobs.append(
            {
                "rule": rule,
                "job": "/".join(rest) or rule,
                **_used(path),
                "end": path.stat().st_mtime,
            }
        )
    return pd.DataFrame(jobs)


def _used(path: Path) -> dict[str, float]:
    """Read the last line of a log, and what it says of the loading of models before that."""
    *earlier, last = path.read_text(encoding="utf-8").rstrip().split("\n")
    match = re.fullmatch(_pattern(LINE), last)
    if match is None:
        raise InputError(f"{path}: its last line does not begin with 'usage:'; did the job end?")
    loadings = filter(None, (re.fullmatch(_pattern(LOADING), line) for line in earlier))
    used = {"loading": sum(float(loading["cpu"]) for loading in loadings), **match.groupdict()}
    return {column: float(used[name]) for name, column in COLUMNS.items()}


def _pattern(line: str) -> str:
    """Return the regular expression that reads what a format string wrote."""
    return re.sub(r"\\{(\w+):[^}]*\\}", r"(?P<\1>[0-9.]+)", re.escape(line))


def rules_table(jobs: pd.DataFrame) -> list[dict]:
    """Sum the jobs by rule, the most expensive rule first, and in total."""
    groups = jobs.groupby("rule")
    rules = groups[SUMS].sum()
    rules["peak MB"] = groups["peak MB"].max()
    rules.insert(0, "jobs", groups.size())
    rules = rules.sort_values("CPU seconds", ascending=False)
    rules["proportion of CPU"] = rules["CPU seconds"] / rules["CPU seconds"].sum()
    rows = rules.reset_index().to_dict("records")
    total = {**rules.sum(), "jobs": len(jobs), "peak MB": float(rules["peak MB"].max())}
    return [*rows, {"rule": "all", **total}]


def study_table(jobs: pd.DataFrame) -> list[dict]:
    """Return the study's wall clock, the CPU time of its jobs, and the proportion of start-up."""
    wall = jobs["end"].max() - (jobs["end"] - jobs["wall seconds"]).min()
    cpu = jobs["CPU seconds"].sum()
    return [
        {
            "wall minutes": wall / 60,
            "CPU minutes": cpu / 60,
            "proportion of start-up and loading": (jobs["start-up"] + jobs["loading"]).sum() / cpu,
            "largest peak MB": jobs["peak MB"].max(),
        }
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Read, sum, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "default")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args(argv)
    jobs = read_jobs(arguments.results)
    record = {"arguments": vars(arguments), "rules": rules_table(jobs)}
    record["study"] = study_table(jobs)
    record["jobs"] = jobs.sort_values("CPU seconds", ascending=False).to_dict("records")
    show(record, arguments.json)


if __name__ == "__main__":
    run(lambda _: main())
