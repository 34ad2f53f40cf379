"""Tables of levers, certificates and the consequence law whose effects are known."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_routing.routing.certificate import Certificate
from moe_routing.statistics.law import consequence_law, spearman

CERTIFIED = "certified_k8_m001"
BUDGETS = (2, 3, 4)
PLAIN = {1: 0.35, 2: 0.13, 3: 0.066, 4: 0.037, 6: 0.0135}
"""Loss of static top-k by probability over stock, by k."""
FACTORS = {
    "regular_k{b}_norm": ("norm", "all", "omitted", 0.9),
    "regular_k{b}_norm_own": ("norm", "own", "omitted", 0.92),
    "regular_k{b}_compensated": ("probability", "all", "compensated", 0.4),
    "absolute_k8_b{b}": ("probability", "own", "omitted", 0.7),
    "absolute_k8_b{b}_consequence": ("consequence", "own", "omitted", 0.45),
    "absolute_k8_b{b}_compensated": ("probability", "own", "compensated", 0.25),
    "absolute_k8_b{b}_consequence_compensated": ("consequence", "own", "compensated", 0.15),
    "stock_k{b}_mass-matched": ("probability", "all", "omitted", 0.6),
}
"""By id: score, candidates, substitute, and the loss as a part of that of static top-k."""
SCALE_GAIN = 0.0115
SCALED = 0.65
"""Loss at fitted scale as a part of that as is."""


def levers(
    *,
    helps: float = 1.0,
    scaled_at: tuple[int, ...] = (3,),
    scale_explains: bool = False,
    width: float = 0.002,
    datasets: tuple[str, ...] = ("wikipedia", "hellaswag", "lambada"),
    certified: bool = True,
) -> pd.DataFrame:
    """Return ``statistics/levers.csv`` with planted losses.

    Args:
        helps: 1: levers lose what FACTORS says; 0: as much as static top-k; -1: they lose more.
        scaled_at: budgets that were scored at fitted scale too.
        scale_explains: at fitted scale, every lever loses as much as static top-k.
        width: half the width of intervals.
        datasets: evaluation sets.
        certified: whether a certified strategy is among them.
    """
    rows = []
    for dataset in datasets:
        for k, loss in PLAIN.items():
            rows.append(_row(dataset, f"regular_k{k}", _PLAIN, k, loss, width))
            if k in scaled_at:
                rows.append(_scaled(dataset, f"regular_k{k}", _PLAIN, k, loss, width))
        for name, (*options, part) in FACTORS.items():
            for budget in BUDGETS:
                loss, strategy = PLAIN[budget], name.format(b=budget)
                own = loss * (1 - helps * (1 - part))
                used = budget if "_k{b}" in name else budget + 0.05
                rows.append(_row(dataset, strategy, options, used, own, width))
                if budget in scaled_at:
                    own = loss if scale_explains else own
                    rows.append(_scaled(dataset, strategy, options, used, own, width))
        if scaled_at:
            rows.append(_row(dataset, "stock_scaled", _PLAIN, 8.0, -SCALE_GAIN, width))
        if certified:
            options = ("consequence", "own", "compensated")
            rows.append(_row(dataset, CERTIFIED, options, 3.06, 0.009, width))
    return pd.DataFrame(rows)


_PLAIN = ("probability", "all", "omitted")


def _scaled(dataset, strategy, options, used, loss, width):
    row = _row(dataset, f"{strategy}_scaled", options, used, SCALED * loss, width)
    return {**row, "reference": "stock_scaled"}


def _row(dataset, strategy, options, used, difference, width):
    last_word = dataset == "lambada"
    score, candidates, dropped = options
    return {
        "strategy": strategy,
        "dataset": dataset,
        "metric": "nats_per_target" if last_word else "nats_per_token",
        "reference": "stock",
        "score": score,
        "candidates": candidates,
        "dropped": dropped,
        "scale": "scaled" if strategy.endswith("scaled") else "unscaled",
        "mean_experts": float(used),
        "value": 3.0 + difference,
        "reference_value": 3.0,
        "difference": difference,
        "low": difference - width,
        "high": difference + width,
        "p_value": 0.001,
        "n_items": 120,
        "n_clusters": 120,
    }


def damage(**by_dataset: tuple[float, float, float]) -> pd.DataFrame:
    """Return rows of ``comparison/all_metrics.csv``: held-out KL and its limits by data set."""
    return pd.DataFrame(
        [
            {"strategy": CERTIFIED, "dataset": dataset, "metric": "kl_from_baseline",
             "value": value, "ci_low": low, "ci_high": high, "n": 24}
            for dataset, (value, low, high) in by_dataset.items()
        ]
    )  # fmt: skip


def certificate(margin: float = 0.01) -> Certificate:
    """Return a certificate on 128 documents."""
    return Certificate(
        strategy=CERTIFIED, margin=margin, threshold=3e-6, budget=3.1, bound=10 * margin,
        documents=128, damage=0.0091, risk=0.0098, mean_experts=3.1,
        mean_experts_L=(3.0, 3.2), tried={"3.1": 0.0091}, fingerprint="f" * 64,
    )  # fmt: skip


def removals(slope: float = 2.0, layers: int = 6, tokens: int = 60) -> pd.DataFrame:
    """Return ``consequence/removals.parquet`` in which log KL has a known slope.

    The realised loss changes by noise alone.
    """
    rng = np.random.default_rng(0)
    parts = []
    for dropped in ("omitted", "compensated"):
        for layer in range(layers):
            token = np.repeat(np.arange(tokens), 8)
            weight = rng.uniform(0.01, 0.4, len(token))
            norm = np.exp(rng.normal(0, 0.4, len(token)))
            noise = rng.normal(0, 0.4, tokens)[token] + rng.normal(0, 0.4, len(token))
            kl = 4e-5 * 0.9**layer * (weight * norm) ** slope * np.exp(noise)
            loss = rng.normal(0, 1e-3, len(token))
            parts.append(
                pd.DataFrame(
                    {"dropped": dropped, "token": token, "layer": layer, "weight": weight,
                     "norm": norm, "weight_norm": weight * norm,
                     "predicted": weight * norm * np.exp(rng.normal(0, 0.2, len(token))),
                     "kl": kl, "loss_size": np.abs(loss), "loss": loss}
                )
            )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def law_table(planted: pd.DataFrame) -> pd.DataFrame:
    """Return ``consequence/consequence_law.csv`` of removals."""
    return pd.DataFrame(
        [
            {
                "dropped": dropped,
                "layer": layer,
                **consequence_law(own["weight"], own["norm"], own["kl"], own["token"]).row(),
            }
            for (dropped, layer), own in planted.groupby(["dropped", "layer"], sort=False)
        ]
    )


def correlation_table(planted: pd.DataFrame) -> pd.DataFrame:
    """Return ``consequence/rank_correlations.csv`` of removals."""
    rows = [
        {
            "dropped": dropped, "layer": layer, "predictor": predictor, "effect": effect,
            "spearman": spearman(own[predictor], own[effect]),
            "lower_loss": float((own["loss"] < 0).mean()),
        }
        for (dropped, layer), own in planted.groupby(["dropped", "layer"], sort=False)
        for predictor in ("weight", "norm", "weight_norm", "predicted")
        for effect in ("kl", "loss_size", "loss")
    ]  # fmt: skip
    layers = pd.DataFrame(rows)
    keys = ["dropped", "predictor", "effect"]
    means = layers.groupby(keys, sort=False)[["spearman", "lower_loss"]].mean().reset_index()
    layers["layer"] = layers["layer"].astype(str)
    return pd.concat([layers, means.assign(layer="all")], ignore_index=True)
