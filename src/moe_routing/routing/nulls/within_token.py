"""Nulls that compare an expert with the bulk of its token's own experts.

Shape letters: L layers, T tokens, E experts, n draws; 1 a kept axis.
"""

from __future__ import annotations

import math
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from moe_routing.routing.nulls.base import SMALLEST_P, Null, check_finite
from moe_routing.routing.nulls.tails import EmpiricalTail
from moe_routing.routing.ordering import order_experts, sort_rows
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.types import RouterInputs

NORMAL_MAD = 1.482602218505602
"""Standard deviation of a normal law in units of its median absolute deviation."""
SMALLEST_SCALE = 1e-30
"""Scale of a token whose logits are mostly equal: then every other logit is far out."""


def median_and_scale(sorted_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's median and normal-consistent MAD, both (tokens, 1).

    With an even number of experts both medians are the midpoint of the two middle values: then
    reflecting the logits reflects the z-scores exactly. Masked experts (minus infinity) are left
    out.

    Args:
        sorted_TE: logits sorted downwards, float32.
    """
    count_T1 = _unmasked(sorted_TE)
    upper_T1 = ((count_T1 - 1) // 2).clamp(min=0)
    lower_T1 = (count_T1 // 2).clamp(max=sorted_TE.shape[1] - 1)
    centre_T1 = (sorted_TE.gather(1, upper_T1) + sorted_TE.gather(1, lower_T1)) / 2
    deviation_TE = sort_rows((sorted_TE - centre_T1).abs_())
    mad_T1 = (deviation_TE.gather(1, upper_T1) + deviation_TE.gather(1, lower_T1)) / 2
    return centre_T1, (mad_T1 * NORMAL_MAD).clamp(min=SMALLEST_SCALE)


def _unmasked(sorted_TE: Tensor) -> Tensor:
    """Return how many experts of each token are not masked, (tokens, 1)."""
    tokens, experts = sorted_TE.shape
    if sorted_TE.device.type == "cpu" and bool((sorted_TE[:, -1] > -math.inf).all()):
        return torch.full((tokens, 1), experts)
    return (sorted_TE > -math.inf).sum(1, keepdim=True)


def robust_z(logits_LTE: Tensor) -> Tensor:
    """Return the z-scores of the experts within their tokens, float32, sorted downwards."""
    sorted_TE, _ = order_experts(logits_LTE.flatten(0, -2).float())
    centre_T1, scale_T1 = median_and_scale(sorted_TE)
    return ((sorted_TE - centre_T1) / scale_T1).view(logits_LTE.shape)


class RobustZNull(Null):
    """A null whose statistic is z = (logit - median) / MAD over the token's own experts.

    z does not change when a constant is added to all logits of a token, nor does the softmax; nor
    when they are multiplied by a positive one.
    """

    hypothesis: ClassVar[str] = "the expert belongs to the bulk of this token's experts"
    layer_monotone: ClassVar[bool] = True

    def statistic(self, inputs: RouterInputs) -> Tensor:
        """Return the z-scores."""
        logits_TE = inputs.logits_TE.float()
        centre_T1, scale_T1 = median_and_scale(order_experts(logits_TE)[0])
        return (logits_TE - centre_T1) / scale_T1

    def ordered(self, inputs: RouterInputs) -> tuple[Tensor, Tensor]:
        """Sort once for order, median and test; see :meth:`Null.ordered`."""
        sorted_TE, order_TE = order_experts(inputs.logits_TE.float())
        centre_T1, scale_T1 = median_and_scale(sorted_TE)
        return (sorted_TE - centre_T1).div_(scale_T1), order_TE


class WithinToken(RobustZNull):
    """Robust z-scores whose upper tail is calibrated by the lower one, by layer.

    A plug-in normal tail is wrong twice: median and MAD of 64 values are estimated, and logits
    have heavy tails. The layer's own z-scores know their tail, but the upper one holds the signal.
    So the lower tail, which a router that picks large logits leaves alone, is reflected::

        p(z) = (1 + #{calibration z' <= -z}) / (n + 1),   n = tokens x experts.

    Assumption: under H0, z is as likely to be above any x > 0 as below -x (marginally over tokens
    and experts of the layer). Then p is superuniform whatever the tails, by exchangeability of the
    calibration and test tokens. Counting on the other side of a symmetric null is the device of
    Barber & Candes (2015, 1404.5609) and Arias-Castro & Chen (2017, 1604.07520).

    What bends it: (1) experts with signal sit in the upper half, so n counts them while the lower
    tail does not: p is too small by the share of nulls, as in an adaptive BH that knows that
    share, and the FDR stays at alpha rather than alpha * m0/m. (2) They pull the median up, which
    puts nulls lower and makes p too large. (3) A skewed bulk breaks it in the direction of the
    skew: see ``upper_to_lower`` in the diagnostics. Tokens differ in their tails; p is calibrated
    on average over a layer, not given the token.
    """

    id: ClassVar[str] = "within_token"

    def __init__(self, table: EmpiricalTail) -> None:
        self.table = table
        self.draws = table.draws

    @classmethod
    def fit(cls, sample: CalibrationSample) -> Self:
        """Fit every layer; see :meth:`Null.fit`."""
        check_finite(sample)
        return cls(EmpiricalTail.fit(-robust_z(sample.logits_LTE).flatten(1)))

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


class WithinTokenEfron(RobustZNull):
    """Robust z-scores under a normal null fitted to their centre, by layer.

    Central matching (Efron 2004, JASA 99, section 4): the log density of z over the central 80 %
    (a histogram of 60 bins, Poisson regression on a cubic spline's simplest form, a quadratic) is
    that of N(delta, sigma^2). The normal tail is an assumption that the centre cannot check.
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
        check_finite(sample)
        z_Ln = robust_z(sample.logits_LTE).flatten(1).double().numpy()
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
