"""What every script's last line calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from moe_routing.errors import InputError
from moe_routing.usage import JobClock


def run(main: Callable[[JobClock], None]) -> NoReturn:
    """Call ``main`` with the clock of the job and exit.

    The exit code is 0 on success, with what the job used as the last line on standard error, and 2
    on bad input, with one ``error:`` line.
    """
    clock = JobClock()
    try:
        main(clock)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(clock.usage_line(), file=sys.stderr)
    sys.exit(0)
