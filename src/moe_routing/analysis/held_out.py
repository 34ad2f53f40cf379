"""The false discovery rate under the null ``needed``, on documents that it was not fitted on.

Shape letters: L layers, T tokens, E experts, N ranks, P toggled pairs, S series.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_routing.analysis.outputs import ALL_LAYERS
from moe_routing.routing.nulls.needed import Needed, not_needed, statistics
from moe_routing.routing.nulls.step_up import StepUpTest
from moe_routing.routing.ordering import order_experts, sort_descending
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.procedures import bh_levels, num_rejected_at
from moe_routing.routing.toggles import Toggles
from moe_routing.statistics.bootstrap import bootstrap_items, studentised_interval


def held_out_fdr(
    null: Needed,
    test: Toggles,
    alphas: Sequence[float],
    *,
    outputs: ExpertOutputs | None = None,
    levels: Callable[[int, float], Tensor] = bh_levels,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Estimate the false discovery rate of a step-up procedure, one row per alpha and layer.

    With R the experts that the procedure selects for a token, without floor and cap, the false
    discovery proportion is sum_i w_i N_i 1[pair i is selected] / max(1, R): lower ranks are
    sampled, and pair i counts with its sampling weight w_i, so the numerator is unbiased given R.
    The rate is its mean over tokens (and layers, in the row ``all``).

    Columns: ``layer``, ``alpha``, ``fdr`` with ``low`` and ``high`` (the studentised bootstrap over
    documents; the variation of the fit is not included), ``mean_rejected`` experts per token,
    ``n_tokens``, ``n_documents``.

    Args:
        null: fitted on other documents.
        test: toggled pairs of the test tokens.
        outputs: outputs of the model's experts, for a null that tests another score than the
            probability.
        alphas: levels.
        levels: maps the number of experts and alpha to the levels of the procedure.
        confidence: level of the intervals.
        resamples: number of bootstrap resamples.
        rng: source of randomness.
    """
    layers, tokens, experts = test.weight_LTE.shape
    token_P = test.token_P
    false_P = test.sampling_weight_P * not_needed(test, null.name, null.epsilon)
    statistic_LTE = statistics(test, outputs, null.name, null.score)
    rank_P = test.rank_P
    if null.score != "probability":
        rank_P = _ranks(statistic_LTE)[test.layer_P, token_P, test.expert_P]
    document_T = torch.zeros(tokens, dtype=torch.int64).scatter(0, token_P, test.document_P).numpy()
    parts = []
    for alpha in alphas:
        count_LT = _rejections(null, statistic_LTE, levels(experts, alpha))
        selected_P = rank_P < count_LT[test.layer_P, token_P]
        false_LT = torch.zeros(layers, tokens, dtype=torch.float64)
        false_LT.index_put_((test.layer_P, token_P), false_P * selected_P, accumulate=True)
        proportion_LT = false_LT / count_LT.clamp(min=1)
        boot = bootstrap_items(
            _with_mean(proportion_LT),
            np.ones(tokens),
            document_T,
            resamples=resamples,
            rng=rng,
        )
        low_S, high_S = studentised_interval(boot, confidence)
        row = {"layer": [*map(str, range(layers)), ALL_LAYERS], "alpha": alpha}
        row |= {"fdr": boot.ratio_S, "low": low_S, "high": high_S}
        row |= {"mean_rejected": _with_mean(count_LT.double()).mean(0)}
        row |= {"n_tokens": tokens, "n_documents": boot.clusters}
        parts.append(pd.DataFrame(row))
    return pd.concat(parts, ignore_index=True)


def _ranks(statistic_LTE: Tensor) -> Tensor:
    """Return the rank of each expert in its token by the statistic, from 0, int64."""
    _, order_NE = order_experts(statistic_LTE.flatten(0, 1))
    rank_NE = torch.arange(order_NE.shape[1]).expand_as(order_NE)
    return torch.empty_like(order_NE).scatter_(1, order_NE, rank_NE).view(statistic_LTE.shape)


def _rejections(null: Needed, statistic_LTE: Tensor, level_E: Tensor) -> Tensor:
    """Return how many experts the procedure selects, int64, (layers, tokens)."""
    layers = statistic_LTE.shape[0]
    critical_LN = StepUpTest.build(null, level_E, layers).critical_LN
    sorted_LTE = sort_descending(statistic_LTE.flatten(0, 1)).view(statistic_LTE.shape)
    sorted_LTN = sorted_LTE[..., : critical_LN.shape[1]]
    return torch.stack(
        [num_rejected_at(sorted_LTN[layer], critical_LN[layer]) for layer in range(layers)]
    )


def _with_mean(value_LT: Tensor) -> NDArray[np.float64]:
    """Return one series per layer and their mean, (tokens, series)."""
    value_TL = value_LT.T.numpy()
    return np.concatenate([value_TL, value_TL.mean(1, keepdims=True)], axis=1)
