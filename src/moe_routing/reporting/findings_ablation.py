"""Findings of the expert ablation: what discoveries are worth, and what is left out.

Pure functions from the tables of ``ablation/`` to sentences, as in
:mod:`moe_routing.reporting.findings`. All of them are about held-out calibration text unless they
name another: the contexts of an evaluation set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from moe_routing import wording
from moe_routing.analysis.outputs import (
    ADDED,
    ALL_LAYERS,
    EITHER,
    NO_NULL,
    REMOVED,
    ROUTED,
    STOCK,
)
from moe_routing.analysis.tables import groups_of, rows_of, truth_values
from moe_routing.analysis.together import ORACLE, ORDERS, ROUTER
from moe_routing.config.study import CALIBRATION, StudyConfig
from moe_routing.reporting.claims import Finding
from moe_routing.vocabulary import DATASETS, DIVERGENCE, NeededId

DISCOVERIES = "ablation/ablation.csv"
LEFT_OUT = "ablation/left_out.csv"
STATES = "ablation/states.csv"
NEEDED = "ablation/needed_experts.csv"
CONTRASTS = "ablation/class_contrasts.csv"
PRESENCE = "ablation/presence.csv"
JOINT = "ablation/joint_removals.csv"
HEADROOM = "ablation/headroom.csv"

FEWEST = 30
"""Fewer discoveries than this are counted, and nothing else is said of them."""
SMALL = 0.1
"""Experts whose KLs add up to less than this part of the total are said to have small effects."""
CLASSES = {
    ("frequency", "rare"): "rare tokens",
    ("frequency", "frequent"): "frequent tokens",
    ("position", "early"): "early tokens of a document",
    ("position", "late"): "late ones",
    ("loss", "low"): "tokens before a well predicted one",
    ("loss", "high"): "tokens before a badly predicted one",
    ("word_start", "inside a word"): "tokens inside a word",
    ("word_start", "word start"): "tokens at the start of a word",
}
"""Classes of tokens in words."""


def discoveries(table: pd.DataFrame, config: StudyConfig) -> list[Finding]:
    """State what the experts that stock chose, and those that each null discovers, are worth.

    The config declares thresholds and level, so they are not chosen from the results: the loss is
    ``analysis.ablation.primary_epsilon``, KL is the epsilon of the null or of the study; the level
    is the one of the table nearest to that of the primary strategy (the first, if that strategy has
    none).

    Args:
        table: ``ablation/ablation.csv``.
        config: of the study.
    """
    if table.empty:
        return []
    rows = table[truth_values(table["primary"])]
    rows = rows.assign(layer=rows["layer"].astype(str))
    stock = _by_effect(rows[(rows["null"] == NO_NULL) & (rows["part"] == REMOVED)])
    tested = rows[rows["null"] != NO_NULL]
    return [
        _stock(stock),
        *(_null(at_level(own, config), stock) for _, own in groups_of(tested, "null")),
    ]


def at_level(rows: pd.DataFrame, config: StudyConfig) -> pd.DataFrame:
    """Return the rows at the level nearest to that of the primary strategy.

    Those of the first level, if that strategy has none.
    """
    alpha = getattr(config.parsed[config.statistics.primary.strategy], "alpha", None)
    levels = rows["alpha"].unique()
    nearest = levels[0] if alpha is None else min(levels, key=lambda level: abs(level - alpha))
    return rows[rows["alpha"] == nearest]


def _by_effect(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the rows about all layers by effect."""
    everywhere = rows[rows["layer"] == ALL_LAYERS]
    return {row["effect"]: row for _, row in everywhere.iterrows()}


def _stock(stock: dict[str, pd.Series]) -> Finding:
    kl, loss = stock["kl"], stock["loss"]
    text = (
        f"Of {wording.count(kl['n_discoveries'])} experts that the stock router had chosen, the "
        f"removal of {_proportion(kl, 'false')} changes the prediction by less than "
        f"{wording.scientific(kl['epsilon'])} nats (KL). That of {_proportion(loss, 'false')} does "
        f"not raise the loss of the next token by {loss['epsilon']:g} nats. That of "
        f"{_proportion(loss, 'harmful')} lowers it by as much: for the one token that followed, "
        "these experts are harmful. The same interventions serve every null."
    )
    return Finding(text, DISCOVERIES, "reference")


