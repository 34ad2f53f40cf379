"""Whether the cells of a study were made with the same code, software and threads."""

from __future__ import annotations

import pandas as pd

_WHAT = {
    "code": "versions of the code",
    "torch": "versions of torch",
    "threads": "numbers of threads",
    "device": "devices",
}


def differences(provenance: pd.DataFrame) -> list[str]:
    """Return a sentence for everything that differs between cells; versions of code by commit.

    Args:
        provenance: one row per cell; columns commit, code, threads, device and torch.

    >>> cells = pd.DataFrame({"commit": ["a1", "b2", "b2"], "code": ["x", "y", "y"],
    ...                       "threads": 1, "device": "cpu", "torch": "2.13.0"})
    >>> differences(cells)
    ['the cells mix 2 versions of the code: a1 (1 cell), b2 (2 cells)']
    """
    found = []
    for column, what in _WHAT.items():
        if provenance[column].nunique() < 2:
            continue
        named = "commit" if column == "code" and provenance["commit"].nunique() > 1 else column
        counts = provenance[named].value_counts(sort=False)
        parts = [f"{value} ({n} cell{'s' * (n > 1)})" for value, n in counts.items()]
        found.append(f"the cells mix {provenance[column].nunique()} {what}: {', '.join(parts)}")
    return found
