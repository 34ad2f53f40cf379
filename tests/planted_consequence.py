"""Tables of certificates and of the consequence law whose effects are known."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_routing.routing.certificate import Certificate
from moe_routing.statistics.law import consequence_law, spearman

CERTIFIED = "certified_k8_m001"
USED = 3.06
"""Its mean experts on every data set."""


def budgets() -> pd.DataFrame:
    """Return what the findings read of ``statistics/matched_budgets.csv``."""
    sets = ("wikipedia", "hellaswag", "lambada")
    return pd.DataFrame(
        [{"strategy": CERTIFIED, "dataset": name, "mean_experts": USED} for name in sets]
    )


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