def _null(rows: pd.DataFrame, stock: dict[str, pd.Series]) -> Finding:
    parts = {part: _by_effect(own) for part, own in groups_of(rows, "part")}
    every, own = parts[EITHER]["kl"], parts[REMOVED]
    alpha = every["alpha"]
    under = f"Under {null_words(every['null'])} at alpha {alpha:g},"
    if every["n_discoveries"] < FEWEST:
        text = (
            f"{under} BH discovers {wording.plural(every['n_discoveries'], 'expert')} in "
            f"{wording.count(every['n_decisions'])} decisions."
        )
        return Finding(text, DISCOVERIES, "few" if every["n_discoveries"] else "no discovery")
    held = every["fdr_low"] <= alpha
    layers = rows[(rows["part"] == EITHER) & (rows["effect"] == "kl")]
    layers = layers[layers["layer"] != ALL_LAYERS]
    above = layers.loc[layers["fdr_low"] > alpha, "layer"]
    alone = f"{wording.capital(_layers(above, len(layers)))} {'is' if len(above) == 1 else 'are'}"
    if above.empty:
        alone = "No single layer is"
    text = (
        f"{under} BH discovers {wording.experts(every['mean_discoveries'])} experts per token and "
        f"layer, {wording.experts(own['kl']['mean_discoveries'])} of them of the model's own "
        f"choice. Their false discovery rate (KL below {wording.scientific(every['epsilon'])} "
        f"nats) is {_proportion(every, 'fdr')} over all layers, {_above(held, alpha)}. {alone} "
        "above it."
    )
    if own["loss"]["n_toggled"] >= FEWEST:
        text += (
            f" Of those of the own choice, {wording.percent(own['loss']['false'])} do not raise "
            f"the loss by {own['loss']['epsilon']:g} nats when removed, "
            f"{_compared(own['loss'], stock['loss'], 'false')}. The harmful ones are "
            f"{wording.percent(own['loss']['harmful'])}, "
            f"{_compared(own['loss'], stock['loss'], 'harmful')}."
        )
    return Finding(text, DISCOVERIES, "held" if held else "exceeded")


def null_words(null: str) -> str:
    """Return a null as sentences name it, its epsilon as a number.

    >>> null_words("needed_e1e4"), null_words("pooled")
    ('`needed` with epsilon 0.0001', '`pooled`')
    """
    parts = NeededId.parse(null)
    if parts is None or parts.epsilon is None:
        return f"`{null}`"
    name = replace(parts, epsilon=None)
    return f"`{name}` with epsilon {wording.scientific(parts.epsilon)}"


def _above(held: bool, alpha: float) -> str:
    return f"{'not shown to be ' if held else ''}above alpha {alpha:g}"


def _one(rows: pd.DataFrame, column: str, value: str) -> pd.Series:
    """Return the row with a value in a column."""
    return rows[rows[column] == value].iloc[0]


