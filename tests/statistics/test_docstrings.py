"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from moe_routing import statistics

MODULES = [module.name for module in pkgutil.iter_modules(statistics.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(f"moe_routing.statistics.{name}")
    assert doctest.testmod(module).failed == 0


def test_pure_functions_have_examples():
    counts = {
        name: doctest.testmod(importlib.import_module(f"moe_routing.statistics.{name}")).attempted
        for name in MODULES
    }
    pure = ("bootstrap", "proportions", "paired", "multiplicity", "power", "ranks", "pareto")
    assert all(counts[name] > 0 for name in pure)
