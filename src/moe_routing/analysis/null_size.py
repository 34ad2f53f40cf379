"""The size of nulls where they hold, the bound of marginal nulls, floor and cap.

Shape letters: L layers, T tokens, E experts, N levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from moe_routing.analysis.outputs import ALL_LAYERS, NOT_SHOWN, NOT_VALID, VALID
from moe_routing.analysis.tables import largest
from moe_routing.routing.nulls import Null, sample_inputs
from moe_routing.routing.ordering import sort_descending
from moe_routing.routing.procedures import bh_levels, num_rejected_at
from moe_routing.routing.sample import CalibrationSample
from moe_routing.statistics.proportions import wilson_interval
from moe_routing.wording import percent


@dataclass(frozen=True)
class Evidence:
    """The evidence against H0 for the experts of every token of a layer.

    A p-value is at most a level if and only if the evidence is at least the level's critical value.

    Attributes:
        sorted_TE: evidence, each token's in descending order.
        critical: maps float64 levels, of those that are examined, to their critical values, both
            (N,).
    """

    sorted_TE: Tensor
    critical: Callable[[Tensor], Tensor]

    @classmethod
    def of(
        cls, null: Null, sample: CalibrationSample, layer: int, alphas: Sequence[float]
    ) -> Evidence:
        """Use the statistic of a layer-monotone null, and minus the p-value of any other.

        So too if p-values depend on the rank: then there is no single critical value per level.

        Critical values give exactly the decisions of p-values (:meth:`Null.critical_values`)
        without looking up every statistic in a table of a million draws. Those of BH at ``alphas``
        are computed once.
        """
        inputs = sample_inputs(sample, layer)
        if not null.layer_monotone or null.by_rank:
            return cls.of_p_values(null.p_values(inputs))
        bh = [bh_levels(sample.num_experts, alpha) for alpha in alphas]
        level_N = torch.cat(bh).unique()
        critical_N = null.critical_values(layer, level_N)
        return cls(
            sort_descending(null.statistic(inputs)),
            lambda wanted_N: critical_N[torch.searchsorted(level_N, wanted_N)],
        )

    @classmethod
    def of_p_values(cls, p_TE: Tensor) -> Evidence:
        """Use minus the p-values."""
        return cls(sort_descending(-p_TE), lambda level_N: -level_N)

    def rejections(self, alpha: float) -> Tensor:
        """Return how many experts BH selects for each token, without floor and cap, (tokens,)."""
        level_E = bh_levels(self.sorted_TE.shape[1], alpha)
        return num_rejected_at(self.sorted_TE, self.critical(level_E))


def harmonic(experts: int) -> float:
    """Return 1 + 1/2 + ... + 1/E.

    >>> round(harmonic(64), 3)
    4.744
    """
    return float((1 / np.arange(1, experts + 1)).sum())


def attainable(null: Null, alphas: Sequence[float], experts: int) -> list[float]:
    """Return the levels of BH that the null has enough draws for, by the same rule as in routing.

    No p-value is below 1 / draws. BH with a smaller alpha / E could not select a single expert, and
    its size would be small for that reason alone.
    """
    return [alpha for alpha in alphas if null.attains(alpha / experts)]


def size_row(rejected_T: Tensor, confidence: float) -> dict[str, float]:
    """Return the proportion of tokens with a rejection, its Wilson limits, and the mean number."""
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
) -> pd.DataFrame:
    """Return the size of a fitted null on a sample, by level and layer.

    A row ``all`` is over the tokens of all layers. Levels without enough draws are left out; see
    :func:`attainable`.
    """
    alphas = attainable(null, alphas, sample.num_experts)
    rejected: dict[float, list[Tensor]] = {alpha: [] for alpha in alphas}
    for layer in range(sample.num_layers if alphas else 0):
        evidence = Evidence.of(null, sample, layer, alphas)
        for alpha in alphas:
            rejected[alpha].append(evidence.rejections(alpha))
    sizes = [
        {"alpha": alpha, "layer": layer, **size_row(rejected_T, confidence)}
        for alpha, by_layer in rejected.items()
        for layer, rejected_T in [*enumerate(by_layer), (ALL_LAYERS, torch.cat(by_layer))]
    ]
    return pd.DataFrame(sizes)


def binding_rows(
    null: Null, sample: CalibrationSample, alphas: Sequence[float], *, min_k: int, max_k: int
) -> pd.DataFrame:
    """Return by layer how often floor and cap decide in place of BH, and how often BH is empty.

    ``floor_proportion``: fewer rejections than ``min_k``; ``cap_proportion``: more than ``max_k``;
    ``empty_proportion``: none; ``any_proportion``: at least one, to compare with ``bound`` = alpha
    * H_E, which no marginal null can exceed on the tokens that it was fitted on: exactly for the
    empirical laws, approximately for the kernel ones. Levels without enough draws are left out; see
    :func:`attainable`.
    """
    alphas = attainable(null, alphas, sample.num_experts)
    rows = []
    for layer in range(sample.num_layers if alphas else 0):
        evidence = Evidence.of(null, sample, layer, alphas)
        for alpha in alphas:
            rejected_T = evidence.rejections(alpha)
            rows.append(
                {
                    "layer": layer,
                    "alpha": alpha,
                    "floor_proportion": float((rejected_T < min_k).double().mean()),
                    "cap_proportion": float((rejected_T > max_k).double().mean()),
                    "empty_proportion": float((rejected_T == 0).double().mean()),
                    "any_proportion": float((rejected_T > 0).double().mean()),
                    "mean_rejected": float(rejected_T.double().mean()),
                    "bound": min(1.0, alpha * harmonic(sample.num_experts)),
                    "n_tokens": rejected_T.numel(),
                }
            )
    return pd.DataFrame(rows)


def call_designs(
    sizes: pd.DataFrame,
    *,
    level: float,
    largest_size: float,
    confidence: float,
    breaks: Callable[[str, str], str] = lambda null, design: "",
    if_noise: Callable[[str], bool] = lambda design: False,
) -> pd.DataFrame:
    """Return which nulls hold their size in which designs, one row per null and design.

    This is weak control: under the complete null, in which every selection is false. The size is
    the proportion of tokens for which BH at ``level`` selects anything under H0. A null is fitted,
    and used, layer by layer; so it must hold its size in each of them. Its ``call`` in a design is
    ``valid`` if no layer's size, as estimated, is above ``largest_size``; ``not valid`` if a layer,
    or all of them together, is above it by more than chance; and else ``not shown``. By chance: the
    lower limit of a Wilson interval that all layers and designs of the null share (Bonferroni), so
    that a valid null fails with probability at most 1 - ``confidence``. The variation of the fit is
    not included.

    Columns: ``breaks`` (the null's assumption that the design breaks, if any), ``if_noise`` (the
    design takes no part in the verdict on the null), ``valid`` (whether the call is that), ``size``
    with ``low`` and ``high`` over all layers; ``worst_layer_*`` with simultaneous limits;
    ``layer_fails_above``, the size above which a single layer fails; ``failing_layers`` by number,
    and how many, ``layers_above``, of ``layers``; ``unshown_layers``, above ``largest_size`` and
    not failing; ``n_tokens`` of a layer.

    Args:
        sizes: rows for which H0 holds; columns ``null``, ``design``, ``alpha``, ``layer``,
            ``size``, ``low``, ``high``, ``n_tokens``.
        level: level of BH.
        largest_size: most that a valid null may have.
        confidence: joint level of the intervals of single layers.
        breaks: maps null and design to the assumption that does not hold.
        if_noise: whether a design reshuffles real logits, and takes no part in the verdict.
    """
    used = sizes[np.isclose(sizes["alpha"], level)].reset_index(drop=True)
    rows = []
    for null, own in used.groupby("null", sort=False):
        joint = 1 - (1 - confidence) / len(own)
        own = own.join(_joint_limits(own, joint))
        for design, group in own.groupby("design", sort=False):
            row = _call_design(group, largest_size)
            edge = fails_above(largest_size, row["n_tokens"], joint)
            named = {"null": null, "design": design, "breaks": breaks(str(null), str(design))}
            named |= {"if_noise": if_noise(str(design))}
            rows.append({**named, **row, "layer_fails_above": edge})
    return pd.DataFrame(rows).assign(level=level, largest_size=largest_size, confidence=confidence)


def _call_design(group: pd.DataFrame, largest_size: float) -> dict[str, Any]:
    """Return whether a null is valid in a design, from its sizes by layer and over all layers."""
    is_all = group["layer"].astype(str) == ALL_LAYERS
    overall, layers = group[is_all].iloc[0], group[~is_all]
    worst = largest(layers, "size")
    above, fails = group["size"] > largest_size, group["joint_low"] > largest_size
    failing = group.loc[fails & ~is_all, "layer"]
    return {
        "call": NOT_VALID if fails.any() else NOT_SHOWN if above.any() else VALID,
        "valid": not above.any(),
        **overall[["size", "low", "high"]],
        "worst_layer": worst["layer"],
        "worst_layer_size": worst["size"],
        "worst_layer_low": worst["joint_low"],
        "worst_layer_high": worst["joint_high"],
        "failing_layers": _names(failing),
        "layers_above": len(failing),
        "unshown_layers": _names(group.loc[above & ~fails & ~is_all, "layer"]),
        "layers": len(layers),
        "n_tokens": worst["n_tokens"],
    }


def fails_above(largest_size: float, tokens: int, confidence: float) -> float:
    """Return the size above which the lower Wilson limit is above ``largest_size``.

    Wilson's limits invert the score test, whose standard error is that under H0: p0 + z
    sqrt(p0 (1 - p0) / n).

    >>> round(fails_above(0.06, 2048, 1 - 0.05 / 80), 3)
    0.078
    """
    z = stats.norm.ppf((1 + confidence) / 2)
    return float(largest_size + z * np.sqrt(largest_size * (1 - largest_size) / tokens))


def _joint_limits(sizes: pd.DataFrame, confidence: float) -> pd.DataFrame:
    limits = [
        wilson_interval(size * tokens, tokens, confidence)
        for size, tokens in zip(sizes["size"], sizes["n_tokens"], strict=True)
    ]
    return pd.DataFrame(limits, index=sizes.index, columns=["joint_low", "joint_high"])


def _names(layers: Iterable[object]) -> str:
    return " ".join(sorted({str(layer) for layer in layers}, key=int))


def call_nulls(designs: pd.DataFrame) -> pd.DataFrame:
    """Return which nulls are valid, one row per null, from :func:`call_designs`.

    Its ``call`` is the worst of the designs that judge it, including those that break its
    assumption, since real logits may break it too. ``assumption_call`` leaves these out (empty:
    none is left). ``valid`` and ``valid_under_assumption`` say whether they are ``valid``.
    ``worst_*`` is the design with the largest size over all layers, ``worst_layer_*`` the layer of
    any design with the largest, with its simultaneous limits, and ``layer_fails_above`` the size
    above which it would fail. ``failing_layers`` and ``unshown_layers`` are those of any design; a
    layer that fails in one is not among the latter.

    ``noise_size`` and ``noise_design`` are the largest size over all layers, and where, in the
    designs that take no part: how often BH would select anything if all of the real logits' law
    were noise. They are empty for a null without such a design.
    """
    rows = []
    for _, group in designs.groupby("null", sort=False):
        judging = group[~group["if_noise"]]
        if len(judging):
            rows.append(_call_null(judging, group[group["if_noise"]]))
    constants = designs[["level", "largest_size"]].iloc[0]
    return pd.DataFrame(rows).assign(**constants)


def _worst_call(calls: pd.Series) -> str:
    ranked = [call for call in (NOT_VALID, NOT_SHOWN, VALID) if call in set(calls)]
    return ranked[0] if ranked else ""


def _call_null(group: pd.DataFrame, noise: pd.DataFrame) -> dict[str, object]:
    worst = largest(group, "size")
    layer = largest(group, "worst_layer_size")
    call = _worst_call(group["call"])
    assumed = _worst_call(group.loc[group["breaks"] == "", "call"])
    failing = " ".join(group["failing_layers"]).split()
    unshown = set(" ".join(group["unshown_layers"]).split()) - set(failing)
    row = {
        "null": worst["null"],
        "call": call,
        "valid": call == VALID,
        "assumption_call": assumed,
        "valid_under_assumption": assumed == VALID,
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
        "failing_layers": _names(failing),
        "layers_above": len(set(failing)),
        "unshown_layers": _names(unshown),
        "n_layers": layer["layers"],
        "n_designs": len(group),
        "noise_design": "",
        "noise_size": np.nan,
    }
    text = _verdict(row, layer, group)
    if len(noise):
        most = largest(noise, "size")
        row |= {"noise_design": most["design"], "noise_size": most["size"]}
        text += (
            f" If all of the real logits were noise ({most['design']}), it would be "
            f"{percent(most['size'])}; this takes no part in the verdict."
        )
    return {**row, "verdict": text}


def _layers(names: Sequence[str]) -> str:
    return f"{'layer' if len(names) == 1 else 'layers'} {', '.join(names)}"


def _verdict(row: dict[str, Any], layer: pd.Series, group: pd.DataFrame) -> str:
    words = {
        VALID: "keeps its size",
        NOT_SHOWN: "was not shown to keep its size",
        NOT_VALID: "does not keep its size",
    }
    text = (
        f"{row['null']} {words[row['call']]} under the complete null (weak control), where no "
        f"expert deserves to be selected. BH at {layer['level']:g} selects one for "
        f"{percent(row['worst_layer_size'])} of the tokens in the worst layer (layer "
        f"{row['worst_layer']}, {row['worst_layer_design']}; simultaneous "
        f"{percent(layer['confidence'], 0)} interval {percent(row['worst_layer_low'])} to "
        f"{percent(row['worst_layer_high'])}). Over all layers it is "
        f"{percent(row['worst_size'])} in the worst of {row['n_designs']} designs "
        f"({row['worst_design']}). Allowed is "
        f"{percent(layer['largest_size'], 0)}, which leaves room for chance beside alpha. With "
        f"{layer['n_tokens']:,} tokens, a layer counts as failing if its rate exceeds "
        f"{percent(row['layer_fails_above'])}."
    )
    failing, unshown = row["failing_layers"].split(), row["unshown_layers"].split()
    if len(failing) == row["n_layers"]:
        text += " It fails in every layer."
    elif failing:
        text += f" It fails in {len(failing)} of {row['n_layers']} layers ({_layers(failing)})."
    if unshown:
        text += (
            f" Above {percent(layer['largest_size'], 0)}, but not by more than chance: "
            f"{_layers(unshown)}."
        )
    return text + _where_it_holds(row, group)


def _where_it_holds(row: dict[str, object], group: pd.DataFrame) -> str:
    """Return the sentence on a null that is valid only where its assumption holds; else nothing."""
    if row["valid"] or not row["valid_under_assumption"]:
        return ""
    failed, kept = group[~group["valid"]], group[group["breaks"] == ""]
    broken = ", ".join(f"{name} ({what})" for name, what in failed[["design", "breaks"]].values)
    best = largest(kept, "worst_layer_size")
    return (
        f" It exceeds what is allowed only where its assumption is broken: {broken}. Where that "
        f"holds ({', '.join(kept['design'])}), the worst layer has "
        f"{percent(best['worst_layer_size'])}."
    )
