"""A stand-in for Apptainer: it writes down how it was called, and runs the command outside."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Answer ``--version``, or do ``exec [options] IMAGE SHELL -c COMMAND``."""
    if arguments == ["--version"]:
        print("apptainer version 1.4.0")
        return
    with (Path(__file__).parent / "calls.jsonl").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps(arguments) + "\n")
    shell, flag, command = arguments[-3:]
    os.execvp(shell, [shell, flag, command])  # noqa: S606 (what Snakemake asked for)


if __name__ == "__main__":
    main(sys.argv[1:])
