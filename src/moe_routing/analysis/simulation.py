"""False discovery rate and power of the procedures where the truth is known.

Shape letters: T simulated tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import ndtr

from moe_routing.analysis.outputs import SUM_TO_ZERO
from moe_routing.routing.strategies import families
from moe_routing.routing.strategies.testing import MultipleTesting

Counter = Callable[[torch.Tensor], torch.Tensor]
"""Maps each token's p-values in ascending order to its number of rejections."""


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
    sum_to_zero: bool = False,
) -> NDArray[np.float64]:
    """Return one-sided normal p-values, (repeats, experts); the first ``signals`` have an effect.

    z = sqrt(rho) common + sqrt(1 - rho) own + effect * signal: equicorrelated, which is positive
    regression dependence. With ``sum_to_zero`` the noise of a token has its mean subtracted and is
    scaled back to unit variance: every pair is correlated by -1 / (E - 1), which is not.
    """
    common_T1 = rng.standard_normal((repeats, 1))
    own_TE = rng.standard_normal((repeats, experts))
    z_TE = np.sqrt(correlation) * common_T1 + np.sqrt(1 - correlation) * own_TE
    if sum_to_zero:
        z_TE -= z_TE.mean(1, keepdims=True)
        z_TE /= np.sqrt((1 - correlation) * (1 - 1 / experts))
    z_TE[:, :signals] += effect
    return ndtr(-z_TE)


@dataclass(frozen=True)
class Simulated:
    """Simulated p-values, sorted.

    Attributes:
        sorted_p_TE: each token's p-values in ascending order, float64.
        false_TE: how many of the first 0, 1, ... E of them are of true nulls, (tokens, E + 1).
        signals: number of false nulls.
    """

    sorted_p_TE: torch.Tensor
    false_TE: NDArray[np.int64]
    signals: int

    @classmethod
    def of(cls, p_TE: NDArray[np.float64], signals: int) -> Self:
        """Sort p-values of tokens whose first ``signals`` experts have an effect."""
        order_TE = np.argsort(p_TE, axis=1, kind="stable")
        false_TE = np.pad((order_TE >= signals).cumsum(1), ((0, 0), (1, 0)))
        sorted_p_TE = torch.from_numpy(np.take_along_axis(p_TE, order_TE, 1))
        return cls(sorted_p_TE, false_TE, signals)


def score_procedure(counter: Counter, simulated: Simulated) -> dict[str, float]:
    """Return the false discovery rate and power of a procedure on simulated p-values.

    Args:
        counter: the procedure at a level, see :func:`counters`.
        simulated: the p-values.

    ``fdr`` is the mean of V / max(R, 1), V the rejected nulls among the R rejections, and
    ``fdr_se`` its Monte-Carlo standard error; ``power`` is the proportion of signals found.
    """
    signals = simulated.signals
    rejected_T = counter(simulated.sorted_p_TE).numpy()
    false_T = np.take_along_axis(simulated.false_TE, rejected_T[:, None], 1)[:, 0]
    true_T = rejected_T - false_T
    proportion_T = false_T / np.maximum(rejected_T, 1)
    return {
        "fdr": proportion_T.mean(),
        "fdr_se": proportion_T.std(ddof=1) / np.sqrt(proportion_T.size),
        "power": true_T.mean() / signals if signals else np.nan,
        "mean_rejected": rejected_T.mean(),
    }


def counters(experts: int, alphas: Sequence[float]) -> dict[tuple[str, float], Counter]:
    """Return every procedure at every level: a function of sorted p-values, (tokens, experts)."""
    return {
        (name, alpha): procedure(max_k=experts, alpha=alpha).counter(experts)
        for (name, procedure), alpha in product(procedures().items(), alphas)
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
    """Return one row per procedure, level, number of signals and dependence.

    Dependences: every pair correlated by each of ``correlations``, and noise that sums to zero.
    All procedures see the same p-values. ``bh_theory`` is alpha * m0/m, which is BH's exact false
    discovery rate for independent p-values and an upper bound for positively correlated ones.
    """
    dependences = [(f"correlation {rho:g}", rho, False) for rho in correlations]
    if experts > 1:
        dependences.append((SUM_TO_ZERO, 0.0, True))
    rows, counter_of, families = [], counters(experts, alphas), procedures()
    for (dependence, correlation, centred), count in product(dependences, signals):
        p_TE = simulate_p(
            rng, repeats=repeats, experts=experts, signals=count, effect=effect,
            correlation=correlation, sum_to_zero=centred,
        )  # fmt: skip
        simulated = Simulated.of(p_TE, count)
        rows += [
            {
                "procedure": name,
                "guarantee": families[name].guarantee,
                "alpha": alpha,
                "signals": count,
                "dependence": dependence,
                "correlation": -1 / (experts - 1) if centred else correlation,
                "effect": effect,
                **score_procedure(counter, simulated),
                "bh_theory": alpha * (1 - count / experts),
                "repeats": repeats,
            }
            for (name, alpha), counter in counter_of.items()
        ]
    return pd.DataFrame(rows)
