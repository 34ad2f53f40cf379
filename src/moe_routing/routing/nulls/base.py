"""The interface of a null hypothesis for router logits.

Shape letters: L layers, T tokens, E experts, N levels or places, R rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from moe_routing.errors import InputError
from moe_routing.routing.ordering import order_experts
from moe_routing.routing.procedures import last_reaching
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.types import RouterInputs
from moe_routing.vocabulary import HYPOTHESES

SMALLEST_P = torch.finfo(torch.float32).tiny
"""Where p-values of nulls with a formula are clipped, so that they stay positive in float32."""


class Null(ABC):
    """A fitted null: turns a token's logits into one-sided p-values, one an expert.

    Every null maps the logits to a statistic (larger speaks more against H0) and the statistic to
    a p-value. Where the second map is the same for all experts and tokens of a layer
    (``layer_monotone``), comparing a p-value with a level is comparing the statistic with a
    critical value, and no p-value need be computed on the hot path.

    A logit of minus infinity marks a masked expert: it has p-value 1 and changes no other one's.

    Attributes:
        id: name in config, ids and file names; a key of :data:`moe_routing.vocabulary.HYPOTHESES`.
        layer_monotone: whether all experts and tokens of a layer share the map to p-values.
        ranks_by_logit: whether within a token the statistic is in the order of the logits.
        draws: number n of null draws behind each tail; p-values are at least 1 / (n + 1). Infinite
            for a null with a formula.
    """

    id: ClassVar[str]
    layer_monotone: ClassVar[bool]
    ranks_by_logit: ClassVar[bool] = True
    draws: float

    @property
    def hypothesis(self) -> str:
        """H0 in words."""
        return HYPOTHESES[self.id]

    @classmethod
    @abstractmethod
    def fit(cls, sample: CalibrationSample) -> Self:
        """Fit every layer on calibration tokens.

        Raises:
            InputError: the sample has logits that are not finite.
        """

    @abstractmethod
    def statistic(self, inputs: RouterInputs) -> Tensor:
        """Return the float32 test statistic, (tokens, experts)."""

    @abstractmethod
    def tail(self, layer: int, statistic_TE: Tensor) -> Tensor:
        """Return the float32 p-values, in (0, 1], of statistics; never larger for a larger one."""

    def p_values(self, inputs: RouterInputs) -> Tensor:
        """Return float32 p-values in (0, 1], (tokens, experts)."""
        return self.tail(inputs.layer, self.statistic(inputs))

    def ordered(self, inputs: RouterInputs) -> tuple[Tensor, Tensor]:
        """Return each token's statistics, sorted downwards, and the experts in that order.

        Equal statistics are ordered by the larger logit, then by the lower index.
        """
        return order_with_ties(self.statistic(inputs), inputs.logits_TE)

    def ranked(self, inputs: RouterInputs) -> tuple[Tensor, Tensor]:
        """Return :meth:`rank_value`, sorted downwards, and the experts in that order."""
        value_TE = self.rank_value(inputs)
        if self.ranks_by_logit:
            return order_experts(value_TE)
        return order_with_ties(value_TE, inputs.logits_TE)

    def ordered_p_values(self, inputs: RouterInputs) -> tuple[Tensor, Tensor]:
        """Return each token's p-values, sorted upwards, and the experts in that order.

        The order is that of :meth:`ordered` for a layer-monotone null; otherwise equal p-values
        are ordered by the larger logit, then by the lower index.
        """
        if self.layer_monotone:
            statistic_TE, order_TE = self.ordered(inputs)
            return self.tail(inputs.layer, statistic_TE), order_TE
        negative_TE, order_TE = order_with_ties(-self.p_values(inputs), inputs.logits_TE)
        return -negative_TE, order_TE

    def critical(self, layer: int, level_N: Tensor) -> Tensor:
        """Return for each level the smallest float32 statistic with a p-value at most that level.

        Found by bisection over the float32 numbers on :meth:`tail` itself, so that comparing
        statistics with it gives exactly the decisions of comparing p-values with the level.
        Infinity where no finite statistic reaches the level. Only for layer-monotone nulls.

        Args:
            layer: index of the layer.
            level_N: float64 levels, (levels,).
        """
        if not self.layer_monotone:
            raise NotImplementedError(f"null '{self.id}' is not monotone within a layer")
        low_N = torch.full(level_N.shape, -math.inf, device=level_N.device)
        low_N, high_N = _to_rank(low_N), _to_rank(-low_N)
        while bool((high_N - low_N > 1).any()):
            middle_N = (low_N + high_N) // 2
            p_N = self.tail(layer, _from_rank(middle_N)[:, None])[:, 0]
            passes_N = p_N.double() <= level_N
            high_N = torch.where(passes_N, middle_N, high_N)
            low_N = torch.where(passes_N, low_N, middle_N)
        return _from_rank(high_N)

    def reachable(self, critical_LE: Tensor) -> Tensor:
        """Return the critical values of the places that an expert can pass at, (layers, places).

        The others need not be looked at. Runs once, when a router is built.

        Args:
            critical_LE: for each place, first to last, its critical statistic.
        """
        return critical_LE

    def rank_value(self, inputs: RouterInputs) -> Tensor:
        """Return what a token's experts are ranked by, float32, (tokens, experts).

        The statistic, or something in the same order within a token. Ties are those of
        :meth:`ordered`. Only for layer-monotone nulls.
        """
        return self.statistic(inputs)

    def passing(self, sorted_TE: Tensor, critical_N: Tensor) -> Tensor:
        """Return the largest i whose i-th statistic reaches the i-th critical value, (tokens,).

        The same decisions as on p-values, without them.

        Args:
            sorted_TE: :meth:`rank_value`, each row sorted downwards.
            critical_N: critical statistics of the layer at :meth:`reachable` places.
        """
        return last_reaching(sorted_TE, critical_N)

    def reaches(self, level: float) -> bool:
        """Return whether the null has the draws for a p-value as small as a level."""
        return self.draws >= needed_draws(level)

    def check_level(self, level: float, strategy_id: str) -> None:
        """Check that the null has the draws to reach a level.

        Raises:
            InputError: fewer than 1 / level draws.
        """
        if not self.reaches(level):
            raise InputError(
                f"strategy '{strategy_id}': null '{self.id}' has {self.draws:.0f} calibration "
                f"draws; allowed: at least {needed_draws(level)}, so that a p-value can reach its "
                f"smallest level {level:.3g} (raise calibration.tokens)"
            )

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what :meth:`from_tensors` needs, for a safetensors file."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Rebuild a fitted null."""

    def to(self, device: torch.device | str) -> Self:
        """Return the null with its tables on a device, itself if they are there.

        Single numbers stay on the host.
        """
        tensors = self.tensors()
        moved = {name: value.to(device) if value.ndim else value for name, value in tensors.items()}
        there = all(moved[name] is value for name, value in tensors.items())
        return self if there else self.from_tensors(moved)


