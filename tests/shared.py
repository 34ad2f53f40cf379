"""What is made once for all workers of pytest-xdist, because it is slow to make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """Return a folder that the first worker makes; others wait for it. Tests must not change it.

    Args:
        factory: pytest's ``tmp_path_factory``.
        name: name of the folder.
        make: fills a new folder.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # that of a worker lies in that of the run
    folder, made = base / name, base / f"{name}.made"
    with FileLock(base / f"{name}.lock"):
        if not made.exists():
            folder.mkdir()  # one that is there was left by a worker that failed: an error here too
            make(folder)
            made.touch()
    return folder
