"""Values that are optional in general, but not where they are used."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """Return a value that is not None here, as a setting that ``StudyConfig.of_model`` filled in.

    >>> present(8)
    8
    """
    if value is None:
        raise TypeError("a value is needed here, not None")
    return value