def _at_own_epsilon(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows at the study's own epsilon, which is the first of a table."""
    return rows[rows["epsilon"] == rows["epsilon"].iloc[0]]


def _elsewhere(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the other texts, by name, and their rows."""
    for text, rows in groups_of(table[table["text"] != CALIBRATION], "text"):
        yield f"contexts of {DATASETS[text].label}", rows


def _layers(names: pd.Series, total: int) -> str:
    if names.empty:
        return "no layer"
    if len(names) > 4:
        return f"{wording.count(len(names))} of {wording.count(total)} layers"
    return f"layer{'s' if len(names) > 1 else ''} {wording.listed(list(names))}"


def _compared(row: pd.Series, stock: pd.Series, name: str) -> str:
    if row[f"{name}_high"] < stock[f"{name}_low"]:
        return "fewer than among its whole choice"
    if row[f"{name}_low"] > stock[f"{name}_high"]:
        return "more than among its whole choice"
    return "not shown to differ from those among its whole choice"


def _proportion(row: pd.Series, name: str, low: str = "", high: str = "") -> str:
    return wording.share(row[name], row[low or f"{name}_low"], row[high or f"{name}_high"])


def left_out(table: pd.DataFrame) -> Finding | None:
    """State which part of the needed experts the study's BH arm leaves out.

    Args:
        table: ``ablation/left_out.csv``.
    """
    if table.empty:
        return None
    rows = table[table["layer"].astype(str) == ALL_LAYERS]
    rows = _at_own_epsilon(rows)
    bounded = truth_values(rows["bounded"])
    free, rows = rows[~bounded & (rows["part"] == REMOVED)], rows[bounded]
    own, every = (_one(rows, "part", part) for part in (REMOVED, EITHER))
    small = own["effect_left_out"] < SMALL
    text = (
        f"Of the model's own choice, {wording.experts(own['mean_needed'])} experts per token and "
        f"layer are needed at epsilon {wording.scientific(own['epsilon'])}. BH routing with its "
        f"floor and cap (`{own['strategy']}`) leaves out "
        f"{_proportion(own, 'left_out', 'low', 'high')} of them. Of all experts whose toggling "
        f"changes the prediction by as much, it leaves out "
        f"{_proportion(every, 'left_out', 'low', 'high')}. "
        f"Those left out of the own choice have {wording.percent(own['effect_left_out'])} of the "
        "sum of its effects: " + ("mostly small ones." if small else "not only small ones.")
    )
    levels = free[free["null"] == own["null"]].sort_values("alpha")
    if len(levels):
        parts = [
            f"{wording.percent(row.left_out)} at alpha {row.alpha:g}" for row in rows_of(levels)
        ]
        text += (
            f" Without floor and cap, BH leaves out {wording.listed(parts)} of the needed experts "
            "of the own choice."
        )
    return Finding(text, LEFT_OUT, "small" if small else "not small")


def joint(table: pd.DataFrame) -> Finding | None:
    """State how far removing everything at once moves the prediction, against its parts.

    Args:
        table: ``ablation/joint_removals.csv``.
    """
    if table.empty:
        return None
    own = table[table["text"] == CALIBRATION]
    everywhere = own["layer"].astype(str) == ALL_LAYERS
    row, layers = own[everywhere].iloc[0], own.loc[~everywhere, "ratio"].dropna()
    if not row["mean_removed"] or np.isnan(row["ratio"]):
        text = "The study's BH arm leaves out no expert of the model's own choice."
        return Finding(text, JOINT, "nothing")
    if row["ratio_low"] > 1:
        verdict, said = "more", "more than the sum"
    elif row["ratio_high"] < 1:
        verdict, said = "less", "less than the sum"
    else:
        verdict, said = "open", "not shown to differ from the sum"
    text = (
        f"What it leaves out of the model's own choice ({row['mean_removed']:.0f} experts), "
        f"removed together at one token in all layers, moves the prediction by "
        f"{_interval(row, 'kl')} nats. That is {_interval(row, 'ratio')} times the sum of the "
        f"single effects, {said}. It is {_interval(row, 'layers_ratio')} times the sum of what the "
        f"layers do alone. Within single layers it is {layers.min():.2f} to {layers.max():.2f} "
        "times the sum of their effects."
    )
    for name, rows in _elsewhere(table):
        other = _one(rows, "layer", ALL_LAYERS)
        text += f" On {name} it is {_interval(other, 'ratio')} times the sum of the single effects."
    return Finding(text, JOINT, verdict)


def _interval(row: pd.Series, name: str) -> str:
    return wording.interval(row[name], row[f"{name}_low"], row[f"{name}_high"])


def states(table: pd.DataFrame) -> Finding | None:
    """State the false discovery rate in the states of the model that BH routes.

    Args:
        table: ``ablation/states.csv``.
    """
    if table.empty:
        return None
    rows = table[table["layer"].astype(str) == ALL_LAYERS]
    stock, routed = (_one(rows, "states", states) for states in (STOCK, ROUTED))
    held = routed["low"] <= routed["alpha"]
    moved = routed["low"] > stock["high"] or routed["high"] < stock["low"]
    text = (
        f"In the states of the model that `{routed['strategy']}` routes, the false discovery rate "
        f"among the experts that it keeps is {_proportion(routed, 'fdr', 'low', 'high')}, "
        f"{_above(held, routed['alpha'])}. In those of the stock model it is "
        f"{_proportion(stock, 'fdr', 'low', 'high')}; the two "
        f"{'differ' if moved else 'were not shown to differ'}."
    )
    return Finding(
        text, STATES, f"{'held' if held else 'exceeded'}, {'moved' if moved else 'same'}"
    )


def needed(table: pd.DataFrame) -> Finding | None:
    """State N(epsilon): how many experts of the model's own choice a token needs.

    Args:
        table: ``ablation/needed_experts.csv``.
    """
    if table.empty:
        return None
    own = table[(table["text"] == CALIBRATION) & (table["group"] == table["group"].iloc[0])]
    everywhere = own["layer"].astype(str) == ALL_LAYERS
    rows = list(rows_of(own[everywhere].sort_values("epsilon")))
    numbers = [
        f"{wording.interval(row.mean, row.low, row.high)} at "
        f"{'' if number else 'epsilon '}{wording.scientific(row.epsilon)}"
        for number, row in enumerate(rows)
    ]
    first = _at_own_epsilon(own[~everywhere])
    least, most = (
        first.iloc[int(place)] for place in (first["mean"].argmin(), first["mean"].argmax())
    )
    every = _at_own_epsilon(own[everywhere]).iloc[0]
    text = (
        "The number of needed experts of the model's own choice, per token and layer, is "
        f"{wording.listed(numbers)}. At epsilon {wording.scientific(every['epsilon'])} it is "
        f"{wording.experts(least['mean'])} in layer {least['layer']} and "
        f"{wording.experts(most['mean'])} in layer {most['layer']}. All of the choice is needed in "
        f"{wording.percent(every['every'])} of the decisions, none in "
        f"{wording.percent(every['none'])}."
    )
    others = [
        f"{wording.experts(_one(_at_own_epsilon(rows), 'layer', ALL_LAYERS)['mean'])} on {name}"
        for name, rows in _elsewhere(table[table["group"] == table["group"].iloc[0]])
    ]
    if others:
        text += f" At this epsilon it is {wording.listed(others)}."
    return Finding(text, NEEDED, "counted")


def contrasts(table: pd.DataFrame) -> Finding | None:
    """State which classes of tokens need more experts, at the study's own epsilon.

    Args:
        table: ``ablation/class_contrasts.csv``.
    """
    rows = table[table["text"] == CALIBRATION] if len(table) else table
    if rows.empty:
        return None
    rows = _at_own_epsilon(rows)
    shown, open_ = [], []
    for row in rows_of(rows):
        first, second = (CLASSES[row.group, name] for name in (row.first, row.second))
        if row.low <= 0 <= row.high:
            open_.append(f"{first} and {second}")
            continue
        limits = sorted([abs(row.low), abs(row.high)])
        more, fewer = (second, first) if row.difference > 0 else (first, second)
        number = wording.interval(abs(row.difference), *limits)
        shown.append(f"{more} need {number} experts more than {fewer}.")
    text = f"At epsilon {wording.scientific(rows['epsilon'].iloc[0])}, "
    verdict = "some" if shown and open_ else "all" if shown else "none"
    pairs = [f"between {pair}" for pair in open_]
    for start in range(0, len(pairs), 2):  # all in one sentence would be too long
        lead = "nor could one be shown" if start else "no difference could be shown"
        shown.append(f"{lead} {wording.listed(pairs[start : start + 2], 'or')}.")
    text += " ".join([shown[0], *map(wording.capital, shown[1:])])
    return Finding(text, CONTRASTS, verdict)


def presence(table: pd.DataFrame) -> Finding | None:
    """State whether experts that stock did not choose would lower the loss, if they matter at all.

    Args:
        table: ``ablation/presence.csv``.
    """
    if table.empty:
        return None
    rows = table[(table["text"] == CALIBRATION) & (table["layer"].astype(str) == ALL_LAYERS)]
    rows = _at_own_epsilon(rows)
    added, own = (_one(rows, "part", part) for part in (ADDED, REMOVED))
    if not added["n_toggled"]:
        text = "Adding an expert that the stock router had not chosen changed no prediction enough."
        return Finding(text, PRESENCE, "none")
    if added["low"] > 0.5:
        verdict, said = "helps", "in more than half"
    elif added["high"] < 0.5:
        verdict, said = "hurts", "in fewer than half"
    else:
        verdict, said = "open", "not shown to be more or fewer than half"
    text = (
        f"Beyond the model's own choice, {wording.experts(added['mean_experts'])} experts per "
        f"token and layer are consequential at epsilon {wording.scientific(added['epsilon'])}: "
        "adding one changes the prediction by as much. It lowers the loss of the next token in "
        f"{_proportion(added, 'lowers_loss', 'low', 'high')} of the cases, {said}. The presence "
        "of a needed expert of the own choice does in "
        f"{_proportion(own, 'lowers_loss', 'low', 'high')}."
    )
    return Finding(text, PRESENCE, verdict)


def headroom(table: pd.DataFrame) -> list[Finding]:
    """State how much better than the router's any order of experts could be, one sentence per k.

    Args:
        table: ``ablation/headroom.csv``.
    """
    if table.empty:
        return []
    own = table[table["text"] == CALIBRATION]
    found = [_room(rows) for _, rows in groups_of(own, "k", sort=True)]
    return [*found, *(_predicted(name, rows) for name, rows in _elsewhere(table))]


def _predicted(name: str, rows: pd.DataFrame) -> Finding:
    """State how much the order by predicted norm helps on another text."""
    norm = rows[rows["order"] == "norm"].sort_values("k")
    if norm["closed"].isna().any():
        text = f"On {name}, the order by measured effect was not better than the router's."
        return Finding(text, HEADROOM, "no room")
    better = norm.loc[norm["over_router_high"] < 0, "k"].astype(str)
    parts = [_closed(row) for _, row in norm.iterrows()]
    if len(better) == len(norm):
        verdict, where = "better", "at every number"
    elif len(better):
        verdict, where = "partly", f"at {wording.listed(list(better))} only"
    else:
        verdict, where = "open", "at no number"
    kept = wording.listed([wording.count(k) for k in norm["k"]])
    text = (
        f"On {name}, weight times predicted norm closes {wording.listed(parts)} of the room with "
        f"{kept} experts kept. It was shown to be better than the router's order {where}."
    )
    return Finding(text, HEADROOM, verdict)


def _closed(row: pd.Series) -> str:
    return wording.share(row["closed"], row["closed_low"], row["closed_high"])


def _room(rows: pd.DataFrame) -> Finding:
    by_order = {order: _one(rows, "order", order) for order in ORDERS}
    best, predicted = by_order[ORACLE], by_order["norm"]
    versus = (best["over_router"], best["over_router_low"], best["over_router_high"])
    text = (
        f"At one token, {wording.plural(best['k'], 'expert')} of the model's own choice "
        f"{'was' if best['k'] == 1 else 'were'} kept in every layer. The KL in the order by "
        "measured effect differs from that in the router's order by "
        f"{wording.difference(*versus, DIVERGENCE.name, unit=False)} nats"
    )
    if best["over_router_high"] >= 0:
        text += ", so no room for a better order could be shown."
        return Finding(text, HEADROOM, "no room")
    middle = [order for order in ORDERS if order not in (ROUTER, ORACLE)]
    parts = [f"{ORDERS[order]} closes {_closed(by_order[order])}" for order in middle]
    if predicted["over_router_high"] < 0:
        verdict, said = "better", "is better than the router's"
    elif predicted["over_router_low"] > 0:
        verdict, said = "worse", "is worse than the router's"
    else:
        verdict, said = "open", "was not shown to differ from the router's"
    text += (
        f". Of this room, {wording.listed(parts)}. The order by predicted norm, which a router can "
        f"use, {said}."
    )
    return Finding(text, HEADROOM, verdict)


def beside(
    missed: pd.DataFrame, together: pd.DataFrame, by_state: pd.DataFrame
) -> Iterator[Finding | None]:
    """Yield what the false discovery rate does not say.

    Args:
        missed: ``ablation/left_out.csv``.
        together: ``ablation/joint_removals.csv``.
        by_state: ``ablation/states.csv``.
    """
    yield left_out(missed)
    yield joint(together)
    yield states(by_state)