def needed_draws(level: float) -> int:
    """Return how many null draws a p-value as small as a level needs: 1 / level.

    >>> needed_draws(0.05 / 64)
    1280
    """
    return math.ceil(1 / level - 1e-6)


def order_with_ties(first_TE: Tensor, then_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows of ``first_TE`` downwards; ties by the larger ``then_TE``, then the lower index.

    On the CPU only rows that have ties are sorted by both; an accelerator would have to wait for
    their number.
    """
    if first_TE.device.type != "cpu":
        return _order_by_both(first_TE, then_TE)
    sorted_TE, order_TE = order_experts(first_TE)
    tied_TE = sorted_TE[:, 1:] == sorted_TE[:, :-1]
    if bool(tied_TE.any()):
        row_R = tied_TE.any(1).nonzero()[:, 0]
        sorted_TE[row_R], order_TE[row_R] = _order_by_both(first_TE[row_R], then_TE[row_R])
    return sorted_TE, order_TE


def _order_by_both(first_TE: Tensor, then_TE: Tensor) -> tuple[Tensor, Tensor]:
    _, by_then_TE = order_experts(then_TE.float())
    sorted_TE, place_TE = order_experts(first_TE.gather(1, by_then_TE))
    return sorted_TE, by_then_TE.gather(1, place_TE)


def sample_inputs(sample: CalibrationSample, layer: int, *, permuted: bool = False) -> RouterInputs:
    """Return calibration logits as router inputs, for diagnostics and simulations.

    Only the norms of hidden states and router vectors are in a sample; they stand in as vectors
    of one element, which is all that the nulls look at.
    """
    logits_LTE = sample.permuted_LTE if permuted else sample.logits_LTE
    norm_LT = sample.permuted_norm_LT if permuted else sample.input_norm_LT
    return RouterInputs(
        layer,
        logits_LTE[layer],
        hidden_TH=norm_LT[layer, :, None],
        weight_EH=sample.weight_norm_LE[layer, :, None],
    )


def check_finite(sample: CalibrationSample) -> None:
    """Check the logits of a calibration sample.

    Raises:
        InputError: naming the first layer with logits that are not finite.
    """
    for name in ("logits_LTE", "permuted_LTE"):
        value_Ln = getattr(sample, name).flatten(1)
        # NaN and infinities show in the extremes, at a quarter of the time of looking at each.
        finite_L = torch.isfinite(value_Ln.amin(1)) & torch.isfinite(value_Ln.amax(1))
        if not bool(finite_L.all()):
            layer = int(finite_L.int().argmin())
            raise InputError(
                f"calibration sample: {name} of layer {layer} has values that are not finite; "
                "allowed: finite router logits"
            )


def _to_rank(value_N: Tensor) -> Tensor:
    """Map float32 to integers in the same order."""
    bits_N = value_N.view(torch.int32)
    return (bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)).long()


def _from_rank(rank_N: Tensor) -> Tensor:
    bits_N = rank_N.to(torch.int32)
    return (bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)).view(torch.float32)
