"""Stand-ins for the commands of cluster schedulers, which run jobs on this machine.

PBS, and Slurm without accounting. The state of a job is in the folder of the commands. ``cancel``
beside it holds words: a job whose submission contains one of them is cancelled before it runs, and
the word used up. While ``forget`` is beside it, squeue knows no job that has ended, as after the
controller's MinJobAge.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

PBS = ("qsub", "qstat", "qdel")
SLURM = ("sbatch", "squeue", "scancel", "srun", "scontrol", "sinfo", "sacct", "sacctmgr")
FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else None


def make_cluster(folder, commands):
    """Write the commands, and return a PATH that begins with their folder."""
    (folder / "jobs").mkdir(parents=True)
    for name in commands:
        program = folder / name
        words = [str(word) for word in (sys.executable, "-S", __file__, folder / "jobs", name)]
        program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def start(command, words):
    """Start a shell command as a job in the background; return its number."""
    number = len(list(FOLDER.glob("*.state"))) + 1
    state = FOLDER / f"{number}.state"
    script = FOLDER / f"{number}.sh"
    script.write_text(
        f"echo RUNNING > '{state}'\n({command})\ncode=$?\n"
        f"[ $code -eq 0 ] && echo COMPLETED > '{state}' || echo FAILED > '{state}'\n"
    )
    state.write_text("PENDING\n")
    doomed = FOLDER.parent / "cancel"
    unlucky = doomed.read_text().split() if doomed.exists() else []
    for word in unlucky:
        if word in words:
            doomed.write_text(" ".join(one for one in unlucky if one != word))
            state.write_text("CANCELLED\n")
            return number
    with (FOLDER / f"{number}.out").open("w") as out:
        job = subprocess.Popen(
            ["/bin/sh", script], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    (FOLDER / f"{number}.pid").write_text(str(job.pid))
    return number


def stop(number):
    """Kill a job."""
    pid = FOLDER / f"{number}.pid"
    if pid.exists():
        subprocess.run(["kill", "-9", "--", f"-{pid.read_text()}"], check=False)
    (FOLDER / f"{number}.state").write_text("CANCELLED\n")


def state_of(number):
    """Return the state of a job."""
    return (FOLDER / f"{number}.state").read_text().strip()


def main(name, *arguments):
    """Do what a command does."""
    if name == "qsub":
        print(f"{start(f'sh {shlex.quote(arguments[-1])}', ' '.join(arguments))}.here")
    elif name == "sbatch":
        wrapped = [one for one in arguments if one.startswith("--wrap=")]
        command = wrapped[0][7:] if wrapped else arguments[arguments.index("--wrap") + 1]
        print(start(command, " ".join(arguments)))
    elif name == "qstat":
        number = arguments[-1].split(".")[0]
        if state_of(number) not in ("PENDING", "RUNNING"):
            sys.exit(f"qstat: Unknown Job Id {number}")
        print(f"Job id  Name  User  Time Use S Queue\n{number}.here  x  me  0 R main")
    elif name == "squeue":
        forgets = (FOLDER.parent / "forget").exists()
        for path in sorted(FOLDER.glob("*.state")):
            state = path.read_text().strip()
            if not forgets or state in ("PENDING", "RUNNING"):
                print(f"{path.stem}|{state}")
    elif name in ("qdel", "scancel"):
        for number in arguments:
            if number.split(".")[0].isdigit():
                stop(number.split(".")[0])
    elif name == "srun":
        command = [*arguments]
        while command[0].startswith("-"):
            command.pop(0)
        os.execvp(command[0], command)  # noqa: S606 (as srun does)
    elif name in ("sacct", "sacctmgr"):
        sys.exit("Slurm accounting storage is disabled")
    elif name == "scontrol":
        print("MinJobAge               = 300 sec\nMaxArraySize            = 1001")
    elif name == "sinfo":
        print("main*")


if __name__ == "__main__":
    main(*sys.argv[2:])
