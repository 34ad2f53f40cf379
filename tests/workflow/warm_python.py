"""A ``python`` for Snakemake and its jobs, which has already imported what takes them longest.

Importing torch and transformers takes a job 5 to 8 seconds, longer than most jobs of the small
studies work. Here one server imports them, and forks for each job. The script, its arguments, its
environment and the package are those of the job: the server imports nothing of this repository.
The same holds for ``python -m snakemake``, which clusters start for every job, and twice on Slurm.
A job that may use the network runs in a Python of its own, because huggingface_hub reads its
settings when it is imported. So does every job where a process cannot safely fork after such
imports: on other systems than Linux.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread

SNAKEMAKE_IMPORTS = (
    "jinja2", "numpy", "pydantic.json_schema", "smart_open", "snakemake.cli",
    "snakemake.report.html_reporter", "yaml", "yte",
)  # fmt: skip
SLOW_IMPORTS = (
    "pyarrow.dataset", "pyarrow.parquet", "pydantic.json_schema", "scipy.optimize", "scipy.stats",
    "seaborn", "torch", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.olmoe.modeling_olmoe",
)  # fmt: skip
PROGRAM = """#!/bin/sh
case "$HF_HUB_OFFLINE$1 $2" in
  1[!-]* | "1-m snakemake") exec {python} -S {here} ask {address} "$@" ;;
  *) exec {python} "$@" ;;
esac
"""


@contextmanager
def warm_python(environment, imports=SLOW_IMPORTS):
    """Yield a PATH with a ``python`` whose imports are done, for a run with this environment."""
    if sys.platform != "linux":
        yield environment["PATH"]
        return
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket must be short
        address, program = Path(folder) / "server", Path(folder) / "python"
        program.write_text(PROGRAM.format(python=sys.executable, here=__file__, address=address))
        program.chmod(0o755)
        command = [sys.executable, __file__, "serve", str(address), *imports]
        with subprocess.Popen(command, env=environment | {"HF_HUB_OFFLINE": "1"}) as server:
            while not address.exists():
                assert server.poll() is None
                time.sleep(0.05)
            try:
                yield f"{folder}{os.pathsep}{environment['PATH']}"
            finally:
                server.terminate()


def serve(address, *imports):
    """Run every job that asks for it in a fork; jobs that ask before the imports are done wait."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        for name in imports:
            import_module(name)
        gc.freeze()  # or the first collection in each fork would copy all that was imported
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        while True:
            asked, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                run_job(asked)
            asked.close()


def run_job(asked):
    """Become the job that asks, and tell it the exit code; if it is killed, so is this process."""
    os.setsid()  # what the job starts can be ended with it
    _, streams, *_ = socket.recv_fds(asked, 1, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    job = json.loads(asked.makefile().readline())
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    package = job["environment"].get("PYTHONPATH", "").split(os.pathsep)
    program, *arguments = job["argv"]
    module = program == "-m"
    folder = Path.cwd() if module else Path(program).parent.absolute()
    sys.argv = arguments if module else job["argv"]
    sys.path[:1] = [str(folder), *filter(None, package)]
    if module:  # Snakemake, whose jobs on a cluster start it by this path
        sys.executable = str(Path(asked.getsockname()).with_name("python"))
    Thread(target=end_with, args=(asked,), daemon=True).start()
    code = exit_code_of(sys.argv[0], module=module)
    asked.sendall(b"%d\n" % code)
    os._exit(code)


def end_with(asked):
    """Kill this process and what it started when the job that asked for it is gone."""
    asked.recv(1)
    os.killpg(0, signal.SIGKILL)


def exit_code_of(name, *, module):
    """Run a script as ``python name`` does, or ``python -m name``, and return its exit code."""
    try:
        if module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
        return 0
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
            return 1
        return stopped.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def ask(address, *argv):
    """Have the server run a script or module with this process's streams; return the exit code."""
    job = {"argv": argv, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"\0"], [0, 1, 2])
        server.sendall(json.dumps(job).encode() + b"\n")
        return int(server.makefile().readline() or 1)


if __name__ == "__main__":
    sys.exit({"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:]))
