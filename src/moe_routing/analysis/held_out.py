"""The false discovery rate under the null ``needed``, on documents that it was not fitted on.

Shape letters: L layers, T tokens, E experts, N ranks, P toggled pairs, S series.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_routing.analysis.outputs import ALL_LAYERS, ROUTED, RULE
from moe_routing.routing.nulls.needed import Needed, not_needed, statistics
from moe_routing.routing.ordering import order_experts
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.procedures import bh_levels, step_up
from moe_routing.routing.toggles import Toggles
from moe_routing.statistics.bootstrap import bootstrap_items, studentised_interval
from moe_routing.statistics.proportions import wilson_interval

LevelsOf = Callable[[int, float], Tensor]
"""Maps the number of experts and alpha to the levels of a step-up procedure, (experts,)."""


@dataclass(frozen=True)
class Judged:
    """Toggled tokens of a text, and what a null tests there.

    Attributes:
        toggles: the toggled pairs.
        sorted_LTN: the test statistics of all experts, each token's in descending order.
        order_LTN: the experts in that order, int64.
        false_P: sampling weight of the pairs that H0 holds for, 0 for the others, float64.
    """

    toggles: Toggles
    sorted_LTN: Tensor
    order_LTN: Tensor
    false_P: Tensor

    @classmethod
    def of(cls, null: Needed, test: Toggles, outputs: ExpertOutputs | None) -> Self:
        """Sort the statistics of a null, and judge the toggled pairs by its H0.

        Args:
            null: its score, effect and epsilon are used, not what it was fitted on.
            test: toggled pairs.
            outputs: outputs of the model's experts, for all scores but the probability.
        """
        false_P = test.sampling_weight_P * not_needed(test, null.name, null.epsilon)
        return cls.by(statistics(test, outputs, null.name, null.score), test, false_P)

    @classmethod
    def by(cls, statistic_LTE: Tensor, test: Toggles, false_P: Tensor) -> Self:
        """Sort statistics; equal ones are in the order of the experts."""
        ordered = [order_experts(statistic_TE) for statistic_TE in statistic_LTE]
        sorted_LTN, order_LTN = (torch.stack(parts) for parts in zip(*ordered, strict=True))
        return cls(test, sorted_LTN, order_LTN, false_P)

    @functools.cached_property
    def rank_LTE(self) -> Tensor:
        """Rank of each expert in its token by the statistic, from 0, int64."""
        rank_LTN = torch.arange(self.order_LTN.shape[2]).expand_as(self.order_LTN)
        return torch.empty_like(self.order_LTN).scatter_(2, self.order_LTN, rank_LTN)

    @functools.cached_property
    def document_T(self) -> NDArray[np.int64]:
        """Index of each token's document."""
        token_P, document_P = self.toggles.token_P, self.toggles.document_P
        tokens = self.order_LTN.shape[1]
        return torch.zeros(tokens, dtype=torch.int64).scatter(0, token_P, document_P).numpy()

    def p_values(self, null: Needed) -> Tensor:
        """Return each token's p-values in ascending order, float32, (layers, tokens, ranks)."""
        layers = range(len(self.sorted_LTN))
        return torch.stack([null.survival(layer, self.sorted_LTN[layer]) for layer in layers])

    @functools.cached_property
    def rank_P(self) -> Tensor:
        """Rank of the toggled pairs' experts, int64."""
        toggles = self.toggles
        return self.rank_LTE[toggles.layer_P, toggles.token_P, toggles.expert_P]

    def selected(self, count_LT: Tensor) -> Tensor:
        """Return whether each toggled pair is among the first ``count_LT`` of its token, bool."""
        return self.rank_P < count_LT[self.toggles.layer_P, self.toggles.token_P]

    def proportion(self, count_LT: Tensor) -> Tensor:
        """Return the false discovery proportion of each token, float64, (layers, tokens).

        With R = ``count_LT`` selected experts, sum_i w_i N_i 1[pair i is selected] / max(1, R):
        lower ranks are sampled, and pair i counts with its sampling weight w_i, so the numerator is
        unbiased given R.
        """
        place_P = self.toggles.layer_P * count_LT.shape[1] + self.toggles.token_P
        selected_P = self.rank_P < count_LT.flatten()[place_P]
        false_n = torch.bincount(place_P, self.false_P * selected_P, count_LT.numel())
        return false_n.view(count_LT.shape) / count_LT.clamp(min=1)


def rejections(p_LTN: Tensor, level_N: Tensor) -> Tensor:
    """Return how many experts a step-up procedure selects, int64, (layers, tokens)."""
    return torch.stack([step_up(p_TN, level_N) for p_TN in p_LTN])


def fewest_selected(null: Needed, level_E: Tensor) -> int:
    """Return the smallest positive number of experts that the draws allow a procedure to select.

    The smallest p-value of a layer is above the levels of smaller numbers. If it is above all
    levels, the answer is one more than there are experts.

    >>> from types import SimpleNamespace
    >>> null = SimpleNamespace(total_L=torch.tensor([99.0]), rank_weight_E=torch.tensor([1.0]))
    >>> level_E = torch.tensor([0.004, 0.008, 0.012, 0.016])
    >>> fewest_selected(null, level_E)
    3
    """
    weight, total = float(null.rank_weight_E[0]), float(null.total_L.min())
    smallest = weight / (weight + total)
    return int((level_E * (1 + 1e-6) < smallest).sum()) + 1


