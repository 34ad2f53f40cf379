"""As many experts as pass a multiple-testing procedure.

Shape letters: L layers, T tokens, E experts, N places.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moe_routing.routing import procedures
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import NULLS
from moe_routing.routing.nulls.base import Null
from moe_routing.routing.ordering import first_experts, sort_down
from moe_routing.routing.strategies.base import Selector
from moe_routing.routing.strategies.ranked import (
    Ranked,
    Ranker,
    Ranking,
    blocks_of,
    bounded_count,
    prefix_selector,
)
from moe_routing.routing.types import RouterInputs, Selection
from moe_routing.routing.weighting import WEIGHTINGS, Weighting

Counter = Callable[[Tensor], Tensor]
"""Maps p-values sorted upwards, (tokens, experts), to numbers of rejections, (tokens,)."""
Local = Callable[[torch.device], tuple[Null, Tensor]]
"""Maps a device to a null and its critical statistics there, (layers, places)."""
PROBE = 64
"""Tokens that tell how many experts a rule selects."""
FEW = 3
"""With at most this many experts a token, on average, ordering these alone is faster."""


class MultipleTesting(Ranked):
    """A procedure on a token's p-values, at least ``min_k`` experts, at most ``max_k``.

    What the procedure controls is decided by the null. Experts are taken in the order of the null's
    statistic, which is that of the p-values; ties by the larger logit, then by the lower index.
    """

    codes: ClassVar[dict[str, str]] = {"max_k": "k", "alpha": "a", "min_k": "m"}
    words: ClassVar[tuple[str, ...]] = ("null", "weighting")

    max_k: int = Field(ge=1, description="Most experts a token.")
    alpha: float = Field(gt=0, lt=1, description="Level.")
    min_k: int = Field(1, ge=1, description="Fewest experts a token.")
    null: str = Field("within_token", description="Null that p-values are computed under.")
    weighting: Weighting = Field("softmax", description="How selected experts are weighted.")

    @model_validator(mode="after")
    def _consistent(self) -> MultipleTesting:
        if self.max_k < self.min_k:
            raise ValueError(f"max_k is {self.max_k}; allowed: at least min_k = {self.min_k}")
        if self.null not in NULLS:
            raise ValueError(f"null is '{self.null}'; allowed: {', '.join(NULLS)}")
        return self

    @classmethod
    def choices(cls, word: str) -> tuple[str, ...]:
        """Return the allowed values of a named parameter."""
        return tuple(NULLS) if word == "null" else WEIGHTINGS

    @property
    def max_experts(self) -> int:
        """The most experts a token can get."""
        return self.max_k

    @property
    def min_experts(self) -> int:
        """The fewest experts a token can get."""
        return self.min_k

    @property
    def needs_null(self) -> str:
        """Id of the null."""
        return self.null

    @property
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""
        return self.weighting

    @abstractmethod
    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""

    def smallest_level(self, num_experts: int) -> float:
        """Return the p-value that an expert needs to be the only one selected."""
        return self.alpha / num_experts

    def fitted_null(self, calibration: Calibration, num_experts: int) -> Null:
        """Return the null.

        Raises:
            InputError: it was not fitted, or on too few tokens for ``alpha``.
        """
        null = calibration.null(self.null)
        null.check_level(self.smallest_level(num_experts), self.id)
        return null

    def ranker(self, calibration: Calibration, num_experts: int) -> Ranker:
        """Return ranking by p-values."""
        null = self.fitted_null(calibration, num_experts)
        count = self.counter(num_experts)
        null_on = functools.cache(null.to)

        def rank(inputs: RouterInputs, _: Tensor) -> Ranking:
            p_TE, order_TE = null_on(inputs.logits_TE.device).ordered_p_values(inputs)
            logits_TE = inputs.logits_TE.gather(1, order_TE)
            return Ranking.bounded(order_TE, logits_TE, count(p_TE), self.min_k, self.max_k)

        return rank


@functools.lru_cache(maxsize=64)
def critical_values(null: Null, layers: int, levels: tuple[float, ...]) -> Tensor:
    """Return a null's critical statistics at :meth:`Null.reachable` places, (layers, places).

    Kept, because a strategy is often put into a model and taken out again, and looking for them
    takes longer than routing a few thousand tokens.
    """
    level_E = torch.tensor(levels, dtype=torch.float64)
    critical_LE = torch.stack([null.critical(layer, level_E) for layer in range(layers)])
    return null.reachable(critical_LE)


class StepUp(MultipleTesting):
    """A step-up procedure: the largest i with p_(i) at most the i-th level."""

    levels: ClassVar[Callable[[int, float], Tensor]]

    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""
        level_E = type(self).levels(num_experts, self.alpha)
        level_on = functools.cache(level_E.to)
        return lambda p_TE: procedures.step_up(p_TE, level_on(p_TE.device))

    def smallest_level(self, num_experts: int) -> float:
        """Return the first level."""
        return float(type(self).levels(num_experts, self.alpha)[0])

    def critical(self, calibration: Calibration, num_experts: int) -> Local | None:
        """Return null and critical statistics on a device, if the null is monotone in a layer."""
        null = self.fitted_null(calibration, num_experts)
        if not null.layer_monotone:
            return None
        level_E = type(self).levels(num_experts, self.alpha)
        critical_LN = critical_values(null, calibration.sample.num_layers, tuple(level_E.tolist()))
        return functools.cache(lambda device: (null.to(device), critical_LN.to(device)))

    def ranker(self, calibration: Calibration, num_experts: int) -> Ranker:
        """Return ranking by critical statistics where the null allows it, else by p-values."""
        on = self.critical(calibration, num_experts)
        return self._ranker(on) if on else super().ranker(calibration, num_experts)

    def _ranker(self, on: Local) -> Ranker:
        def rank(inputs: RouterInputs, _: Tensor) -> Ranking:
            null, critical_LN = on(inputs.logits_TE.device)
            value_TE, order_TE = null.ranked(inputs)
            rejected_T = null.passing(value_TE, critical_LN[inputs.layer])
            return Ranking.bounded(order_TE, value_TE, rejected_T, self.min_k, self.max_k)

        return rank

    def selector(self, calibration: Calibration, num_experts: int) -> Selector:
        """Return selection that on the CPU orders only what it selects, where that is little.

        The first tokens tell whether it is; the selection is the same either way.
        """
        on = self.critical(calibration, num_experts)
        if on is None:
            return super().selector(calibration, num_experts)
        rank = self._ranker(on)
        select_all = prefix_selector(rank, num_experts)

        def select_few(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
            null, critical_LN = on(inputs.logits_TE.device)
            value_TE = null.rank_value(inputs)
            sorted_TE = sort_down(value_TE)
            rejected_T = null.passing(sorted_TE, critical_LN[inputs.layer])
            count_T = bounded_count(sorted_TE, rejected_T, self.min_k, self.max_k)
            index_TK, tied = first_experts(value_TE, sorted_TE, count_T)
            if tied and not null.ranks_by_logit:
                return select_all(inputs, probability_TE)
            return Selection(index_TK, count_T, rejected_T)

        def select(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
            if probability_TE.device.type != "cpu" or len(probability_TE) <= PROBE:
                return select_all(inputs, probability_TE)
            probe_T = rank(inputs.rows(slice(PROBE)), probability_TE[:PROBE]).count_T
            if int(probe_T.sum()) > FEW * PROBE:
                return select_all(inputs, probability_TE)
            blocks = blocks_of(*probability_TE.shape)
            parts = [select_few(inputs.rows(b), probability_TE[b]) for b in blocks]
            return Selection.concatenated(parts, num_experts)

        return select


class BH(StepUp):
    """Benjamini-Hochberg; see :func:`procedures.bh_levels`."""

    family: ClassVar[str] = "bh"
    levels = staticmethod(procedures.bh_levels)


class BY(StepUp):
    """Benjamini-Yekutieli; see :func:`procedures.by_levels`."""

    family: ClassVar[str] = "by"
    levels = staticmethod(procedures.by_levels)


class EBH(StepUp):
    """e-BH on calibrated p-values; see :func:`procedures.ebh_levels`."""

    family: ClassVar[str] = "ebh"
    levels = staticmethod(procedures.ebh_levels)


class Threshold(StepUp):
    """Every expert with p at most alpha; see :func:`procedures.threshold_levels`."""

    family: ClassVar[str] = "threshold"
    levels = staticmethod(procedures.threshold_levels)


class Storey(MultipleTesting):
    """Storey's adaptive BH; see :func:`procedures.storey`."""

    family: ClassVar[str] = "storey"

    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""
        return lambda p_TE: procedures.storey(p_TE, self.alpha)


class HigherCriticism(MultipleTesting):
    """Higher Criticism at level alpha; see :func:`procedures.higher_criticism`."""

    family: ClassVar[str] = "hc"

    def counter(self, num_experts: int) -> Counter:
        """Return the procedure."""
        critical = procedures.hc_critical(num_experts, self.alpha)
        return lambda p_TE: procedures.higher_criticism(p_TE, critical)
