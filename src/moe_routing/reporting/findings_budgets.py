"""Findings at matched budgets: what a rule costs, against stock and against a fixed number.

Pure functions from ``statistics/matched_budgets.csv``, ``levers.csv`` and ``timing.csv`` to
sentences, as in :mod:`moe_routing.reporting.findings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.tables import groups_of, rows_of
from moe_routing.reporting.claims import DIRECTIONS, Claim, Finding, claims, directions, distinct
from moe_routing.reporting.findings import NAMED, beyond_line, not_evidence
from moe_routing.reporting.names import rule_words
from moe_routing.reporting.pages import BUDGETS_FILE, LEVERS_FILE, TIMING_FILE
from moe_routing.statistics.rules import AS_IS, FITTED, PLAIN
from moe_routing.statistics.verdict import Verdict
from moe_routing.vocabulary import DATASETS, text_dataset

SCALE_WORDS = {AS_IS: "as is", FITTED: "at fitted scale"}
LEVER_WORDS = {
    "score": (
        "ranking by predicted norm or consequence", "which experts", "ranking by probability"
    ),
    "tokens": ("one threshold", "for which tokens", "one number for every token"),
    "substitute": (
        "the mean output in a dropped expert's place", "what stands in", "nothing in its place"
    ),
    "weights": (
        "rescaling weights to the mass of the model's own choice", "which weights",
        "weights as they are",
    ),
}  # fmt: skip
"""What each lever does, the question that it answers, and what it is compared with."""


def compared(rows: pd.DataFrame, scale: str = AS_IS) -> pd.DataFrame:
    """Return the rows at a scale that are compared with a fixed number, each routing once.

    Args:
        rows: ``statistics/matched_budgets.csv`` with kinds.
        scale: as is or fitted.
    """
    if rows.empty:
        return rows
    chosen = distinct(rows[(rows["scale"] == scale) & rows["verdict"].notna()])
    return chosen.loc[[kind != PLAIN for kind in chosen["kind"]]]


def middle_budget(rows: pd.DataFrame) -> float:
    """Return the budget in the middle of those of adaptive rules, at which the text is exact."""
    if rows.empty:
        return float("nan")
    budgets = sorted(compared(rows)["budget"].dropna().unique())
    return float(budgets[(len(budgets) - 1) // 2]) if budgets else float("nan")


def leader(rows: pd.DataFrame) -> pd.Series | None:
    """Return the row of lowest loss at the middle budget on the text set; None without rows.

    The rule is chosen from these results; other sets show whether the choice carries over.
    """
    own = compared(rows)
    own = own[own["budget"] == middle_budget(rows)] if len(own) else own
    if own.empty:
        return None
    text = own[own["dataset"] == text_dataset(own["dataset"].drop_duplicates())]
    return text.iloc[int(text["loss_over_stock"].argmin())]


def answer(rows: pd.DataFrame) -> Finding | None:
    """State what the best rule at the middle budget costs, and whether it beats a fixed number."""
    row = leader(rows)
    if row is None:
        return None
    own = compared(rows)
    own = own[own["strategy"] == row["strategy"]]
    n = compared(rows)["kind"].nunique()
    loss = wording.difference(row["loss_over_stock"], row["low"], row["high"], row["metric"])
    versus = wording.difference(
        row["versus_static"], row["static_low"], row["static_high"], row["metric"], unit=False
    )
    text = (
        f"Of {wording.plural(n, 'rule')} at a budget of {wording.experts(row['budget'])} experts "
        f"per token, {rule_words(row['kind'])} lost least on {DATASETS[row['dataset']].label}: "
        f"{loss} over the stock model. Against a fixed number of experts at the same mean the "
        f"difference is {versus}"
    )
    others = own[own["dataset"] != row["dataset"]]
    text += f"; it was {by_set(others)}." if len(others) else "."
    found = claims(own, BUDGETS_FILE, "scale")
    return Finding(text, BUDGETS_FILE, DIRECTIONS[Verdict(row["verdict"])], found)


def by_set(rows: pd.DataFrame, *, apart: bool = False) -> str:
    """Return on which data sets a comparison was better, worse or open.

    Args:
        rows: one comparison, a row per data set.
        apart: whether open sets get a sentence of their own where others do not.
    """
    words = {"better": "better", "worse": "worse", "open": "not shown to differ", "same": "equal"}
    found = rows["verdict"].map(lambda verdict: DIRECTIONS[Verdict(verdict)])
    where = {
        one: wording.listed([DATASETS[name].label for name in rows.loc[found == one, "dataset"]])
        for one in words
        if (found == one).any()
    }
    unclear = where.pop("open") if apart and len(where) > 1 and "open" in where else ""
    text = wording.listed([f"{words[one]} on {names}" for one, names in where.items()])
    return f"{text}. On {unclear} it was not shown to differ" if unclear else text


def budgets(rows: pd.DataFrame) -> list[Finding]:
    """State for each data set which rules beat a fixed number of experts, as is and fitted.

    Args:
        rows: ``statistics/matched_budgets.csv`` with kinds.
    """
    if rows.empty:
        return []
    return [_budgets(own, str(dataset)) for dataset, own in groups_of(rows, "dataset")]


def _budgets(rows: pd.DataFrame, dataset: str) -> Finding:
    sentences: list[str] = []
    found: list[Claim] = []
    where = f"On {DATASETS[dataset].label}"
    for scale in SCALE_WORDS:
        own = compared(rows, scale)
        if own.empty:
            continue
        found += claims(own, BUDGETS_FILE, "scale")
        start = SCALE_WORDS[scale].capitalize() if sentences else where
        sentences.append(f"{start}, {_counted(own, first=not sentences)}.{_unsure(own)}")
    if not sentences:
        text = f"{where}, no rule could be compared with a fixed number of experts."
        return Finding(text, BUDGETS_FILE, "missing")
    text = f"{' '.join(sentences)}{_by_rule(compared(rows))}"
    return Finding(text, BUDGETS_FILE, outcome(found), tuple(found))


def outcome(found: Iterable[Claim]) -> str:
    """Return what claims show together: mixed, better, worse or none."""
    shown = directions(found)
    if {"better", "worse"} <= shown:
        return "mixed"
    return next((one for one in ("better", "worse") if one in shown), "none")


def _counted(rows: pd.DataFrame, *, first: bool) -> str:
    """Return how many settings were better and worse, the others being not shown to differ."""
    counts, total = _counts(rows), len(rows)
    noun = wording.measure_words(rows["metric"].iloc[0])
    against = f"a fixed number of experts at the same mean (by {noun})" if first else "that number"
    shown = [one for one in ("better", "worse") if counts.get(one)]
    if not shown:
        return f"none of {wording.plural(total, 'setting')} was shown to differ from {against}"
    parts = [f"{_of(counts[shown[0]], total)} settings {_was(counts[shown[0]])} {shown[0]}"]
    parts[0] += f" than {against}"
    parts += [f"{wording.count(counts[one])} {_was(counts[one])} {one}" for one in shown[1:]]
    return ", and ".join(parts)


def _counts(rows: pd.DataFrame) -> dict[str, int]:
    found = rows["verdict"].map(lambda verdict: DIRECTIONS[Verdict(verdict)])
    return {str(name): int(n) for name, n in found.value_counts().items()}


def _of(n: int, total: int) -> str:
    return f"all {wording.count(total)}" if n == total else f"{wording.count(n)} of {total}"


def _was(n: int) -> str:
    return "was" if n == 1 else "were"


def _unsure(rows: pd.DataFrame) -> str:
    """Return how many gains a convex curve of the fixed numbers may explain."""
    better = rows[rows["verdict"] == Verdict.BETTER]
    limits = better.assign(low=better["static_low"], high=better["static_high"])
    unsure = len(better) - int(beyond_line(limits, losses=True).sum())
    return not_evidence(unsure, len(better))


def _by_rule(rows: pd.DataFrame) -> str:
    """Return the rules whose settings were all better, and those whose settings were all worse."""
    groups = {
        kind: {DIRECTIONS[Verdict(verdict)] for verdict in own["verdict"]}
        for kind, own in groups_of(rows, "kind")
    }
    text = ""
    for direction in ("better", "worse"):
        names = [rule_words(kind) for kind, shown in groups.items() if shown == {direction}]
        if names and len(names) < len(groups) and len(names) <= NAMED:
            text += f" {direction.capitalize()} at every budget: {wording.listed(names)}."
    return text


def scale(rows: pd.DataFrame, declared: Sequence[str]) -> Finding | None:
    """State what was compared as is only, where the scale of the output may explain a difference.

    Args:
        rows: ``statistics/matched_budgets.csv`` with kinds.
        declared: the strategies of the declared contrasts.
    """
    if rows.empty:
        return None
    fitted = rows[rows["scale"] == FITTED]
    sets = [
        name for name in rows["dataset"].drop_duplicates() if name not in set(fitted["dataset"])
    ]
    parts = [f"rules on {wording.listed([DATASETS[name].label for name in sets])}"] if sets else []
    if not {f"{name}_scaled" for name in declared} & set(fitted["strategy"]):
        parts.append("the declared contrasts")
    if not parts:
        return None
    text = (
        f"{wording.capital(wording.listed(parts))} were compared as is only. Part of these "
        "differences may be due to the scale of a layer's output, not to experts or tokens."
    )
    return Finding(text, BUDGETS_FILE, "as is")


def levers(table: pd.DataFrame) -> list[Finding]:
    """State for each lever where it lowered and where it raised the loss, at fitted scale.

    A lever without rows at fitted scale is stated as is, where scale may explain the difference.

    Args:
        table: ``statistics/levers.csv``.
    """
    if table.empty:
        return []
    return [
        _lever(str(lever), rows)
        for lever, rows in groups_of(table[table["verdict"].notna()], "lever")
    ]


def _lever(lever: str, rows: pd.DataFrame) -> Finding:
    done, question, without = LEVER_WORDS[lever]
    fitted = rows[rows["scale"] == FITTED]
    own = rows if fitted.empty else fitted
    found = claims(own, LEVERS_FILE, "scale", "lever")
    scale = "As is, where scale may explain it" if fitted.empty else "At fitted scale"
    sets: dict[str, list[str]] = {}
    for dataset, part in groups_of(own, "dataset"):
        sets.setdefault(_tally(part, without), []).append(DATASETS[dataset].label)
    parts = [f"{words} on {wording.listed(names)}" for words, names in sets.items()]
    text = f"*{question.capitalize()}*: {scale.lower()}, {done} was {wording.listed(parts)}."
    return Finding(text, LEVERS_FILE, outcome(found), found)


def _tally(rows: pd.DataFrame, without: str) -> str:
    """Return in how many comparisons a lever was better and worse than what it replaces."""
    counts, total = _counts(rows), len(rows)
    parts = []
    for one in ("better", "worse"):
        if n := counts.get(one):
            cases = "both" if n == total == 2 else _of(n, total)
            parts.append(f"{one} than {without}" + (f" in {cases} cases" if total > 1 else ""))
    return wording.listed(parts) if parts else f"not shown to differ from {without}"


def lever_sets(rows: pd.DataFrame, direction: str) -> list[str]:
    """Return the data sets on which a lever was shown in a direction, at fitted scale if scored.

    Args:
        rows: rows of one lever in ``statistics/levers.csv``.
        direction: better or worse.
    """
    fitted = rows[rows["scale"] == FITTED]
    own = rows if fitted.empty else fitted
    found = own["verdict"].map(lambda verdict: DIRECTIONS[Verdict(verdict)])
    names = own.loc[found == direction, "dataset"].drop_duplicates()
    return [DATASETS[name].label for name in names]


def time(
    table: pd.DataFrame,
    baseline: str,
    duplicates: dict[str, str],
    *,
    least: Sequence[str],
    confidence: float,
) -> list[Finding]:
    """State the measured time of settings against the baseline's, and the noise of the measure.

    Args:
        table: ``statistics/timing.csv``.
        baseline: the strategy that ratios are over.
        duplicates: strategies that are the same routing as another.
        least: the strategy that computes least, one expert for every token, if there is one.
        confidence: level of the intervals.
    """
    if table.empty:
        return []
    others = table[(table["strategy"] != baseline) & ~table["strategy"].isin(duplicates)]
    if others.empty:
        return []
    faster = others[others["ratio_high"] < 1]
    slower = others[others["ratio_low"] > 1]
    repeats = wording.count(table["repeats"].iloc[0])
    chance = (1 - confidence) * len(others)
    text = (
        f"Over {repeats} interleaved repeats of one text, {wording.count(len(faster))} of "
        f"{wording.plural(len(others), 'setting')} took less time than `{baseline}` and "
        f"{wording.count(len(slower))} took more. Chance alone would make about {chance:.0f} of "
        "them differ, so single settings are not ranked by their time."
    )
    for row in rows_of(others[others["strategy"].isin(least)]):
        ratio = wording.interval(row.ratio, row.ratio_low, row.ratio_high)
        text += f" The least work, `{row.strategy}`, took {ratio} times as long as the baseline."
    same = table[table["strategy"].isin(duplicates)]
    same = same[same["strategy"].map(duplicates) == baseline]
    if len(same):
        apart = same[(same["ratio_low"] > 1) | (same["ratio_high"] < 1)]
        text += (
            " The same routing under another id did not differ."
            if apart.empty
            else " The same routing under another id differed too, so the measure is not reliable."
        )
    return [Finding(text, TIMING_FILE, "faster" if len(faster) else "not faster")]
