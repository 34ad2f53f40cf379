"""Calibration folders: what is read from them, and that equal contents are equal bytes."""

from __future__ import annotations

import pytest
import torch
from slow_loops import even_outputs, simulated_toggles

from moe_routing.errors import InputError
from moe_routing.routing.calibration import OUTPUTS_FILE, SAMPLE_FILE, Calibration, null_path
from moe_routing.routing.nulls import fit_null, save_null
from moe_routing.routing.sample import CalibrationSample


@pytest.fixture
def parts(calibration_of, rng):
    """A sample, its toggles and its outputs."""
    sample = calibration_of(64).sample
    logits_LTE = sample.logits_LTE[:, :40].numpy()
    toggles = simulated_toggles(logits_LTE, logits_LTE**2, rng)
    return sample, toggles, even_outputs(toggles)


def test_outputs_are_read_if_asked_for(parts, tmp_path):
    sample, _, outputs = parts
    sample.save(tmp_path / SAMPLE_FILE)
    save_null(fit_null("pooled", sample), sample, null_path(tmp_path, "pooled"))
    plain = Calibration.load(tmp_path, ("pooled",))
    assert plain.outputs is plain.toggles is None
    message = r"expert_outputs\.safetensors: no such file"
    with pytest.raises(InputError, match=message):
        Calibration.load(tmp_path, ("pooled",), outputs=True)
    outputs.save(tmp_path / OUTPUTS_FILE)
    assert Calibration.load(tmp_path, outputs=True).outputs.fingerprint == outputs.fingerprint


def test_equal_contents_are_equal_bytes(parts, tmp_path):
    sample, toggles, outputs = parts
    null = fit_null("pooled", sample)
    for name in ("one", "two"):
        folder = tmp_path / name
        sample.save(folder / "sample")
        toggles.save(folder / "toggles")
        outputs.save(folder / "outputs")
        save_null(null, sample, folder / "null")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_a_sample_is_saved_and_loaded(parts, tmp_path):
    sample, *_ = parts
    sample.save(tmp_path / "sample")
    again = CalibrationSample.load(tmp_path / "sample")
    for name in CalibrationSample.TENSORS:
        assert torch.equal(getattr(sample, name), getattr(again, name)), name
    for name in ("hidden_size", "rule", "fingerprint"):
        assert getattr(sample, name) == getattr(again, name), name
    with pytest.raises(InputError, match="toggles: no such file"):
        CalibrationSample.load(tmp_path / "toggles")
