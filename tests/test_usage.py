"""The last line of a job's log."""

from __future__ import annotations

import re
import subprocess
import sys

PROGRAM = """
import time
from moe_routing.usage import loading, started, usage_line

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

burn(0.2)
started()
with loading():
    burn(0.3)
burn(0.1)
memory = bytearray(200 << 20)
print(usage_line())
"""


def test_usage_of_a_process():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    numbers = [float(number) for number in re.findall(r"[0-9.]+(?= s| MB)", done.stdout)]
    wall, cpu, start, loading, peak = numbers
    assert 0.2 <= start <= cpu - 0.39
    assert 0.3 <= loading <= cpu - start
    assert cpu >= 0.6
    assert wall >= 0.6
    assert 200 < peak < 2000
