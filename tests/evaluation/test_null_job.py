"""Nulls of a study: fitted in passing as alone, with its epsilon, each a piece of the store."""

from __future__ import annotations

import pandas as pd
import pytest

from moe_routing.config.study import StudyConfig
from moe_routing.errors import InputError
from moe_routing.evaluation.null_job import fit_study_null
from moe_routing.routing.nulls import fit_null, load_null, save_null
from moe_routing.workflow import write_config

NULLS = ["needed", "needed_e1e4", "within_token", "pooled"]


@pytest.fixture
def calibrated_study(tmp_path, calibration):
    """A study whose logits, toggles and outputs are there, and no null."""
    source = {"kind": "local", "path": "unused"}
    config = StudyConfig.model_validate({
        "study": "small",
        "model": {"path": "unused"},
        "calibration": {"source": source, "nulls": NULLS, "epsilon": 3e-5},
        "datasets": {"wikipedia": {"source": source}},
        "strategies": ["stock", "bh_k8_a005"],
        "statistics": {"primary": {"strategy": "bh_k8_a005", "dataset": "wikipedia"}},
    })  # fmt: skip
    write_config(config, tmp_path / "config.yaml")
    folder = tmp_path / "calibration"
    folder.mkdir()
    calibration.sample.save(folder / "router_logits.safetensors")
    calibration.toggles.save(folder / "toggles.safetensors")
    calibration.outputs.save(folder / "expert_outputs.safetensors")
    return tmp_path


def test_one_job_fits_every_null_as_it_is_fitted_alone(calibrated_study, calibration):
    fit_study_null(calibrated_study, "needed")
    folder, (sample, toggles) = (
        calibrated_study / "calibration/nulls",
        (calibration.sample, calibration.toggles),
    )
    assert {path.name for path in folder.glob("[!.]*")} == {"needed.csv", "needed.safetensors"}
    again = load_null(folder / "needed.safetensors", sample, toggles)
    assert (again.id, again.epsilon) == ("needed", 3e-5)
    assert (pd.read_csv(folder / "needed.csv")["epsilon"] == 3e-5).all()
    # The others wait in the store: their own jobs copy them.
    kept = {path.name.split(".")[0] for path in (calibrated_study / "store").rglob("*.csv")}
    assert kept == set(NULLS)
    for name in NULLS:
        fit_study_null(calibrated_study, name)
        alone = fit_null(name, sample, toggles, 3e-5, calibration.outputs)
        save_null(alone, sample, calibrated_study / "alone", toggles)
        made = (folder / f"{name}.safetensors").read_bytes()
        assert made == (calibrated_study / "alone").read_bytes()


def test_nulls_of_logits_need_no_toggles(calibrated_study, calibration):
    (calibrated_study / "calibration/toggles.safetensors").unlink()
    fit_study_null(calibrated_study, "pooled")
    null = load_null(calibrated_study / "calibration/nulls/pooled.safetensors", calibration.sample)
    assert null.id == "pooled"
    with pytest.raises(InputError, match=r"toggles\.safetensors"):
        fit_study_null(calibrated_study, "needed")


def test_a_null_that_the_study_lacks_is_one_line(calibrated_study):
    with pytest.raises(InputError, match="null 'unselected' is not fitted; allowed: needed, "):
        fit_study_null(calibrated_study, "unselected")
