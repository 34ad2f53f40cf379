"""The exception for errors that the user can fix, and warnings."""

from __future__ import annotations


class InputError(Exception):
    """Bad input. The message is one line: the file and key, the value, and what is allowed."""


class WeightingWarning(UserWarning):
    """A strategy weights experts otherwise than the model was trained to."""


def check_type(what: str, value: object, *allowed: type) -> None:
    """Check the type of an argument that users give.

    Raises:
        InputError: it is none of the allowed types; ``True`` is no number.
    """
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(one.__name__ for one in allowed)
        raise InputError(f"{what} is a {type(value).__name__}; allowed: {names}")
