"""Simulated router logits for which the null hypothesis holds by design.

A design draws two independent samples from one distribution in which no expert deserves to be
selected. Nulls are fitted on the first sample and tested on the second. All experts of a token are
alike, so H0 is true for each of them and every selection is false: the proportion of tokens with a
selection is the false discovery rate under the complete null, whose control is called weak. Whether
a null then holds its size is another question: some calibrate their tail by an assumption on the
distribution, which a design may violate.

Designs that judge a null draw noise of a known law: independent (``normal``, ``t4``), around a
centre and in a spread of each token's own (``shared_centre``, strong positive dependence), or from
router rows of random directions (alone, in groups that point the same way, around a common
direction). For some nulls a design is their very definition (``own``); each is judged in at least
two others.

Designs that reshuffle the real logits judge no null (``if_noise``). They ask what BH would select
if all of the real layer's law were noise: logits drawn independently from it (``real_marginal``) or
with the correlations of the layer's experts (``real_copula``: those of normal scores, hence of
ranks, by a Gaussian copula; further tail dependence is not kept), and the same from its lower half
and the reflection (``symmetric_*``). The upper tail of a real layer is where the router's decisions
are, and logits alone cannot tell them from a skewed bulk: a null that is monotone in the logits of
a layer and has power on real text must fail there.

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
from torch import Tensor

from moe_routing.config.analyses import FIT_TIMES
from moe_routing.routing.nulls import NULLS
from moe_routing.routing.sample import CalibrationSample

SCORES = np.linspace(-5, 5, 1025)
"""Normal scores of the quantiles that represent a layer's distribution; logits are interpolated
between them. Evenly spaced scores are dense in the tails, where BH decides."""
DIRECTED = "random_direction"
"""Its H0 holds only in designs that name it, because it needs random vectors."""
GROUP = 8
"""Experts whose router rows point the same way in the design ``grouped_directions``."""


Draw = Callable[[CalibrationSample, int, np.random.Generator], tuple[Tensor, Tensor]]
"""Maps (real sample, tokens, rng) to two tensors of logits, (layers, tokens, experts): those that
nulls are fitted on (FIT_TIMES as many tokens) and those that they are tested on."""


@dataclass(frozen=True)
class Design:
    """A way to draw logits under H0.

    Attributes:
        name: id in tables.
        why: why H0 holds.
        nulls: ids of the nulls for which it holds; None for all but ``DIRECTED``.
        draw: draws the logits.
        breaks: nulls whose assumption on the distribution is violated here, and that assumption;
            their size is measured all the same.
        own: nulls whose definition the design is.
        if_noise: whether it reshuffles the real logits, and takes no part in the verdict.
    """

    name: str
    why: str
    nulls: frozenset[str] | None
    draw: Draw
    breaks: Mapping[str, str] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    if_noise: bool = False

    def holds_for(self, null: str) -> bool:
        """Return whether H0 of a null holds by design."""
        return null != DIRECTED if self.nulls is None else null in self.nulls


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
    for logits_TE in logits_LTE:
        order_ET = torch.from_numpy(np.argsort(logits_TE.T.contiguous().numpy(), axis=1))
        rank_ET = torch.empty_like(order_ET)
        rank_ET.scatter_(1, order_ET, torch.arange(order_ET.shape[1]).expand_as(order_ET))
        score_TE = ndtri((rank_ET.numpy().T + 0.5) / order_ET.shape[1])
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
    """Draw a real token's mean and standard deviation for each token, and normal experts."""
    mean_LT1 = real.logits_LTE.mean(-1, keepdim=True)
    sd_LT1 = real.logits_LTE.std(-1, keepdim=True)

    def draw(count: int) -> Tensor:
        token_T = torch.from_numpy(rng.integers(real.num_tokens, size=count))
        noise_LTE = rng.standard_normal((real.num_layers, count, real.num_experts), np.float32)
        return mean_LT1[:, token_T] + sd_LT1[:, token_T] * torch.from_numpy(noise_LTE)

    return _twice(draw, tokens)


def _parametric(
    draw: Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.floating]],
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


