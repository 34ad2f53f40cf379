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

Experts of a real token are not independent. Three designs have dependence:

- ``real_copula``: the layer's own law and the correlations of its experts (those of normal scores,
  so of ranks, by a Gaussian copula; dependence of tails beyond that is not kept). Every logit has
  the law that marginal nulls compare it with, whatever the dependence: their H0 holds by design.
  For the nulls within a token nothing holds by design there: real correlations contain what the
  router does, and an expert that is up with its group may well deserve it. As with
  ``real_marginal``, what they select is counted as if all of it were noise.
- ``symmetric_copula``: the same correlations and a symmetric law. A token's logits are then as
  likely as their reflection, all of them at once, and so is every z: the tails of z are symmetric,
  which is all that ``within_token`` assumes, although experts are not exchangeable. That makes
  single p-values superuniform on average over a layer's experts; the size of BH, which depends on
  the correlations too, is what is measured.
- ``shared_centre``: exchangeable experts around a centre and within a spread of each token's own.
  Nulls within a token hold there by design; the logits are strongly and positively dependent.

Shape letters: L layers, T tokens, E experts, N quantile levels, F factors; 1 a kept axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata
from torch import Tensor

from moe_routing.analysis.config import FIT_TIMES
from moe_routing.routing.nulls import NULLS
from moe_routing.routing.sample import CalibrationSample

SCORES = np.linspace(-5, 5, 1025)
"""Normal scores at which quantiles stand for a layer's law; a logit is interpolated between them.
Even in the score, they are dense in the tails, where BH decides."""
ELSEWHERE = frozenset(("random_direction", "permuted_context"))
"""Nulls that designs hold for only if they name them. ``random_direction`` needs random vectors.
``permuted_context`` needs another text; with simulated logits for both it would be ``per_expert``
once more."""


@dataclass(frozen=True)
class Design:
    """One way to make logits under H0.

    Attributes:
        name: id in tables.
        why: why H0 holds.
        nulls: ids of the nulls for which it does; None for every null that is not ``ELSEWHERE``.
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
        return null not in ELSEWHERE if self.nulls is None else null in self.nulls


def samples(
    design: Design, real: CalibrationSample, tokens: int, rng: np.random.Generator
) -> tuple[CalibrationSample, CalibrationSample]:
    """Return the samples to fit on and to test on; norms are those of the real model's tokens."""
    first, second = design.draw(real, tokens, rng)
    return _with_logits(real, first), _with_logits(real, second)


def _with_logits(real: CalibrationSample, logits_LTE: Tensor) -> CalibrationSample:
    norm_LT = _tiled(real.input_norm_LT, logits_LTE.shape[1])
    # The null of mismatched contexts is fitted and tested on such contexts only, so that one
    # tensor can stand for both kinds.
    return replace(
        real,
        logits_LTE=logits_LTE,
        permuted_LTE=logits_LTE,
        input_norm_LT=norm_LT,
        permuted_norm_LT=norm_LT,
    )


