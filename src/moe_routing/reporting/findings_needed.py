"""Findings about the null ``needed``: on held-out text, and where experts are dead.

Pure functions from the tables of the validity analysis to sentences, as in
:mod:`moe_routing.reporting.findings`. "Above alpha" always means shown to be: the lower end of an
interval is above alpha.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_routing.analysis.outputs import ALL_LAYERS, BH_RULE, BLOCK_EXACT, BY_RULE, ROUTED, RULE
from moe_routing.analysis.tables import groups_of, rows_of
from moe_routing.config.study import CALIBRATION
from moe_routing.reporting import wording
from moe_routing.reporting.claims import Finding
from moe_routing.vocabulary import DATASETS

RATES = "validity/false_discoveries.csv"
RESAMPLED = "validity/resampled.csv"
WORST_EXPERTS = "validity/worst_experts.csv"
DEAD_LAYERS = "validity/dead_layers.csv"
DEAD_EXPERTS = "validity/dead_experts.csv"

LEVELS = (0.01, 0.05, 0.1)
"""The levels that sentences are about; the tables have more."""
NAMED = 5
"""Most experts that a sentence names."""

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
    shown = f"It is above alpha on {wording.listed(above)}." if above else (
        "None of them was shown to be above alpha."
    )  # fmt: skip
    text = (
        f"At alpha {MIDDLE:g}, the false discovery rate of BH on held-out documents is "
        f"{wording.listed(parts)}. {shown}"
    )
    return [Finding(text, RATES, EXCEEDED if above else KEPT)]


def _held_out(rows: pd.DataFrame, text: str) -> Finding:
    first = rows.iloc[0]
    sentence = (
        f"On {text_name(text)} ({wording.count(first['n_tokens'])} tokens of "
        f"{wording.count(first['n_documents'])} held-out documents), {_rates(rows, 'BH')}"
    )
    above, verdict = _layers(rows, "fdr")
    return Finding(f"{sentence}. {above}{_skipped(rows)}", RATES, verdict)


def _rates(rows: pd.DataFrame, who: str, value: str = "fdr", *, what: str = "") -> str:
    """Return the values over all layers by level, with their limits."""
    table = _at_levels(rows[rows["layer"].astype(str) == ALL_LAYERS])
    low, high = ("low", "high") if value != "dead_slots" else ("dead_slots_low", "dead_slots_high")
    values = [_share(row, value, low, high) for _, row in table.iterrows()]
    what = what or "has a false discovery rate of"
    return f"{who} at alpha {_alphas(table)} {what} {wording.listed(values)} over all layers"


def _at_levels(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["alpha"].round(6).isin(LEVELS)] if len(rows) else rows


def _alphas(table: pd.DataFrame) -> str:
    return wording.listed([f"{alpha:g}" for alpha in table["alpha"].drop_duplicates()])


def _share(row: pd.Series, value: str, low: str = "low", high: str = "high") -> str:
    ends = f"{wording.percent(row[low])}, {wording.percent(row[high])}"
    return f"{wording.percent(row[value])} [{ends}]"


def _layers(rows: pd.DataFrame, value: str) -> tuple[str, str]:
    """Say in how many layers the lower end is at most alpha, and name the others; the verdict."""
    table = _at_levels(rows)
    single = table["layer"].astype(str) != ALL_LAYERS
    layers, overall = table[single], table[~single]
    counts, exceptions = [], []
    for alpha, own in groups_of(layers, "alpha"):
        above = own[own["low"] > alpha]
        counts.append(f"{len(own) - len(above)} of {len(own)}")
        exceptions += [
            f"layer {row['layer']} at {alpha:g} ({_share(row, value)})"
            for _, row in above.iterrows()
        ]
    width = (layers["high"] - layers["low"]).max() / 2
    text = (
        f"The lower end of a layer's interval is at most alpha in {wording.listed(counts)} layers; "
        f"the widest interval is {wording.percent(width)} to either side."
    )
    text += f" Above alpha: {wording.listed(exceptions)}." if exceptions else ""
    higher = overall[overall["low"] > overall["alpha"]]
    if len(higher):
        return f"{text} Over all layers it is above alpha at {_alphas(higher)}.", EXCEEDED
    return text, EXCEPTIONS if exceptions else KEPT


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
    rows = _of(rates, procedure=BH_RULE, part=ROUTED, text=CALIBRATION)
    if rows.empty:
        return None
    overall = _at_levels(rows[rows["layer"].astype(str) == ALL_LAYERS])
    floor = wording.listed([wording.percent(share) for share in overall["empty_proportion"]])
    cap = wording.listed([wording.percent(share) for share in overall["cap_proportion"]])
    above, verdict = _layers(rows, "fdr")
    text = (
        f"With the floor of one expert and the cap included, {_rates(rows, 'the routed set')} on "
        f"calibration text. The floor decides for {floor} of the tokens and the cap for {cap}. The "
        f"promise is about the rule, not about an expert that the floor adds. {above}"
    )
    return Finding(text, RATES, verdict)


def _of(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    for name, value in values.items():
        table = table[table[name] == value] if len(table) else table
    return table


def shift(rates: pd.DataFrame) -> Finding | None:
    """State whether the rate is above alpha on other texts, and whether it moves from calibration.

    It is said to move if the intervals over all layers do not overlap.

    Args:
        rates: ``validity/false_discoveries.csv``.
    """
    rows = _of(rates, procedure=BH_RULE, part=RULE, layer=ALL_LAYERS)
    if rows.empty:
        return None
    rows = _at_levels(rows)
    own = rows[rows["text"] == CALIBRATION].set_index("alpha")
    others = rows[(rows["text"] != CALIBRATION) & rows["alpha"].isin(own.index)]
    if others.empty:
        return None
    moved, above = [], []
    for row in rows_of(others):
        base = own.loc[row.alpha]
        where = f"on {text_name(row.text)} at {row.alpha:g}"
        if row.low > row.alpha:
            above.append(where)
        if row.low > base["high"] or row.high < base["low"]:
            moved.append(f"{'higher' if row.low > base['high'] else 'lower'} {where}")
    texts = wording.listed([text_name(text) for text in others["text"].drop_duplicates()])
    text = (
        "The promise is about documents like those of the calibration; other text shows how far it "
        f"reaches. Over all layers the rate on {texts} is "
    )
    text += f"above alpha {wording.listed(above)}" if above else "nowhere above alpha"
    text += (
        f". Against calibration text it is {wording.listed(moved)}."
        if moved
        else "; its intervals overlap those on calibration text."
    )
    return Finding(text, RATES, EXCEEDED if above else KEPT)


def guarantee(rates: pd.DataFrame, experts: int) -> Finding | None:
    """State what is proven and what is measured, by procedure, on calibration text.

    Args:
        rates: ``validity/false_discoveries.csv``.
        experts: number of experts per layer.
    """
    rows = _at_levels(_of(rates, part=RULE, layer=ALL_LAYERS, text=CALIBRATION))
    if rows.empty:
        return None
    harmonic = float((1 / np.arange(1, experts + 1)).sum())
    text = (
        "As calibration documents become many, the false discovery rate of BY is at most alpha, "
        f"and that of BH at most {harmonic:.2f} alpha, for any dependence between the experts of a "
        "token; that of BH at alpha itself is not a theorem but what is measured here."
    )
    by, block = _of(rows, procedure=BY_RULE), _of(rows, procedure=BLOCK_EXACT)
    parts = []
    if len(by):
        parts.append(_rates(by, "BY"))
    if len(block):
        fewest = [f"{row.fewest}" for row in rows_of(block)]
        parts.append(
            f"{_rates(block, 'BH with block-exact p-values')}, where their resolution allows no "
            f"fewer than {wording.listed(fewest)} experts"
        )
    text += f" {_capital('; '.join(parts))}." if parts else ""
    above = pd.concat([by, block])
    exceeded = bool((above["low"] > above["alpha"]).any())
    text += " One of them is above alpha." if exceeded else " Neither is above alpha."
    return Finding(text, RATES, EXCEEDED if exceeded else KEPT)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def spread(resampled: pd.DataFrame) -> Finding | None:
    """State how the rate varies over calibrations with resampled documents.

    Args:
        resampled: ``validity/resampled.csv``.
    """
    rows = _of(resampled, layer=ALL_LAYERS)
    rows = _at_levels(rows) if len(rows) else rows
    if rows.empty:
        return None
    ends = [
        f"{wording.percent(own['fdr'].min())} to {wording.percent(own['fdr'].max())}"
        for _, own in groups_of(rows, "alpha")
    ]
    excess = rows.groupby("alpha")["fdr"].min() > rows.groupby("alpha")["fdr"].first().index
    text = (
        f"These intervals leave the variation of the calibration out. Over "
        f"{rows['calibration'].nunique()} calibrations whose documents are drawn with replacement, "
        f"the rate of BH at alpha {_alphas(rows)} is {wording.listed(ends)}"
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
    text = (
        "The promise is an average over the experts of a layer, not one about each expert. Of "
        f"{wording.plural(int(first['n_experts']), 'expert')} with enough tested slots, "
    )
    shown = above if len(above) else table
    names = [
        f"expert {row.expert} of layer {row.layer} ({wording.percent(row.not_needed)} of "
        f"{row.slots} slots, {row.toggled} of them tested [{wording.percent(row.low)}, "
        f"{wording.percent(row.high)}])"
        for row in rows_of(shown.head(NAMED))
    ]
    multiplicity = (
        "by intervals that hold for all of them at once (Bonferroni); the intervals given are for "
        "one expert"
    )
    if above.empty:
        text += (
            f"none is above alpha {first['alpha']:g} by itself, {multiplicity}. Most suspicious: "
            f"{wording.listed(names)}."
        )
        return Finding(text, WORST_EXPERTS, "none")
    few = "at least " if len(above) == len(table) else ""
    verb, pronoun = ("is", "itself") if len(above) == 1 else ("are", "themselves")
    first_of = "first " if len(above) > NAMED else ""
    text += (
        f"{few}{len(above)} {verb} above alpha {first['alpha']:g} by {pronoun}, {multiplicity}: "
        f"{first_of}{wording.listed(names)}."
    )
    return Finding(text, WORST_EXPERTS, "named")


def dead_layers(table: pd.DataFrame) -> list[Finding]:
    """State how often anything is selected in a layer whose experts are all dead, by score.

    Args:
        table: ``validity/dead_layers.csv``.
    """
    if table.empty:
        return []
    return [_dead_layer(rows, str(score)) for score, rows in groups_of(table, "score")]


def _dead_layer(table: pd.DataFrame, score: str) -> Finding:
    rows, by = _of(table, procedure=BH_RULE), _of(table, procedure=BY_RULE)
    word = score.replace("_", "-")
    what = "selects anything for"
    text = (
        "With all experts of a layer dead, where every selection is false, "
        f"{_rates(rows, f'BH by the score {word}', 'any_proportion', what=what)} of the tokens"
    ).replace(" over all layers of the tokens", " of the tokens, averaged over layers")
    above, verdict = _layers(rows, "any_proportion")
    ends = [
        f"{wording.percent(row.spread_low)} to {wording.percent(row.spread_high)}"
        for row in rows_of(_at_levels(_of(rows, layer=ALL_LAYERS)))
    ]
    text += (
        f" (over calibrations with resampled documents, which the intervals leave out, "
        f"{wording.listed(ends)}). {above}"
    )
    attained = _at_levels(by)
    if len(attained):
        text += f" {_rates(by, 'BY', 'any_proportion', what=what)}."
    return Finding(text, DEAD_LAYERS, verdict)


def dead_experts(table: pd.DataFrame) -> Finding | None:
    """State the rate with some dead experts in every layer, and how many kept slots are theirs.

    Args:
        table: ``validity/dead_experts.csv``.
    """
    rows = _of(table, procedure=BH_RULE, part=RULE)
    if rows.empty:
        return None
    dead = wording.percent(rows["dead"].iloc[0])
    above, verdict = _layers(rows, "fdr")
    slots = _rates(rows, "BH", "dead_slots", what="keeps dead experts in")
    text = (
        f"With {dead} of the experts of every layer dead and the null calibrated on that model, "
        f"{_rates(rows, 'BH')}. {above}{_skipped(rows)} {slots}".replace(
            slots, slots.replace(" over all layers", " of its slots")
        )
    )
    return Finding(f"{text}.", DEAD_EXPERTS, verdict)
