"""The null of a random direction, which needs no calibration text.

Shape letters: L layers, T tokens, E experts, H hidden size; 1 a kept axis.
"""

from __future__ import annotations

import math
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from moe_routing.routing.nulls.base import Null
from moe_routing.routing.nulls.tails import SmoothSurvival
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.types import RouterInputs, centred_norms

SMALLEST_LENGTH = 1e-30
"""Lower bound on the length of a vector: a zero vector has logits 0, and the statistic is 0."""


class RandomDirection(Null):
    """Compares an expert's centred router vector with one of its length in a random direction.

    The softmax does not change if the same vector is added to all router vectors, so their mean is
    subtracted, and so is that of the logits. Statistic, with w and logit centred: sqrt(H) *
    cos(w_e, x) = logit * sqrt(H) / (|w_e| |x|). Under H0 the cosine c is that of a uniformly random
    direction with a fixed one, so c * sqrt((H - 1) / (1 - c^2)) follows Student's t with H - 1
    degrees of freedom (equivalently, c^2 is Beta(1/2, (H - 1)/2)): exact, for every token and
    expert. It measures alignment, not usefulness, and at a fixed cosine it increases with H.
    """

    id: ClassVar[str] = "random_direction"
    layer_monotone: ClassVar[bool] = True
    KNOTS: ClassVar[int] = 8193
    """256 points per standard unit: p-values above 1e-10 have a relative error below 1e-5."""

    def __init__(self, table: SmoothSurvival, hidden_size: Tensor) -> None:
        self.table = table
        self.hidden_size = hidden_size
        self.num_draws = math.inf

    @classmethod
    def fit(cls, sample: CalibrationSample) -> Self:
        """Tabulate the distribution, which depends on the hidden size only."""
        from scipy.stats import t

        width = sample.hidden_size

        def log_survival(_: int, grid: np.ndarray) -> np.ndarray:
            cosine = np.clip(grid / math.sqrt(width), -1, 1)
            with np.errstate(divide="ignore"):
                return t.logsf(cosine * np.sqrt((width - 1) / (1 - cosine**2)), width - 1)

        # For any realistic width, p-values beyond 16 standard units are below 1e-38.
        end_1 = np.array([min(16.0, math.sqrt(width))])
        table = SmoothSurvival.fit(-end_1, end_1, cls.KNOTS, log_survival)
        return cls(table, torch.tensor(width))

    def statistic(self, inputs: RouterInputs) -> Tensor:
        """Return sqrt(H) times the cosine; needs the router's input and weight."""
        norm_E = inputs.centred_norm_E
        if norm_E is None and inputs.weight_EH is not None:
            norm_E = centred_norms(inputs.weight_EH)
        if inputs.hidden_TH is None or norm_E is None:
            raise ValueError("null 'random_direction' needs the router's input and weight")
        logits_TE = inputs.logits_TE.float()
        mean_T1, length_TE = _centre(logits_TE, inputs.weight_EH, norm_E)
        token_T1 = torch.linalg.vector_norm(inputs.hidden_TH.float(), dim=1, keepdim=True)
        scale_TE = self.hidden_size.sqrt().float() / length_TE.clamp(min=SMALLEST_LENGTH)
        return (logits_TE - mean_T1).mul_(scale_TE).div_(token_T1.clamp_(min=SMALLEST_LENGTH))

    def survival(self, layer: int, statistic_TE: Tensor) -> Tensor:
        """Return p-values; see :meth:`Null.survival`."""
        return self.table(0, statistic_TE)

    def tensors(self) -> dict[str, Tensor]:
        """Return the table and the hidden size."""
        return {**self.table.tensors(), "hidden_size": self.hidden_size}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Restore the null."""
        return cls(SmoothSurvival.from_tensors(tensors), tensors["hidden_size"])


def _centre(logits_TE: Tensor, weight_EH: Tensor | None, norm_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's mean logit, (tokens, 1), and the norms of the centred router vectors.

    Both means are those of the token's unmasked experts, so the norms may differ between tokens:
    they are (experts,) or (tokens, experts).
    """
    present_TE = logits_TE > -math.inf
    # On an accelerator the check would synchronise with the device.
    if logits_TE.device.type == "cpu" and bool(present_TE.all()):
        return logits_TE.mean(1, keepdim=True), norm_E
    share_TE = present_TE / present_TE.sum(1, keepdim=True).clamp_(min=1)
    mean_T1 = (logits_TE.masked_fill(~present_TE, 0) * share_TE).sum(1, keepdim=True)
    if weight_EH is None:
        return mean_T1, norm_E
    # |w_e - m|^2 with m the mean of a token's unmasked rows, from the products of all rows.
    row_EH = weight_EH.float() - weight_EH.float().mean(0)
    product_EE = row_EH @ row_EH.T
    with_mean_TE = share_TE @ product_EE
    square_T1 = (with_mean_TE * share_TE).sum(1, keepdim=True)
    return mean_T1, (product_EE.diag() - 2 * with_mean_TE + square_T1).clamp_(min=0).sqrt_()