def _tiled(value_LT: Tensor, tokens: int) -> Tensor:
    repeats = -(-tokens // value_LT.shape[1])
    return value_LT.repeat(1, repeats)[:, :tokens].contiguous()


def quantile_grid(value_LTE: Tensor) -> NDArray[np.float64]:
    """Return quantiles of each layer's values at the levels of ``SCORES``, (layers, levels)."""
    sorted_Ln = np.sort(value_LTE.flatten(1).numpy(), axis=1)
    place_N = np.rint(ndtr(SCORES) * (sorted_Ln.shape[1] - 1)).astype(int)
    return sorted_Ln[:, place_N].astype(np.float64)


def symmetric_grid(grid_LN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the quantiles with the upper half replaced by the reflected lower half."""
    middle = grid_LN.shape[1] // 2
    upper_LN = 2 * grid_LN[:, [middle]] - grid_LN[:, :middle][:, ::-1]
    return np.concatenate([grid_LN[:, : middle + 1], upper_LN], axis=1)


def copula_factor(logits_LTE: Tensor) -> NDArray[np.float64]:
    """Return F, (layers, experts, factors), with F F' the correlations of experts' normal scores.

    Normal scores (van der Waerden's) look at an expert's ranks only, and their correlation matrix
    is one by construction, which sines of rank correlations need not be.
    """
    factors = []
    for logits_TE in logits_LTE.numpy():
        score_TE = ndtri((rankdata(logits_TE, axis=0) - 0.5) / len(logits_TE))
        value_F, vector_EF = np.linalg.eigh(np.corrcoef(score_TE.T))
        factors.append(vector_EF * np.sqrt(value_F.clip(min=0)))
    return np.stack(factors)


def from_grid(
    grid_LN: NDArray[np.float64],
    tokens: int,
    experts: int,
    rng: np.random.Generator,
    factor_LEF: NDArray[np.float64] | None = None,
) -> Tensor:
    """Draw logits with the given quantiles, float32, (layers, tokens, experts).

    Independent, or with the Gaussian copula of :func:`copula_factor`.
    """
    draws = []
    for layer, grid_N in enumerate(grid_LN):
        score_TE = rng.standard_normal((tokens, experts))
        if factor_LEF is not None:
            score_TE = score_TE @ factor_LEF[layer].T
        draws.append(np.interp(score_TE, SCORES, grid_N).astype(np.float32))
    return torch.from_numpy(np.stack(draws))


def _twice(draw: Callable[[int], Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    return draw(FIT_TIMES * tokens), draw(tokens)


def _empirical(
    *, symmetric: bool, copula: bool
) -> Callable[[CalibrationSample, int, np.random.Generator], tuple[Tensor, Tensor]]:
    """Return a design with the real layers' law, or its lower half and that reflected."""

    def make(
        real: CalibrationSample, tokens: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        grid_LN = quantile_grid(real.logits_LTE)
        grid_LN = symmetric_grid(grid_LN) if symmetric else grid_LN
        factor_LEF = copula_factor(real.logits_LTE) if copula else None
        return _twice(lambda n: from_grid(grid_LN, n, real.num_experts, rng, factor_LEF), tokens)

    return make


def _shared_centre(
    real: CalibrationSample, tokens: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draw each token's mean and standard deviation from the real ones, experts around them.

    Their law is that of the layer's logits in these units, its lower half reflected.
    """
    mean_LT1 = real.logits_LTE.mean(-1, keepdim=True)
    sd_LT1 = real.logits_LTE.std(-1, keepdim=True).clamp(min=1e-30)
    grid_LN = symmetric_grid(quantile_grid((real.logits_LTE - mean_LT1) / sd_LT1))

    def draw(count: int) -> Tensor:
        token_T = torch.from_numpy(rng.integers(real.num_tokens, size=count))
        noise_LTE = from_grid(grid_LN, count, real.num_experts, rng)
        return mean_LT1[:, token_T] + sd_LT1[:, token_T] * noise_LTE

    return _twice(draw, tokens)


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
    """Split the real model's logits on shuffled text into two parts at random.

    At random, so that the two are exchangeable by design although tokens of one text are alike; an
    interval of the size is then about the tokens of this sample, and how texts differ is not in it.
    """
    available = real.permuted_LTE.shape[1]
    test = min(tokens, available // (FIT_TIMES + 1))
    order_T = torch.from_numpy(rng.permutation(available))
    first_T, second_T = order_T[test : (FIT_TIMES + 1) * test], order_T[:test]
    return real.permuted_LTE[:, first_T], real.permuted_LTE[:, second_T]


# Assumptions that designs break, by null.
SELECTED = {"unselected": "draws that are not selected for being small"}
NORMAL = {"within_token_efron": "normal tails"}
SYMMETRIC = {"within_token": "symmetric tails", "within_token_split": "sides of the same shape"}
ALL_NOISE = {name: f"{what}, no signal in correlations" for name, what in SYMMETRIC.items()}

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
                _empirical(symmetric=True, copula=False),
                SELECTED | NORMAL,
            ),
            Design(
                "real_marginal",
                "independent logits with the layer's own law, skewness included",
                None,
                _empirical(symmetric=False, copula=False),
                SELECTED | NORMAL | SYMMETRIC,
            ),
            Design(
                "symmetric_copula",
                "the same symmetric law, and the real correlations between experts",
                None,
                _empirical(symmetric=True, copula=True),
                SELECTED | NORMAL,
            ),
            Design(
                "real_copula",
                "the layer's own law, and the real correlations between experts",
                None,
                _empirical(symmetric=False, copula=True),
                SELECTED | NORMAL | ALL_NOISE,
            ),
            Design(
                "shared_centre",
                "independent and symmetric experts around each token's own centre, in its own "
                "spread",
                None,
                _shared_centre,
                SELECTED | NORMAL,
            ),
            Design(
                "random_directions",
                "router rows replaced by random vectors of the same length",
                frozenset(NULLS) - {"permuted_context"},
                _random_directions,
                SELECTED | NORMAL,
            ),
            Design(
                "permuted_contexts",
                "the real router on shuffled text, a random part against the rest (intervals are "
                "about the tokens of this text)",
                frozenset(("permuted_context",)),
                _permuted,
            ),
        )
    }
)
