"""A job that is a fork does what a job in a Python of its own does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm_python import warm_python
from workflow_runs import offline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are made on Linux only")
JOB = """
import os, sys, time
import beside, packaged
print(sys.argv, os.getcwd(), os.environ["NOTE"], __name__, flush=True)
with open(os.environ["NOTE"], "w") as note:
    note.write(f"{os.getpid()} {'decimal' in sys.modules}")
"""


@pytest.fixture(scope="module")
def paths():
    """A PATH with a Python of its own for each job, and one whose jobs are forks."""
    own = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with warm_python(offline(), imports=["decimal"]) as warm:
        yield own, warm


@pytest.fixture
def start(tmp_path):
    """A function that starts a script, which imports a module beside it and one of a package."""
    for path in ("scripts/beside.py", "src/packaged.py"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()

    def run(path, end):
        (tmp_path / "scripts" / "job.py").write_text(JOB + end)
        settings = {"PATH": path, "PYTHONPATH": f"{tmp_path}/src", "NOTE": f"{tmp_path}/note"}
        return subprocess.Popen(
            ["/bin/sh", "-c", "python scripts/job.py --a 'b c'"], cwd=tmp_path, text=True,
            env=offline(**settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('no more')", 1, "no more"),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_a_fork_ends_as_a_python_of_its_own(paths, start, tmp_path, end, code, said):
    outputs = []
    for path, forked in zip(paths, (False, True), strict=True):
        job = start(path, end)
        output, errors = job.communicate()
        assert job.returncode == code
        assert said in errors
        assert (tmp_path / "note").read_text().endswith(f" {forked}")
        outputs.append(output)
    assert outputs[0] == outputs[1] != ""


def test_a_fork_that_dies_is_a_job_that_fails(paths, start):
    job = start(paths[1], "os.abort()")
    job.communicate()
    assert job.returncode == 1


def test_a_fork_and_what_it_started_end_with_the_job_that_is_killed(paths, start):
    child = "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
    job = start(paths[1], f"{child}print(os.getpid(), child.pid, flush=True)\ntime.sleep(600)")
    assert "job.py" in job.stdout.readline()
    started = [Path("/proc", number) for number in job.stdout.readline().split()]
    assert [path.exists() for path in started] == [True, True]
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    deadline = time.monotonic() + 60
    while any(path.exists() for path in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)
