"""Key findings of the baseline analysis, computed with intervals and tests.

Pure functions of arrays. Shape letters: L layers, T tokens, E experts, D documents, B resamples.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from moe_routing.statistics import law
from moe_routing.statistics.bootstrap import cluster_sums
from moe_routing.wording import percent

Array = NDArray[np.float64]


def document_weights(documents: int, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return how often each document is drawn in each resample with replacement, (B, D)."""
    return rng.multinomial(documents, np.full(documents, 1 / documents), size=resamples)


def loads_by_document(
    index_LTK: NDArray[np.int64], document_T: NDArray[np.int64], experts: int
) -> NDArray[np.int64]:
    """Count selections by document, (documents, layers, experts), documents in sorted order."""
    layers, tokens, k = index_LTK.shape
    names, index_T = np.unique(document_T, return_inverse=True)
    cell_LTK = (index_T[None, :, None] * layers + np.arange(layers)[:, None, None]) * experts
    counts = np.bincount((cell_LTK + index_LTK).ravel(), minlength=names.size * layers * experts)
    assert counts.sum() == layers * tokens * k  # noqa: S101 (every selection is counted once)
    return counts.reshape(names.size, layers, experts)


def imbalance(
    load_DLE: NDArray[np.int64], *, confidence: float, resamples: int, rng: np.random.Generator
) -> dict[str, object]:
    """Return the largest imbalance factor (max load / mean load) of the layers.

    The interval is that of the layer that has the largest factor, by percentiles over resampled
    documents. The maximum of noisy loads is biased upwards, in the data as in the resamples, by
    about as much as ``balanced_reference`` shows: the mean factor if every selection were drawn
    uniformly.
    """
    load_LE = load_DLE.sum(0)
    factor_L = load_LE.max(1) / load_LE.mean(1)
    layer = int(factor_L.argmax())
    weight_BD = document_weights(len(load_DLE), resamples, rng)
    resampled_BE = weight_BD @ load_DLE[:, layer].astype(float)
    low, high = _percentiles(resampled_BE.max(1) / resampled_BE.mean(1), confidence)
    uniform = np.full(load_LE.shape[1], 1 / load_LE.shape[1])
    noise_BE = rng.multinomial(int(load_LE[layer].sum()), uniform, size=200)
    reference = float((noise_BE.max(1) / noise_BE.mean(1)).mean())
    return {
        "layer": layer,
        "value": float(factor_L[layer]),
        "low": low,
        "high": high,
        "mean_over_layers": float(factor_L.mean()),
        "balanced_reference": reference,
        "n_documents": len(load_DLE),
        "statement": (
            f"The busiest expert of layer {layer} gets {factor_L[layer]:.2f} times the mean load "
            f"({percent(confidence, 0)} interval {low:.2f} to {high:.2f}). Uniform use would give "
            f"{reference:.2f} by chance."
        ),
    }


