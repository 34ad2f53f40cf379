"""Nulls that compare an expert with the bulk of its token's own experts.

Shape letters: L layers, T tokens, E experts, N places, n draws; 1 a kept axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from moe_routing.routing.nulls.base import SMALLEST_P, Null, check_finite
from moe_routing.routing.nulls.tails import EmpiricalTail
from moe_routing.routing.ordering import order_experts, sort_down, sort_rows
from moe_routing.routing.procedures import last_reaching
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.types import RouterInputs

Spread = Callable[[Tensor, Tensor, Tensor | int], Tensor]
"""Maps (logits sorted downwards, their medians, experts not masked) to a spread, (tokens, 1)."""
NORMAL_MAD = 1.482602218505602
"""Standard deviation of a normal law in units of its median absolute deviation."""
SMALLEST_SCALE = 1e-30
"""Scale of a token whose logits are mostly equal: then every other logit is far out."""


def median_deviation(sorted_TE: Tensor, centre_T1: Tensor, count: Tensor | int) -> Tensor:
    """Return the median absolute deviation, (tokens, 1).

    Without masked experts in O(E): on either side of the median the sorted row is a sorted row of
    deviations, the upper one falling and the lower one rising. Of two such rows of n, the smaller
    entries place by place are the n smallest of all 2n, and the larger ones the n largest (the
    split of a bitonic sort; Batcher 1968), so that one maximum and one minimum are the two middle
    deviations.
    """
    deviation_TE = (sorted_TE - centre_T1).abs_()
    if not isinstance(count, int):
        # Deviations of masked experts are infinite, so that they come last here too.
        return _median(sort_rows(deviation_TE), 0, count)
    half = count // 2
    if half == 0:
        return deviation_TE[:, :1]
    above_TN, below_TN = deviation_TE[:, :half], deviation_TE[:, count - half :]
    left_T1 = torch.minimum(above_TN, below_TN).amax(1, keepdim=True)
    if count % 2:  # the middle expert's own deviation, 0, is the smallest
        return left_T1
    return (left_T1 + torch.maximum(above_TN, below_TN).amin(1, keepdim=True)) / 2


def upper_hinge(sorted_TE: Tensor, centre_T1: Tensor, count: Tensor | int) -> Tensor:
    """Return the distance from the median to the median of the upper half, (tokens, 1).

    Tukey's hinges: the middle one of an odd number of experts is in both halves.
    """
    return _median(sorted_TE, 0, (count + 1) // 2) - centre_T1


def lower_hinge(sorted_TE: Tensor, centre_T1: Tensor, count: Tensor | int) -> Tensor:
    """Return the distance from the median to the median of the lower half, (tokens, 1)."""
    half = (count + 1) // 2
    return centre_T1 - _median(sorted_TE, count - half, half)


def _unmasked(sorted_TE: Tensor) -> Tensor | int:
    """Return how many experts of each token are not masked: (tokens, 1), or one for all.

    Only the CPU may look whether any is masked; an accelerator would have to wait for the answer.
    """
    if sorted_TE.device.type == "cpu" and bool((sorted_TE[:, -1] > -math.inf).all()):
        return sorted_TE.shape[1]
    return (sorted_TE > -math.inf).sum(1, keepdim=True)


def _median(sorted_TE: Tensor, start: Tensor | int, count: Tensor | int) -> Tensor:
    """Return the median of ``count`` sorted entries from ``start`` on, (tokens, 1)."""
    left_T1 = _entry(sorted_TE, start + (count - 1) // 2)
    return (left_T1 + _entry(sorted_TE, start + count // 2)) / 2


def _entry(sorted_TE: Tensor, place: Tensor | int) -> Tensor:
    if isinstance(place, int):
        return sorted_TE[:, place : place + 1]
    # A token without experts has no median; any entry will do.
    return sorted_TE.gather(1, place.clamp(0, sorted_TE.shape[1] - 1))


def _as_scale(median_deviation_T1: Tensor) -> Tensor:
    return (median_deviation_T1 * NORMAL_MAD).clamp_(min=SMALLEST_SCALE)


class RobustZNull(Null):
    """A null whose statistic is a robust z-score of the logit among its token's own logits.

    z = (logit - median) / scale, the scale in units of a normal law's standard deviation. It does
    not change when a constant is added to all logits of a token, nor does the softmax; nor when
    they are multiplied by a positive one. With an even number of experts medians are the midpoint
    of the two middle values: then reflecting the logits reflects z exactly. Masked experts (minus
    infinity) are left out of median and scale.
    """

    layer_monotone: ClassVar[bool] = True
    spread_above: ClassVar[Spread] = staticmethod(median_deviation)
    """What the scale above the median is made of."""
    spread_below: ClassVar[Spread | None] = None
    """What the scale below it is made of; None: the same."""

    @classmethod
    def z(cls, value_TN: Tensor, sorted_TE: Tensor, *, upper: bool = False) -> Tensor:
        """Return z-scores.

        Args:
            value_TN: float32 logits to score, (tokens, any number).
            sorted_TE: all logits of the tokens, sorted downwards.
            upper: only the scores above 0 matter; the others need only be at most 0.
        """
        count = _unmasked(sorted_TE)
        centre_T1 = _median(sorted_TE, 0, count)
        distance_TN = value_TN - centre_T1
        scale_T1 = _as_scale(cls.spread_above(sorted_TE, centre_T1, count))
        if upper or cls.spread_below is None:
            return distance_TN.div_(scale_T1)
        below_T1 = _as_scale(cls.spread_below(sorted_TE, centre_T1, count))
        return distance_TN.div_(torch.where(distance_TN > 0, scale_T1, below_T1))

    @classmethod
    def calibration_z_Ln(cls, sample: CalibrationSample) -> Tensor:
        """Return the z-scores of a calibration sample, float32, (layers, tokens * experts).

        Raises:
            InputError: the sample has logits that are not finite.
        """
        check_finite(sample)
        sorted_TE = sort_down(sample.logits_LTE.flatten(0, 1).float())
        return cls.z(sorted_TE, sorted_TE).view(sample.num_layers, -1)

    def statistic(self, inputs: RouterInputs) -> Tensor:
        """Return the z-scores."""
        logits_TE = inputs.logits_TE.float()
        return self.z(logits_TE, sort_down(logits_TE))

    def ordered(self, inputs: RouterInputs) -> tuple[Tensor, Tensor]:
        """Sort once for order, median and test; see :meth:`Null.ordered`."""
        sorted_TE, order_TE = order_experts(inputs.logits_TE.float())
        return self.z(sorted_TE, sorted_TE), order_TE

    def reachable(self, critical_LE: Tensor) -> Tensor:
        """Drop the places below the median where z must be positive; see :meth:`Null.reachable`."""
        half = max(1, critical_LE.shape[1] // 2)
        return critical_LE[:, :half] if bool((critical_LE > 0).all()) else critical_LE

    def rank_value(self, inputs: RouterInputs) -> Tensor:
        """Return the logits, which are in the order of z; see :meth:`Null.rank_value`."""
        return inputs.logits_TE.float()

    def passing(self, sorted_TE: Tensor, critical_N: Tensor) -> Tensor:
        """Score the places that can pass only; see :meth:`Null.passing`."""
        places = critical_N.shape[0]
        upper = places < sorted_TE.shape[1]
        z_TN = self.z(sorted_TE[:, :places], sorted_TE, upper=upper)
        return last_reaching(z_TN, critical_N)


class WithinToken(RobustZNull):
    """Robust z-scores whose upper tail is calibrated by the lower one, by layer.

    A plug-in normal tail is wrong twice: median and MAD of 64 values are estimated, and logits
    have heavy tails. The layer's own z-scores know their tail, but the upper one holds the signal.
    So the lower tail is reflected::

        p(z) = (1 + #{calibration z' <= -z}) / (n + 1),   n = tokens x experts.

    Assumption: under H0, z is as likely to be above any x > 0 as below -x (marginally over tokens
    and experts of the layer). Then p is superuniform whatever the tails, by exchangeability of the
    calibration and test tokens. Counting on the other side of a symmetric null is the device of
    Barber & Candes (2015, 1404.5609) and Arias-Castro & Chen (2017, 1604.07520).

    What bends it: (1) Experts with signal sit in the upper half, so n counts them while the lower
    tail does not: p is too small by the share of nulls, as in an adaptive BH that knows that
    share, and the FDR bound is alpha rather than alpha * m0/m. (2) They pull the median up, which
    puts nulls lower and makes p too large: at 6 strong signals among 64, by far the larger effect.
    (3) Skew. Where the router pushes some experts far down (a heavy lower tail: ``upper_to_lower``
    below 1 in the diagnostics), the reflected tail is too heavy and the test conservative, up to
    finding nothing; where the bulk leans up, it is anti-conservative. ``within_token_split``
    shows how much hangs on this. Tokens differ in their tails; p is calibrated on average over a
    layer, not given the token. Correlations between experts, by themselves, break nothing: if a
    token's logits are as likely as their reflection, all of them at once, every z is symmetric. BH
    with dependent p-values is another matter; the validity page measures its size with the real
    correlations.
    """

    id: ClassVar[str] = "within_token"

    def __init__(self, table: EmpiricalTail) -> None:
        self.table = table
        self.draws = table.draws

    @classmethod
    def fit(cls, sample: CalibrationSample) -> Self:
        """Fit every layer; see :meth:`Null.fit`."""
        return cls(EmpiricalTail.fit(-cls.calibration_z_Ln(sample)))

    def tail(self, layer: int, statistic_TE: Tensor) -> Tensor:
        """Return p-values; see :meth:`Null.tail`."""
        return self.table(layer, statistic_TE)

    def tensors(self) -> dict[str, Tensor]:
        """Return the table."""
        return self.table.tensors()

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Rebuild the null."""
        return cls(EmpiricalTail.from_tensors(tensors))


class WithinTokenSplit(WithinToken):
    """As ``within_token``, for a bulk that may be wider on one side of its median.

    Each side is measured in its own scale, the distance from the median to its hinge, as in a
    two-piece normal law; then the sides are assumed to have the same shape. Exactly valid under the
    same symmetric nulls, less powerful there (a quarter of the experts sets the scale, and signal
    widens it), and less wrong where the bulk is skewed.
    """

    id: ClassVar[str] = "within_token_split"
    spread_above: ClassVar[Spread] = staticmethod(upper_hinge)
    spread_below: ClassVar[Spread | None] = staticmethod(lower_hinge)


class WithinTokenEfron(RobustZNull):
    """Robust z-scores under a normal null fitted to their centre, by layer.

    Central matching (Efron 2004, JASA 99, section 4): N(delta, sigma^2) is the normal law whose log
    density is the quadratic fitted, by Poisson regression on 60 bins, to the central 80 % of z.
    That the tail is normal too is an assumption which the centre cannot check.
    """

    id: ClassVar[str] = "within_token_efron"
    CENTRAL: ClassVar[tuple[float, float]] = (0.1, 0.9)
    BINS: ClassVar[int] = 60

    def __init__(self, centre_L: Tensor, scale_L: Tensor) -> None:
        self.centre_L, self.scale_L = centre_L, scale_L
        self.draws = math.inf

    @classmethod
    def fit(cls, sample: CalibrationSample) -> Self:
        """Fit every layer; see :meth:`Null.fit`."""
        z_Ln = cls.calibration_z_Ln(sample).double().numpy()
        fits_L2 = torch.tensor([cls._match(z_n) for z_n in z_Ln], dtype=torch.float64)
        return cls(*fits_L2.T.contiguous())

    @classmethod
    def _match(cls, z_n: np.ndarray) -> tuple[float, float]:
        import statsmodels.api as sm

        low, high = np.quantile(z_n, cls.CENTRAL)
        count_B, edges = np.histogram(z_n, cls.BINS, (low, high))
        middle_B = (edges[:-1] + edges[1:]) / 2
        design = np.stack([np.ones_like(middle_B), middle_B, middle_B**2], axis=1)
        _, linear, square = sm.GLM(count_B, design, family=sm.families.Poisson()).fit().params
        if square >= 0:  # no peak in the centre: not a normal bulk at all
            return float(np.median(z_n)), float((high - low) / 2.563)
        return float(-linear / (2 * square)), float(np.sqrt(-1 / (2 * square)))

    def tail(self, layer: int, statistic_TE: Tensor) -> Tensor:
        """Return normal p-values, clipped at the smallest float32."""
        score_TE = (statistic_TE.double() - self.centre_L[layer]) / self.scale_L[layer]
        return torch.special.ndtr(-score_TE).float().clamp(min=SMALLEST_P)

    def tensors(self) -> dict[str, Tensor]:
        """Return centre and scale by layer."""
        return {"centre": self.centre_L, "scale": self.scale_L}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Rebuild the null."""
        return cls(tensors["centre"], tensors["scale"])
