"""Simulated router logits for which the null hypothesis holds by design.

A design draws two independent samples from one distribution in which no expert deserves to be
selected. Nulls are fitted on the first sample and tested on the second. All experts of a token are
alike, so H0 is true for each of them and every selection is false. Whether a null then holds its
size is another question: some calibrate their tail by an assumption on the distribution, which a
design may violate.

``real_marginal`` is the hardest design. It draws all logits of a layer independently from the
layer's own distribution, skewness and upper tail included. For the marginal nulls that distribution
*is* the null, and by exchangeability their p-values are superuniform whatever it looks like.
``within_token`` has no such guarantee there: it is exact only if P(z >= x) = P(z <= -x) for all
x > 0. If the distribution has the longer tail above, reflecting the lower one gives p-values that
are too small; if below, too large. A real layer is skewed upwards where a few experts stand out,
which is the signal that the router is there to find, and logits alone cannot tell such signal from
a skewed bulk. This design therefore asks what happens if all of the skewness is noise, and a null
that fails it is not called valid.

The experts of a real token are dependent. Three designs have dependence:

- ``real_copula``: the layer's own distribution and the correlations of its experts (those of normal
  scores, hence of ranks, by a Gaussian copula; further tail dependence is not kept). Every logit
  has the marginal distribution that marginal nulls compare it with, so their H0 holds by design,
  whatever the dependence. For the nulls within a token nothing holds by design: real correlations
  contain the router's own decisions, and an expert whose whole group has large logits may deserve
  it. As in ``real_marginal``, all that they select is counted as if it were noise.
- ``symmetric_copula``: the same correlations and a symmetric distribution. A token's logits have
  the same joint distribution as their reflection, and so has every z: the tails of z are symmetric,
  which is all that ``within_token`` assumes, although the experts are not exchangeable. Single
  p-values are then superuniform on average over a layer's experts. The size of BH depends on the
  correlations too, and is measured.
- ``shared_centre``: exchangeable experts around a centre and with a spread of each token's own. H0
  of the nulls within a token holds by design; the logits have strong positive dependence.

Shape letters: L layers, T tokens, E experts, N quantile levels, F factors; 1 a kept axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata
from torch import Tensor

from moe_routing.config.analyses import FIT_TIMES
from moe_routing.routing.nulls import NULLS
from moe_routing.routing.sample import CalibrationSample

SCORES = np.linspace(-5, 5, 1025)
"""Normal scores of the quantiles that represent a layer's distribution; logits are interpolated
between them. Evenly spaced scores are dense in the tails, where BH decides."""
ELSEWHERE = frozenset(("random_direction", "permuted_context"))
"""Nulls whose H0 holds only in designs that name them. ``random_direction`` needs random vectors.
``permuted_context`` needs another text; with simulated logits for both texts it would equal
``per_expert``."""


Draw = Callable[[CalibrationSample, int, np.random.Generator], tuple[Tensor, Tensor]]
"""Maps (real sample, tokens, rng) to two tensors of logits, (layers, tokens, experts): those that
nulls are fitted on (FIT_TIMES as many tokens) and those that they are tested on."""


@dataclass(frozen=True)
class Design:
    """A way to draw logits under H0.

    Attributes:
        name: id in tables.
        why: why H0 holds.
        nulls: ids of the nulls for which it holds; None for every null that is not in
            ``ELSEWHERE``.
        draw: draws the logits.
        breaks: nulls whose assumption on the distribution is violated here, and that assumption;
            their size is measured all the same.
    """

    name: str
    why: str
    nulls: frozenset[str] | None
    draw: Draw
    breaks: Mapping[str, str] = field(default_factory=dict)

    def holds_for(self, null: str) -> bool:
        """Return whether H0 of a null holds by design."""
        return null not in ELSEWHERE if self.nulls is None else null in self.nulls


def samples(
    design: Design, real: CalibrationSample, tokens: int, rng: np.random.Generator
) -> tuple[CalibrationSample, CalibrationSample]:
    """Return the samples to fit on and to test on; norms are those of the real model's tokens."""
    first, second = (
        with_logits(real, logits_LTE, _tiled(real.input_norm_LT, logits_LTE.shape[1]))
        for logits_LTE in design.draw(real, tokens, rng)
    )
    return first, second


def with_logits(
    sample: CalibrationSample, logits_LTE: Tensor, norm_LT: Tensor
) -> CalibrationSample:
    """Return a sample with other logits and input norms, those of mismatched contexts included."""
    # The null of mismatched contexts is fitted and tested on such contexts only, so one tensor
    # serves as both.
    return replace(
        sample,
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
    index_N = np.rint(ndtr(SCORES) * (sorted_Ln.shape[1] - 1)).astype(int)
    return sorted_Ln[:, index_N].astype(np.float64)


def symmetric_grid(grid_LN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the quantiles with the upper half replaced by the reflected lower half."""
    middle = grid_LN.shape[1] // 2
    upper_LN = 2 * grid_LN[:, [middle]] - grid_LN[:, :middle][:, ::-1]
    return np.concatenate([grid_LN[:, : middle + 1], upper_LN], axis=1)


def copula_factor(logits_LTE: Tensor) -> NDArray[np.float64]:
    """Return F, (layers, experts, factors), with F F' the correlations of experts' normal scores.

    Normal scores (van der Waerden's) depend on an expert's ranks only. Their correlation matrix is
    positive semidefinite by construction, which sines of rank correlations need not be.
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


def _empirical(*, symmetric: bool, copula: bool) -> Draw:
    """Return a design with the real layers' distribution, or its lower half and the reflection."""

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
    """Draw a real token's mean and standard deviation for each token, and experts around them.

    The experts' distribution is that of the layer's standardised logits, its lower half reflected.
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
) -> Draw:
    """Return a design with the real layers' means and standard deviations, and other draws."""

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
    """Replace every router row by a random vector, drawn anew for every token.

    <w, x> = |w| |x| c with c the cosine of a random direction: c = +-sqrt(b), b following
    Beta(1/2, (H - 1)/2). Exact, and independent over experts given x. Subtracting the mean of E
    independent rows shortens them by sqrt(1 - 1/E) (for equal lengths), so they are longer by its
    inverse than the model's centred rows. Drawing rows anew for every token has the same average
    size as one random router, with less noise.
    """
    experts = real.num_experts
    norm_L1E = real.centred_norm_LE[:, None] * math.sqrt(experts / max(experts - 1, 1))

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

    The random split makes the two parts exchangeable by design, although tokens of one text are
    similar. An interval of the size is therefore about the tokens of this sample; variation between
    texts is not in it.
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
