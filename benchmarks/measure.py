"""What the benchmarks share: fair timing, the machine, tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "numpy", "lm_eval")


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time every run once a round, in an order that turns round; return seconds.

    What else the machine does then falls on all of them alike, and ratios within a round mean
    something where times do not.
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for turn in range(rounds):
        names = list(runs) if turn % 2 == 0 else list(runs)[::-1]
        for name in names:
            wait()
            started = time.perf_counter()
            runs[name]()
            wait()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return the median over rounds of how many times faster the second is."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def machine(device: str, threads: int) -> dict[str, object]:
    """Return what the numbers depend on."""
    allocator = {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "allocator": allocator or "default",
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def sgemm_rate(threads: int, size: int = 1024, repeats: int = 9) -> float:
    """Return floating-point operations a second of a square single-precision product."""
    torch.set_num_threads(threads)
    left, right, out = (torch.rand(size, size) for _ in range(3))
    seconds = interleave({"mm": lambda: torch.mm(left, right, out=out)}, repeats)["mm"]
    return 2 * size**3 / min(seconds)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return a Markdown table; the first row names the columns."""
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(_cell(row.get(name, "")) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def write(path: Path | None, record: Mapping[str, object]) -> None:
    """Write a record as JSON, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
