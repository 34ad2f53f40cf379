"""One planted results folder, complete with statistics and figures, shared by the tests."""

from __future__ import annotations

import pytest
from planted_results import EFFECTS, make_study, planted_config

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
