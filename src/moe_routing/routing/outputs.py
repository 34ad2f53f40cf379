"""What calibration text says about the outputs of experts: their means, and how large they are.

The effect of an expert on the prediction grows with the product of its weight and the size of its
output, which no router logit shows. The size is predicted from the router's input, so that nothing
is computed by an expert that is not selected.

Shape letters: L layers, T tokens, E experts, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moe_routing.routing.rule import ModelRule
from moe_routing.routing.tensors import TensorFile


@dataclass(frozen=True)
class ExpertOutputs(TensorFile):
    """Outputs of the experts of one model on calibration text, and predictors of their norms.

    The output o of an expert is not weighted; mean is over tokens, selected or not. A predictor is
    log norm = slope . x + offset, for x the input of the layer's router.

    Attributes:
        mean_LEH: mean output of each expert, float32, (layers, experts, hidden).
        log_mean_norm_LE: log of the mean Euclidean norm |o|, float32, (layers, experts).
        log_mean_deviation_LE: log of the mean of |o - mean output|, float32.
        slope_LEH: predictor of log |o|, float32, (layers, experts, hidden).
        offset_LE: its constant, float32, (layers, experts).
        deviation_slope_LEH: predictor of log |o - mean output|, float32.
        deviation_offset_LE: its constant, float32.
        r2_L: proportion of the variance of log |o| within experts that the predictor explains on
            text that it was not fitted on, float64, (layers,).
        deviation_r2_L: the same of log |o - mean output|.
        explained_L: proportion of the mean of |o|^2 that the mean outputs explain, float64.
        sample_log_norm_LTE: predicted log |o| at the tokens of the calibration sample, in its
            order, float32, (layers, tokens, experts).
        sample_log_deviation_LTE: the same of log |o - mean output|.
        rule: the model's own routing rule.
        fingerprint: hash of all weights of the model, see
            :func:`moe_routing.engine.adapters.model_fingerprint`.
    """

    mean_LEH: Tensor
    log_mean_norm_LE: Tensor
    log_mean_deviation_LE: Tensor
    slope_LEH: Tensor
    offset_LE: Tensor
    deviation_slope_LEH: Tensor
    deviation_offset_LE: Tensor
    r2_L: Tensor
    deviation_r2_L: Tensor
    explained_L: Tensor
    sample_log_norm_LTE: Tensor
    sample_log_deviation_LTE: Tensor
    rule: ModelRule
    fingerprint: str

    WHAT: ClassVar[str] = "a file of expert outputs"
    TENSORS: ClassVar[tuple[str, ...]] = (
        "mean_LEH", "log_mean_norm_LE", "log_mean_deviation_LE", "slope_LEH", "offset_LE",
        "deviation_slope_LEH", "deviation_offset_LE", "r2_L", "deviation_r2_L", "explained_L",
        "sample_log_norm_LTE", "sample_log_deviation_LTE",
    )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.mean_LEH.shape[0]

    @property
    def num_experts(self) -> int:
        """Number of experts per layer."""
        return self.mean_LEH.shape[1]
