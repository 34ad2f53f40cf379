"""Benchmarks are scripts: they are imported as running them would."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Return an importer of a benchmark, with its folder first on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
