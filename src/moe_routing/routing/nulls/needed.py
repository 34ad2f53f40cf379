"""The null that an expert is not needed, calibrated by intervention.

Shape letters: L layers, T tokens, E experts, N ranks, P toggled pairs, n pairs that H0 holds for,
X any shape; 1 a kept axis.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar, Self

import torch
from torch import Tensor

from moe_routing.errors import InputError
from moe_routing.routing import procedures
from moe_routing.routing.nulls.base import Null, OrderedExperts
from moe_routing.routing.ordering import order_experts, sort_descending
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.scores import ExpertScorer
from moe_routing.routing.toggles import Toggles
from moe_routing.routing.types import RouterInputs
from moe_routing.vocabulary import EXPERT_SCORES, ExpertScore, NeededId, hypothesis

MARGIN = 0.01
"""Nats per token that the default epsilon shares out over all experts of all layers: a declared
margin and a heuristic, not a bound on what dropping several experts costs."""
FREE_SCORES: tuple[ExpertScore, ...] = ("probability", "mean_norm", "norm")
"""Scores that need no interventions and next to no time, the simplest first."""
CHOICE_ALPHA = 0.05
"""Level of BH at which scores are compared."""
NOISE_FACTOR = 10
"""An epsilon must be this many times the noise floor of every layer."""
LARGEST_SUM = 1.0001
"""No softmax in float32 adds up to more."""


def default_epsilon(layers: int, experts: int) -> float:
    """Return the epsilon of ids without one, in nats.

    >>> default_epsilon(16, 64)
    9.765625e-06
    """
    return MARGIN / (layers * experts)


def not_needed(toggles: Toggles, name: NeededId, epsilon: float) -> Tensor:
    """Return for each toggled pair whether H0 holds, bool, (pairs,).

    Args:
        toggles: pairs, and what toggling them changes.
        name: id of the null, with the effect (``loss``: by how much the expert's presence lowers
            the realised loss) and what stands in for a removed expert.
        epsilon: the effect of an expert that is not needed is smaller, in nats.

    Raises:
        InputError: an effect is not finite.
    """
    compensated = name.dropped == "compensated"
    effect_P = toggles.compensated_kl_P if compensated else toggles.kl_P
    if name.effect == "loss":
        change_P = toggles.compensated_loss_change_P if compensated else toggles.loss_change_P
        removed_P = toggles.rank_P < toggles.rule.top_k
        effect_P = torch.where(removed_P, change_P, -change_P)
    if not bool(effect_P.isfinite().all()):
        layer = int(toggles.layer_P[int(effect_P.isfinite().int().argmin())])
        raise InputError(
            f"toggles: effect '{name.effect}' in layer {layer} is not finite; allowed: numbers"
        )
    return effect_P < epsilon


class Needed(Null):
    """Toggling the expert changes the model's predictions by less than epsilon.

    Conformal selection (Jin & Candes 2023, arXiv 2210.01408) with p-values calibrated by
    intervention. The statistic g is a score (:mod:`moe_routing.routing.scores`). If it is the
    probability, g is the weight that the model gives, or would give, the expert: the router's
    probability, on a model with raw softmax weights. On calibration tokens experts are toggled
    (:class:`Toggles`); pair i has the sampling weight w_i, and N_i = 1 if H0 holds for it. For the
    expert of rank r in its token, with the sampling weight w_r of that rank::

        p(g, r) = (w_r + sum_i w_i N_i 1[g_i >= g]) / (w_r + sum_i w_i)

    The sums are over the pairs of the layer. All of them are in the denominator, so that the
    expected number of experts of a token for which H0 holds and p <= t is at most E t (validity on
    average) if calibration and test documents are exchangeable, as documents become many. So BH at
    alpha keeps the experts down to the last rank k for which at most alpha * k experts per token
    are expected that H0 holds for and whose g is at least as large. Under any dependence of the
    experts of a token, the FDR of BY is at most alpha, and that of BH alpha * (1 + ... + 1/E).

    w_r does not decrease with the rank, so p is monotone in the order of the experts. Pairs are
    sampled by their rank in the order of the weight. The rank of the tested expert is the one in
    the order of g: the same for the probability, else w_r is an approximation, of one pair among
    all.

    An id without a score stands for the best of the scores that cost next to nothing
    (:data:`FREE_SCORES`); see :func:`choose_score`.

    Attributes:
        id: canonical id.
        epsilon: effect below which an expert is not needed, in nats.
        score: the test statistic.
        draw_Ln: statistics of the pairs that H0 holds for, ascending, float32, after -inf and
            before padding of +inf.
        above_Ln: sum_i w_i N_i of the pairs from each draw on, float64; the first entry is the
            denominator's sum.
        total_L: the denominator's sum, float64.
        needed_L: weighted proportion of pairs that are needed, float64.
        pairs_L: number of toggled pairs, int64.
        rank_weight_E: sampling weight by rank, float64.
        summed_E: how many statistics of a token, the first ones, surely add up to at most 1 among
            those down to a rank, int64: all, or those of the top k of a model that renormalises.
    """

    layer_monotone: ClassVar[bool] = True
    by_rank: ClassVar[bool] = True
    tokens_key: ClassVar[str] = "calibration.toggled_tokens"
    TABLES: ClassVar[tuple[str, ...]] = (
        "draw_Ln", "above_Ln", "total_L", "needed_L", "pairs_L", "rank_weight_E", "summed_E",
    )  # fmt: skip

    def __init__(
        self, name: NeededId, epsilon: float, score: ExpertScore, tables: dict[str, Tensor]
    ) -> None:
        self.name, self.id, self.epsilon, self.score = name, str(name), epsilon, score
        self.compensated = name.dropped == "compensated"
        self.draw_Ln, self.above_Ln = tables["draw_Ln"], tables["above_Ln"]
        self.total_L, self.needed_L = tables["total_L"], tables["needed_L"]
        self.pairs_L, self.rank_weight_E = tables["pairs_L"], tables["rank_weight_E"]
        self.summed_E = tables["summed_E"]

    @functools.cached_property
    def num_draws(self) -> float:
        """Number of draws, in pairs of the first rank; asked for on the host only."""
        # A sum of weights of several thirds is a whole number up to rounding.
        return round(float(self.total_L.min() / self.rank_weight_E[0]), 6)

    @property
    def hypothesis(self) -> str:
        """H0 in words."""
        return hypothesis(self.id, self.epsilon, self.score)

    @classmethod
    def fit(
        cls,
        sample: CalibrationSample,
        toggles: Toggles | None = None,
        name: NeededId = NeededId(),  # noqa: B008, immutable
        epsilon: float | None = None,
        outputs: ExpertOutputs | None = None,
    ) -> Self:
        """Fit every layer on toggled experts.

        Args:
            sample: the calibration sample of the same model.
            toggles: toggled experts of calibration tokens.
            name: id, with the effect and perhaps an epsilon.
            epsilon: the epsilon of an id without one; None: :func:`default_epsilon`.
            outputs: outputs of the same model's experts, for all scores but the probability; the
                only one that an id without a score can stand for without them.

        Raises:
            InputError: no toggles, or no outputs that the score needs; those of another model; an
                effect that is not finite; or an epsilon that rounding alone may reach.
        """
        if toggles is None:
            raise InputError(
                f"null '{name}' needs toggled experts; none given (allowed: a calibration with "
                "toggles)"
            )
        found, wanted = ((x.num_layers, x.num_experts) for x in (toggles, sample))
        if found != wanted:
            raise InputError(
                f"null '{name}': the toggles have {found[0]} layers and {found[1]} experts; "
                f"allowed: those of the calibration sample, {wanted[0]} and {wanted[1]}"
            )
        epsilon = name.epsilon or epsilon or default_epsilon(*wanted)
        _check_noise(name, epsilon, toggles)
        score = name.score or choose_score(toggles, outputs, name, epsilon)
        return cls._fitted(toggles, outputs, name, epsilon, score)

    @classmethod
    def _fitted(
        cls,
        toggles: Toggles,
        outputs: ExpertOutputs | None,
        name: NeededId,
        epsilon: float,
        score: ExpertScore,
    ) -> Self:
        statistic_LTE = statistics(toggles, outputs, name, score)
        null_P = not_needed(toggles, name, epsilon)
        return cls.of_pairs(toggles, statistic_LTE, null_P, name=name, epsilon=epsilon, score=score)

    @classmethod
    def of_pairs(
        cls,
        toggles: Toggles,
        statistic_LTE: Tensor,
        null_P: Tensor,
        *,
        name: NeededId,
        epsilon: float,
        score: ExpertScore,
    ) -> Self:
        """Fit every layer on pairs that are already judged.

        Args:
            toggles: the toggled pairs.
            statistic_LTE: test statistics of all experts of the toggled tokens.
            null_P: whether H0 holds for each pair, bool.
            name: id.
            epsilon: effect below which an expert is not needed, in nats.
            score: what the statistic is.
        """
        statistic_P = statistic_LTE[toggles.layer_P, toggles.token_P, toggles.expert_P]
        return cls(name, epsilon, score, _tables(toggles, statistic_P, null_P))

    def conditional(self) -> Needed:
        """Return the null with the pairs that H0 holds for, not all, in the denominator.

        p is then superuniform given H0. In a layer without such pairs it is 1.
        """
        total_L = self.above_Ln[:, 1]
        above_Ln = torch.cat([total_L[:, None], self.above_Ln[:, 1:]], dim=1)
        return self._with(total_L=total_L, above_Ln=above_Ln)

    def block_exact(self) -> Needed:
        """Return the null with p = (E + sum_i w_i N_i 1[g_i >= g]) / (E + sum_i w_i).

        All experts of the tested token count as if H0 held for them with larger statistics. Valid
        on average for exchangeable tokens whatever their number, if every rank is toggled.
        """
        experts = self.rank_weight_E.shape[0]
        return self._with(rank_weight_E=torch.full_like(self.rank_weight_E, experts))

    def _with(self, **tables: Tensor) -> Needed:
        return type(self)(self.name, self.epsilon, self.score, self._tables() | tables)

    def statistic(self, inputs: RouterInputs) -> Tensor:
        """Return the model's own weights, or the scores of the inputs; -inf for masked experts.

        Raises:
            InputError: the inputs have no scores, and the statistic is not the probability.
        """
        if self.score == "probability":
            masked_TE = inputs.logits_TE == -math.inf
            return inputs.own_weight_TE.masked_fill(masked_TE, -math.inf)
        if inputs.score_TE is None:
            raise InputError(
                f"null '{self.id}' tests the score '{self.score.replace('_', '-')}'; allowed: "
                "router inputs that are scored by it"
            )
        return inputs.score_TE

    def order(self, inputs: RouterInputs, num_ranks: int | None = None) -> OrderedExperts:
        """Sort the scores, or the logits, whose order the weights have up to rounding."""
        if self.score != "probability":
            return super().order(inputs, num_ranks)
        sorted_TE, order_TE = order_experts(inputs.logits_TE.float())
        statistic_TN = inputs.own_weight_TE.detach().gather(1, order_TE[:, :num_ranks])
        statistic_TN.masked_fill_(sorted_TE[:, :num_ranks] == -math.inf, -math.inf)
        return OrderedExperts(order_TE, sorted_TE, statistic_TN)

    def max_rejections(self, critical_LE: Tensor) -> int:
        """Return the last rank whose statistic can be as large as its critical value."""
        if self.score != "probability":
            return super().max_rejections(critical_LE)
        rank_E = torch.arange(1, critical_LE.shape[1] + 1, device=critical_LE.device)
        possible_E = (critical_LE * self.summed_E <= LARGEST_SUM).any(0)
        return max(1, int((possible_E * rank_E).max()))

    def survival(self, layer: int, statistic_TE: Tensor) -> Tensor:
        """Return p-values, rounded up to float32; columns are ranks. See :meth:`Null.survival`."""
        below_TN = torch.searchsorted(self.draw_Ln[layer], statistic_TE.contiguous())
        return self._p_above(layer, below_TN)

    def _p_above(self, layer: int, below_TN: Tensor) -> Tensor:
        """Return the p-values of statistics above so many draws; columns are ranks."""
        own_N = self.rank_weight_E[: below_TN.shape[1]]
        p_TN = (own_N + self.above_Ln[layer][below_TN]) / (own_N + self.total_L[layer])
        return _rounded_up(p_TN.clamp(max=1))  # sums of weights may differ in the last bit

    def _invert(self, layer: int, level_N: Tensor) -> Tensor:
        """Invert by bisection over the draws: a p-value changes only from one to the next."""
        draw_n = self.draw_Ln[layer]
        most = draw_n.shape[0]
        low_N = torch.full(level_N.shape, -1, device=level_N.device)
        high_N = torch.full_like(low_N, most + 1)  # more than there are: no statistic attains it
        while bool((high_N - low_N > 1).any()):
            middle_N = (low_N + high_N + 1) // 2
            p_N = self._p_above(layer, middle_N.clamp(max=most)[None])[0]
            attains_N = p_N.double() <= level_N
            high_N = torch.where(attains_N, middle_N, high_N)
            low_N = torch.where(attains_N, low_N, middle_N)
        infinity_1 = draw_n.new_full((1,), math.inf)
        above_n = torch.nextafter(draw_n, infinity_1)
        return torch.cat([-infinity_1, above_n, infinity_1])[high_N]

    def diagnostics(self, layer: int) -> dict[str, object]:
        """Return what is particular to this null; see :func:`diagnose`."""
        total, weight_E = self.total_L[layer], self.rank_weight_E
        first, last = (float(weight / (weight + total)) for weight in (weight_E[0], weight_E[-1]))
        return {
            "n": float(total / weight_E[0]),
            "smallest_p": first,
            "epsilon": self.epsilon,
            "score": self.score,
            "needed_proportion": float(self.needed_L[layer]),
            "pairs": int(self.pairs_L[layer]),
            "resolution": last,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tables by layer, epsilon, and the parts of the id."""
        return {
            **self._tables(),
            "epsilon": torch.tensor(self.epsilon, dtype=torch.float64),
            "own_epsilon": torch.tensor(self.name.epsilon is not None),
            "loss": torch.tensor(self.name.effect == "loss"),
            "score": torch.tensor(EXPERT_SCORES.index(self.score)),
            "own_score": torch.tensor(self.name.score is not None),
            "compensated": torch.tensor(self.name.dropped == "compensated"),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Restore the null."""
        epsilon = float(tensors["epsilon"])
        score = EXPERT_SCORES[int(tensors["score"])]
        name = NeededId(
            epsilon if bool(tensors["own_epsilon"]) else None,
            "loss" if bool(tensors["loss"]) else "kl",
            score if bool(tensors["own_score"]) else None,
            "compensated" if bool(tensors["compensated"]) else "omitted",
        )
        return cls(name, epsilon, score, {key: tensors[key] for key in cls.TABLES})

    def _tables(self) -> dict[str, Tensor]:
        return {key: getattr(self, key) for key in self.TABLES}


def _check_noise(name: NeededId, epsilon: float, toggles: Toggles) -> None:
    layer = int(toggles.noise_L.argmax())
    floor = float(toggles.noise_L[layer])
    if epsilon < NOISE_FACTOR * floor:
        raise InputError(
            f"null '{name}': epsilon is {epsilon:.3g}; allowed: at least {NOISE_FACTOR} times the "
            f"noise floor of every layer, {NOISE_FACTOR * floor:.3g} in layer {layer}, whose floor "
            f"is {floor:.3g} nats"
        )


def statistics(
    toggles: Toggles, outputs: ExpertOutputs | None, name: NeededId, score: ExpertScore
) -> Tensor:
    """Return the test statistics of all experts of the toggled tokens, (layers, tokens, experts).

    Raises:
        InputError: the score needs outputs of experts.
    """
    if score == "probability":
        return toggles.weight_LTE
    compensated = name.dropped == "compensated"
    scorer = ExpertScorer.build(score, outputs, toggles, f"null '{name}'", compensated=compensated)
    layers = range(toggles.num_layers)
    return torch.stack([scorer.of_toggles(toggles, layer) for layer in layers])


def choose_score(
    toggles: Toggles, outputs: ExpertOutputs | None, name: NeededId, epsilon: float
) -> ExpertScore:
    """Return the score with which BH at .05 keeps most experts.

    Every second document is left out: each score is fitted on the others, and the experts that BH
    keeps, without floor and cap, are counted on those left out. Then the halves change places. The
    first of :data:`FREE_SCORES` with the largest mean wins; it is the probability, too, if there
    are no outputs or only one document.

    Args:
        toggles: toggled experts of calibration tokens.
        outputs: outputs of the same model's experts.
        name: id of the null.
        epsilon: effect below which an expert is not needed, in nats.
    """
    documents = toggles.document_P.unique().tolist()
    halves = [toggles.of_documents(documents[start::2]) for start in range(min(2, len(documents)))]
    if outputs is None or len(halves) < 2:
        return "probability"
    kept = {
        score: sum(
            mean_kept(Needed._fitted(fit, outputs, name, epsilon, score), count, outputs)
            for fit, count in (halves, halves[::-1])
        )
        for score in FREE_SCORES
    }
    return max(FREE_SCORES, key=lambda score: kept[score])


def mean_kept(null: Needed, toggles: Toggles, outputs: ExpertOutputs | None) -> float:
    """Return how many experts per token and layer BH at .05 keeps of the toggled tokens' experts.

    Args:
        null: a fitted null.
        toggles: toggled experts of other documents.
        outputs: outputs of the same model's experts, for all scores but the probability.
    """
    statistic_LTE = statistics(toggles, outputs, null.name, null.score)
    level_E = procedures.bh_levels(toggles.num_experts, CHOICE_ALPHA)
    counts = [
        procedures.step_up(null.survival(layer, sort_descending(statistic_TE)), level_E)
        for layer, statistic_TE in enumerate(statistic_LTE)
    ]
    return float(torch.cat(counts).double().mean())


def _tables(toggles: Toggles, statistic_P: Tensor, null_P: Tensor) -> dict[str, Tensor]:
    """Sort the pairs that H0 holds for by their statistic, and add up their weights from above."""
    layers = range(toggles.num_layers)
    parts = [_layer(toggles, statistic_P, null_P, toggles.layer_P == layer) for layer in layers]
    width = max(draw_n.shape[0] for draw_n, *_ in parts)
    draw_Ln = torch.full((len(parts), width), math.inf)
    above_Ln = torch.zeros(len(parts), width + 1, dtype=torch.float64)
    for layer, (draw_n, above_n, *_) in enumerate(parts):
        draw_Ln[layer, : draw_n.shape[0]] = draw_n
        above_Ln[layer, : above_n.shape[0]] = above_n
    total_L = above_Ln[:, 0].clone()
    pairs_L = torch.bincount(toggles.layer_P, minlength=len(parts))
    rank_E, rule = torch.arange(1, toggles.num_experts + 1), toggles.rule
    summed_E = rank_E if rule.weighting == "softmax" else rank_E.clamp(max=rule.top_k)
    if rule.biased and rule.weighting == "renormalised":
        summed_E = torch.zeros_like(rank_E)  # experts of larger weights may be left out of the sum
    return {
        "draw_Ln": draw_Ln,
        "above_Ln": above_Ln,
        "total_L": total_L,
        "needed_L": torch.where(pairs_L > 0, 1 - above_Ln[:, 1] / total_L, 0.0),
        "pairs_L": pairs_L,
        "rank_weight_E": toggles.rank_weight_E.double(),
        "summed_E": summed_E,
    }


def _layer(
    toggles: Toggles, statistic_P: Tensor, null_P: Tensor, here_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the draws of a layer, after -inf, and the sums of weights from each draw on."""
    weight_P = toggles.sampling_weight_P.double()
    draw_n, order_n = statistic_P[here_P & null_P].float().sort(stable=True)
    null_weight_n = weight_P[here_P & null_P][order_n]
    from_above_n = null_weight_n.flip(0).cumsum(0).flip(0)
    total_1, nothing_1 = weight_P[here_P].sum()[None], torch.zeros(1, dtype=torch.float64)
    lowest_1 = torch.tensor([-math.inf])
    return torch.cat([lowest_1, draw_n]), torch.cat([total_1, from_above_n, nothing_1])


def _rounded_up(value_X: Tensor) -> Tensor:
    """Return the smallest float32 that is not below a float64."""
    nearest_X = value_X.float()
    above_X = torch.nextafter(nearest_X, torch.full_like(nearest_X, math.inf))
    return torch.where(nearest_X.double() < value_X, above_X, nearest_X)
