"""The exception for errors that the user can fix."""

from __future__ import annotations


class InputError(Exception):
    """Bad input. The message is one line: the file and key, the value, and what is allowed."""
