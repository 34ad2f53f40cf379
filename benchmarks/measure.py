"""Shared by the benchmarks: options, fair timing, memory, the machine, tables."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "numpy", "lm_eval")
MALLOPT = {"M_TRIM_THRESHOLD": -1, "M_TOP_PAD": -2, "M_MMAP_THRESHOLD": -3}
"""Numbers of glibc's parameters."""
KEEP_MEMORY = {"M_TRIM_THRESHOLD": 1 << 30, "M_TOP_PAD": 64 << 20, "M_MMAP_THRESHOLD": 32 << 20}
"""Buffers of up to 32 MB, the most that glibc allows, are reused instead of returned and faulted in
again."""
RETURN_MEMORY = {"M_TRIM_THRESHOLD": 0, "M_TOP_PAD": 0}
"""Memory freed at the end of an arena is returned at once."""
DEFAULT_MEMORY = {"M_TRIM_THRESHOLD": 64 << 20, "M_TOP_PAD": 128 << 10}
"""glibc's own thresholds after a buffer of 32 MB was freed."""
_in_force = dict(DEFAULT_MEMORY)


def options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options that timing scripts share."""
    threads = min(2, os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:<n>")
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=rounds, help="number of runs of each")
    parser.add_argument(
        "--allocator",
        default="keep",
        choices=["keep", "default"],
        help="keep: glibc keeps freed buffers, for all alike (default)",
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")


def prepare(arguments: argparse.Namespace) -> dict[str, object]:
    """Set threads and allocator; return the machine and settings."""
    import torch

    torch.set_num_threads(arguments.threads)
    kept = arguments.allocator == "keep" and _set_allocator(KEEP_MEMORY)
    if kept:
        _in_force.update(KEEP_MEMORY)
    cuda = arguments.device.startswith("cuda")
    return {
        **machine(),
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name(arguments.device) if cuda else "cpu",
        "allocator": "freed buffers kept" if kept else "default",
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def machine() -> dict[str, object]:
    """Return the processor and the versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time every run once per round, in alternating order; return seconds.

    Runs are interleaved, so that background load affects all of them equally; ratios within a round
    are meaningful even if times are not.
    """
    wait = _waiter(device)
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


def peak_megabytes(run: Callable[[], object], device: str = "cpu") -> float | None:
    """Return the peak of memory during a run above that before it, in MiB.

    On the CPU that is resident memory. Only Linux can reset its peak; None elsewhere.
    """
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if platform.system() != "Linux":
        return None
    with _memory_returned():
        run()  # memory kept by ended threads is returned; it would hide the peak
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = _resident("VmRSS")
        run()
        return (_resident("VmHWM") - before) / 1024


def sgemm_rate(threads: int, size: int = 1024, repeats: int = 9) -> float:
    """Return floating-point operations per second of a square single-precision product."""
    import torch

    torch.set_num_threads(threads)
    left, right, out = (torch.rand(size, size) for _ in range(3))
    seconds = interleave({"mm": lambda: torch.mm(left, right, out=out)}, repeats)["mm"]
    return 2 * size**3 / min(seconds)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return a Markdown table; the first row names the columns."""
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(_cell(row.get(name)) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def show(record: Mapping[str, object], path: Path | None) -> None:
    """Print a record's tables and its other values; write it as JSON if a path is given."""
    for name, value in record.items():
        if isinstance(value, list) and value:
            print(f"{name}\n\n{table(value)}\n")
        elif name != "arguments":
            print(f"{name}: {value}\n")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, default=str)
        path.write_text(text + "\n", encoding="utf-8")


def _set_allocator(values: Mapping[str, int]) -> bool:
    """Set parameters of glibc's allocator; return whether that worked."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return all([libc.mallopt(MALLOPT[name], value) for name, value in values.items()])


@contextmanager
def _memory_returned() -> Iterator[None]:
    """Return freed memory at once, inside the context."""
    _set_allocator(RETURN_MEMORY)
    try:
        yield
    finally:
        _set_allocator(_in_force)


def _waiter(device: str) -> Callable[[], None]:
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return torch.cuda.synchronize


def _resident(field: str) -> int:
    """Return a field of this process's status, kB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cell(value: object) -> str:
    if value is None:
        return ""
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
