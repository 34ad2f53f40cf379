"""Nulls that compare an expert with the bulk of the experts of the same token.

Shape letters: L layers, T tokens, E experts, N ranks, B bins, n draws; 1 a kept axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from moe_routing.routing.nulls.base import SMALLEST_P, Null, OrderedExperts, check_finite
from moe_routing.routing.nulls.tails import EmpiricalNull
from moe_routing.routing.ordering import order_experts, sort_ascending_, sort_descending
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.types import RouterInputs

Spread = Callable[[Tensor, Tensor, Tensor | int], Tensor]
"""Maps (logits in descending order, their medians, numbers of unmasked experts) to a spread,
(tokens, 1)."""
NORMAL_MAD = 1.482602218505602
"""Standard deviation of a normal distribution in units of its median absolute deviation."""
SMALLEST_SCALE = 1e-30
"""Scale if more than half of a token's logits are equal; any other logit is then an outlier."""


def median_deviation(sorted_TE: Tensor, centre_T1: Tensor, count: Tensor | int) -> Tensor:
    """Return the median absolute deviation, (tokens, 1).

    Takes O(E) without masked experts. On either side of the median the deviations of a sorted row
    are sorted too: descending above it, ascending below it. The elementwise minimum of two such
    rows of n holds the n smallest of all 2n deviations, and the elementwise maximum the n largest
    (the split step of a bitonic sort; Batcher 1968). The two middle deviations are therefore the
    maximum of the former and the minimum of the latter.
    """
    deviation_TE = (sorted_TE - centre_T1).abs_()
    if not isinstance(count, int):
        # Deviations of masked experts are infinite, so they come last here too.
        return _median(sort_ascending_(deviation_TE), 0, count)
    half = count // 2
    if half == 0:
        return deviation_TE[:, :1]
    above_TN, below_TN = deviation_TE[:, :half], deviation_TE[:, count - half :]
    left_T1 = torch.minimum(above_TN, below_TN).amax(1, keepdim=True)
    if count % 2:  # the deviation of the middle expert, 0, is the smallest
        return left_T1
    return (left_T1 + torch.maximum(above_TN, below_TN).amin(1, keepdim=True)) / 2


