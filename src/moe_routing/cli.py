"""What every script's last line calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from moe_routing.errors import InputError


def run(main: Callable[[], None]) -> NoReturn:
    """Call ``main`` and exit: 0 when it returns, 2 with one ``error:`` line on bad input."""
    try:
        main()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