def held_out_fdr(
    null: Needed,
    test: Toggles,
    alphas: Sequence[float],
    *,
    outputs: ExpertOutputs | None = None,
    levels: LevelsOf = bh_levels,
    max_k: int | None = None,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Estimate the false discovery rate of a step-up procedure, by part, alpha and layer.

    The rate is the mean over tokens (and layers, in the row ``all``) of
    :meth:`Judged.proportion`.

    Columns: ``part`` (``rule``: what the procedure selects; ``routed``: with a floor of one expert
    and a cap of ``max_k``, if given), ``alpha``, ``layer``, ``fdr`` with ``low`` and ``high``
    (:func:`document_limits`; the variation of the fit is not included), ``mean_rejected`` experts
    per token, ``empty_proportion`` and ``cap_proportion`` of tokens for which the procedure selects
    nothing, or more than the cap, ``n_tokens``, ``n_documents``.

    Args:
        null: fitted on other documents.
        test: toggled pairs of the test tokens.
        outputs: outputs of the model's experts, for a null that tests another score than the
            probability.
        alphas: levels.
        levels: the procedure.
        max_k: cap of the routed set; None: the part ``rule`` only.
        confidence: level of the intervals.
        resamples: number of bootstrap resamples.
        rng: source of randomness.
    """
    tested = Judged.of(null, test, outputs)
    p_LTN = tested.p_values(null)
    experts = test.num_experts
    parts = count_parts(
        {alpha: rejections(p_LTN, levels(experts, alpha)) for alpha in alphas}, max_k
    )
    return estimate(tested, parts, confidence=confidence, resamples=resamples, rng=rng)


def count_parts(
    count_LT: Mapping[float, Tensor], max_k: int | None
) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
    """Return the key, the procedure's count and the selected count of each part and alpha."""
    parts = [({"part": RULE, "alpha": alpha}, n_LT, n_LT) for alpha, n_LT in count_LT.items()]
    if max_k is not None:
        parts += [
            ({"part": ROUTED, "alpha": alpha}, n_LT, n_LT.clamp(1, max_k))
            for alpha, n_LT in count_LT.items()
        ]
    cap = max_k or 0
    return [({**key, "max_k": cap}, count_LT, selected_LT) for key, count_LT, selected_LT in parts]


def estimate(
    tested: Judged,
    parts: Sequence[tuple[dict[str, Any], Tensor, Tensor]],
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return rate, limits and counts of each part, by layer; see :func:`held_out_fdr`.

    All rows share the resampled documents.
    """
    rates = [with_mean(tested.proportion(selected_LT)) for _, _, selected_LT in parts]
    ratio_S, low_S, high_S = document_limits(
        np.concatenate(rates, axis=1),
        tested.document_T,
        confidence=confidence,
        resamples=resamples,
        rng=rng,
    )
    layers, tokens = tested.order_LTN.shape[:2]
    names = [*map(str, range(layers)), ALL_LAYERS]
    tables = []
    for number, (key, count_LT, selected_LT) in enumerate(parts):
        here = slice(number * len(names), (number + 1) * len(names))
        cap = key["max_k"] or count_LT.max() + 1
        table = pd.DataFrame({"layer": names, "fdr": ratio_S[here], "low": low_S[here]})
        table["high"] = high_S[here]
        table["mean_rejected"] = with_mean(selected_LT.double()).mean(0)
        table["empty_proportion"] = with_mean((count_LT == 0).double()).mean(0)
        table["cap_proportion"] = with_mean((count_LT > cap).double()).mean(0)
        tables.append(table.assign(**key))
    joined = pd.concat(tables, ignore_index=True).drop(columns="max_k")
    documents = np.unique(tested.document_T).size
    return joined.assign(n_tokens=tokens, n_documents=documents)


def document_limits(
    value_TS: NDArray[np.float64],
    document_T: NDArray[np.int64],
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return means of proportions over tokens, and their limits, each (series,).

    The studentised bootstrap over documents, cut to [0, 1]. Where every value is 0 it has no width;
    the upper limit is then Wilson's, as if each document were one token.
    """
    boot = bootstrap_items(
        value_TS, np.ones(len(value_TS)), document_T, resamples=resamples, rng=rng
    )
    low_S, high_S = studentised_interval(boot, confidence)
    nothing = wilson_interval(0, boot.clusters, confidence)[1]
    high_S = np.where(value_TS.any(0), high_S, nothing)
    return boot.ratio_S, low_S.clip(0, 1), high_S.clip(0, 1)


def with_mean(value_LT: Tensor) -> NDArray[np.float64]:
    """Return one series per layer and their mean, (tokens, series)."""
    value_TL = value_LT.double().T.numpy()
    return np.concatenate([value_TL, value_TL.mean(1, keepdims=True)], axis=1)
