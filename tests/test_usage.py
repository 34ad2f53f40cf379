"""The last line of a job's log."""

from __future__ import annotations

import re
import subprocess
import sys

from moe_routing.usage import JobClock

PROGRAM = """
import time
from moe_routing.usage import JobClock

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

clock = JobClock()
burn(0.2)
clock.started()
burn(0.4)
memory = bytearray(200 << 20)
print(clock.usage_line())
"""


def test_usage_of_a_process():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    numbers = [float(number) for number in re.findall(r"[0-9.]+(?= s| MB)", done.stdout)]
    wall, cpu, start, peak = numbers
    assert 0.2 <= start <= cpu - 0.39
    assert cpu >= 0.6
    assert wall >= 0.6
    assert 200 < peak < 2000


def test_each_clock_is_its_own():
    JobClock().started()
    assert "(start-up 0.00 s)" in JobClock().usage_line()


def test_the_peak_is_not_that_of_the_process_that_started_it():
    """The kernel's own figure begins at the size of the parent."""
    parent = (
        "import subprocess, sys; memory = bytearray(700 << 20); "
        "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    child = "from moe_routing.usage import JobClock; print(JobClock().usage_line())"
    done = subprocess.run(
        [sys.executable, "-c", parent, child], capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split()[-2]) < 300
