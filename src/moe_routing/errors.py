"""The one kind of error that is the user's to mend."""

from __future__ import annotations


class InputError(Exception):
    """Bad input: the message is one line naming the file and key, the value, what is allowed."""
