"""Findings about the null ``needed``: on held-out text, and where experts are dead.

Pure functions from the tables of the validity analysis to sentences, as in
:mod:`moe_routing.reporting.findings`. "Above alpha" always means shown to be: the lower end of an
interval is above alpha.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from moe_routing import wording
from moe_routing.analysis.outputs import ALL_LAYERS, BH_RULE, BLOCK_EXACT, BY_RULE, ROUTED, RULE
from moe_routing.analysis.tables import groups_of, rows_of, rows_with
from moe_routing.config.study import CALIBRATION
from moe_routing.reporting.claims import Finding
from moe_routing.vocabulary import DATASETS

RATES = "validity/false_discoveries.csv"
RESAMPLED = "validity/resampled.csv"
WORST_EXPERTS = "validity/worst_experts.csv"
DEAD_LAYERS = "validity/dead_layers.csv"
DEAD_EXPERTS = "validity/dead_experts.csv"
SCORE_TABLE = "validity/scores.csv"

LEVELS = (0.01, 0.05, 0.1)
"""The levels that sentences are about; the tables have more."""
SCORES = {
    "probability": "the router's probability",
    "norm": "probability times predicted norm",
    "mean_norm": "probability times mean norm",
    "exact_norm": "probability times exact norm",
    "consequence": "the predicted consequence",
}
"""What experts are tested by, in words."""
NAMED = 3
"""Most experts or layers that a sentence names."""

KEPT, EXCEPTIONS, EXCEEDED = "kept", "exceptions", "exceeded"
"""Verdicts: above alpha in no layer; in single layers, but not over all; over all layers."""


def text_name(text: str) -> str:
    """Return the name of a text of held-out interventions within a sentence."""
    return "calibration text" if text == CALIBRATION else DATASETS[text].label


def held_out(rates: pd.DataFrame) -> list[Finding]:
    """State for each text whether the rate of BH is above alpha, and in which layers.

    Args:
        rates: ``validity/false_discoveries.csv``.
    """
    if rates.empty:
        return []
    own = rates[(rates["procedure"] == BH_RULE) & (rates["part"] == RULE)]
    return [_held_out(rows, str(text)) for text, rows in groups_of(own, "text")]


MIDDLE = 0.05
"""The level of the sentence in short."""


def in_short(rates: pd.DataFrame) -> list[Finding]:
    """State in one sentence the rate of BH at the middle level over all layers, by text."""
    if rates.empty:
        return []
    own = rates[(rates["procedure"] == BH_RULE) & (rates["part"] == RULE)]
    own = own[(own["layer"].astype(str) == ALL_LAYERS) & np.isclose(own["alpha"], MIDDLE)]
    if own.empty:
        return []
    parts = [f"{_share(row, 'fdr')} on {text_name(str(row['text']))}" for _, row in own.iterrows()]
    above = [text_name(str(name)) for name in own.loc[own["low"] > MIDDLE, "text"]]
    shown = (
        f"above alpha on {wording.listed(above)}" if above else "nowhere shown to be above alpha"
    )
    text = (
        f"At alpha {MIDDLE:g}, the false discovery rate of BH on held-out documents is {shown}: it "
        f"is {wording.listed(parts)}."
    )
    return [Finding(text, RATES, EXCEEDED if above else KEPT)]


def _held_out(rows: pd.DataFrame, text: str) -> Finding:
    first = rows.iloc[0]
    sentence = (
        f"On {text_name(text)}, {wording.count(first['n_tokens'])} tokens of "
        f"{wording.count(first['n_documents'])} documents were held out. The false discovery rate "
        f"of BH over all layers is {_rates(rows)}."
    )
    above, verdict = _layers(rows, "fdr")
    return Finding(f"{sentence} {above}{_skipped(rows)}", RATES, verdict)


def _rates(rows: pd.DataFrame, value: str = "fdr", low: str = "low", high: str = "high") -> str:
    """Return the values over all layers by level, with their limits."""
    table = _at_levels(rows[rows["layer"].astype(str) == ALL_LAYERS])
    return _by_alpha([(row["alpha"], _share(row, value, low, high)) for _, row in table.iterrows()])


def _by_alpha(values: Iterable[tuple[float, str]]) -> str:
    """Return values with their levels; the first level is called alpha."""
    parts = [
        f"{text} at {'' if n else 'alpha '}{alpha:g}" for n, (alpha, text) in enumerate(values)
    ]
    return wording.listed(parts)


def _at_levels(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["alpha"].round(6).isin(LEVELS)] if len(rows) else rows


def _alphas(table: pd.DataFrame) -> str:
    return wording.listed([f"{alpha:g}" for alpha in table["alpha"].drop_duplicates()])


def _share(row: pd.Series, value: str, low: str = "low", high: str = "high") -> str:
    return wording.share(row[value], row[low], row[high])


def _layers(rows: pd.DataFrame, value: str) -> tuple[str, str]:
    """Say which layers are above alpha, or how many if they are many; and the verdict."""
    table = _at_levels(rows)
    single = table["layer"].astype(str) != ALL_LAYERS
    layers, overall = table[single], table[~single]
    above = layers[layers["low"] > layers["alpha"]]
    if above.empty:
        text = "No single layer is above alpha"
    elif len(above) <= NAMED:
        names = [
            f"layer {row['layer']} at {row['alpha']:g} ({_share(row, value)})"
            for _, row in above.iterrows()
        ]
        text = f"Above alpha by themselves: {wording.listed(names)}"
    else:
        total = layers["layer"].nunique()
        counts = [
            (alpha, f"{wording.count(len(own))} of {wording.count(total)} layers")
            for alpha, own in groups_of(above, "alpha")
        ]
        text = f"Above alpha by themselves: {_by_alpha(counts)}"
    width = (layers["high"] - layers["low"]).max() / 2
    text += (
        f". The widest interval of a layer reaches {100 * width:.1f} percentage points to either "
        "side."
    )
    higher = overall[overall["low"] > overall["alpha"]]
    if len(higher):
        return f"{text} Over all layers it is above alpha at {_alphas(higher)}.", EXCEEDED
    return text, EXCEPTIONS if len(above) else KEPT


def _skipped(rows: pd.DataFrame) -> str:
    """Name the levels of sentences that the resolution of the p-values leaves out."""
    missing = [f"{alpha:g}" for alpha in LEVELS if not np.isclose(rows["alpha"], alpha).any()]
    if not missing:
        return ""
    return f" Alpha {wording.listed(missing)} is below the resolution of the calibration."


def routed(rates: pd.DataFrame) -> Finding | None:
    """State the rate of what is routed, floor and cap included, on calibration text.

    Args:
        rates: ``validity/false_discoveries.csv``.
    """
    rows = rows_with(rates, procedure=BH_RULE, part=ROUTED, text=CALIBRATION)
    if rows.empty:
        return None
    overall = _at_levels(rows[rows["layer"].astype(str) == ALL_LAYERS])
    floor, cap = (
        wording.spread(overall[name].min(), overall[name].max())
        for name in ("empty_proportion", "cap_proportion")
    )
    above, verdict = _layers(rows, "fdr")
    text = (
        "The routed set includes what the floor of one expert adds and lacks what the cap leaves "
        f"out. Its rate on calibration text is {_rates(rows)}. The floor decides for {floor} of "
        f"the tokens and the cap for {cap}, by level. The promise is about the rule, not about an "
        f"expert that the floor adds. {above}"
    )
    return Finding(text, RATES, verdict)


def shift(rates: pd.DataFrame) -> Finding | None:
    """State whether the rate is above alpha on other texts, and whether it moves from calibration.

    It is said to move if the intervals over all layers do not overlap.

    Args:
        rates: ``validity/false_discoveries.csv``.
    """
    rows = rows_with(rates, procedure=BH_RULE, part=RULE, layer=ALL_LAYERS)
    if rows.empty:
        return None
    rows = _at_levels(rows)
    own = rows[rows["text"] == CALIBRATION].set_index("alpha")
    others = rows[(rows["text"] != CALIBRATION) & rows["alpha"].isin(own.index)]
    if others.empty:
        return None
    moved: dict[str, list[str]] = {}
    above: dict[str, list[str]] = {}
    for row in rows_of(others):
        base = own.loc[row.alpha]
        where = f"on {text_name(row.text)}"
        if row.low > row.alpha:
            above.setdefault(where, []).append(f"{row.alpha:g}")
        if row.low > base["high"] or row.high < base["low"]:
            side = "higher" if row.low > base["high"] else "lower"
            moved.setdefault(f"{side} {where}", []).append(f"{row.alpha:g}")
    texts = wording.listed([text_name(text) for text in others["text"].drop_duplicates()])
    text = (
        "The promise is about documents like those of the calibration; other text shows how far it "
        f"reaches. Over all layers the rate on {texts} is "
    )
    text += f"above alpha {_where(above)}" if above else "nowhere above alpha"
    text += (
        f". Against calibration text it is {_where(moved)}."
        if moved
        else "; its intervals overlap those on calibration text."
    )
    return Finding(text, RATES, EXCEEDED if above else KEPT)


def _where(levels: Mapping[str, list[str]]) -> str:
    return wording.listed([f"{where} at {wording.listed(own)}" for where, own in levels.items()])


def guarantee(rates: pd.DataFrame, experts: int) -> Finding | None:
    """State what is proven and what is measured, by procedure, on calibration text.

    Args:
        rates: ``validity/false_discoveries.csv``.
        experts: number of experts per layer.
    """
    rows = _at_levels(rows_with(rates, part=RULE, layer=ALL_LAYERS, text=CALIBRATION))
    if rows.empty:
        return None
    harmonic = float((1 / np.arange(1, experts + 1)).sum())
    text = (
        "With many calibration documents, the false discovery rate of BY is at most alpha, for any "
        f"dependence between the experts of a token. That of BH is at most {harmonic:.2f} alpha. "
        "That BH keeps alpha itself is no theorem; it is measured here."
    )
    by, block = rows_with(rows, procedure=BY_RULE), rows_with(rows, procedure=BLOCK_EXACT)
    if len(by):
        text += f" The rate of BY is {_rates(by)}."
    if len(block):
        fewest = wording.listed([f"{row.fewest}" for row in rows_of(block)])
        text += (
            f" That of BH with block-exact p-values is {_rates(block)}. There, the resolution of "
            f"these p-values allows no fewer than {fewest} experts."
        )
    above = pd.concat([by, block])
    exceeded = bool((above["low"] > above["alpha"]).any())
    text += " One of them is above alpha." if exceeded else " Neither is above alpha."
    return Finding(text, RATES, EXCEEDED if exceeded else KEPT)


def spread(resampled: pd.DataFrame) -> Finding | None:
    """State how the rate varies over calibrations with resampled documents.

    Args:
        resampled: ``validity/resampled.csv``.
    """
    rows = rows_with(resampled, layer=ALL_LAYERS)
    rows = _at_levels(rows) if len(rows) else rows
    if rows.empty:
        return None
    ends = _by_alpha(
        (alpha, wording.spread(own["fdr"].min(), own["fdr"].max()))
        for alpha, own in groups_of(rows, "alpha")
    )
    excess = rows.groupby("alpha")["fdr"].min() > rows.groupby("alpha")["fdr"].first().index
    text = (
        f"These intervals leave the variation of the calibration out. Over "
        f"{rows['calibration'].nunique()} calibrations whose documents are drawn with replacement, "
        f"the rate of BH is {ends}"
    )
    if bool(excess.any()):
        names = [f"{alpha:g}" for alpha in excess.index[excess]]
        return Finding(f"{text}; at {wording.listed(names)} every one is above alpha.", RESAMPLED,
                       EXCEEDED)  # fmt: skip
    return Finding(f"{text}.", RESAMPLED, KEPT)


def worst_experts(table: pd.DataFrame) -> Finding | None:
    """Name the experts whose own selected slots are needed least.

    Args:
        table: ``validity/worst_experts.csv``.
    """
    if table.empty:
        return None
    first = table.iloc[0]
    above = table[table["joint_low"] > table["alpha"]]
    shown = above if len(above) else table
    names = [
        f"expert {row.expert} of layer {row.layer} ({wording.percent(row.not_needed, 0)})"
        for row in rows_of(shown.head(NAMED))
    ]
    text = (
        "The promise is an average over the experts of a layer, not one about each expert. Of "
        f"{wording.plural(int(first['n_experts']), 'expert')} with enough tested slots, "
    )
    at_once = "by intervals that hold for all of them at once (Bonferroni)"
    if above.empty:
        text += (
            f"none is above alpha {first['alpha']:g} by itself, {at_once}. The nearest to it, by "
            f"slots that are not needed, {'is' if len(names) == 1 else 'are'} "
            f"{wording.listed(names)}."
        )
        return Finding(text, WORST_EXPERTS, "none")
    few = "at least " if len(above) == len(table) else ""
    verb, pronoun = ("is", "itself") if len(above) == 1 else ("are", "themselves")
    text += (
        f"{few}{len(above)} {verb} above alpha {first['alpha']:g} by {pronoun}, {at_once}. "
        f"The clearest by slots that are not needed {'is' if len(names) == 1 else 'are'} "
        f"{wording.listed(names)}."
    )
    return Finding(text, WORST_EXPERTS, "named")


def scores(table: pd.DataFrame) -> Finding | None:
    """State how many experts BH keeps by the score that the null tests, and by the probability.

    Args:
        table: ``validity/scores.csv``.
    """
    rows = table[np.isclose(table["alpha"], MIDDLE)] if len(table) else table
    if rows.empty:
        return None
    chosen = rows[rows["chosen"]].iloc[0]
    base = rows[rows["score"] == "probability"].iloc[0]
    kept = {row.score: wording.experts(row.mean_rejected) for row in rows_of(rows)}
    text = (
        f"The null tests {SCORES[chosen['score']]}. At alpha {MIDDLE:g}, BH then keeps "
        f"{kept[chosen['score']]} experts per token on held-out documents, and "
    )
    if chosen["score"] == "probability":
        others = [f"{kept[name]} by {SCORES[name]}" for name in kept if name != "probability"]
        return Finding(f"{text}{wording.listed(others)}.", SCORE_TABLE, "probability")
    text += f"{kept['probability']} by the router's probability. "
    ratio = f"{chosen['ratio']:.2f} [{chosen['ratio_low']:.2f}, {chosen['ratio_high']:.2f}]"
    if np.isnan(chosen["ratio"]):
        text, verdict = f"{text}A ratio cannot be given", "not shown"
    elif chosen["ratio_low"] > 1:
        text, verdict = f"{text}That is {ratio} times as many", "more"
    elif chosen["ratio_high"] < 1:
        text, verdict = f"{text}That is only {ratio} times as many", "fewer"
    else:
        text, verdict = f"{text}The ratio of {ratio} is not shown to differ from 1", "not shown"
    rates = f"{_share(chosen, 'fdr')} and {_share(base, 'fdr')}"
    return Finding(f"{text}; the false discovery rates are {rates}.", SCORE_TABLE, verdict)


def dead_layers(table: pd.DataFrame) -> list[Finding]:
    """State how often anything is selected in a layer whose experts are all dead, by score.

    Args:
        table: ``validity/dead_layers.csv``.
    """
    if table.empty:
        return []
    return [_dead_layer(rows, str(score)) for score, rows in groups_of(table, "score")]


def _dead_layer(table: pd.DataFrame, score: str) -> Finding:
    rows, by = rows_with(table, procedure=BH_RULE), rows_with(table, procedure=BY_RULE)
    value = "any_proportion"
    above, verdict = _layers(rows, value)
    overall = _at_levels(rows_with(rows, layer=ALL_LAYERS))
    ends = _by_alpha(
        (row.alpha, wording.spread(row.spread_low, row.spread_high)) for row in rows_of(overall)
    )
    text = (
        f"All experts of a layer are dead, and the score is {SCORES.get(score, score)}. The "
        "proportion of tokens for which BH selects something, averaged over layers, is "
        f"{_rates(rows, value)}. The intervals leave the calibration's variation out: with "
        f"resampled documents it is {ends}. {above}"
    )
    if len(_at_levels(by)):
        text += f" With BY it is {_rates(by, value)}."
    return Finding(text, DEAD_LAYERS, verdict)


def dead_experts(table: pd.DataFrame) -> Finding | None:
    """State the rate with some dead experts in every layer, and how many kept slots are theirs.

    Args:
        table: ``validity/dead_experts.csv``.
    """
    rows = rows_with(table, procedure=BH_RULE, part=RULE)
    if rows.empty:
        return None
    dead = wording.percent(rows["dead"].iloc[0])
    above, verdict = _layers(rows, "fdr")
    slots = _rates(rows, "dead_slots", "dead_slots_low", "dead_slots_high")
    text = (
        f"In every layer, {dead} of the experts are dead. The null is calibrated on that model. "
        f"The false discovery rate of BH is {_rates(rows)}. {above}{_skipped(rows)} Of the slots "
        f"that it keeps, dead experts have {slots}."
    )
    return Finding(text, DEAD_EXPERTS, verdict)
