"""The entry point that every script uses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from moe_routing.errors import InputError
from moe_routing.usage import JobClock


def first_line(docstring: str | None) -> str:
    """Return the first line of a script's docstring, for its help; empty under ``python -OO``."""
    return (docstring or "").partition("\n")[0]


def run(main: Callable[[JobClock], None]) -> NoReturn:
    """Call ``main`` with the clock of the job, and exit.

    The exit code is 0 when it returns, 2 with one ``error:`` line on bad input. On success, the
    last line on standard error reports the time and memory used.
    """
    clock = JobClock()
    try:
        main(clock)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(clock.usage_line(), file=sys.stderr)
    sys.exit(0)
