"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from moe_routing import analysis
from moe_routing.figures import series

MODULES = [
    f"moe_routing.analysis.{module.name}" for module in pkgutil.iter_modules(analysis.__path__)
]


@pytest.mark.parametrize("name", [*MODULES, series.__name__])
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
