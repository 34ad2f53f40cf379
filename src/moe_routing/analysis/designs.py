"""Router logits for which the null hypothesis holds by design.

A design makes two independent samples of the same law, with no expert that deserves to be chosen:
nulls are fitted on the first and tested on the second. All experts of a token are alike, so that
H0 is true of each of them and every selection is a false one. Whether a null then holds its size is
another question: some calibrate their tail by an assumption on the law, and a design may break it.

``real_marginal`` is the hard one. It draws all logits of a layer independently from the layer's own
law, skewness and upper tail included. For the marginal nulls that law *is* the null, and
exchangeability makes them superuniform whatever it looks like. The mirror of ``within_token`` has
no such guarantee there: it is exact only if z is as likely to be above any x > 0 as below -x, and
reflecting the lower tail of a law with a longer upper one gives p-values that are too small (of a
law with a longer lower one, too large). A real layer leans up where a few experts stand out, which
is the signal that the router is for, and logits alone do not tell such signal from a skewed bulk.
So this design asks what happens if all of the skewness were noise, and a null that fails it is not
called valid.

Shape letters: L layers, T tokens, E experts, N quantile levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_routing.routing.nulls import NULLS
from moe_routing.routing.sample import CalibrationSample

FIT_TIMES = 2
"""Tokens to fit on for one token to test on: the noise of the fit adds to that of the test."""
LEVELS = 1025
"""Quantiles that stand for a layer's law; a logit is interpolated between them."""


@dataclass(frozen=True)
class Design:
    """One way to make logits under H0.

    Attributes:
        name: id in tables.
        why: why H0 holds.
        nulls: ids of the nulls for which it does; None for every null but ``random_direction``.
        draw: (real sample, tokens, rng) to logits, (layers, tokens, experts), twice: what nulls
            are fitted on (FIT_TIMES as many tokens), and what they are tested on.
        breaks: nulls whose assumption on the law does not hold here, and that assumption; what
            they then do is measured all the same.
    """

    name: str
    why: str
    nulls: frozenset[str] | None
    draw: Callable[[CalibrationSample, int, np.random.Generator], tuple[Tensor, Tensor]]
    breaks: Mapping[str, str] = field(default_factory=dict)

    def holds_for(self, null: str) -> bool:
        """Return whether H0 of a null holds by design."""
        return null != "random_direction" if self.nulls is None else null in self.nulls


def samples(
    design: Design, real: CalibrationSample, tokens: int, rng: np.random.Generator
) -> tuple[CalibrationSample, CalibrationSample]:
    """Return the samples to fit on and to test on; norms are those of the real model's tokens."""
    first, second = design.draw(real, tokens, rng)
    return _with_logits(real, first), _with_logits(real, second)


def _with_logits(real: CalibrationSample, logits_LTE: Tensor) -> CalibrationSample:
    tokens = logits_LTE.shape[1]
    # Under H0 a mismatched context has the same law; the same logits stand for it.
    norm_LT = _tiled(real.input_norm_LT, tokens)
    return replace(real, logits_LTE=logits_LTE, permuted_LTE=logits_LTE, input_norm_LT=norm_LT)


