"""Submit jobs to PBS, SGE or LSF, ask for their status, cancel them: for profiles/generic.

    python3 cluster.py submit --system pbs --name RULE --threads 1 --memory 4000 --runtime 60 \
        --gpus 0 [options for qsub or bsub] SCRIPT     # prints the id
    python3 cluster.py status ID                       # prints running, success or failed
    python3 cluster.py cancel ID...

A job writes its own exit code, so that a job which the scheduler has forgotten is not taken for a
failed one. A job without an exit code that the scheduler does not know as waiting or running has
been killed: cancelled, out of memory or time, or with its node.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(".snakemake/cluster")
"""Records of submitted jobs, in the folder where snakemake runs."""
PATIENCE = 10.0
"""Seconds that an exit code may take to be seen on this machine after its job has gone."""


def options(system: str, job: argparse.Namespace, log: Path) -> list[str]:
    """Return the command that submits a script with what it asks for."""
    minutes, gpus = job.runtime, job.gpus
    time_limit = f"{minutes // 60}:{minutes % 60:02d}:00"
    if system == "pbs":
        chunk = f"select=1:ncpus={job.threads}:mem={job.memory}mb"
        chunk += f":ngpus={gpus}" if gpus else ""
        limits = ["-l", chunk, "-l", f"walltime={time_limit}"]
        return ["qsub", "-V", "-N", job.name[:15], "-j", "oe", "-o", str(log), *limits]
    if system == "sge":
        limits = ["-l", f"h_vmem={-(-job.memory // job.threads)}M,h_rt={time_limit}"]
        limits += ["-pe", "smp", str(job.threads)] if job.threads > 1 else []
        limits += ["-l", f"gpu={gpus}"] if gpus else []
        command = ["qsub", "-terse", "-V", "-cwd", "-N", job.name, "-j", "y", "-o", str(log)]
        return [*command, *limits]
    limits = ["-n", str(job.threads), "-M", f"{job.memory}MB", "-W", str(minutes)]
    limits += ["-R", f"rusage[mem={job.memory}MB] span[hosts=1]"]
    limits += ["-gpu", f"num={gpus}"] if gpus else []
    return ["bsub", "-J", job.name, "-o", str(log), *limits]


def submit(job: argparse.Namespace, extra: list[str]) -> str:
    """Submit a script; return the id that the scheduler gives."""
    *others, script = extra
    FOLDER.mkdir(parents=True, exist_ok=True)
    exit_code = FOLDER.absolute() / f"{Path(script).name}.{time.time_ns()}.exit"
    body = f"sh {shlex.quote(script)}\necho $? > {shlex.quote(str(exit_code))}\n"
    wrapped = exit_code.with_suffix(".sh")
    wrapped.write_text(f"#!/bin/sh\n{body}", encoding="utf-8")
    command = [*options(job.system, job, exit_code.with_suffix(".log")), *others]
    if job.system == "lsf":  # bsub reads the script
        with wrapped.open(encoding="utf-8") as stream:
            said = subprocess.run(command, stdin=stream, capture_output=True, text=True, check=True)
        found = re.search(r"Job <(\d+)>", said.stdout)
        number = found[1] if found else said.stdout.strip()
    else:
        said = subprocess.run([*command, str(wrapped)], capture_output=True, text=True, check=True)
        number = said.stdout.strip().splitlines()[-1]
    record = {"system": job.system, "exit": str(exit_code)}
    _record(number).write_text(json.dumps(record), encoding="utf-8")
    return number


def status(number: str) -> str:
    """Return running, success or failed."""
    record = json.loads(_record(number).read_text(encoding="utf-8"))
    exit_code = Path(record["exit"])
    deadline = time.monotonic() + PATIENCE
    while True:
        if exit_code.is_file() and (code := exit_code.read_text().strip()):
            return "success" if code == "0" else "failed"
        if _is_known(record["system"], number):
            return "running"
        if time.monotonic() > deadline:
            return "failed"
        time.sleep(1)


def _is_known(system: str, number: str) -> bool:
    """Return whether the scheduler has the job as waiting or running."""
    command = {
        "pbs": ["qstat", number],
        "sge": ["qstat", "-j", number],
        "lsf": ["bjobs", "-noheader", "-o", "stat", number],
    }[system]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        return False
    if system == "pbs":
        *_, row = asked.stdout.strip().splitlines()
        return row.split()[-2] not in ("C", "F", "X")
    return system == "sge" or asked.stdout.strip() not in ("DONE", "EXIT", "ZOMBI", "")


def cancel(numbers: list[str]) -> None:
    """Cancel jobs."""
    for number in numbers:
        record = json.loads(_record(number).read_text(encoding="utf-8"))
        command = "bkill" if record["system"] == "lsf" else "qdel"
        subprocess.run([command, number], check=False)


def _record(number: str) -> Path:
    return FOLDER / f"{re.sub(r'[^A-Za-z0-9._-]', '_', number)}.json"


def main() -> None:
    """Parse arguments and do it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    submitting = commands.add_parser("submit")
    submitting.add_argument("--system", choices=("pbs", "sge", "lsf"), required=True)
    submitting.add_argument("--name", required=True)
    for name in ("threads", "memory", "runtime", "gpus"):
        submitting.add_argument(f"--{name}", type=int, required=True)
    commands.add_parser("status").add_argument("id")
    commands.add_parser("cancel").add_argument("id", nargs="+")
    arguments, extra = parser.parse_known_args()
    if arguments.command == "submit":
        try:
            print(submit(arguments, extra))
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: {shlex.join(error.cmd)}: {error.stderr.strip()}")
    elif arguments.command == "status":
        print(status(arguments.id))
    else:
        cancel(arguments.id)


if __name__ == "__main__":
    main()
