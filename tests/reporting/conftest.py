"""One planted results folder, complete with statistics and figures, shared by the tests."""

from __future__ import annotations

import numpy as np
import pytest
from planted_budgets import write_budgets_study
from planted_results import EFFECTS, make_study, planted_config, texts

from moe_routing.evaluation.outputs import fit_expert_outputs
from moe_routing.evaluation.toggles import toggle_experts
from moe_routing.reporting.comparison_report import write_report
from moe_routing.reporting.plots import write_plots


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """A study with known effects; the primary contrast is the known loss."""
    folder = tmp_path_factory.mktemp("planted") / "planted"
    study = make_study(folder, planted_config(beside=True), EFFECTS)
    write_plots(study)
    write_report(study)
    return study


@pytest.fixture(scope="session")
def at_budgets(tmp_path_factory):
    """A study of rules at matched budgets; see :mod:`planted_budgets`."""
    return write_budgets_study(tmp_path_factory.mktemp("budgets") / "budgets")


@pytest.fixture(scope="session")
def outputs(nano):
    """Outputs of the experts on a little text."""
    return fit_expert_outputs(nano.model, nano.tokenizer, texts(), tokens=256, window=64)


@pytest.fixture(scope="session")
def toggles(nano, outputs):
    """Toggled experts of as few tokens as the levels of the planted BH analysis allow."""
    rng = np.random.default_rng(0)
    return toggle_experts(nano.model, nano.tokenizer, texts(), outputs, tokens=20, rng=rng)
