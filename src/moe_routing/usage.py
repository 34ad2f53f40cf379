"""Time and memory used by a job, reported in the last line of its log.

The times are kept in this module, since they belong to the process as a whole.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

LINE = (
    "usage: {wall:.2f} s, {cpu:.2f} s of CPU "
    "(start-up {start:.2f} s, loading {loading:.2f} s), peak memory {peak:.0f} MB"
)
_seconds = {"start": 0.0, "loading": 0.0}
_began = time.perf_counter() - time.process_time()
"""Approximate start of the process: until now, CPU time and wall-clock time are nearly equal."""


def started() -> None:
    """Mark the end of start-up, when the imports are done."""
    _seconds["start"] = time.process_time()


@contextmanager
def loading() -> Iterator[None]:
    """Measure the loading of a model."""
    before = time.process_time()
    yield
    _seconds["loading"] += time.process_time() - before


def usage_line() -> str:
    """Return the time and peak resident memory used by this process and its finished children.

    On Windows, which does not report them, memory and child processes count as 0.
    """
    cpu, peak = time.process_time(), 0.0
    if sys.platform != "win32":
        import resource

        own, children = (
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        cpu += children.ru_utime + children.ru_stime
        # Kilobytes on Linux, bytes on macOS.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = max(own.ru_maxrss, children.ru_maxrss) / unit
    return LINE.format(wall=time.perf_counter() - _began, cpu=cpu, peak=peak, **_seconds)
