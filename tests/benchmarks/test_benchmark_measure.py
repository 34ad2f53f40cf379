"""Timing, memory and tables of the benchmarks."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def test_runs_alternate_and_are_warmed_up(script):
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = script("measure").interleave(runs, 3)
    assert "".join(order) == "ababbaab"
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_ratios_are_within_rounds(script):
    # The machine was ten times slower in the second round, for both.
    assert script("measure").ratio([2, 20, 3], [1, 10, 3]) == 2


def test_the_peak_is_that_of_the_run(script):
    peak = script("measure").peak_megabytes
    np.ones(30 << 20)  # an earlier peak does not count
    megabytes = [peak(lambda: np.ones(100 << 17)), peak(lambda: None)]
    if platform.system() == "Linux":
        assert megabytes[0] == pytest.approx(100, abs=5)
        assert megabytes[1] < 5
    else:
        assert megabytes == [None, None]


KEPT_BY_THREADS = """
import argparse, json
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import measure

def run():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: [np.ones(1 << 20) for _ in range(5)]).result()

measure.prepare(argparse.Namespace(threads=1, allocator="keep", device="cpu"))
run()
print(json.dumps([measure.peak_megabytes(run) for _ in range(3)]))
"""


def test_memory_that_ended_threads_kept_counts_again(script):
    """In a process of its own, because the allocator is set for the whole of it."""
    folder = Path(script("measure").__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", KEPT_BY_THREADS], cwd=folder, check=True, capture_output=True
    )
    peaks = json.loads(done.stdout)
    known = 40 if platform.system() == "Linux" else None
    assert peaks == [pytest.approx(known, abs=6)] * 3


def test_tables_and_json(script, tmp_path, capsys):
    rows = [
        {"run": "a", "tokens/s": 1234.5, "proportion": 0.12345},
        {"run": "b", "proportion": None},
    ]
    path = tmp_path / "new" / "record.json"
    script("measure").show({"machine": {"cores": 2}, "scoring": rows}, path)
    out = capsys.readouterr().out
    assert (
        "| run | tokens/s | proportion |\n| --- | --- | --- |\n| a | 1,234 | 0.123 |\n| b |  |  |"
        in out
    )
    assert "machine: {'cores': 2}" in out
    assert json.loads(path.read_text())["scoring"] == rows