def _directions(*, within: float = 0.0, common: float = 0.0) -> Draw:
    """Return a design in which every router row is a random vector, drawn anew for every token.

    <w, x> = |w| |x| c with c the cosine of a random direction, u_1 / |u| for a vector u of H
    independent normals: exact, and independent over experts given x. Rows drawn anew for every
    token have the same average size as one random router, with less noise.

    Subtracting the mean of E rows of equal length shortens them by sqrt(1 - s), s the squared
    length of the mean (1/E for independent rows), so they are longer by its inverse than the
    model's centred rows.

    Args:
        within: correlation of u_1 between the rows of a group of ``GROUP`` experts.
        common: length of a vector that all rows share, over the root mean square length of the
            rows; softmax ignores it.
    """

    def make(
        real: CalibrationSample, tokens: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        experts, hidden = real.num_experts, real.hidden_size
        mean_square = (1 + (min(GROUP, experts) - 1) * within) / experts
        norm_L1E = real.centred_norm_LE[:, None] / math.sqrt(max(1 - mean_square, 1 / experts))
        length_L11 = common * norm_L1E.square().mean(-1, keepdim=True).sqrt()

        def draw(count: int) -> Tensor:
            shape = (real.num_layers, count, experts)
            first_LTE = rng.standard_normal(shape, np.float32)
            if within:
                groups = -(-experts // GROUP)
                group_LTG = rng.standard_normal((*shape[:2], groups), np.float32)
                group_LTE = group_LTG.repeat(GROUP, axis=-1)[..., :experts]
                first_LTE = math.sqrt(within) * group_LTE + math.sqrt(1 - within) * first_LTE
            rest_LTE = rng.chisquare(hidden - 1, shape).astype(np.float32)
            cosine_LTE = torch.from_numpy(first_LTE / np.sqrt(first_LTE**2 + rest_LTE))
            shared_LT1 = length_L11 * _cosines(rng, (*shape[:2], 1), hidden) if common else 0.0
            return _tiled(real.input_norm_LT, count)[..., None] * (
                norm_L1E * cosine_LTE + shared_LT1
            )

        return _twice(draw, tokens)

    return make


def _cosines(rng: np.random.Generator, shape: tuple[int, ...], hidden: int) -> Tensor:
    """Return cosines of random directions and a fixed one, float32."""
    first, rest = rng.standard_normal(shape), rng.chisquare(hidden - 1, shape)
    return torch.from_numpy((first / np.sqrt(first**2 + rest)).astype(np.float32))


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
ALL_LOGITS = frozenset(("pooled", "pooled_kde", "per_expert", "per_expert_kde"))

DESIGNS: Mapping[str, Design] = MappingProxyType(
    {
        design.name: design
        for design in (
            Design(
                "normal",
                "independent normal logits with the layer's mean and standard deviation",
                None,
                _parametric(lambda rng, shape: rng.standard_normal(shape, np.float32)),
                SELECTED,
                own=frozenset(("within_token_efron",)),
            ),
            Design(
                "t4",
                "independent logits with heavy tails (Student's t, 4 degrees of freedom)",
                None,
                _parametric(lambda rng, shape: rng.standard_t(4, shape) / np.sqrt(2)),
                SELECTED | NORMAL,
            ),
            Design(
                "shared_centre",
                "independent normal logits around each token's own centre, in its own spread",
                None,
                _shared_centre,
                SELECTED,
                own=frozenset(("within_token", "within_token_split")),
            ),
            Design(
                "random_directions",
                "router rows replaced by random vectors of the same length",
                frozenset(NULLS) - {"permuted_context"},
                _directions(),
                SELECTED,
                own=frozenset((DIRECTED,)),
            ),
            Design(
                "grouped_directions",
                "the same, in groups of experts whose vectors point the same way",
                frozenset((DIRECTED,)),
                _directions(within=0.5),
            ),
            Design(
                "common_direction",
                "random vectors around one vector that all experts share and softmax ignores",
                frozenset((DIRECTED,)),
                _directions(common=2.0),
            ),
            Design(
                "permuted_contexts",
                "the real router on shuffled text, a random part against the rest (intervals are "
                "about the tokens of this text)",
                frozenset(("permuted_context",)),
                _permuted,
                own=frozenset(("permuted_context",)),
            ),
            Design(
                "symmetric_marginal",
                "independent logits with the layer's law below its median, reflected above",
                None,
                _empirical(symmetric=True, copula=False),
                SELECTED | NORMAL,
                if_noise=True,
            ),
            Design(
                "real_marginal",
                "independent logits with the layer's own law, skewness included",
                None,
                _empirical(symmetric=False, copula=False),
                SELECTED | NORMAL | SYMMETRIC,
                ALL_LOGITS,
                if_noise=True,
            ),
            Design(
                "symmetric_copula",
                "the same symmetric law, and the real correlations between experts",
                None,
                _empirical(symmetric=True, copula=True),
                SELECTED | NORMAL,
                if_noise=True,
            ),
            Design(
                "real_copula",
                "the layer's own law, and the real correlations between experts",
                None,
                _empirical(symmetric=False, copula=True),
                SELECTED | NORMAL | ALL_NOISE,
                if_noise=True,
            ),
        )
    }
)
