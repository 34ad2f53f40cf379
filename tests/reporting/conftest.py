"""One planted results folder, complete with statistics and figures, shared by the tests."""

from __future__ import annotations

import pytest
from planted_results import planted_config, write_results

from moe_routing.evaluation.collect import write_tables
from moe_routing.reporting.comparison_report import write_report
from moe_routing.reporting.plots import write_plots
from moe_routing.reporting.study import Study
from moe_routing.statistics.study import write_statistics

EFFECTS = {"bh_k8_a005": -0.03, "bh_k16_a005": 0.03, "uniform_k8": -0.06, "regular_k4": -0.10}
"""A known loss, a known gain; every other strategy has a known zero."""


def make_study(folder, config, effects=None, **options):
    """Write a planted study with tables and statistics, and read it."""
    write_results(folder, config, effects, **options)
    write_tables(config, folder)
    write_statistics(config, folder)
    return Study.load(folder)


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """A study with known effects; the primary contrast is the known loss."""
    folder = tmp_path_factory.mktemp("planted") / "planted"
    study = make_study(folder, planted_config(), EFFECTS)
    write_plots(study)
    write_report(study)
    return study