def _tiled(value_LT: Tensor, tokens: int) -> Tensor:
    repeats = -(-tokens // value_LT.shape[1])
    return value_LT.repeat(1, repeats)[:, :tokens].contiguous()


def quantile_grid(logits_LTE: Tensor) -> NDArray[np.float64]:
    """Return quantiles of each layer's logits at even levels from 0 to 1, (layers, levels)."""
    flat_Ln = logits_LTE.flatten(1).double().numpy()
    return np.quantile(flat_Ln, np.linspace(0, 1, LEVELS), axis=1).T


def symmetric_grid(grid_LN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the quantiles with the upper half replaced by the reflected lower half."""
    middle = grid_LN.shape[1] // 2
    upper_LN = 2 * grid_LN[:, [middle]] - grid_LN[:, :middle][:, ::-1]
    return np.concatenate([grid_LN[:, : middle + 1], upper_LN], axis=1)


def from_grid(
    grid_LN: NDArray[np.float64], tokens: int, experts: int, rng: np.random.Generator
) -> Tensor:
    """Draw independent logits with the given quantiles, float32, (layers, tokens, experts)."""
    levels_N = np.linspace(0, 1, grid_LN.shape[1])
    draws = [np.interp(rng.random((tokens, experts)), levels_N, grid_N) for grid_N in grid_LN]
    return torch.from_numpy(np.stack(draws).astype(np.float32))


def _twice(draw: Callable[[int], Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    return draw(FIT_TIMES * tokens), draw(tokens)


def _marginal(
    real: CalibrationSample, tokens: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    grid_LN = quantile_grid(real.logits_LTE)
    return _twice(lambda count: from_grid(grid_LN, count, real.num_experts, rng), tokens)


def _symmetric(
    real: CalibrationSample, tokens: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    grid_LN = symmetric_grid(quantile_grid(real.logits_LTE))
    return _twice(lambda count: from_grid(grid_LN, count, real.num_experts, rng), tokens)


def _parametric(
    draw: Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]],
) -> Callable[[CalibrationSample, int, np.random.Generator], tuple[Tensor, Tensor]]:
    """Return a design with the real layers' means and standard deviations and another law."""

    def make(
        real: CalibrationSample, tokens: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        mean_L11 = real.logits_LTE.mean((1, 2), keepdim=True)
        sd_L11 = real.logits_LTE.flatten(1).std(1)[:, None, None]

        def scaled(count: int) -> Tensor:
            shape = (real.num_layers, count, real.num_experts)
            return mean_L11 + sd_L11 * torch.from_numpy(draw(rng, shape).astype(np.float32))

        return _twice(scaled, tokens)

    return make


def _random_directions(
    real: CalibrationSample, tokens: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Replace every router row by a random vector of its length, anew for every token.

    <w, x> = |w| |x| c with c the cosine of a random direction: c = +-sqrt(b), b following
    Beta(1/2, (H - 1)/2). Exact, and independent over experts given x; drawing rows anew for every
    token gives the same size on average as one random router, with less noise.
    """
    norm_L1E = real.weight_norm_LE[:, None]

    def draw(count: int) -> Tensor:
        shape = (real.num_layers, count, real.num_experts)
        square = rng.beta(0.5, (real.hidden_size - 1) / 2, shape)
        cosine = np.sqrt(square) * rng.choice([-1.0, 1.0], shape)
        norm_LT1 = _tiled(real.input_norm_LT, count)[..., None]
        return norm_LT1 * norm_L1E * torch.from_numpy(cosine.astype(np.float32))

    return _twice(draw, tokens)


def _permuted(
    real: CalibrationSample, tokens: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Split the real model's logits on shuffled text into two parts at random."""
    available = real.permuted_LTE.shape[1]
    test = min(tokens, available // (FIT_TIMES + 1))
    order_T = torch.from_numpy(rng.permutation(available))
    first_T, second_T = order_T[test : (FIT_TIMES + 1) * test], order_T[:test]
    return real.permuted_LTE[:, first_T], real.permuted_LTE[:, second_T]


# Assumptions that designs break, by null.
SELECTED = {"unselected": "draws that are not selected for being small"}
NORMAL = {"within_token_efron": "normal tails"}
SYMMETRIC = {"within_token": "symmetric tails", "within_token_split": "sides of the same shape"}

DESIGNS: Mapping[str, Design] = MappingProxyType(
    {
        design.name: design
        for design in (
            Design(
                "normal",
                "independent normal logits with the layer's mean and standard deviation",
                None,
                _parametric(lambda rng, shape: rng.standard_normal(shape)),
                SELECTED,
            ),
            Design(
                "t4",
                "independent logits with heavy tails (Student's t, 4 degrees of freedom)",
                None,
                _parametric(lambda rng, shape: rng.standard_t(4, shape) / np.sqrt(2)),
                SELECTED | NORMAL,
            ),
            Design(
                "symmetric_marginal",
                "independent logits with the layer's law below its median, reflected above",
                None,
                _symmetric,
                SELECTED | NORMAL,
            ),
            Design(
                "real_marginal",
                "independent logits with the layer's own law, skewness included",
                None,
                _marginal,
                SELECTED | NORMAL | SYMMETRIC,
            ),
            Design(
                "random_directions",
                "router rows replaced by random vectors of the same length",
                frozenset(NULLS),
                _random_directions,
                SELECTED | NORMAL,
            ),
            Design(
                "permuted_contexts",
                "the real router on shuffled text, one part against the other",
                frozenset(("permuted_context",)),
                _permuted,
            ),
        )
    }
)
