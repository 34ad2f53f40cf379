"""One planted results folder, complete with statistics and figures, shared by the tests."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from planted_budgets import write_budgets_study
from planted_results import EFFECTS, make_study, planted_config, texts
from shared import shared_folder

from moe_routing.evaluation.outputs import fit_expert_outputs
from moe_routing.evaluation.toggles import toggle_experts
from moe_routing.reporting.comparison_report import write_report
from moe_routing.reporting.plots import write_plots
from moe_routing.reporting.results import StudyResults
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.toggles import Toggles


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """A study with known effects; the primary contrast is the known loss.

    The study is made once, and every worker has a copy of its own.
    """
    made = shared_folder(tmp_path_factory, "planted_study", write_planted_study)
    folder = tmp_path_factory.mktemp("planted") / "planted"
    return StudyResults.load(shutil.copytree(made, folder))


def write_planted_study(folder):
    study = make_study(folder, planted_config(beside=True), EFFECTS)
    write_plots(study)
    write_report(study)


@pytest.fixture(scope="session")
def at_budgets(tmp_path_factory):
    """A study of rules at matched budgets; see :mod:`planted_budgets`."""
    return StudyResults.load(shared_folder(tmp_path_factory, "budgets", write_budgets_study))


@pytest.fixture(scope="session")
def outputs(nano, tmp_path_factory):
    """Outputs of the experts on a little text."""
    return ExpertOutputs.load(outputs_file(nano, tmp_path_factory))


@pytest.fixture(scope="session")
def toggles(nano, tmp_path_factory):
    """Toggled experts of as few tokens as the levels of the planted BH analysis allow."""
    return Toggles.load(outputs_file(nano, tmp_path_factory).with_name("toggles.safetensors"))


def outputs_file(nano, tmp_path_factory):
    """Return the file of the outputs; beside it is that of the toggles."""

    def write(folder):
        rng = np.random.default_rng(0)
        model, tokenizer = nano.model, nano.tokenizer
        outputs = fit_expert_outputs(model, tokenizer, texts(), tokens=256, window=64)
        toggles = toggle_experts(model, tokenizer, texts(), outputs, tokens=20, rng=rng)
        outputs.save(folder / "outputs.safetensors")
        toggles.save(folder / "toggles.safetensors")

    return shared_folder(tmp_path_factory, "toggled", write) / "outputs.safetensors"