def upper_hinge(sorted_TE: Tensor, centre_T1: Tensor, count: Tensor | int) -> Tensor:
    """Return the distance from the median to the median of the upper half, (tokens, 1).

    Tukey's hinges: with an odd number of experts the middle one belongs to both halves.
    """
    return _median(sorted_TE, 0, (count + 1) // 2) - centre_T1


def lower_hinge(sorted_TE: Tensor, centre_T1: Tensor, count: Tensor | int) -> Tensor:
    """Return the distance from the median to the median of the lower half, (tokens, 1)."""
    half = (count + 1) // 2
    return centre_T1 - _median(sorted_TE, count - half, half)


def _unmasked(sorted_TE: Tensor) -> Tensor | int:
    """Return the number of unmasked experts per token, (tokens, 1), or one number for all tokens.

    Whether any expert is masked is checked on the CPU only: on an accelerator the check would
    synchronise with the device.
    """
    if sorted_TE.device.type == "cpu" and bool((sorted_TE[:, -1] > -math.inf).all()):
        return sorted_TE.shape[1]
    return (sorted_TE > -math.inf).sum(1, keepdim=True)


def _median(sorted_TE: Tensor, start: Tensor | int, count: Tensor | int) -> Tensor:
    """Return the median of ``count`` sorted entries beginning at ``start``, (tokens, 1)."""
    left_T1 = _entry(sorted_TE, start + (count - 1) // 2)
    return (left_T1 + _entry(sorted_TE, start + count // 2)) / 2


def _entry(sorted_TE: Tensor, index: Tensor | int) -> Tensor:
    if isinstance(index, int):
        return sorted_TE[:, index : index + 1]
    # A token with all experts masked has no median; any entry will do.
    return sorted_TE.gather(1, index.clamp(0, sorted_TE.shape[1] - 1))


def _as_scale(median_deviation_T1: Tensor) -> Tensor:
    return (median_deviation_T1 * NORMAL_MAD).clamp_(min=SMALLEST_SCALE)


class RobustZNull(Null):
    """A null whose statistic is the robust z-score of a logit among its token's own logits.

    z = (logit - median) / scale, the scale in units of a normal distribution's standard deviation.
    Neither adding a constant to all logits of a token (which leaves the softmax unchanged, too) nor
    multiplying them by a positive constant changes z. With an even number of experts a median is
    the midpoint of the two middle values, so reflecting the logits reflects z exactly. Masked
    experts (minus infinity) are left out of median and scale.
    """

    layer_monotone: ClassVar[bool] = True
    spread_above: ClassVar[Spread] = staticmethod(median_deviation)
    """Spread that sets the scale above the median."""
    spread_below: ClassVar[Spread | None] = None
    """Spread that sets the scale below the median; None: the same."""

    @classmethod
    def z(cls, value_TN: Tensor, sorted_TE: Tensor, *, positive_only: bool = False) -> Tensor:
        """Return z-scores.

        Args:
            value_TN: float32 logits to score, (tokens, any number).
            sorted_TE: all logits of the tokens, in descending order.
            positive_only: only positive scores must be exact; the others must only be at most 0.
        """
        count = _unmasked(sorted_TE)
        centre_T1 = _median(sorted_TE, 0, count)
        distance_TN = value_TN - centre_T1
        scale_T1 = _as_scale(cls.spread_above(sorted_TE, centre_T1, count))
        if positive_only or cls.spread_below is None:
            return distance_TN.div_(scale_T1)
        below_T1 = _as_scale(cls.spread_below(sorted_TE, centre_T1, count))
        return distance_TN.div_(torch.where(distance_TN > 0, scale_T1, below_T1))

    @classmethod
    def calibration_z_Ln(cls, sample: CalibrationSample) -> Tensor:
        """Return the z-scores of a calibration sample, float32, (layers, tokens * experts)."""
        sorted_TE = sort_descending(sample.logits_LTE.flatten(0, 1).float())
        return cls.z(sorted_TE, sorted_TE).view(sample.num_layers, -1)

    def statistic(self, inputs: RouterInputs) -> Tensor:
        """Return the z-scores."""
        logits_TE = inputs.logits_TE.float()
        return self.z(logits_TE, sort_descending(logits_TE))

    def max_rejections(self, critical_LE: Tensor) -> int:
        """Return half the experts if only positive z-scores are rejected, else all."""
        experts = critical_LE.shape[1]
        return max(1, experts // 2) if bool((critical_LE > 0).all()) else experts

    def order(self, inputs: RouterInputs, num_ranks: int | None = None) -> OrderedExperts:
        """Sort the logits, whose order is that of z; see :meth:`Null.order`.

        One sort serves the order, the median and the scale. With fewer ranks than experts, only
        positive z-scores are exact.
        """
        sorted_TE, order_TE = order_experts(inputs.logits_TE.float())
        value_TN = sorted_TE[:, :num_ranks]
        z_TN = self.z(value_TN, sorted_TE, positive_only=value_TN.shape != sorted_TE.shape)
        return OrderedExperts(order_TE, sorted_TE, z_TN)


class WithinToken(RobustZNull, EmpiricalNull):
    """Robust z-scores, with the layer's lower tail of z as the null distribution of the upper one.

    A normal tail would be wrong for two reasons: median and MAD of 64 values are estimates, and
    logits have heavy tails. The layer's z-scores show the true tails, but the upper tail contains
    the signal. Therefore the lower tail is reflected::

        p(z) = (1 + #{calibration z' <= -z}) / (n + 1),   n = tokens x experts.

    Assumption: under H0, P(z >= x) = P(z <= -x) for all x > 0 (marginally over the tokens and
    experts of the layer). Then p is superuniform, whatever the tails, if calibration and test
    tokens are exchangeable. Counting on the other side of a symmetric null follows Barber & Candes
    (2015, 1404.5609) and Arias-Castro & Chen (2017, 1604.07520).

    Three things distort p. (1) Experts with signal are in the upper half: n counts them, the lower
    tail does not. p is too small by a factor of the proportion of nulls, as in an adaptive BH that
    knows this proportion, and the bound on the FDR is alpha rather than alpha * m0/m. (2) They
    raise the median, which lowers the z-scores of the nulls and makes p too large; with 6 strong
    signals among 64 this is by far the larger effect. (3) Skewness. Where the router gives some
    experts very low logits (a heavy lower tail: ``upper_to_lower`` below 1 in the diagnostics), the
    reflected tail is too heavy and the test is conservative, to the point of rejecting nothing;
    where the bulk is skewed upwards, it is anti-conservative. ``within_token_split`` shows how much
    depends on this.

    Tails differ between tokens: p is calibrated on average over a layer, not conditionally on the
    token. Correlations between experts do not by themselves invalidate p: if a token's logits have
    the same joint distribution as their reflection, every z is symmetric. BH on dependent p-values
    is another question; the validity analysis measures its size with the real correlations.
    """

    id: ClassVar[str] = "within_token"

    @classmethod
    def draws_Ln(cls, sample: CalibrationSample) -> Tensor:
        """Return the reflected z-scores, (layers, tokens * experts)."""
        return -cls.calibration_z_Ln(sample)


class WithinTokenSplit(WithinToken):
    """As ``within_token``, for a bulk with different spreads above and below its median.

    Each side has its own scale, the distance from the median to its hinge, as in a two-piece normal
    distribution; apart from scale the sides are assumed to have the same shape. Exactly valid under
    the same symmetric nulls. There it is less powerful, since a quarter of the experts sets the
    scale and signal increases it; where the bulk is skewed, it is less biased.
    """

    id: ClassVar[str] = "within_token_split"
    spread_above: ClassVar[Spread] = staticmethod(upper_hinge)
    spread_below: ClassVar[Spread | None] = staticmethod(lower_hinge)


class WithinTokenEfron(RobustZNull):
    """Robust z-scores under a normal null fitted to the central z-scores, by layer.

    Central matching (Efron 2004, JASA 99, section 4): N(delta, sigma^2) is the normal distribution
    whose log density is the quadratic fitted, by Poisson regression on 60 bins, to the central 80 %
    of z. That the tails are normal too is an assumption that the centre cannot test.
    """

    id: ClassVar[str] = "within_token_efron"
    CENTRAL: ClassVar[tuple[float, float]] = (0.1, 0.9)
    BINS: ClassVar[int] = 60

    def __init__(self, centre_L: Tensor, scale_L: Tensor) -> None:
        self.centre_L, self.scale_L = centre_L, scale_L
        self.num_draws = math.inf

    @classmethod
    def fit(cls, sample: CalibrationSample) -> Self:
        """Fit every layer; see :meth:`Null.fit`."""
        check_finite(sample)
        z_Ln = cls.calibration_z_Ln(sample).double().numpy()
        fits_L2 = torch.tensor([cls._match(z_n) for z_n in z_Ln], dtype=torch.float64)
        return cls(*fits_L2.T.contiguous())

    @classmethod
    def _match(cls, z_n: np.ndarray) -> tuple[float, float]:
        # Not statsmodels.api, which imports four times as long.
        from statsmodels.genmod.families import Poisson
        from statsmodels.genmod.generalized_linear_model import GLM

        low, high = np.quantile(z_n, cls.CENTRAL)
        count_B, edges = np.histogram(z_n, cls.BINS, (low, high))
        middle_B = (edges[:-1] + edges[1:]) / 2
        design = np.stack([np.ones_like(middle_B), middle_B, middle_B**2], axis=1)
        _, linear, square = GLM(count_B, design, family=Poisson()).fit().params
        if square >= 0:  # no peak in the centre: the bulk is not normal
            return float(np.median(z_n)), float((high - low) / 2.563)
        return float(-linear / (2 * square)), float(np.sqrt(-1 / (2 * square)))

    def survival(self, layer: int, statistic_TE: Tensor) -> Tensor:
        """Return normal p-values, clipped at the smallest normal float32."""
        score_TE = (statistic_TE.double() - self.centre_L[layer]) / self.scale_L[layer]
        return torch.special.ndtr(-score_TE).float().clamp(min=SMALLEST_P)

    def tensors(self) -> dict[str, Tensor]:
        """Return centre and scale by layer."""
        return {"centre": self.centre_L, "scale": self.scale_L}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Restore the null."""
        return cls(tensors["centre"], tensors["scale"])
