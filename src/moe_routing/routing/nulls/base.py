"""The interface of a null hypothesis for router logits.

Shape letters: L layers, T tokens, E experts, N levels or ranks, n values of a layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from moe_routing.errors import InputError
from moe_routing.routing.levels import min_draws
from moe_routing.routing.ordering import order_experts
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.types import RouterInputs
from moe_routing.vocabulary import ExpertScore, hypothesis

SMALLEST_P = torch.finfo(torch.float32).tiny
"""p-values computed from a formula are clipped here, so that they stay positive in float32."""


@dataclass(frozen=True)
class OrderedExperts:
    """Each token's experts in descending order of the test statistic.

    Attributes:
        order_TE: expert ids, int64, (tokens, experts).
        key_TE: the float32 sort key, descending, (tokens, experts): the logit where it has the
            order of the statistic, else the statistic; -inf for masked experts.
        statistic_TN: float32 statistics of the first N experts in that order, (tokens, ranks).
    """

    order_TE: Tensor
    key_TE: Tensor
    statistic_TN: Tensor


class Null(ABC):
    """A fitted null hypothesis: maps a token's logits to one-sided p-values, one per expert.

    A null has a test statistic (larger values are evidence against H0) and a survival function,
    which maps the statistic to a p-value. If all experts and tokens of a layer share the survival
    function (``layer_monotone``), it has an inverse, the critical values: p is at most a level if
    and only if the statistic is at least the critical value, and the hot path computes no p-values
    (:class:`moe_routing.routing.nulls.step_up.StepUpTest`).

    A logit of minus infinity marks a masked expert. Its statistic is minus infinity, its p-value is
    1, and the p-values of the other experts are as if it did not exist.

    Attributes:
        id: name in config, ids and file names; see :func:`moe_routing.vocabulary.hypothesis`.
        layer_monotone: whether all experts and tokens of a layer share the survival function.
        by_rank: whether the survival function of a layer-monotone null also depends on the rank of
            the statistic within its token. It must not decrease from rank to rank.
        tokens_key: key of the config that sets the number of draws, for errors.
        score: what ranks the experts in the test statistic, if not the logit; see
            :mod:`moe_routing.routing.scores`.
        compensated: whether a dropped expert is replaced by its mean output.
        num_draws: number n of null draws behind each p-value: the smallest attainable p-value is
            1 / (n + 1). Infinite for a null with a formula.
    """

    id: str
    layer_monotone: ClassVar[bool]
    by_rank: ClassVar[bool] = False
    tokens_key: ClassVar[str] = "calibration.tokens"
    score: ExpertScore = "probability"
    compensated: bool = False
    num_draws: float

    @property
    def hypothesis(self) -> str:
        """H0 in words."""
        return hypothesis(self.id)

    @classmethod
    @abstractmethod
    def fit(cls, sample: CalibrationSample) -> Self:
        """Fit every layer on calibration tokens.

        Raises:
            InputError: the sample has logits that are not finite.
        """

    @abstractmethod
    def statistic(self, inputs: RouterInputs) -> Tensor:
        """Return the float32 test statistics, (tokens, experts)."""

    @abstractmethod
    def survival(self, layer: int, statistic_TE: Tensor) -> Tensor:
        """Return the float32 p-values, in (0, 1], of test statistics; non-increasing.

        Unless the null is layer-monotone, the columns must be the experts in their own order. For a
        null ``by_rank`` they must be the experts in descending order of the statistic.
        """

    def p_values(self, inputs: RouterInputs) -> Tensor:
        """Return float32 p-values in (0, 1], (tokens, experts)."""
        if self.by_rank:
            p_TE, order_TE = self.sorted_p_values(inputs)
            return torch.empty_like(p_TE).scatter_(1, order_TE, p_TE)
        return self.survival(inputs.layer, self.statistic(inputs))

    def conditional(self) -> Null:
        """Return the null with p-values that are superuniform for an expert for which H0 holds.

        Itself, unless its p-values are superuniform only on average over all experts. Procedures
        that estimate or use the number of true nulls need conditional p-values.
        """
        return self

    def critical_values(self, layer: int, level_N: Tensor) -> Tensor:
        """Return for each level the smallest float32 statistic with a p-value at most that level.

        The exact inverse of :meth:`survival`: comparing statistics with critical values gives the
        decisions of comparing p-values with levels. Infinity where no finite statistic attains the
        level, minus infinity where all do.

        Args:
            layer: index of the layer.
            level_N: float64 levels, (levels,); those of the ranks, for a null ``by_rank``.

        Raises:
            NotImplementedError: the null is not layer-monotone.
        """
        if not self.layer_monotone:
            raise NotImplementedError(f"null '{self.id}' is not monotone within a layer")
        return self._invert(layer, level_N)

    def _invert(self, layer: int, level_N: Tensor) -> Tensor:
        """Invert the survival function of a layer, here by bisection over the float32 numbers."""
        high_N = _to_ordinal(torch.full(level_N.shape, math.inf, device=level_N.device))
        low_N = -high_N - 2  # one below minus infinity; never evaluated, since the middle is above
        while bool((high_N - low_N > 1).any()):
            middle_N = (low_N + high_N + 1) // 2
            p_N = self.survival(layer, _from_ordinal(middle_N)[None])[0]
            attains_N = p_N.double() <= level_N
            high_N = torch.where(attains_N, middle_N, high_N)
            low_N = torch.where(attains_N, low_N, middle_N)
        return _from_ordinal(high_N)

    def max_rejections(self, critical_LE: Tensor) -> int:
        """Return an upper bound on the rejections of a step-up procedure, for any token.

        Ranks beyond it need not be looked at. Called once, when a test is built.

        Args:
            critical_LE: the critical values of the procedure's levels, (layers, experts).
        """
        return critical_LE.shape[1]

    def order(self, inputs: RouterInputs, num_ranks: int | None = None) -> OrderedExperts:
        """Sort each token's experts by the test statistic, in descending order.

        Equal statistics are ordered by the larger logit, then by the lower index. For a
        layer-monotone null this is the ascending order of the p-values.

        Args:
            inputs: logits of one layer.
            num_ranks: how many statistics to return, by default all. Fewer must be what
                :meth:`max_rejections` allows; then only statistics that can reach their critical
                value are exact.
        """
        statistic_TE, order_TE = order_experts(self.statistic(inputs), inputs.logits_TE)
        return OrderedExperts(order_TE, statistic_TE, statistic_TE[:, :num_ranks])

    def sorted_p_values(self, inputs: RouterInputs) -> tuple[Tensor, Tensor]:
        """Return each token's p-values in ascending order, and the experts in that order.

        The order is that of :meth:`order` for a layer-monotone null. Otherwise equal p-values are
        ordered by the larger logit, then by the lower index.
        """
        if self.layer_monotone:
            ordered = self.order(inputs)
            return self.survival(inputs.layer, ordered.statistic_TN), ordered.order_TE
        negative_TE, order_TE = order_experts(-self.p_values(inputs), inputs.logits_TE)
        return -negative_TE, order_TE

    def attains(self, level: float) -> bool:
        """Return whether the null has enough draws for a p-value as small as a level."""
        return self.num_draws >= min_draws(level)

    def diagnostics(self, layer: int) -> dict[str, object]:
        """Return what to add to the row of a layer in the table of diagnostics, by column."""
        del layer
        return {}

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the state that :meth:`from_tensors` restores, for a safetensors file."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Restore a fitted null."""

    def to(self, device: torch.device | str) -> Self:
        """Return the null with its tables on a device, itself if they are there.

        Zero-dimensional tensors stay on the host.
        """
        tensors = self.tensors()
        moved = {name: value.to(device) if value.ndim else value for name, value in tensors.items()}
        there = all(moved[name] is value for name, value in tensors.items())
        return self if there else self.from_tensors(moved)


def check_finite(sample: CalibrationSample) -> None:
    """Check the logits of a calibration sample.

    Raises:
        InputError: naming the first layer with logits that are not finite.
    """
    for name in ("logits_LTE", "permuted_LTE"):
        value_Ln = getattr(sample, name).flatten(1)
        # NaN and infinities show in the minimum and maximum, which take a quarter of the time of
        # isfinite on every value.
        finite_L = torch.isfinite(value_Ln.amin(1)) & torch.isfinite(value_Ln.amax(1))
        if not bool(finite_L.all()):
            layer = int(finite_L.int().argmin())
            raise InputError(
                f"calibration sample: {name} of layer {layer} has values that are not finite; "
                "allowed: finite router logits"
            )


def _to_ordinal(value_N: Tensor) -> Tensor:
    """Map float32 to integers in the same order."""
    bits_N = value_N.view(torch.int32)
    return (bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)).long()


def _from_ordinal(ordinal_N: Tensor) -> Tensor:
    bits_N = ordinal_N.to(torch.int32)
    return (bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)).view(torch.float32)
