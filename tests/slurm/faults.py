"""Run the smoke study on a Slurm of one node, do it harm, and check that nothing is lost.

    tests/slurm/one_node.sh up
    python tests/slurm/faults.py /tmp/harmed                    # clones this repository there
    python tests/slurm/faults.py /tmp/harmed --local results/smoke   # and compares the cells' bytes

A scoring job is cancelled after its third cell, another one hangs until its time is over,
`ablation` has too little memory at first, the node is drained while jobs wait, and the main process
is killed. The study must be complete after one restart, with no cell scored twice. This takes about
a quarter of an hour on two cores, and needs root and Slurm, so it is no part of the test suite.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (
    "snakemake", "--workflow-profile", "profiles/slurm", "--configfile", "config/smoke.yaml",
    "--seconds-between-status-checks", "5",
    "--set-resources", "ablation:mem_mb=250*8**(attempt-1)",
)  # fmt: skip
DRAINED = 45.0
"""Seconds for which the node takes no jobs."""
KILLED_AT = 38
"""Finished cells, of 59, at which the main process is killed."""
PARTS = ("cells", "numerics")
"""Folders of cells."""


class Job(NamedTuple):
    """A job of squeue; ``rule`` is the comment that Snakemake gives it."""

    number: str
    state: str
    rule: str
    run: str


def ask(*command: str) -> str:
    """Return what a command of Slurm prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def queue() -> list[Job]:
    """Return the jobs that wait or run."""
    lines = ask("squeue", "--noheader", "--format=%i|%T|%k|%j").splitlines()
    return [Job(*line.split("|")) for line in lines]


def processes(job: Job, script: str) -> list[int]:
    """Return the processes of a job that run a script."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        runs_it = words[0].endswith(b"python") and any(w.endswith(script.encode()) for w in words)
        if runs_it and f"SLURM_JOB_ID={job.number}".encode() in variables:
            found.append(int(folder.name))
    return found


class Study:
    """The study that is harmed: its main process, and what it has stored so far."""

    def __init__(self, folder: Path) -> None:
        """Clone the repository, and start."""
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        self.folder, self.results = folder, folder / "results" / "smoke"
        self.written: dict[Path, set[tuple[int, int]]] = defaultdict(set)
        self.before: dict[str, int] = {}
        self.drained = 0.0
        self.faults: dict[str, Callable[[list[Job]], bool]] = {
            "cancelled": self.cancel, "hung": self.hang, "drained": self.drain,
            "resumed": self.resume, "killed": self.kill,
        }  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start the main process."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "src"), "HF_HUB_OFFLINE": "1"}
        with (self.folder / "snakemake.out").open("a") as out:
            self.main = subprocess.Popen(
                COMMAND, cwd=self.folder, env=environment, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def look(self) -> None:
        """Note which cells are stored, and each time that one is written."""
        for part in PARTS:
            for path in self.results.glob(f"store/{part}/*/*.json"):
                status = path.stat()
                self.written[path].add((status.st_ino, status.st_mtime_ns))

    def scoring(self, jobs: list[Job]) -> list[Job]:
        """Return the scoring jobs that run, and note how many cells there were at their start."""
        running = [j for j in jobs if j.state == "RUNNING" and j.rule.startswith("rule_evaluate")]
        for job in running:
            self.before.setdefault(job.number, len(self.written))
        return running

    def cancel(self, jobs: list[Job]) -> bool:
        """Cancel a scoring job during which three cells were finished."""
        for job in self.scoring(jobs):
            if len(self.written) >= self.before[job.number] + 3:
                ask("scancel", job.number)
                return True
        return False

    def hang(self, jobs: list[Job]) -> bool:
        """Stop the script of a scoring job, and leave the job a minute."""
        for job in self.scoring(jobs):
            stopped = processes(job, "evaluate.py") if "cancelled" not in self.faults else []
            for process in stopped:
                os.kill(process, signal.SIGSTOP)
            if stopped:
                ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
                return True
        return False

    def drain(self, jobs: list[Job]) -> bool:
        """Let the node take no more jobs while several wait."""
        if "cancelled" in self.faults or sum(job.state == "PENDING" for job in jobs) < 5:
            return False
        self.drained = time.monotonic()
        self._node("State=DRAIN", "Reason=fault")
        return True

    def resume(self, _: list[Job]) -> bool:
        """Let the node take jobs again."""
        if not self.drained or time.monotonic() < self.drained + DRAINED:
            return False
        self._node("State=RESUME")
        return True

    def kill(self, jobs: list[Job]) -> bool:
        """Kill the main process while jobs run, end its orphans as README says, and restart."""
        running = any(job.state == "RUNNING" for job in jobs)
        if "resumed" in self.faults or len(self.written) < KILLED_AT or not running:
            return False
        self.main.kill()
        self.main.wait()
        for run in {job.run for job in queue()}:
            ask("scancel", "--name", run)
        while queue():
            time.sleep(1)
        unlock = ["snakemake", "--unlock", "--configfile", "config/smoke.yaml"]
        subprocess.run(unlock, cwd=self.folder, check=True, capture_output=True)
        self.start()
        return True

    def _node(self, *change: str) -> None:
        name = socket.gethostname().split(".")[0]
        ask("scontrol", "update", f"NodeName={name}", *change)

    def run(self) -> None:
        """Run the study, and do each harm as soon as it can be done."""
        while self.main.poll() is None:
            self.look()
            jobs = queue()
            for name, fault in list(self.faults.items()):
                if fault(jobs):
                    del self.faults[name]
                    print(f"{time.strftime('%T')} {name}, {len(self.written)} cells", flush=True)
                    break  # what Slurm says has changed
            time.sleep(0.3)
        self.look()


def tables(results: Path) -> list[Path]:
    """Return the tables of all cells, relative to the folder."""
    found = (table for part in PARTS for table in results.glob(f"{part}/*/*.parquet"))
    return [table.relative_to(results) for table in found]


def main() -> int:
    """Run the study, and say what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the clone; must not exist")
    parser.add_argument("--local", type=Path, help="results of the smoke study without Slurm")
    arguments = parser.parse_args()
    study = Study(arguments.folder.resolve())
    study.run()
    results, cells = study.results, tables(study.results)
    table = results / "comparison" / "full_routing_results.csv"
    out = (study.folder / "snakemake.out").read_text()
    twice = [str(path) for path, times in study.written.items() if len(times) > 1]
    wrong = {
        f"the main process ended with {study.main.returncode}": study.main.returncode != 0,
        f"never happened: {', '.join(study.faults)}": bool(study.faults),
        "ablation never ran out of memory": "Error in rule ablation" not in out,
        f"written twice: {twice}": bool(twice),
        f"{len(study.written)} cells were scored for {len(cells)}": len(study.written)
        != len(cells),
        f"{table} is missing": not table.is_file(),
    }
    if local := arguments.local:
        others = [str(c) for c in cells if (results / c).read_bytes() != (local / c).read_bytes()]
        wrong[f"other bytes than in {local}: {others}"] = bool(others)
    for line in (line for line, is_wrong in wrong.items() if is_wrong):
        print(line)
    print("failed" if any(wrong.values()) else "complete, each cell scored once")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
