"""How p-values behave: uniformity, size, the bound of marginal nulls, what binds.

Shape letters: L layers, T tokens, E experts, N points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_routing.routing.nulls import Null, sample_inputs
from moe_routing.routing.procedures import bh_levels, step_up
from moe_routing.routing.sample import CalibrationSample
from moe_routing.statistics.proportions import wilson_interval

BINS = 20
QQ_LEVELS = tuple(np.round(np.geomspace(1e-4, 1, 33), 8).tolist())
ALL_LAYERS = "all"


def layer_p_values(null: Null, sample: CalibrationSample, layer: int) -> Tensor:
    """Return the p-values of a layer's tokens, sorted upwards within tokens, (tokens, experts)."""
    return null.p_values(sample_inputs(sample, layer)).sort(1).values


def harmonic(experts: int) -> float:
    """Return 1 + 1/2 + ... + 1/E.

    >>> round(harmonic(64), 3)
    4.744
    """
    return float((1 / np.arange(1, experts + 1)).sum())


def histogram_rows(p_TE: Tensor) -> pd.DataFrame:
    """Return the share of p-values in 20 equal bins; uniform p-values have 1/20 in each."""
    counts, edges = np.histogram(p_TE.double().numpy().ravel(), BINS, (0, 1))
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "share": counts / counts.sum()})


def qq_rows(p_TE: Tensor) -> pd.DataFrame:
    """Return the share of p-values at or below levels that are even in log; H0: the level."""
    sorted_p = np.sort(p_TE.double().numpy().ravel())
    below = np.searchsorted(sorted_p, QQ_LEVELS, side="right")
    return pd.DataFrame({"level": QQ_LEVELS, "share": below / sorted_p.size})


def rejections(sorted_p_TE: Tensor, alpha: float) -> Tensor:
    """Return how many experts BH keeps for each token, without floor and cap, (tokens,)."""
    return step_up(sorted_p_TE, bh_levels(sorted_p_TE.shape[1], alpha))


def size_row(rejected_T: Tensor, confidence: float) -> dict[str, float]:
    """Return the share of tokens with any rejection, its Wilson interval, and the mean number."""
    tokens, some = rejected_T.numel(), int((rejected_T > 0).sum())
    low, high = wilson_interval(some, tokens, confidence)
    return {
        "size": some / tokens,
        "low": low,
        "high": high,
        "mean_rejected": float(rejected_T.double().mean()),
        "n_tokens": tokens,
    }


def examine(
    null: Null, sample: CalibrationSample, alphas: Sequence[float], confidence: float
) -> dict[str, pd.DataFrame]:
    """Return ``size``, ``histogram`` and ``qq`` of a fitted null on a sample, by layer.

    ``size`` has a row ``all`` too, over the tokens of all layers.
    """
    tables: dict[str, list[pd.DataFrame]] = {"size": [], "histogram": [], "qq": []}
    rejected: dict[float, list[Tensor]] = {alpha: [] for alpha in alphas}
    for layer in range(sample.num_layers):
        p_TE = layer_p_values(null, sample, layer)
        tables["histogram"].append(histogram_rows(p_TE).assign(layer=layer))
        tables["qq"].append(qq_rows(p_TE).assign(layer=layer))
        for alpha in alphas:
            rejected[alpha].append(rejections(p_TE, alpha))
    sizes = []
    for alpha, by_layer in rejected.items():
        named = {**dict(enumerate(by_layer)), ALL_LAYERS: torch.cat(by_layer)}
        for layer, rejected_T in named.items():
            sizes.append({"alpha": alpha, "layer": layer, **size_row(rejected_T, confidence)})
    tables["size"].append(pd.DataFrame(sizes))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def binding_rows(
    null: Null,
    sample: CalibrationSample,
    alphas: Sequence[float],
    *,
    min_k: int,
    max_k: int,
) -> pd.DataFrame:
    """Return by layer how often floor and cap decide in place of BH, and how often BH is empty.

    ``share_floor``: fewer rejections than ``min_k``; ``share_cap``: more than ``max_k``;
    ``share_empty``: none; ``share_any``: at least one, to hold against ``bound`` = alpha * H_E,
    which no marginal null can exceed on the tokens that it was fitted on.
    """
    rows = []
    for layer in range(sample.num_layers):
        p_TE = layer_p_values(null, sample, layer)
        for alpha in alphas:
            rejected_T = rejections(p_TE, alpha)
            rows.append(
                {
                    "layer": layer,
                    "alpha": alpha,
                    "share_floor": float((rejected_T < min_k).double().mean()),
                    "share_cap": float((rejected_T > max_k).double().mean()),
                    "share_empty": float((rejected_T == 0).double().mean()),
                    "share_any": float((rejected_T > 0).double().mean()),
                    "mean_rejected": float(rejected_T.double().mean()),
                    "bound": min(1.0, alpha * harmonic(p_TE.shape[1])),
                    "n_tokens": rejected_T.numel(),
                }
            )
    return pd.DataFrame(rows)


