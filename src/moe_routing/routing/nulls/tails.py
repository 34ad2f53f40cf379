"""Upper tails of one-dimensional laws, as tables that fit in a small file.

Shape letters: L layers, R rows, N knots, n draws, X whatever is looked up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_routing.routing.nulls.base import SMALLEST_P

EXACT_SHARE = 8
"""The upper 1/8 of the draws is kept as it is."""
EXACT_FEWEST = 1024
"""But never fewer than this; below, ranks are thinned in steps of at most 1/1024 of the rank."""


@dataclass(frozen=True)
class EmpiricalTail:
    """Conformal p-values from the empirical law of n draws, by layer (and expert).

    p(x) = (1 + #{draws >= x}) / (n + 1): superuniform if x and the draws are exchangeable (Bates
    et al. 2023, arXiv 2104.08279). Draws equal to x count against it. The upper eighth of the
    draws (at least 1,024) is kept, so that p-values up to about 1/8 are those of the full sample;
    of the rest a geometric grid of ranks is kept and counts are rounded up, by less than 1 in
    1,024: larger p-values are conservative by less than 0.1 %.

    Attributes:
        knot_LN: kept draws, sorted upwards, float32, (layers, knots) or (layers, experts, knots).
        p_N: p-value of a value that exceeds exactly N knots, float32, (knots + 1,).
        draws: n.
    """

    knot_LN: Tensor
    p_N: Tensor
    draws: int

    @classmethod
    def fit(cls, draws_Ln: Tensor) -> EmpiricalTail:
        """Tabulate finite draws along the last axis."""
        draws = draws_Ln.shape[-1]
        rank_N = _kept_ranks(draws)
        sorted_Ln = np.sort(draws_Ln.float().numpy(), axis=-1)
        knot_LN = torch.from_numpy(sorted_Ln[..., draws - rank_N])
        return cls(knot_LN.contiguous(), _conformal_p(draws), draws)

    def __call__(self, layer: int, value_X: Tensor) -> Tensor:
        """Return float32 p-values of values of one layer, of any shape."""
        return self.p_N[torch.searchsorted(self.knot_LN[layer], value_X.contiguous())]

    def tensors(self) -> dict[str, Tensor]:
        """Return what :meth:`from_tensors` needs."""
        return {"knots": self.knot_LN, "draws": torch.tensor(self.draws)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> EmpiricalTail:
        """Rebuild the table."""
        knot_LN, draws = tensors["knots"], int(tensors["draws"])
        return cls(knot_LN, _conformal_p(draws).to(knot_LN.device), draws)


def _kept_ranks(draws: int) -> np.ndarray:
    """Return ranks from the top (1 is the largest draw), sorted downwards from ``draws`` to 1."""
    exact = min(draws, max(draws // EXACT_SHARE, EXACT_FEWEST))
    ranks = list(range(1, exact + 1))
    while ranks[-1] < draws:
        ranks.append(min(draws, ranks[-1] + ranks[-1] // EXACT_FEWEST))
    return np.array(ranks[::-1])


def _conformal_p(draws: int) -> Tensor:
    # A value whose largest smaller knot has rank r is reached by at most r - 1 draws.
    p_N = np.concatenate([[1.0], _kept_ranks(draws) / (draws + 1)])
    return torch.from_numpy(p_N.astype(np.float32))


@dataclass(frozen=True)
class SmoothTail:
    """Smooth survival functions, interpolated linearly in log p on even grids.

    Values beyond a grid have the p-value of its end.

    Attributes:
        low_R: first grid point of each row (a layer, or an expert of one), float64, (rows,).
        step_R: distance of grid points, float64, (rows,).
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
    ) -> SmoothTail:
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
        # Rounding must not make a tail rise.
        log_p_RN = np.minimum.accumulate(log_p_RN.clip(math.log(SMALLEST_P), 0.0), axis=-1)
        table = torch.from_numpy(log_p_RN.astype(np.float32))
        return cls(torch.from_numpy(low_R), torch.from_numpy(step_R), table)

    def __call__(self, row: int | Tensor, value_X: Tensor) -> Tensor:
        """Return float32 p-values; ``row`` is one row, or one for each column of the values."""
        last = self.log_p_RN.shape[1] - 1
        place_X = ((value_X.double() - self.low_R[row]) / self.step_R[row]).clamp(0.0, last)
        below_X = place_X.long().clamp(max=last - 1)
        left_X, right_X = self.log_p_RN[row, below_X], self.log_p_RN[row, below_X + 1]
        log_p_X = torch.lerp(left_X.double(), right_X.double(), place_X - below_X)
        return log_p_X.exp().float().clamp(min=SMALLEST_P)

    def tensors(self) -> dict[str, Tensor]:
        """Return what :meth:`from_tensors` needs."""
        return {"low": self.low_R, "step": self.step_R, "log_p": self.log_p_RN}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> SmoothTail:
        """Rebuild the table."""
        return cls(tensors["low"], tensors["step"], tensors["log_p"])
