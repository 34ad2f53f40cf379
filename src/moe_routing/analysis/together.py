"""What happens when the experts that a rule leaves out are all removed at once.

The table of joint removals has one row per token, order, k and layer (or ``all``): ``token`` (index
in the token table), ``order``, ``k`` (experts of the model's own choice that are kept), ``layer``,
``removed`` (number of experts), ``kl`` (stock || removed, nats), ``loss_change`` (of the realised
next token, nats) and ``sum_kl`` (of the single removals of the same experts, nats).

Shape letters: T tokens, N items, S series.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moe_routing.analysis.outputs import ALL_LAYERS
from moe_routing.analysis.tables import groups_of
from moe_routing.statistics.bootstrap import bootstrap_items, studentised_interval

RULE = "bh"
"""The order that stands for what the study's BH arm leaves out."""
ROUTER, ORACLE = "router", "effect"
"""Orders: the router's probability, and the measured KL of single removals."""
ORDERS: Mapping[str, str] = {
    ROUTER: "router's probability",
    "norm": "weight times predicted norm",
    "exact_norm": "weight times exact norm",
    ORACLE: "measured effect of single removals",
}
"""The orders that are compared at equal k, in words; the last one cannot be used for routing."""


def joint_removals(
    together: pd.DataFrame,
    document_T: NDArray,
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Compare the removal of everything that the study's BH arm leaves out with its parts.

    Only experts of the model's own choice are removed. Columns: ``layer`` (in this layer alone, or
    ``all``: in every layer at once), ``mean_removed`` experts per token, ``kl`` from stock and
    ``loss_change``, nats per token, ``sum_kl`` (mean sum of the KLs of single removals), ``ratio``
    of ``kl`` to ``sum_kl``, and in the row ``all`` ``layers_ratio``: of ``kl`` to the mean sum over
    layers of the KL of each layer alone. All but ``mean_removed`` and ``sum_kl`` with studentised
    bootstrap limits over documents (``_low``, ``_high``); ratios are empty where nothing is
    removed. ``n_tokens``, ``n_documents``.

    Args:
        together: the table of joint removals.
        document_T: document of each token of the token table.
        confidence: level of the intervals.
        resamples: number of bootstrap resamples.
        rng: source of randomness.
    """
    own = together[together["order"] == RULE]
    own = own.assign(layer=own["layer"].astype(str), document=document_T[own["token"]])
    alone = own[own["layer"] != ALL_LAYERS]
    of_layers = own["token"].map(alone.groupby("token")["kl"].sum())
    own["sum_layers"] = of_layers.where(own["layer"] == ALL_LAYERS, 0.0).fillna(0.0)
    settings = {"confidence": confidence, "resamples": resamples, "rng": rng}
    rows = []
    for layer, part in groups_of(own, "layer"):
        ones = np.ones(len(part))
        row = {"layer": layer, "mean_removed": part["removed"].mean()}
        row |= nonnegative(estimate("kl", part["kl"], ones, part["document"], **settings))
        row |= estimate("loss_change", part["loss_change"], ones, part["document"], **settings)
        row |= {"sum_kl": part["sum_kl"].mean()}
        for name, unit in (("ratio", part["sum_kl"]), ("layers_ratio", part["sum_layers"])):
            row |= estimate(name, part["kl"], unit, part["document"], **settings)
        row |= {"n_tokens": len(part), "n_documents": part["document"].nunique()}
        rows.append(row)
    return pd.DataFrame(rows)


def headroom(
    together: pd.DataFrame,
    document_T: NDArray,
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Compare orders of the model's own choice at equal k, in all layers at once at one token.

    Columns: ``k``, ``order``, ``kl`` from stock and ``loss_change``, nats per token;
    ``over_router``: KL minus that of the router's order on the same tokens; ``closed``: the
    proportion of the distance between the router's order and that by measured effect, in mean KL,
    that the order closes. All with studentised bootstrap limits over documents (``_low``,
    ``_high``); ``closed`` is empty where the measured effects are no better. ``n_tokens``,
    ``n_documents``.

    Args:
        together: the table of joint removals.
        document_T: document of each token of the token table.
        confidence: level of the intervals.
        resamples: number of bootstrap resamples.
        rng: source of randomness.
    """
    everywhere = together[
        together["order"].isin(ORDERS) & (together["layer"].astype(str) == ALL_LAYERS)
    ]
    settings = {"confidence": confidence, "resamples": resamples, "rng": rng}
    rows = []
    for k, part in groups_of(everywhere, "k", sort=True):
        kl, loss = (part.pivot_table(index="token", columns="order", values=name)
                    for name in ("kl", "loss_change"))  # fmt: skip
        document = document_T[kl.index]
        ones = np.ones(len(kl))
        gap = kl[ROUTER] - kl[ORACLE]
        for order in ORDERS:
            saved = kl[ROUTER] - kl[order]
            row = {"k": int(k), "order": order}
            row |= nonnegative(estimate("kl", kl[order], ones, document, **settings))
            row |= estimate("loss_change", loss[order], ones, document, **settings)
            row |= estimate("over_router", -saved, ones, document, **settings)
            row |= estimate("closed", saved, gap, document, **settings)
            rows.append(row | {"n_tokens": len(kl), "n_documents": len(np.unique(document))})
    return pd.DataFrame(rows)


def nonnegative(limits: dict[str, float]) -> dict[str, float]:
    """Return an estimate that is not negative with limits that are not negative either."""
    return {name: max(value, 0.0) for name, value in limits.items()}


def estimate(
    name: str,
    value_N: ArrayLike,
    unit_N: ArrayLike,
    document_N: ArrayLike,
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Return a ratio of sums and its studentised bootstrap limits over documents, by column.

    Items without units are left out; all three are missing if the units do not add up to more
    than 0.
    """
    value_N, unit_N = np.asarray(value_N, dtype=float), np.asarray(unit_N, dtype=float)
    names = (name, f"{name}_low", f"{name}_high")
    some_N = unit_N != 0
    if unit_N.sum() <= 0:
        return dict.fromkeys(names, np.nan)
    boot = bootstrap_items(
        value_N[some_N],
        unit_N[some_N],
        np.asarray(document_N)[some_N],
        resamples=resamples,
        rng=rng,
    )
    low_S, high_S = studentised_interval(boot, confidence)
    return dict(zip(names, map(float, (boot.ratio_S[0], low_S[0], high_S[0])), strict=True))
