"""Findings about the effects of dropped experts: the law that they follow, and certified damage."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.outputs import ALL_LAYERS
from moe_routing.analysis.tables import rows_of
from moe_routing.reporting.claims import Finding
from moe_routing.reporting.pages import METRICS_FILE
from moe_routing.routing.certificate import Certificate
from moe_routing.statistics.rules import OMITTED
from moe_routing.vocabulary import DATASETS, DIVERGENCE

LAW_FILE = "consequence/consequence_law.csv"
CORRELATIONS_FILE = "consequence/rank_correlations.csv"
SLOPE_TOLERANCE = 0.25
"""A slope is called near 2 up to this difference."""
EXPLAINED = 0.75
"""The law is said to hold in a layer where it explains at least this part of the variance."""
HARDLY = 0.1
"""A rank correlation below this size is called hardly any."""


def certified(
    certificates: Mapping[str, Certificate], metrics: pd.DataFrame, rows: pd.DataFrame
) -> list[Finding]:
    """State for each certified strategy the promise and the held-out damage beside it.

    Args:
        certificates: by strategy.
        metrics: ``comparison/all_metrics.csv``.
        rows: ``statistics/matched_budgets.csv``, for the mean experts.
    """
    return [_certified(one, metrics, rows) for one in certificates.values()]


def _certified(one: Certificate, metrics: pd.DataFrame, rows: pd.DataFrame) -> Finding:
    text = (
        f"Certified routing (`{one.strategy}`) promises an expected KL from the stock predictions "
        f"of at most {one.margin:g} nats per token, on documents like the "
        f"{wording.count(one.documents)} of its calibration. There it uses "
        f"{wording.experts(one.mean_experts)} experts per token."
    )
    held_out = metrics[
        (metrics["strategy"] == one.strategy) & (metrics["metric"] == DIVERGENCE.name)
    ]
    if held_out.empty:
        return Finding(
            f"{text} Its KL was not measured on held-out text.", METRICS_FILE, "unmeasured"
        )
    parts = [
        f"{wording.interval(row.value, row.ci_low, row.ci_high)} on {DATASETS[row.dataset].label}"
        f"{_used(rows, one.strategy, row.dataset)}"
        for row in rows_of(held_out)
    ]
    text += f" On held-out text the KL is {wording.listed(parts)}."
    verdicts = {
        "exceeded": held_out["ci_low"] > one.margin,
        "kept": held_out["ci_high"] <= one.margin,
    }
    verdicts["open"] = ~(verdicts["exceeded"] | verdicts["kept"])
    names = {
        verdict: [DATASETS[name].label for name in held_out.loc[chosen, "dataset"]]
        for verdict, chosen in verdicts.items()
    }
    return Finding(text + _kept(names, one.margin), METRICS_FILE, _worst(names))


def _worst(names: Mapping[str, list[str]]) -> str:
    return next(verdict for verdict in ("exceeded", "open", "kept") if names[verdict])


def _kept(names: Mapping[str, list[str]], margin: float) -> str:
    text = ""
    if names["kept"]:
        text += f" On {wording.listed(names['kept'])} the interval is within the promise."
    if names["open"]:
        text += (
            f" On {wording.listed(names['open'])} the interval contains {margin:g}, so it is open "
            "whether the promise holds there."
        )
    if names["exceeded"]:
        text += (
            f" On {wording.listed(names['exceeded'])} it exceeds the promise, which does not cover "
            "text of another kind."
        )
    return text


def _used(rows: pd.DataFrame, strategy: str, dataset: str) -> str:
    if rows.empty:
        return ""
    own = rows[(rows["strategy"] == strategy) & (rows["dataset"] == dataset)]
    return f" ({wording.experts(own['mean_experts'].iloc[0])} experts)" if len(own) else ""


def law(table: pd.DataFrame) -> Finding | None:
    """State whether KL follows the square of weight times norm.

    Args:
        table: ``consequence/consequence_law.csv``.
    """
    if table.empty:
        return None
    rows = table[table["dropped"] == OMITTED]
    near = (rows[["weight_slope", "norm_slope"]] - 2).abs().max(axis=1) <= SLOPE_TOLERANCE
    holds = near & (rows["law_r2"] >= EXPLAINED)
    n, total = int(holds.sum()), wording.plural(len(rows), "layer")
    where = {0: "no layer", len(rows): f"all {total}"}.get(n, f"{n} of {total}")
    text = (
        f"The law holds in {where} (both slopes within {SLOPE_TOLERANCE:g} of 2, at least "
        f"{wording.percent(EXPLAINED, 0)} of the variance explained). Log KL rises with log weight "
        f"by a slope of {_range(rows['weight_slope'])} and with log norm by "
        f"{_range(rows['norm_slope'])}. With both fixed at 2, the law explains "
        f"{_percents(rows['law_r2'])} of the variance of log KL; {_percents(rows['token_share'])} "
        "of the rest lies between tokens."
    )
    return Finding(text, LAW_FILE, {0: "fails", len(rows): "holds"}.get(n, "partly"))


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} to {high}"


def _percents(values: pd.Series) -> str:
    return wording.spread(values.min(), values.max(), 0)


def ranking(table: pd.DataFrame) -> Finding | None:
    """State how weight and weight times norm rank experts by KL and by the change of the loss.

    Args:
        table: ``consequence/rank_correlations.csv``.
    """
    if table.empty:
        return None
    rows = table[(table["dropped"] == OMITTED) & (table["layer"].astype(str) == ALL_LAYERS)]
    rho = rows.set_index(["predictor", "effect"])["spearman"]
    signed, kl = rho[("weight", "loss")], rho[("weight", "kl")]
    product, predicted = rho[("weight_norm", "kl")], rho[("predicted", "kl")]
    lower = wording.percent(rows["lower_loss"].iloc[0], 0)
    null = abs(signed) < HARDLY
    better = product - kl >= HARDLY
    text = (
        f"The router's weight says {'hardly anything' if null else 'something'} about the loss of "
        f"the one token that follows: within layers, Spearman's correlation with its change is "
        f"{_rho(signed)} on average, and {lower} of the removals lower that loss. With the change "
        f"of the whole prediction (KL) it is {_rho(kl)}. The norm adds "
        f"{'to' if better else 'little to'} this: {_rho(product)} for weight times norm, "
        f"{_rho(predicted)} for weight times predicted norm."
    )
    verdict = f"{'null' if null else 'signed'}, {'norm adds' if better else 'norm adds little'}"
    return Finding(text, CORRELATIONS_FILE, verdict)


def _rho(value: float) -> str:
    return wording.signed(value, 2).removeprefix("+")
