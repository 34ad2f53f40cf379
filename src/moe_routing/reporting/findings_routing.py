"""Findings about matched compute, routing, Pareto fronts, ranks and time.

Pure functions from tables to sentences, as in :mod:`moe_routing.reporting.findings`.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.tables import groups_of, rows_of, truth_values
from moe_routing.reporting.claims import Finding, claims
from moe_routing.reporting.findings import NAMED, beyond_line, not_evidence, static_words
from moe_routing.reporting.pages import CELLS_FILE, MATCHED_FILE
from moe_routing.routing.strategies import Strategy, family_entry
from moe_routing.statistics.matched import NO_CURVE
from moe_routing.statistics.verdict import Verdict
from moe_routing.vocabulary import DATASETS

FLOOR_DECIDES = 0.5
"""Proportion of decisions without rejection above which the floor is said to decide."""

SURE = 0.9
"""Proportion of resamples on the front from which a strategy is named as on it."""

COSTS = {
    "mean_experts": ("mean experts", "statistics/pareto.csv"),
    "seconds_per_1000_tokens": ("measured time", "statistics/pareto_time.csv"),
}
"""The costs of Pareto fronts by column: in words, and the file of the front."""


def matched_summary(table: pd.DataFrame, families: dict[str, str]) -> list[Finding]:
    """Summarise the comparison at matched compute over data sets and main metrics.

    One sentence for each pair of a family with a varying number of experts and the static curve
    that it was compared with.

    Args:
        table: ``statistics/matched_compute.csv``.
        families: family of each strategy in it.
    """
    if table.empty:
        return [
            Finding("The comparison at matched compute was not computed.", MATCHED_FILE, "missing")
        ]
    main = table[truth_values(table["main"])].assign(family=lambda t: t["strategy"].map(families))
    return [
        _matched_family(rows, family_entry(family).label, static_words(curve))
        for (family, curve), rows in groups_of(main, ["family", "static_family"], dropna=False)
    ]


def _matched_family(rows: pd.DataFrame, label: str, curve: str | None) -> Finding:
    inside = rows[rows["status"] == "matched"]
    if (rows["status"] == NO_CURVE).all():
        text = f"{label} was not compared at matched compute: no static top-k has its weights."
        return Finding(text, MATCHED_FILE, "no curve")
    if inside.empty:
        text = f"No setting of {label} has settings of {curve} on both sides of its mean experts."
        return Finding(text, MATCHED_FILE, "outside")
    outcomes = inside["verdict"].value_counts()
    better, worse = (int(outcomes.get(name, 0)) for name in (Verdict.BETTER, Verdict.WORSE))
    verdict = "mixed" if better and worse else "better" if better else "worse" if worse else "none"
    cells = wording.plural(len(inside), "comparison")
    static = f"{curve} and the same mean number of experts"
    lead = {
        "mixed": f"{label} was better than {static} in {better} and worse in {worse} of {cells}",
        "better": f"{label} was better than {static} in {better} of {cells}",
        "worse": f"{label} was worse than {static} in {worse} of {cells}",
        "none": f"{label} could not be shown to differ from {static} in any of {cells}",
    }[verdict]
    rest = len(inside) - better - worse
    text = f"{lead}."
    if rest and verdict != "none":
        text += f" In {rest} no difference could be shown."
    outside = len(rows) - len(inside)
    if outside:
        text += f" {wording.plural(outside, 'more cell')} had no static neighbours on both sides."
    unsure = better - int(beyond_line(inside[inside["verdict"] == Verdict.BETTER]).sum())
    text += not_evidence(unsure, better)
    return Finding(text, MATCHED_FILE, verdict, claims(inside, MATCHED_FILE))


def binding(cells: pd.DataFrame, strategies: Mapping[str, Strategy]) -> Finding | None:
    """State how often BH rejected nothing, so the floor decided; None without BH.

    Args:
        cells: table of cells.
        strategies: every strategy by id.
    """
    bh = cells[cells["family"] == "bh"]
    if bh.empty:
        return None
    empty = bh.groupby("strategy", sort=False)["empty_proportion"].mean()
    low, high = empty.min(), empty.max()
    nulls = wording.listed([f"`{null}`" for null in bh["null"].drop_duplicates()])
    floors = sorted({strategies[name].min_experts for name in empty.index})
    fewest = wording.listed([str(floor) for floor in floors])
    text = (
        f"Under {nulls}, BH rejected nothing in {wording.spread(low, high)} of decisions, "
        f"averaged over data sets. There the floor gave the token {fewest} "
        f"expert{'' if floors == [1] else 's'}. "
    )
    many = list(empty.index[empty > FLOOR_DECIDES])
    if len(many) == len(empty):
        text += "In every setting the floor, not the test, decided most of the routing."
        return Finding(text, CELLS_FILE, "floor decides")
    if many:
        text += f"The floor decided most of the routing in {wording.code(many)}."
        return Finding(text, CELLS_FILE, "floor decides in part")
    text += "In no setting did the floor decide most of the routing."
    return Finding(text, CELLS_FILE, "test decides")


def cap(cells: pd.DataFrame) -> Finding | None:
    """State whether max_k matters: mean experts by max_k at equal alpha and null."""
    bh = cells[cells["family"] == "bh"]
    groups = ["alpha", "null", "weighting"]
    table = bh.groupby([*groups, "k"])["mean_experts"].mean().reset_index()
    table = table[table.groupby(groups)["k"].transform("nunique") > 1]
    if table.empty:
        return None
    _, widest = max(table.groupby(groups), key=lambda item: len(item[1]))
    first, last = rows_of(widest.sort_values("k").iloc[[0, -1]])
    ratio = last.mean_experts / first.mean_experts
    text = (
        f"At alpha {first.alpha}, raising max_k from {first.k} to {last.k} changed the mean "
        f"experts per token from {wording.experts(first.mean_experts)} to "
        f"{wording.experts(last.mean_experts)}"
    )
    inert = ratio < 1.05
    text += ": the cap has almost no effect." if inert else ": the cap affects the routing."
    return Finding(text, CELLS_FILE, "inert" if inert else "binds")


def pareto(table: pd.DataFrame, baseline: str, cost: str = "mean_experts") -> list[Finding]:
    """State for each data set which strategies are on the Pareto front of cost and quality.

    Every strategy with a cost takes part: those compared, static top-k and rivals.

    Args:
        table: ``statistics/pareto.csv`` or ``statistics/pareto_time.csv``.
        baseline: the strategy whose place is stated.
        cost: column of the table that is the cost; see :data:`COSTS`.
    """
    words, source = COSTS[cost]
    if table.empty:
        return []
    findings = []
    for dataset, rows in groups_of(table, "dataset"):
        where = DATASETS[dataset].label
        if rows["value"].nunique() == 1:
            text = (
                f"On {where}, every setting has the same quality, so the front is not informative."
            )
            findings.append(Finding(text, source, "no difference"))
            continue
        on_front = rows[truth_values(rows["on_front"])]
        sure = list(on_front.loc[on_front["front_proportion"] >= SURE, "strategy"])
        inside = baseline in set(on_front["strategy"])
        text = (
            f"On {where}, {_are(len(on_front), len(rows))} on the Pareto front of {words} and "
            f"quality, {_which(sure, len(on_front))} in at least {wording.percent(SURE, 0)} of "
            f"resamples. The baseline, `{baseline}`, {'is' if inside else 'is not'} on it."
        )
        findings.append(Finding(text, source, "baseline on front" if inside else "baseline beaten"))
    return findings


def _are(n: int, total: int) -> str:
    return f"{wording.count(n)} of {wording.plural(total, 'setting')} {'is' if n == 1 else 'are'}"


def _which(strategies: list[str], n: int) -> str:
    """Return which of ``n`` strategies, or how many if they are many."""
    if len(strategies) == n > 1:
        return "all of them"
    if len(strategies) > NAMED:
        return f"{wording.count(len(strategies))} of them"
    return wording.code(strategies) if strategies else "none of them"
