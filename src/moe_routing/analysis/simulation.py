"""False discovery rate and power of the procedures where the truth is known.

Shape letters: T simulated tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import ndtr

from moe_routing.routing.strategies import families
from moe_routing.routing.strategies.testing import MultipleTesting


def procedures() -> dict[str, type[MultipleTesting]]:
    """Return the families that are procedures on p-values, by name."""
    return {name: cls for name, cls in families().items() if issubclass(cls, MultipleTesting)}


def simulate_p(
    rng: np.random.Generator,
    *,
    repeats: int,
    experts: int,
    signals: int,
    effect: float,
    correlation: float,
) -> NDArray[np.float64]:
    """Return one-sided normal p-values, (repeats, experts); the first ``signals`` have an effect.

    z = sqrt(rho) common + sqrt(1 - rho) own + effect * signal: equicorrelated, which is positive
    regression dependence.
    """
    common_T1 = rng.standard_normal((repeats, 1))
    own_TE = rng.standard_normal((repeats, experts))
    z_TE = np.sqrt(correlation) * common_T1 + np.sqrt(1 - correlation) * own_TE
    z_TE[:, :signals] += effect
    return ndtr(-z_TE)


def score_procedure(
    procedure: type[MultipleTesting], alpha: float, p_TE: NDArray[np.float64], signals: int
) -> dict[str, float]:
    """Return the false discovery rate and power of a procedure on simulated p-values.

    ``fdr`` is the mean of V / max(R, 1), V the rejected nulls among the R rejections, and
    ``fdr_se`` its Monte-Carlo standard error; ``power`` is the proportion of signals found.
    """
    order_TE = np.argsort(p_TE, axis=1, kind="stable")
    sorted_p_TE = np.take_along_axis(p_TE, order_TE, 1)
    experts = p_TE.shape[1]
    counter = procedure(max_k=experts, alpha=alpha).counter(experts)
    rejected_T = counter(torch.from_numpy(sorted_p_TE)).numpy()
    rejected_TE = np.arange(experts) < rejected_T[:, None]
    false_T = (rejected_TE & (order_TE >= signals)).sum(1)
    true_T = rejected_T - false_T
    proportion_T = false_T / np.maximum(rejected_T, 1)
    return {
        "fdr": proportion_T.mean(),
        "fdr_se": proportion_T.std(ddof=1) / np.sqrt(proportion_T.size),
        "power": true_T.mean() / signals if signals else np.nan,
        "mean_rejected": rejected_T.mean(),
    }


def simulate_procedures(
    rng: np.random.Generator,
    *,
    repeats: int,
    experts: int,
    signals: Sequence[int],
    effect: float,
    correlations: Sequence[float],
    alphas: Sequence[float],
) -> pd.DataFrame:
    """Return one row per procedure, level, number of signals and correlation.

    All procedures see the same p-values. ``bh_theory`` is alpha * m0/m, which is BH's exact false
    discovery rate for independent p-values and an upper bound for these correlated ones.
    """
    rows = []
    for correlation, count in product(correlations, signals):
        p_TE = simulate_p(
            rng, repeats=repeats, experts=experts, signals=count, effect=effect,
            correlation=correlation,
        )  # fmt: skip
        rows += [
            {
                "procedure": name,
                "guarantee": procedure.guarantee,
                "alpha": alpha,
                "signals": count,
                "correlation": correlation,
                "effect": effect,
                **score_procedure(procedure, alpha, p_TE, count),
                "bh_theory": alpha * (1 - count / experts),
                "repeats": repeats,
            }
            for (name, procedure), alpha in product(procedures().items(), alphas)
        ]
    return pd.DataFrame(rows)
