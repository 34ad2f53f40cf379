"""Pure functions have examples; pytest runs them with all others (``--doctest-modules``)."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    ["bootstrap", "proportions", "paired", "multiplicity", "power", "pareto", "timing", "chance"],
)
def test_pure_functions_have_examples(name):
    module = importlib.import_module(f"moe_routing.statistics.{name}")
    assert any(found.examples for found in doctest.DocTestFinder().find(module))
