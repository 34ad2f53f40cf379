"""Tables of the validity analysis: held-out rates, dead experts, worst experts, sizes of nulls."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_routing import wording
from moe_routing.analysis.outputs import ALL_LAYERS, BH_RULE, BLOCK_EXACT, BY_RULE, ROUTED, RULE
from moe_routing.analysis.tables import groups_of, largest, rows_of
from moe_routing.reporting.findings_analyses import VERDICT_TABLE
from moe_routing.reporting.findings_needed import (
    DEAD_EXPERTS,
    DEAD_LAYERS,
    RATES,
    WORST_EXPERTS,
    text_name,
)
from moe_routing.reporting.results import StudyResults

SHOWN_EXPERTS = 10
"""Rows of the table of worst experts."""


def rates_table(study: StudyResults) -> pd.DataFrame:
    """Return the held-out rate by text and level: of the rule, of what is routed, by procedure."""
    rows = []
    for (text, alpha), own in groups_of(study.table(RATES), ["text", "alpha"]):
        rule = _part(own, BH_RULE, RULE)
        if rule.empty:
            continue
        layers = rule[rule["layer"].astype(str) != ALL_LAYERS]
        overall = rule[rule["layer"].astype(str) == ALL_LAYERS].iloc[0]
        worst = largest(layers, "low")
        width = (layers["high"] - layers["low"]).max() / 2
        rows.append(
            {
                "Text": _title(str(text)),
                "Alpha": f"{alpha:g}",
                "BH": _share(overall, "fdr"),
                "Layers": f"{int((layers['low'] <= alpha).sum())} of {len(layers)}",
                "Largest lower end": f"layer {worst['layer']}: {_share(worst, 'fdr')}",
                "Widest": f"±{wording.percent(width)}",
                "Floor and cap included": _overall(own, BH_RULE, ROUTED),
                "BY": _overall(own, BY_RULE, RULE),
                "Block-exact": _overall(own, BLOCK_EXACT, RULE),
                "Experts": wording.experts(overall["mean_rejected"]),
            }
        )
    return pd.DataFrame(rows)


def _title(text: str) -> str:
    name = text_name(text)
    return name[:1].upper() + name[1:]


def _part(rows: pd.DataFrame, procedure: str, part: str) -> pd.DataFrame:
    return rows[(rows["procedure"] == procedure) & (rows["part"] == part)]


def _overall(rows: pd.DataFrame, procedure: str, part: str) -> str:
    own = _part(rows, procedure, part)
    own = own[own["layer"].astype(str) == ALL_LAYERS]
    return _share(own.iloc[0], "fdr") if len(own) else "resolution"


def _share(row: pd.Series, value: str, low: str = "low", high: str = "high") -> str:
    return wording.percentage(row[value], row[low], row[high])


def dead_table(study: StudyResults) -> pd.DataFrame:
    """Return what is selected where experts are dead, by level."""
    layers, experts = study.table(DEAD_LAYERS), study.table(DEAD_EXPERTS)
    rows = []
    for alpha in layers["alpha"].drop_duplicates():
        row = {"Alpha": f"{alpha:g}"}
        here = layers[np.isclose(layers["alpha"], alpha)]
        for procedure, label in ((BH_RULE, "BH"), (BY_RULE, "BY")):
            for score in layers["score"].drop_duplicates():
                own = here[(here["procedure"] == procedure) & (here["score"] == score)]
                word = score.replace("_", "-")
                row[f"All dead: {label}, {word}"] = _with_layers(own, alpha, "any_proportion")
        own = _part(experts[np.isclose(experts["alpha"], alpha)], BH_RULE, RULE)
        row["Some dead: BH"] = _with_layers(own, alpha, "fdr")
        overall = own[own["layer"].astype(str) == ALL_LAYERS]
        row["Dead slots"] = (
            _share(overall.iloc[0], "dead_slots", "dead_slots_low", "dead_slots_high")
            if len(overall)
            else "resolution"
        )
        rows.append(row)
    return pd.DataFrame(rows)


def _with_layers(rows: pd.DataFrame, alpha: float, value: str) -> str:
    if rows.empty:
        return "resolution"
    is_all = rows["layer"].astype(str) == ALL_LAYERS
    layers = rows[~is_all]
    text = _share(rows[is_all].iloc[0], value)
    return f"{text}; {int((layers['low'] <= alpha).sum())} of {len(layers)}"


def worst_table(study: StudyResults) -> pd.DataFrame:
    """Return the experts whose own selected slots are needed least."""
    return pd.DataFrame(
        {
            "Layer": f"{row.layer}",
            "Expert": f"{row.expert}",
            "Slots": f"{row.slots}",
            "Tested": f"{row.toggled}",
            "Not needed": f"{100 * row.not_needed:.0f} [{100 * row.low:.0f}, {100 * row.high:.0f}]",
            "Simultaneous": f"[{100 * row.joint_low:.0f}, {100 * row.joint_high:.0f}]",
        }
        for row in rows_of(study.table(WORST_EXPERTS).head(SHOWN_EXPERTS))
    )


def sizes_table(study: StudyResults) -> pd.DataFrame:
    """Return the verdict on each null about logits, and its size if all of them were noise."""
    return pd.DataFrame(
        {
            "Null": f"`{row.null}`",
            "Verdict": str(row.call),
            "Designs": f"{row.n_designs}",
            "Largest over all layers": _in_design(row.worst_size, row.worst_design),
            "Largest in a layer": wording.percentage(
                row.worst_layer_size, row.worst_layer_low, row.worst_layer_high
            )
            + f" (layer {row.worst_layer}, {wording.as_words(row.worst_layer_design)})",
            "If all were noise": _in_design(row.noise_size, row.noise_design),
        }
        for row in rows_of(study.table(VERDICT_TABLE))
    )


def _in_design(size: float, design: object) -> str:
    return (
        "no such design"
        if np.isnan(size)
        else f"{100 * size:.1f} ({wording.as_words(str(design))})"
    )
