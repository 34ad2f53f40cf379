"""Ridge regression of several targets on standardised features, in plain tensors.

Shape letters: T tokens, H features, E targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Linear predictors of several targets.

    Attributes:
        slope_EH: coefficients, (targets, features).
        offset_E: constants, (targets,).
    """

    slope_EH: Tensor
    offset_E: Tensor

    def __call__(self, feature_TH: Tensor) -> Tensor:
        """Return predictions, (tokens, targets)."""
        return torch.addmm(self.offset_E, feature_TH, self.slope_EH.T)


def ridge(feature_TH: Tensor, target_TE: Tensor) -> Linear:
    """Fit each target by ridge regression on the standardised features.

    With z the features minus their means, in units of their standard deviations, the coefficients
    b of a target y minimise sum (y - mean y - b . z)^2 + H b . b. The penalty H is the number of
    features; the constant is not penalised. A feature that does not vary gets the coefficient 0.

    Args:
        feature_TH: features, float64, (tokens, features).
        target_TE: targets, float64, (tokens, targets).

    Returns:
        Coefficients of the features as they are, not standardised.
    """
    centre_H, mean_E = feature_TH.mean(0), target_TE.mean(0)
    centred_TH = feature_TH - centre_H
    scale_H = centred_TH.square().mean(0).sqrt()
    # A feature that does not vary is 0 in any unit.
    scale_H = scale_H.where(scale_H > 0, 1.0)
    standard_TH = centred_TH / scale_H
    gram_HH = standard_TH.T @ standard_TH
    gram_HH.diagonal().add_(gram_HH.shape[0])
    coefficient_HE = torch.linalg.solve(gram_HH, standard_TH.T @ (target_TE - mean_E))
    slope_EH = (coefficient_HE / scale_H[:, None]).T
    return Linear(slope_EH.contiguous(), mean_E - slope_EH @ centre_H)


def held_out_r2(predicted_TE: Tensor, target_TE: Tensor) -> Tensor:
    """Return the proportion of the variance within targets that predictions explain, a scalar.

    Variances are pooled over the targets. It is 0 if no target varies.
    """
    residual = (target_TE - predicted_TE).square().sum()
    total = (target_TE - target_TE.mean(0)).square().sum()
    return torch.where(total > 0, 1 - residual / total, 0.0)
