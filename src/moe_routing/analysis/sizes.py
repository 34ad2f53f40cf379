"""How p-values behave: uniformity, size, the bound of marginal nulls, what binds.

Shape letters: L layers, T tokens, E experts, N points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
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


def reachable(null: Null, alphas: Sequence[float], experts: int) -> list[float]:
    """Return the levels of BH that the null's draws can reach, by the rule that routing enforces.

    Below 1 / draws there is no p-value, so that BH at a smaller alpha / E could never select a
    single expert, and its size would be small for that reason alone.
    """
    return [alpha for alpha in alphas if null.reaches(alpha / experts)]


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

    ``size`` has a row ``all`` too, over the tokens of all layers. Levels that the draws cannot
    reach are left out of it; see :func:`reachable`.
    """
    alphas = reachable(null, alphas, sample.num_experts)
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
    which no marginal null can exceed on the tokens that it was fitted on: exactly for the empirical
    laws, approximately for the kernel ones. Levels that the draws cannot reach are left out; see
    :func:`reachable`.
    """
    alphas = reachable(null, alphas, sample.num_experts)
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


def judge_designs(
    sizes: pd.DataFrame,
    *,
    level: float,
    largest_size: float,
    confidence: float,
    breaks: Callable[[str, str], str] = lambda null, design: "",
) -> pd.DataFrame:
    """Say which nulls hold their size in which designs: one row a null and design.

    The size is the share of tokens for which BH at ``level`` selects anything where H0 holds. A
    null is fitted, and used, layer by layer; so it must hold its size in each of them. It is
    ``valid`` in a design if no layer is above ``largest_size`` by more than chance, and all layers
    together are not above it at all. By chance: the lower limit of a Wilson interval that all
    layers and designs of the null share (Bonferroni), so that a truly valid null is failed by any
    of them with probability at most 1 - ``confidence``. What the fit varies is not in it. The
    price is that a single layer may be above ``largest_size`` and pass: it fails only above
    ``layer_fails_above``, which more tokens bring closer.

    Columns: ``breaks`` (the null's assumption that the design breaks, if any), ``size`` with
    ``low`` and ``high`` over all layers; ``worst_layer_*`` with simultaneous limits;
    ``layer_fails_above``; ``failing_layers`` by number, and how many, ``layers_above``, of
    ``layers``; ``n_tokens`` of a layer.

    Args:
        sizes: rows for which H0 holds; columns ``null``, ``design``, ``alpha``, ``layer``,
            ``size``, ``low``, ``high``, ``n_tokens``.
        level: level of BH.
        largest_size: most that a valid null may have.
        confidence: joint level of the intervals of single layers.
        breaks: maps null and design to the assumption that does not hold.
    """
    used = sizes[np.isclose(sizes["alpha"], level)].reset_index(drop=True)
    is_all = used["layer"].astype(str) == ALL_LAYERS
    rows = []
    for null, single in used[~is_all].groupby("null", sort=False):
        joint = 1 - (1 - confidence) / len(single)
        limits = _joint_limits(single, joint)
        for design, layers in single.join(limits).groupby("design", sort=False):
            overall = used[is_all & (used["null"] == null) & (used["design"] == design)].iloc[0]
            worst = layers.loc[layers["size"].idxmax()]
            failing = layers.loc[layers["joint_low"] > largest_size, "layer"]
            rows.append(
                {
                    "null": null,
                    "design": design,
                    "breaks": breaks(null, design),
                    "valid": bool(overall["size"] <= largest_size) and failing.empty,
                    **overall[["size", "low", "high"]],
                    "worst_layer": worst["layer"],
                    "worst_layer_size": worst["size"],
                    "worst_layer_low": worst["joint_low"],
                    "worst_layer_high": worst["joint_high"],
                    "layer_fails_above": fails_above(largest_size, worst["n_tokens"], joint),
                    "failing_layers": " ".join(str(layer) for layer in failing),
                    "layers_above": len(failing),
                    "layers": len(layers),
                    "n_tokens": worst["n_tokens"],
                }
            )
    return pd.DataFrame(rows).assign(level=level, largest_size=largest_size, confidence=confidence)


def fails_above(largest_size: float, tokens: int, confidence: float) -> float:
    """Return the size above which the lower Wilson limit is above ``largest_size``.

    Wilson's limits invert the score test, whose standard error is that under H0: p0 + z
    sqrt(p0 (1 - p0) / n).

    >>> round(fails_above(0.06, 2048, 1 - 0.05 / 80), 3)
    0.078
    """
    z = stats.norm.ppf((1 + confidence) / 2)
    return float(largest_size + z * np.sqrt(largest_size * (1 - largest_size) / tokens))


def _joint_limits(single: pd.DataFrame, confidence: float) -> pd.DataFrame:
    limits = [
        wilson_interval(size * tokens, tokens, confidence)
        for size, tokens in zip(single["size"], single["n_tokens"], strict=True)
    ]
    return pd.DataFrame(limits, index=single.index, columns=["joint_low", "joint_high"])


def call_nulls(designs: pd.DataFrame) -> pd.DataFrame:
    """Say which nulls are valid: one row a null, from :func:`judge_designs`.

    A null is ``valid`` if it is in every design in which H0 holds, those that break its assumption
    included: nobody knows that real logits keep it. ``valid_under_assumption`` leaves these out.
    ``worst_*`` is the design with the largest size over all layers, ``worst_layer_*`` the layer of
    any design with the largest, with its simultaneous limits, and ``layer_fails_above`` the size
    above which it would fail.
    """
    rows = [_call(group) for _, group in designs.groupby("null", sort=False)]
    constants = designs[["level", "largest_size"]].iloc[0]
    return pd.DataFrame(rows).assign(**constants)


def _call(group: pd.DataFrame) -> dict[str, object]:
    worst = group.loc[group["size"].idxmax()]
    layer = group.loc[group["worst_layer_size"].idxmax()]
    kept = group[group["breaks"] == ""]
    failing = {name for names in group["failing_layers"] for name in names.split()}
    row = {
        "null": worst["null"],
        "valid": bool(group["valid"].all()),
        "valid_under_assumption": bool(kept["valid"].all()) and not kept.empty,
        "worst_design": worst["design"],
        "worst_size": worst["size"],
        "worst_low": worst["low"],
        "worst_high": worst["high"],
        "worst_layer": layer["worst_layer"],
        "worst_layer_design": layer["design"],
        "worst_layer_size": layer["worst_layer_size"],
        "worst_layer_low": layer["worst_layer_low"],
        "worst_layer_high": layer["worst_layer_high"],
        "layer_fails_above": layer["layer_fails_above"],
        "failing_layers": " ".join(sorted(failing, key=int)),
        "layers_above": len(failing),
        "n_layers": layer["layers"],
        "n_designs": len(group),
    }
    return {**row, "verdict": _verdict(row, layer, group)}


def _verdict(row: dict[str, object], layer: pd.Series, group: pd.DataFrame) -> str:
    allowed, failed = layer["largest_size"], group[~group["valid"]]
    text = (
        f"{row['null']} is {'valid' if row['valid'] else 'not valid'}: where H0 holds, BH at "
        f"{layer['level']:g} selects an expert for {row['worst_layer_size']:.3f} of the tokens in "
        f"the worst layer (layer {row['worst_layer']}, {row['worst_layer_design']}; simultaneous "
        f"{layer['confidence']:.0%} interval {row['worst_layer_low']:.3f} to "
        f"{row['worst_layer_high']:.3f}), and for {row['worst_size']:.3f} over all layers in the "
        f"worst design ({row['worst_design']}); allowed: {allowed:g}. At {layer['n_tokens']:,} "
        f"tokens a layer fails above {row['layer_fails_above']:.3f}."
    )
    if row["valid"]:
        return text
    if row["layers_above"]:
        text += (
            f" It fails in {row['layers_above']} of {row['n_layers']} layers "
            f"({row['failing_layers'].replace(' ', ', ')})."
        )
    if row["valid_under_assumption"]:
        broken = ", ".join(f"{name} ({what})" for name, what in failed[["design", "breaks"]].values)
        text += f" It fails only where its assumption is broken: {broken}."
    return text
