"""Survival functions of one-dimensional distributions, tabulated to fit in a small file.

Shape letters: L layers, R rows, N knots, n draws, X any shape.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_routing.routing.nulls.base import SMALLEST_P, Null, check_finite
from moe_routing.routing.sample import CalibrationSample

EXACT_DIVISOR = 8
"""The largest n / 8 of the draws are kept, and p-values up to about 1/8 are exact."""
MIN_EXACT = 1024
"""At least this many are kept. Lower draws are thinned in steps of at most 1/1024 of their rank."""


@dataclass(frozen=True)
class EmpiricalSurvival:
    """Conformal p-values from the empirical distribution of n draws, by layer (and expert).

    p(x) = (1 + #{draws >= x}) / (n + 1): superuniform if x and the draws are exchangeable (Bates
    et al. 2023, arXiv 2104.08279). Draws equal to x are counted. The largest eighth of the draws
    (at least 1,024) is kept, so p-values up to about 1/8 are those of the full sample. The other
    draws are thinned to a geometric grid of ranks, and counts are rounded up by less than 1 in
    1,024, so larger p-values are conservative by less than 0.1 %.

    Attributes:
        knot_LN: kept draws in ascending order, float32, (layers, knots) or (layers, experts,
            knots).
        p_N: p-value of a value that exceeds exactly N knots, float32, (knots + 1,).
        num_draws: n.
    """

    knot_LN: Tensor
    p_N: Tensor
    num_draws: int

    @classmethod
    def fit(cls, draws_Ln: Tensor) -> EmpiricalSurvival:
        """Tabulate finite draws along the last axis."""
        num_draws = draws_Ln.shape[-1]
        rank_N = _kept_ranks(num_draws)
        sorted_Ln = np.sort(draws_Ln.float().numpy(), axis=-1)
        knot_LN = torch.from_numpy(sorted_Ln[..., num_draws - rank_N])
        return cls(knot_LN.contiguous(), _conformal_p(num_draws), num_draws)

    def __call__(self, layer: int, value_X: Tensor) -> Tensor:
        """Return float32 p-values of values of one layer, of any shape."""
        return self.p_N[torch.searchsorted(self.knot_LN[layer], value_X.contiguous())]

    def inverse(self, layer: int, level_N: Tensor) -> Tensor:
        """Return for each float64 level the smallest value with a p-value at most that level.

        Infinity where no finite value attains the level, minus infinity where all do. Only for
        tables by layer.
        """
        # If p_N[i] is the first p-value that attains the level, i knots must be exceeded.
        first_N = torch.searchsorted(-self.p_N.double(), -level_N)
        knot_N = F.pad(self.knot_LN[layer], (1, 1), value=math.inf)[first_N]
        value_N = torch.nextafter(knot_N, torch.full_like(knot_N, math.inf))
        return value_N.masked_fill(first_N == 0, -math.inf)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that :meth:`from_tensors` restores."""
        return {"knots": self.knot_LN, "draws": torch.tensor(self.num_draws)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> EmpiricalSurvival:
        """Restore the table."""
        knot_LN, num_draws = tensors["knots"], int(tensors["draws"])
        return cls(knot_LN, _conformal_p(num_draws).to(knot_LN.device), num_draws)


def _kept_ranks(num_draws: int) -> np.ndarray:
    """Return ranks in descending order, from ``num_draws`` to 1 (the largest draw)."""
    exact = min(num_draws, max(num_draws // EXACT_DIVISOR, MIN_EXACT))
    ranks = list(range(1, exact + 1))
    while ranks[-1] < num_draws:
        ranks.append(min(num_draws, ranks[-1] + ranks[-1] // MIN_EXACT))
    return np.array(ranks[::-1])


def _conformal_p(num_draws: int) -> Tensor:
    # If the largest knot below a value has rank r, at most r - 1 draws are at least that value.
    p_N = np.concatenate([[1.0], _kept_ranks(num_draws) / (num_draws + 1)])
    return torch.from_numpy(p_N.astype(np.float32))


class EmpiricalNull(Null):
    """A null whose p-values come from the empirical distribution of calibration draws."""

    layer_monotone: ClassVar[bool] = True

    def __init__(self, table: EmpiricalSurvival) -> None:
        self.table = table
        self.num_draws = table.num_draws

    @classmethod
    def fit(cls, sample: CalibrationSample) -> Self:
        """Fit every layer; see :meth:`Null.fit`."""
        check_finite(sample)
        return cls(EmpiricalSurvival.fit(cls.draws_Ln(sample)))

    @classmethod
    @abstractmethod
    def draws_Ln(cls, sample: CalibrationSample) -> Tensor:
        """Return the null draws, (layers, draws) or (layers, experts, draws)."""

    def survival(self, layer: int, statistic_TE: Tensor) -> Tensor:
        """Return p-values; see :meth:`Null.survival`."""
        return self.table(layer, statistic_TE)

    def _invert(self, layer: int, level_N: Tensor) -> Tensor:
        return self.table.inverse(layer, level_N)

    def tensors(self) -> dict[str, Tensor]:
        """Return the table."""
        return self.table.tensors()

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Restore the null."""
        return cls(EmpiricalSurvival.from_tensors(tensors))


@dataclass(frozen=True)
class SmoothSurvival:
    """Smooth survival functions, interpolated linearly in log p on evenly spaced grids.

    Values beyond a grid have the p-value of its nearest end.

    Attributes:
        low_R: first grid point of each row (a layer, or an expert of a layer), float64, (rows,).
        step_R: distance between grid points, float64, (rows,).
        log_p_RN: log survival, float32, (rows, knots); clipped at the smallest normal float32.
    """

    low_R: Tensor
    step_R: Tensor
    log_p_RN: Tensor

    @classmethod
    def fit(
        cls,
        low_R: np.ndarray,
        high_R: np.ndarray,
        knots: int,
        log_survival: Callable[[int, np.ndarray], np.ndarray],
    ) -> SmoothSurvival:
        """Tabulate ``log_survival(row, values)`` from low to high.

        Args:
            low_R: first grid points.
            high_R: last grid points.
            knots: number of grid points.
            log_survival: maps a row and grid points to log p.
        """
        step_R = (high_R - low_R) / (knots - 1)
        log_p_RN = np.stack([
            log_survival(row, low + step * np.arange(knots))
            for row, (low, step) in enumerate(zip(low_R, step_R, strict=True))
        ])  # fmt: skip
        # Rounding must not make a survival function increase.
        log_p_RN = np.minimum.accumulate(log_p_RN.clip(math.log(SMALLEST_P), 0.0), axis=-1)
        table = torch.from_numpy(log_p_RN.astype(np.float32))
        return cls(torch.from_numpy(low_R), torch.from_numpy(step_R), table)

    def __call__(self, row: int | Tensor, value_X: Tensor) -> Tensor:
        """Return float32 p-values; ``row`` is one row, or one row per column of the values."""
        last = self.log_p_RN.shape[1] - 1
        position_X = ((value_X.double() - self.low_R[row]) / self.step_R[row]).clamp(0.0, last)
        below_X = position_X.long().clamp(max=last - 1)
        left_X, right_X = self.log_p_RN[row, below_X], self.log_p_RN[row, below_X + 1]
        log_p_X = torch.lerp(left_X.double(), right_X.double(), position_X - below_X)
        return log_p_X.exp().float().clamp(min=SMALLEST_P)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that :meth:`from_tensors` restores."""
        return {"low": self.low_R, "step": self.step_R, "log_p": self.log_p_RN}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> SmoothSurvival:
        """Restore the table."""
        return cls(tensors["low"], tensors["step"], tensors["log_p"])
