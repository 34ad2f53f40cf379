"""Statistics of a router by layer: how confident it is, and how evenly it uses its experts.

Pure functions of arrays. Shape letters: L layers, T tokens, E experts, K selected, D documents.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

from moe_routing.statistics.bootstrap import bootstrap_items, studentised_interval

Array = NDArray[np.float64]


def probabilities(logits_LTE: NDArray[np.float32]) -> Array:
    """Return the router's softmax over all experts, float64."""
    return special.softmax(logits_LTE.astype(np.float64), axis=-1)


def top_experts(logits_LTE: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return each token's k experts with the largest logits, best first, (..., k).

    Equal logits are ordered by the lower index.
    """
    return np.argsort(-logits_LTE, axis=-1, kind="stable")[..., :k]


def expert_load(index_LTK: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    """Count how often each expert is selected, (layers, experts)."""
    return np.stack([np.bincount(ids.ravel(), minlength=experts) for ids in index_LTK])


def gini(load_E: NDArray) -> float:
    """Return the Gini coefficient of loads: 0 all equal, (E - 1)/E one expert has all.

    G = sum_ij |x_i - x_j| / (2 E sum_i x_i) (Gini 1912). NaN where nothing was selected.

    >>> gini([1, 1, 1, 1]), gini([0, 0, 0, 8])
    (0.0, 0.75)
    """
    sorted_E = np.sort(np.asarray(load_E, dtype=float))
    total = sorted_E.sum()
    if total == 0:
        return float("nan")
    rank_E = np.arange(1, sorted_E.size + 1)
    return float((2 * rank_E - sorted_E.size - 1) @ sorted_E / (sorted_E.size * total))


def max_mean_load(load_E: NDArray) -> float:
    """Return the largest load over the mean load; 1 is perfect balance.

    >>> max_mean_load([1, 1, 1, 5])
    2.5
    """
    load_E = np.asarray(load_E, dtype=float)
    return float(load_E.max() / load_E.mean()) if load_E.sum() else float("nan")


def token_statistics(logits_LTE: NDArray[np.float32], k: int) -> dict[str, Array]:
    """Return statistics of each token's softmax, each (layers, tokens).

    ``avg_max_weight``: the largest softmax probability, which is the weight of the first expert.
    ``entropy``: of the softmax over all experts, nats. ``top{k}_mass``: summed probability of the
    k largest, the total weight of the stock router.
    """
    probability_LTE = probabilities(logits_LTE)
    return {
        "avg_max_weight": probability_LTE.max(-1),
        "entropy": special.entr(probability_LTE).sum(-1),
        f"top{k}_mass": np.sort(probability_LTE, axis=-1)[..., -k:].sum(-1),
    }


def layer_table(
    logits_LTE: NDArray[np.float32],
    document_T: NDArray[np.int64],
    k: int,
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return one row per layer.

    Means over tokens have bootstrap-t limits (``_low``, ``_high``) that resample documents; they
    are missing with a single document. ``top_expert_proportion`` is the proportion of selections
    (uniform use: 1/E); ``logit_kurtosis`` is Pearson's (3 for a normal distribution).
    """
    experts = logits_LTE.shape[-1]
    load_LE = expert_load(top_experts(logits_LTE, k), experts)
    flat_Ln = logits_LTE.reshape(len(logits_LTE), -1).astype(np.float64)
    table = pd.DataFrame({"layer": np.arange(len(logits_LTE))})
    for name, value_LT in token_statistics(logits_LTE, k).items():
        table[name] = value_LT.mean(1)
        limits = _mean_limits(value_LT, document_T, confidence, resamples, rng)
        table[f"{name}_low"], table[f"{name}_high"] = limits
    table["relative_entropy"] = table["entropy"] / np.log(experts)
    table["top_expert"] = load_LE.argmax(1)
    table["top_expert_proportion"] = load_LE.max(1) / load_LE.sum(1)
    table["max_mean_load"] = [max_mean_load(load_E) for load_E in load_LE]
    table["gini"] = [gini(load_E) for load_E in load_LE]
    table["logit_mean"] = flat_Ln.mean(1)
    table["logit_sd"] = flat_Ln.std(1)
    table["logit_skew"] = stats.skew(flat_Ln, axis=1)
    table["logit_kurtosis"] = stats.kurtosis(flat_Ln, axis=1, fisher=False)
    table["n_tokens"] = logits_LTE.shape[1]
    table["n_documents"] = np.unique(document_T).size
    return table


def _mean_limits(
    value_LT: Array,
    document_T: NDArray[np.int64],
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Return limits of each layer's mean, resampling documents; all layers share the resamples."""
    if np.unique(document_T).size < 2:
        missing = np.full(len(value_LT), np.nan)
        return missing, missing
    tokens_T = np.ones(document_T.size)
    boot = bootstrap_items(value_LT.T, tokens_T, document_T, resamples=resamples, rng=rng)
    return studentised_interval(boot, confidence)
