"""Empirical false discovery proportions from interventions.

Pure functions of tables. A removal is one row: ``arm`` (the strategy that routed), ``document``,
``position``, ``layer``, ``expert``, ``rank``, ``discovered``, ``weight``, ``change`` (of the
token's own next-token loss, nats), ``change_window`` (summed over the followed tokens) and
``noise_floor`` (the change of that loss by rounding alone). A decision is the routing of one token
in one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd

from moe_routing.analysis.findings import spearman_limits
from moe_routing.analysis.outputs import ALL_LAYERS, NO_NULL
from moe_routing.statistics.proportions import clustered_wilson

CHANGES = {"own": "change", "window": "change_window"}
DECISION = ["document", "position", "layer"]


def labelled(
    removals: pd.DataFrame, discoveries: pd.DataFrame, arms: Sequence[tuple[str, str, float]]
) -> pd.DataFrame:
    """Return the removals once for the strategy that routed and once for every rule, labelled.

    ``discovered``: whether the rule discovered the removed expert; always true for the strategy
    that routed, whose ``null`` is :data:`NO_NULL`. ``beyond``: discoveries of the decision that the
    model did not select, so that they could not be removed.

    Args:
        removals: one row per intervention.
        discoveries: one row per expert that a rule discovers, by ``arm`` and decision.
        arms: id, null and level of every rule.
    """
    stock = removals.assign(null=NO_NULL, alpha=np.nan, discovered=True, beyond=0)
    parts = [stock]
    for arm, null, alpha in arms:
        found = discoveries.loc[discoveries["arm"] == arm, [*DECISION, "expert"]]
        discovered = _index(removals, "expert").isin(_index(found, "expert"))
        by_decision = pd.Series(discovered).groupby(_index(removals)).sum()
        beyond = found.groupby(DECISION).size().reindex(by_decision.index, fill_value=0)
        beyond = (beyond - by_decision).reindex(_index(removals)).to_numpy()
        named = {"arm": arm, "null": null, "alpha": alpha}
        parts.append(removals.assign(**named, discovered=discovered, beyond=beyond))
    return pd.concat(parts, ignore_index=True)


def _index(table: pd.DataFrame, *more: str) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(table[[*DECISION, *more]])


def false_discoveries(
    removals: pd.DataFrame, epsilons: Sequence[float], *, confidence: float
) -> pd.DataFrame:
    """Return one row per arm, scope, threshold and layer (and ``all``).

    A discovery is false if removing it changes the loss by less than epsilon in either direction.
    Only selected experts can be removed: ``n_beyond`` counts the other discoveries, which no other
    column includes. ``fdp`` is the proportion of false ones among all discoveries. ``fdr`` is the
    mean of V / max(R, 1) over decisions (a token in a layer). It is 0 where the rule found nothing,
    so a rule with few discoveries has a small one; ``any_proportion`` is the proportion of
    decisions with a discovery. ``fdp`` and ``fdr`` have Wilson intervals with the design effect of
    documents (conservative for ``fdr``, whose values are fractions). ``harmful`` is the proportion
    of discoveries whose removal lowers the loss by epsilon or more. ``n_undiscovered`` counts
    removals of experts that the rule did not discover. ``noise_floor`` is the 95 % quantile of the
    change by rounding alone; results for a smaller epsilon mean nothing.
    """
    rows = []
    keys = ["arm", "null", "alpha"]
    for key, arm in removals.groupby(keys, sort=False, dropna=False):
        named = [(ALL_LAYERS, arm), *arm.groupby("layer")]
        for (scope, column), epsilon, (layer, group) in product(CHANGES.items(), epsilons, named):
            row = dict(zip(keys, key, strict=True))
            row |= {"scope": scope, "epsilon": epsilon, "layer": layer}
            rows.append(row | _proportions(group, column, epsilon, confidence))
    return pd.DataFrame(rows)


def _proportions(
    group: pd.DataFrame, column: str, epsilon: float, confidence: float
) -> dict[str, float]:
    beyond = int(group.drop_duplicates(DECISION)["beyond"].sum())
    false = group["discovered"] & (group[column].abs() < epsilon)
    found = group[group["discovered"]]
    decisions = (
        group.assign(false=false).groupby(DECISION)[["false", "discovered"]].sum().reset_index()
    )
    proportion = decisions["false"] / decisions["discovered"].clip(lower=1)
    some = len(found) > 0
    return {
        "n_discoveries": len(found),
        "n_decisions": len(decisions),
        "n_documents": group["document"].nunique(),
        "n_undiscovered": int((~group["discovered"]).sum()),
        "n_beyond": beyond,
        "any_proportion": float((decisions["discovered"] > 0).mean()),
        **_proportion("fdp", false[group["discovered"]], found["document"], confidence),
        **_proportion("fdr", proportion, decisions["document"], confidence),
        "harmful": float((found[column] <= -epsilon).mean()) if some else np.nan,
        "mean_change": float(found[column].mean()) if some else np.nan,
        "noise_floor": float(group["noise_floor"].quantile(0.95)),
    }


def _proportion(
    name: str, values: pd.Series, documents: pd.Series, confidence: float
) -> dict[str, float]:
    """Return a mean of numbers in [0, 1] and its Wilson limits; missing without any."""
    if values.empty:
        return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
    values = values.to_numpy(dtype=float)
    low, high = clustered_wilson(values, documents.to_numpy(), confidence)
    return {name: values.mean(), f"{name}_low": low, f"{name}_high": high}


def weight_and_importance(
    removals: pd.DataFrame, *, confidence: float, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Return by arm and layer the correlation of an expert's weight with the effect of its removal.

    Spearman's correlation of the weight with the absolute change of the token's own loss, with
    percentile limits over resampled documents.
    """
    rows = []
    for (arm, layer), group in removals.groupby(["arm", "layer"], sort=False):
        rho, low, high = spearman_limits(
            group["weight"].to_numpy(),
            group["change"].abs().to_numpy()[None],
            group["document"].to_numpy(),
            confidence=confidence,
            resamples=resamples,
            rng=rng,
        )
        size = {"n_removals": len(group), "n_documents": group["document"].nunique()}
        limits = {"rho": rho[0], "low": low[0], "high": high[0]}
        rows.append({"arm": arm, "layer": layer, **limits, **size})
    return pd.DataFrame(rows)
