"""The exception for errors that the user can fix, and warnings."""

from __future__ import annotations


class InputError(Exception):
    """Bad input. The message is one line: the file and key, the value, and what is allowed."""


class WeightingWarning(UserWarning):
    """A strategy weights experts otherwise than the model was trained to."""
