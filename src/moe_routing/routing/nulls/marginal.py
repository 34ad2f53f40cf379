"""Nulls that compare a logit with the distribution of logits: pooled, per expert, unselected.

Shape letters: L layers, T tokens, E experts, R rows of a table, N grid points, n draws.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from moe_routing.errors import InputError
from moe_routing.routing.nulls.base import Null, OrderedExperts, check_finite
from moe_routing.routing.nulls.tails import EmpiricalNull, SmoothSurvival
from moe_routing.routing.ordering import order_experts
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.types import RouterInputs


class LogitNull(Null):
    """A null whose statistic is the logit itself."""

    def statistic(self, inputs: RouterInputs) -> Tensor:
        """Return the logits."""
        return inputs.logits_TE.float()

    def order(self, inputs: RouterInputs, num_ranks: int | None = None) -> OrderedExperts:
        """Sort the logits, without a tie break by logit; see :meth:`Null.order`."""
        sorted_TE, order_TE = order_experts(inputs.logits_TE.float())
        return OrderedExperts(order_TE, sorted_TE, sorted_TE[:, :num_ranks])


class Pooled(LogitNull, EmpiricalNull):
    """Logits of all calibration tokens and experts of the layer; n = tokens x experts.

    The null is the marginal distribution of the logits, signal included. The p-values of a token
    are then uniform on average over its experts, whatever the router does, and BH selects any
    expert for a proportion of at most alpha * (1 + 1/2 + ... + 1/E) of the tokens: P(R > 0) is at
    most the sum over j of (1/j) * E * alpha/E under any dependence (the argument of Benjamini &
    Yekutieli 2001, theorem 1.3). Such a rule finds unusually large logits; it has no evidence about
    which experts are irrelevant.
    """

    id: ClassVar[str] = "pooled"

    @classmethod
    def draws_Ln(cls, sample: CalibrationSample) -> Tensor:
        """Return each layer's logits, (layers, tokens * experts)."""
        return sample.logits_LTE.flatten(1)


class PerExpert(LogitNull, EmpiricalNull):
    """Logits of one expert on calibration tokens; n = tokens. The bound of ``pooled`` holds."""

    id: ClassVar[str] = "per_expert"
    layer_monotone: ClassVar[bool] = False

    @classmethod
    def draws_Ln(cls, sample: CalibrationSample) -> Tensor:
        """Return each expert's logits, (layers, experts, tokens)."""
        return sample.logits_LTE.transpose(1, 2)

    def survival(self, layer: int, statistic_TE: Tensor) -> Tensor:
        """Return p-values from each expert's own table; columns are experts."""
        return self.table(layer, statistic_TE.T).T


class Unselected(LogitNull, EmpiricalNull):
    """Logits of the experts outside the model's own top k; n = tokens x (experts - k).

    The draws are selected for being small, so p-values are too small under any noise. Not a valid
    null; included to show the effect of that selection.
    """

    id: ClassVar[str] = "unselected"

    @classmethod
    def draws_Ln(cls, sample: CalibrationSample) -> Tensor:
        """Return the logits outside each token's own top k.

        Raises:
            InputError: the model selects every expert.
        """
        if sample.top_k >= sample.num_experts:
            raise InputError(
                f"null 'unselected' needs experts that the model rejects; it selects "
                f"{sample.top_k} of {sample.num_experts}"
            )
        sorted_LTE = np.sort(sample.logits_LTE.numpy(), axis=-1)
        rejected_LTE = sorted_LTE[..., : sample.num_experts - sample.top_k]
        return torch.from_numpy(rejected_LTE.reshape(sample.num_layers, -1))


class PermutedContext(PerExpert):
    """Logits of one expert on calibration tokens in shuffled contexts; n = tokens.

    Conformal: superuniform if, under H0, the expert's logit for a test token is exchangeable with
    its logits on shuffled text. The p-value is marginal over tokens.
    """

    id: ClassVar[str] = "permuted_context"

    @classmethod
    def draws_Ln(cls, sample: CalibrationSample) -> Tensor:
        """Return each expert's logits on shuffled text, (layers, experts, tokens)."""
        return sample.permuted_LTE.transpose(1, 2)


