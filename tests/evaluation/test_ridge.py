"""Ridge regression is least squares on data with rows for the penalty added."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_routing.evaluation.ridge import held_out_r2, ridge


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    feature_TH = rng.normal(3, [0.1, 1, 5, 20], (60, 4))
    target_TE = feature_TH @ rng.normal(size=(4, 3)) + rng.normal(size=(60, 3)) - 7
    return torch.from_numpy(feature_TH), torch.from_numpy(target_TE)


def by_least_squares(feature_TH, target_TE):
    """Solve the penalised problem as plain least squares, with a column of ones."""
    feature_TH, target_TE = feature_TH.numpy(), target_TE.numpy()
    standard_TH = (feature_TH - feature_TH.mean(0)) / feature_TH.std(0)
    number = feature_TH.shape[1]
    penalty_HH = np.sqrt(number) * np.eye(number)
    rows = np.block([
        [standard_TH, np.ones((len(feature_TH), 1))],
        [penalty_HH, np.zeros((number, 1))],
    ])  # fmt: skip
    right = np.vstack([target_TE, np.zeros((number, target_TE.shape[1]))])
    found = np.linalg.lstsq(rows, right, rcond=None)[0]
    return torch.from_numpy(standard_TH @ found[:-1] + found[-1])


def test_predictions_are_those_of_least_squares_with_penalty_rows(data):
    feature_TH, target_TE = data
    fitted = ridge(feature_TH, target_TE)
    expected_TE = by_least_squares(feature_TH, target_TE)
    torch.testing.assert_close(fitted(feature_TH), expected_TE, rtol=1e-9, atol=1e-9)
    assert (expected_TE - target_TE).abs().max() > 0.1  # the penalty and the noise are felt


def test_units_of_features_do_not_matter(data):
    feature_TH, target_TE = data
    scaled_TH = feature_TH * torch.tensor([1e3, 1e-3, 2.0, -1.0]) + 5
    torch.testing.assert_close(
        ridge(scaled_TH, target_TE)(scaled_TH), ridge(feature_TH, target_TE)(feature_TH)
    )


def test_what_does_not_vary_is_harmless(data):
    feature_TH, target_TE = data
    feature_TH[:, 1], target_TE[:, 2] = 4.0, -87.25
    fitted = ridge(feature_TH, target_TE)
    assert (fitted.slope_EH[:, 1] == 0).all()
    assert (fitted.slope_EH[2].abs() < 1e-12).all()
    assert fitted.offset_E[2].item() == pytest.approx(-87.25)


def test_r2_is_pooled_over_targets():
    target_TE = torch.tensor([[0.0, 100.0], [2.0, 104.0]])
    predicted_TE = torch.tensor([[0.0, 100.0], [2.0, 102.0]])
    # Variance 2 and 8 around the targets' own means; the residual is 4.
    assert held_out_r2(predicted_TE, target_TE).item() == pytest.approx(0.6)
    assert held_out_r2(target_TE, torch.ones(2, 2)).item() == 0
    assert held_out_r2(torch.ones(0, 2), torch.ones(0, 2)).item() == 0
