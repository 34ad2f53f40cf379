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
from moe_routing.routing.types import RouterInputs

SMALLEST_LENGTH = 1e-30
"""Lower bound on the length of a vector: a zero vector has logits 0, and the statistic is 0."""


class RandomDirection(Null):
    """Compares an expert's router vector with one of the same length in a random direction.

    Statistic: sqrt(H) * cos(w_e, x) = logit * sqrt(H) / (|w_e| |x|). Under H0 the cosine c is that
    of a uniformly random direction with a fixed one, so c * sqrt((H - 1) / (1 - c^2)) follows
    Student's t with H - 1 degrees of freedom (equivalently, c^2 is Beta(1/2, (H - 1)/2)): exact,
    for every token and expert. It measures alignment, not usefulness, and at a fixed cosine it
    increases with H.
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
        if inputs.hidden_TH is None or inputs.weight_EH is None:
            raise ValueError("null 'random_direction' needs the router's input and weight")
        token_T1 = torch.linalg.vector_norm(inputs.hidden_TH.float(), dim=1, keepdim=True)
        expert_E = torch.linalg.vector_norm(inputs.weight_EH.float(), dim=1)
        scale_E = self.hidden_size.sqrt().float() / expert_E.clamp(min=SMALLEST_LENGTH)
        return (inputs.logits_TE.float() * scale_E).div_(token_T1.clamp_(min=SMALLEST_LENGTH))

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