class KernelNull(LogitNull):
    """A null whose p-values come from a Gaussian kernel density of calibration logits.

    Bandwidth 0.9 * min(sd, IQR / 1.349) * n^(-1/5) (Silverman 1986, eq. 3.31). A kernel density
    has no information beyond its draws, so p-values are clipped at 1 / (n + 1). It is tabulated at
    1,025 points, about 0.01 standard deviations or 0.1 bandwidths apart.
    """

    KNOTS: ClassVar[int] = 1025

    def __init__(self, table: SmoothSurvival, num_draws: int) -> None:
        self.table = table
        self.num_draws = num_draws

    @classmethod
    def fit(cls, sample: CalibrationSample) -> Self:
        """Fit every layer; see :meth:`Null.fit`."""
        check_finite(sample)
        draws_Rn = cls.draws_Rn(sample).double().numpy()
        width_R = np.array([silverman_bandwidth(draws) for draws in draws_Rn])
        low_R, high_R = draws_Rn.min(1) - 6 * width_R, draws_Rn.max(1) + 6 * width_R
        smallest = 1 / (draws_Rn.shape[1] + 1)

        def log_survival(row: int, grid: np.ndarray) -> np.ndarray:
            return np.log(kernel_survival(draws_Rn[row], width_R[row], grid).clip(smallest, 1.0))

        return cls(SmoothSurvival.fit(low_R, high_R, cls.KNOTS, log_survival), draws_Rn.shape[1])

    @classmethod
    @abstractmethod
    def draws_Rn(cls, sample: CalibrationSample) -> Tensor:
        """Return the draws of each row of the table."""

    def survival(self, layer: int, statistic_TE: Tensor) -> Tensor:
        """Return p-values; see :meth:`Null.survival`."""
        return self.table(layer, statistic_TE)

    def tensors(self) -> dict[str, Tensor]:
        """Return the table and the number of draws."""
        return {**self.table.tensors(), "draws": torch.tensor(self.num_draws)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Restore the null."""
        return cls(SmoothSurvival.from_tensors(tensors), int(tensors["draws"]))


class PooledKDE(KernelNull):
    """As ``pooled``, with a kernel density instead of the empirical distribution."""

    id: ClassVar[str] = "pooled_kde"
    layer_monotone: ClassVar[bool] = True

    @classmethod
    def draws_Rn(cls, sample: CalibrationSample) -> Tensor:
        """Return each layer's logits."""
        return sample.logits_LTE.flatten(1)


class PerExpertKDE(KernelNull):
    """As ``per_expert``, with a kernel density instead of the empirical distribution."""

    id: ClassVar[str] = "per_expert_kde"
    layer_monotone: ClassVar[bool] = False

    @classmethod
    def draws_Rn(cls, sample: CalibrationSample) -> Tensor:
        """Return each expert's logits, (layers * experts, tokens)."""
        return sample.logits_LTE.transpose(1, 2).flatten(0, 1)

    def survival(self, layer: int, statistic_TE: Tensor) -> Tensor:
        """Return p-values from each expert's own table; columns are experts."""
        experts = statistic_TE.shape[1]
        row_E = torch.arange(experts, device=statistic_TE.device) + layer * experts
        return self.table(row_E, statistic_TE)


def silverman_bandwidth(draws_n: np.ndarray) -> float:
    """Return 0.9 * min(sd, IQR / 1.349) * n^(-1/5), and a positive number for constant draws."""
    low, high = np.quantile(draws_n, [0.25, 0.75])
    spreads = [spread for spread in (draws_n.std(), (high - low) / 1.349) if spread > 0]
    return 0.9 * float(min(spreads, default=1.0)) * draws_n.size**-0.2


def kernel_survival(draws_n: np.ndarray, width: float, grid_N: np.ndarray) -> np.ndarray:
    """Return the survival function of a Gaussian kernel density on an even grid.

    Each draw is split between its two neighbouring grid points (linear binning); the counts are
    convolved with the survival function of the kernel.
    """
    from scipy.signal import fftconvolve
    from scipy.stats import norm

    step = grid_N[1] - grid_N[0]
    position_n = (draws_n - grid_N[0]) / step
    below_n = np.floor(position_n).astype(int)
    fraction_n = position_n - below_n
    mass_N = np.bincount(below_n, 1 - fraction_n, grid_N.size + 1)
    mass_N += np.bincount(below_n + 1, fraction_n, grid_N.size + 1)
    distance = np.arange(-grid_N.size, grid_N.size + 1) * step
    survival = fftconvolve(mass_N, norm.sf(distance / width))
    return survival[grid_N.size : 2 * grid_N.size] / draws_n.size