def depth_trend(
    entropy_LT: Array,
    document_T: NDArray[np.int64],
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> dict[str, object]:
    """Return Spearman's correlation of a layer's mean entropy with its depth.

    Estimate, interval and test are about the layers of this model, on text like this: the text is
    the sample, so documents are resampled, each with all its tokens. Neighbouring layers have
    similar entropies, so layers are not exchangeable and no test permutes them; nothing is said
    about other models. The interval is by percentiles. The two-sided p-value is the smallest
    1 - confidence whose interval excludes 0: min(1, 2 (1 + c) / (resamples + 1)), where c is the
    number of resamples whose correlation is 0 or has the rarer sign. With many layers of equal
    entropy, which no trained model has, it finds a trend too often.
    """
    depth_L = np.arange(len(entropy_LT))
    rho = spearman(depth_L, entropy_LT.mean(1))
    sums_DL = cluster_sums(entropy_LT.T, document_T)
    tokens_D = cluster_sums(np.ones(document_T.size), document_T)
    weight_BD = document_weights(len(tokens_D), resamples, rng)
    means_BL = (weight_BD @ sums_DL) / (weight_BD @ tokens_D)[:, None]
    rho_B = _spearman_rows(depth_L, means_BL)
    low, high = _percentiles(rho_B, confidence)
    crossed = min((rho_B <= 0).sum(), (rho_B >= 0).sum())
    p_value = min(1.0, float(2 * (1 + crossed) / (resamples + 1)))
    shown = (low > 0 or high < 0) and p_value <= 1 - confidence
    if shown:
        trend = ("falls" if rho < 0 else "rises") + " with depth on the whole"
    else:
        trend = "neither rises nor falls demonstrably with depth"
    return {
        "rho": rho,
        "low": low,
        "high": high,
        "p_value": p_value,
        "n_layers": len(depth_L),
        "n_documents": len(tokens_D),
        "shown": shown,
        "statement": (
            f"Over the {len(depth_L)} layers of this model the router's mean entropy {trend} "
            f"(Spearman {rho:.2f}, {percent(confidence, 0)} interval {low:.2f} to {high:.2f} over "
            f"documents, bootstrap p = {p_value:.3f}). The text is the sample, not the layers, so "
            "this says nothing about other models."
        ),
    }


def ease_and_weight(
    loss_T: Array,
    max_weight_LT: Array,
    document_T: NDArray[np.int64],
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> dict[str, object]:
    """Test whether easy tokens (small next-token loss) have a larger first weight.

    Spearman's correlation within documents of a token's own loss with its largest weight, averaged
    over layers; negative if easy tokens have larger weights. Ranks are taken over all tokens and
    centred within documents, which removes differences between documents; estimate, interval and
    p-value are about this one quantity. The interval is by percentiles over resampled documents,
    each with all its tokens; the p-value permutes losses within documents. The position in the
    document is not controlled: a loss that falls with context and weights that rise with it would
    show up here too.
    """
    weight_T = max_weight_LT.mean(0)
    rho_S, low_S, high_S = spearman_limits(
        loss_T, np.vstack([weight_T, max_weight_LT]), document_T,
        confidence=confidence, resamples=resamples, rng=rng, within_documents=True,
    )  # fmt: skip
    rho, low, high = rho_S[0], low_S[0], high_S[0]
    p_value = within_document_p(loss_T, weight_T, document_T, permutations=999, rng=rng)
    excludes_zero = low > 0 or high < 0
    shown = excludes_zero and p_value <= 1 - confidence
    if shown:
        answer = f"The router is {'more' if rho < 0 else 'less'} confident on easy tokens"
    else:
        answer = "The router was not shown to be more or less confident on easy tokens"
    return {
        "rho": rho,
        "low": low,
        "high": high,
        "p_value": p_value,
        "by_layer": [
            {"layer": layer, "rho": rho, "low": low, "high": high}
            for layer, (rho, low, high) in enumerate(
                zip(rho_S[1:], low_S[1:], high_S[1:], strict=True)
            )
        ],
        "n_tokens": loss_T.size,
        "n_documents": np.unique(document_T).size,
        "shown": shown,
        "statement": (
            f"{answer} (Spearman of loss and weight within documents {rho:.2f}, "
            f"{percent(confidence, 0)} interval {low:.2f} to {high:.2f} over documents, "
            f"permutation p = {p_value:.3f}). The position in the document is not controlled."
        ),
    }


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Return Spearman's rank correlation; 0 where one of the two is constant."""
    rho = law.spearman(first, second)
    return 0.0 if math.isnan(rho) else rho


def _spearman_rows(first_L: ArrayLike, second_BL: Array) -> Array:
    """Return the correlation of one variable with each row, as :func:`spearman` does; (B,)."""
    a_L, b_BL = stats.rankdata(first_L), stats.rankdata(second_BL, axis=1)
    a_L, b_BL = a_L - a_L.mean(), b_BL - b_BL.mean(1, keepdims=True)
    scale_B = np.sqrt((a_L @ a_L) * (b_BL**2).sum(1))
    return np.divide(b_BL @ a_L, scale_B, out=np.zeros_like(scale_B), where=scale_B > 0)


def spearman_limits(
    first_T: Array,
    second_ST: Array,
    document_T: NDArray[np.int64],
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
    within_documents: bool = False,
) -> tuple[Array, Array, Array]:
    """Return Spearman's correlation of one variable with S others, and percentile limits.

    Documents are resampled, each with all its tokens. Ranks are those of the whole sample: a
    resample is the correlation of its ranks, not of its ranks ranked again.

    Args:
        first_T: one variable.
        second_ST: the others.
        document_T: document of each token.
        confidence: level of the limits.
        resamples: number of resamples.
        rng: source of randomness.
        within_documents: centre the ranks within documents, which removes differences between
            documents.

    Returns:
        Correlations, lower and upper limits, each (S,).
    """
    # Centring on the mean of all tokens changes no correlation; it keeps the moments small.
    centre_T = document_T if within_documents else np.zeros(len(document_T))
    a_T1 = _centred_ranks(first_T, centre_T)[:, None]
    b_TS = np.stack([_centred_ranks(second_T, centre_T) for second_T in second_ST], axis=1)
    a_TS = np.broadcast_to(a_T1, b_TS.shape)
    moments = [a_TS, b_TS, a_TS * b_TS, a_TS**2, b_TS**2]
    sums = [cluster_sums(moment_TS, document_T) for moment_TS in moments]
    tokens_D = cluster_sums(np.ones(len(document_T)), document_T)
    weight_BD = document_weights(len(tokens_D), resamples, rng)
    whole_1D = np.ones((1, len(tokens_D)))

    def correlation(weight_BD: NDArray[np.int64] | Array) -> Array:
        n_B1 = (weight_BD @ tokens_D)[:, None]
        a, b, ab, aa, bb = (weight_BD @ sum_DS / n_B1 for sum_DS in sums)
        scale_BS = np.sqrt((aa - a**2) * (bb - b**2))
        return np.divide(ab - a * b, scale_BS, out=np.zeros_like(scale_BS), where=scale_BS > 1e-9)

    tail = (1 - confidence) / 2
    low_S, high_S = np.quantile(correlation(weight_BD), [tail, 1 - tail], axis=0)
    return correlation(whole_1D)[0], low_S, high_S


def within_document_p(
    first_T: Array,
    second_T: Array,
    document_T: NDArray[np.int64],
    *,
    permutations: int,
    rng: np.random.Generator,
) -> float:
    """Test H0: within documents, the order of ``first_T`` is independent of ``second_T``.

    Two-sided, p = (1 + #{|rho*| >= |rho|}) / (permutations + 1) with ranks taken over all tokens
    and centred within documents, which removes differences between documents.
    """
    order_T = np.argsort(document_T, kind="stable")
    document_T = document_T[order_T]
    a_T = _centred_ranks(first_T[order_T], document_T)
    b_T = _centred_ranks(second_T[order_T], document_T)
    observed = abs(a_T @ b_T) * (1 - 1e-12)
    extreme = 0
    for _ in range(permutations):
        shuffled = np.lexsort((rng.random(a_T.size), document_T))
        extreme += bool(abs(a_T[shuffled] @ b_T) >= observed)
    return (1 + extreme) / (permutations + 1)


def _centred_ranks(value_T: Array, document_T: NDArray[np.int64] | Array) -> Array:
    """Return ranks over all tokens less their mean in the document."""
    rank_T = stats.rankdata(value_T)
    _, index_T, count_D = np.unique(document_T, return_inverse=True, return_counts=True)
    return rank_T - (np.bincount(index_T, rank_T) / count_D)[index_T]


def _percentiles(values: Array | list[float], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
