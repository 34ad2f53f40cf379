"""How the effect of an expert follows from its weight and the size of its output.

The consequence law: removing an expert with weight g and output norm n moves the prediction by
KL = c (g n)^2, to second order, with one constant c per layer.

Shape letters: P removed experts (of one layer), T tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ConsequenceLaw:
    """The regression of log KL on log weight and log norm in one layer.

    Attributes:
        weight_slope: coefficient of log weight; the law says 2.
        norm_slope: coefficient of log norm; the law says 2.
        r2: proportion of the variance of log KL that the regression explains.
        constant: c of the law, nats: the geometric mean of KL / (g n)^2.
        law_r2: proportion of the variance of log KL that the law explains, with no slope fitted.
        token_share: proportion of the residual variance of the law that lies between tokens: how
            sensitive a token's prediction is to whatever is removed.
        pairs: number of removals with a positive KL.
    """

    weight_slope: float
    norm_slope: float
    r2: float
    constant: float
    law_r2: float
    token_share: float
    pairs: int

    def row(self) -> dict[str, float | int]:
        """Return a row of a table."""
        return asdict(self)


def consequence_law(
    weight_P: ArrayLike, norm_P: ArrayLike, kl_P: ArrayLike, token_P: ArrayLike
) -> ConsequenceLaw:
    """Fit the law by least squares on the log scale.

    Removals whose weight, norm or KL is 0 are left out.

    Args:
        weight_P: weights g.
        norm_P: Euclidean norms n of the outputs.
        kl_P: KL(stock || without the expert), nats.
        token_P: label of the token of each removal.

    Raises:
        ValueError: fewer than 4 removals are left.

    >>> rng = np.random.default_rng(0)
    >>> weight, norm = rng.uniform(0.01, 0.5, (2, 1000))
    >>> law = consequence_law(weight, norm, 3e-5 * (weight * norm) ** 2, np.arange(1000) // 8)
    >>> round(law.weight_slope, 6), round(law.r2, 6), round(law.constant * 1e5, 6)
    (2.0, 1.0, 3.0)
    """
    columns = [np.asarray(column, dtype=float) for column in (weight_P, norm_P, kl_P)]
    positive_P = np.logical_and.reduce([column > 0 for column in columns])
    if positive_P.sum() < 4:
        raise ValueError(f"{positive_P.sum()} removals have an effect; allowed: at least 4")
    log_weight_P, log_norm_P, log_kl_P = (np.log(column[positive_P]) for column in columns)
    design = np.column_stack([log_weight_P, log_norm_P, np.ones_like(log_kl_P)])
    slopes, *_ = np.linalg.lstsq(design, log_kl_P, rcond=None)
    excess_P = log_kl_P - 2 * (log_weight_P + log_norm_P)
    residual_P = excess_P - excess_P.mean()
    return ConsequenceLaw(
        weight_slope=float(slopes[0]),
        norm_slope=float(slopes[1]),
        r2=_explained(log_kl_P, log_kl_P - design @ slopes),
        constant=float(np.exp(excess_P.mean())),
        law_r2=_explained(log_kl_P, residual_P),
        token_share=_between(residual_P, np.asarray(token_P)[positive_P]),
        pairs=int(positive_P.sum()),
    )


def _explained(value_P: Array, residual_P: Array) -> float:
    total = float(np.square(value_P - value_P.mean()).sum())
    return 1 - float(np.square(residual_P).sum()) / total if total > 0 else 1.0


def _between(residual_P: Array, token_P: NDArray) -> float:
    """Return the variance component between tokens over the total, from a one-way layout.

    The estimate of the analysis of variance for groups of unequal size, at least 0.
    """
    _, index_P, count_T = np.unique(token_P, return_inverse=True, return_counts=True)
    tokens, pairs = len(count_T), len(residual_P)
    if tokens < 2 or pairs == tokens:
        return float("nan")
    mean_T = np.bincount(index_P, residual_P) / count_T
    within = float(np.square(residual_P - mean_T[index_P]).sum()) / (pairs - tokens)
    between = float((count_T * np.square(mean_T - residual_P.mean())).sum()) / (tokens - 1)
    size = (pairs - float(np.square(count_T).sum()) / pairs) / (tokens - 1)
    variance = max(0.0, (between - within) / size)
    return variance / (variance + within) if variance + within > 0 else 0.0


def spearman(one_P: ArrayLike, other_P: ArrayLike) -> float:
    """Return Spearman's rank correlation; NaN if one of the two does not vary.

    >>> round(spearman([1, 2, 3, 4], [1, 3, 2, 4]), 3)
    0.8
    """
    a_P, b_P = stats.rankdata(one_P), stats.rankdata(other_P)
    a_P, b_P = a_P - a_P.mean(), b_P - b_P.mean()
    scale = math.sqrt((a_P @ a_P) * (b_P @ b_P))
    return float(a_P @ b_P / scale) if scale > 0 else math.nan
