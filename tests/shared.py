"""What is made once for all workers of pytest-xdist, because it is slow to make."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from moe_routing.routing.budget import Budget
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import parse_strategy


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


def with_budgets(calibration: Calibration, *strategy_ids: str) -> Calibration:
    """Return a calibration with budgets that are kept on its sample, without running a model."""
    budgets = {}
    for name in strategy_ids:
        strategy = parse_strategy(name)
        sample, budget = calibration.sample, strategy.budget
        size = sample.num_layers if strategy.by_layer else 1
        value = strategy.on_sample(calibration, sample.num_experts)([budget] * size)
        budgets[name] = Budget(
            name, strategy.free, value, budget, budget, (budget,) * sample.num_layers,
            sample.num_tokens, "fitted",
        )  # fmt: skip
    return replace(calibration, budgets=budgets)
