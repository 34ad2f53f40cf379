"""Time and memory used by a job, reported in the last line of its log."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

LINE = "usage: {wall:.2f} s, {cpu:.2f} s of CPU (start-up {start:.2f} s), peak memory {peak:.0f} MB"
"""The last line of a job that succeeds."""

LOADING = "loading: {cpu:.2f} s of CPU"
"""Written whenever a model has been loaded."""


class JobClock:
    """The clock of one job; made at the start of its process."""

    def __init__(self) -> None:
        # Until now, CPU time and wall-clock time of the process are nearly equal.
        self._began = time.perf_counter() - time.process_time()
        self._start_up = 0.0

    def started(self) -> None:
        """Mark the end of start-up, when the imports are done."""
        self._start_up = time.process_time()

    def usage_line(self) -> str:
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
            peak = max(_own_peak() or own.ru_maxrss, children.ru_maxrss) / unit
        wall = time.perf_counter() - self._began
        return LINE.format(wall=wall, cpu=cpu, start=self._start_up, peak=peak)


def _own_peak() -> int | None:
    """Return the peak memory of this process in kilobytes, where Linux tells it.

    ``ru_maxrss`` begins at the size of the process that started this one.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) if found else None