def call_nulls(
    sizes: pd.DataFrame, *, level: float, largest_size: float, confidence: float
) -> pd.DataFrame:
    """Say which nulls are valid: one row a null.

    The size is the share of tokens for which BH at ``level`` selects anything, in a design in
    which H0 holds. A null is ``valid`` if its size is at most ``largest_size`` over the tokens of
    all layers, in every design, and no single layer is above it by more than chance (Wilson
    interval at a level that all its layers and designs share, Bonferroni). It is
    ``valid_on_average`` if only the first holds. ``worst_*`` is the design, and the layer of a
    design, with the largest size.

    Args:
        sizes: rows for which H0 holds; columns ``null``, ``design``, ``alpha``, ``layer``,
            ``size``, ``low``, ``high``, ``n_tokens``.
        level: level of BH.
        largest_size: most that a valid null may have.
        confidence: joint level of the intervals of single layers.
    """
    used = sizes[np.isclose(sizes["alpha"], level)].reset_index(drop=True)
    rows = [_call(group, largest_size, confidence) for _, group in used.groupby("null", sort=False)]
    return pd.DataFrame(rows).assign(level=level, largest_size=largest_size)


def _call(group: pd.DataFrame, largest_size: float, confidence: float) -> dict[str, object]:
    is_all = group["layer"].astype(str) == ALL_LAYERS
    overall, single = group[is_all], group[~is_all]
    joint = 1 - (1 - confidence) / len(single)
    low_N = [
        wilson_interval(row["size"] * row["n_tokens"], row["n_tokens"], joint)[0]
        for _, row in single.iterrows()
    ]
    above = single[np.array(low_N) > largest_size]
    worst, layer = overall.loc[overall["size"].idxmax()], single.loc[single["size"].idxmax()]
    on_average = bool(worst["size"] <= largest_size)
    row = {
        "null": worst["null"],
        "valid": on_average and above.empty,
        "valid_on_average": on_average,
        "worst_design": worst["design"],
        "worst_size": worst["size"],
        "worst_low": worst["low"],
        "worst_high": worst["high"],
        "worst_layer": layer["layer"],
        "worst_layer_design": layer["design"],
        "worst_layer_size": layer["size"],
        "layers_above": above["layer"].nunique(),
        "n_designs": len(overall),
    }
    return {**row, "verdict": _verdict(row, largest_size)}


def _verdict(row: dict[str, object], largest_size: float) -> str:
    word = "not valid"
    if row["valid"]:
        word = "valid"
    elif row["valid_on_average"]:
        word = f"valid on average over layers, but not in {row['layers_above']} of them"
    return (
        f"{row['null']} is {word}: where H0 holds, BH selects an expert for "
        f"{row['worst_size']:.3f} of the tokens in the worst design ({row['worst_design']}), "
        f"{row['worst_layer_size']:.3f} in the worst layer (layer {row['worst_layer']}, "
        f"{row['worst_layer_design']}); allowed: {largest_size:g}."
    )
