"""One planted results folder, complete with statistics and figures, shared by the tests."""

from __future__ import annotations

import numpy as np
import pytest
from planted_results import EFFECTS, make_study, planted_config, texts

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
def toggles(nano):
    """Toggled experts of as few tokens as the levels of the planted BH analysis allow."""
    rng = np.random.default_rng(0)
    return toggle_experts(nano.model, nano.tokenizer, texts(), tokens=20, rng=rng)
