"""Findings of the comparison with the baseline: pure functions from tables to sentences.

Every sentence that states a result, in the report and in the article, comes from a function here
or in the sibling modules, so no text can disagree with the tables. "No difference could be shown"
is a finding like the others. A finding names the file that its numbers come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from moe_routing.analysis.tables import groups_of, rows_of, truth_values
from moe_routing.reporting import wording
from moe_routing.reporting.pages import CELLS_FILE, NONINFERIORITY_FILE, PAIRED_FILE, PRIMARY_FILE
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import family_entry, static_families
from moe_routing.statistics.matched import NO_CURVE, OUTSIDE, UNKNOWN
from moe_routing.statistics.power import POWER
from moe_routing.statistics.verdict import LOSSES, Verdict
from moe_routing.vocabulary import DATASETS, METRICS

NAMED = 4
"""Up to this many strategies are named; more are counted."""

WEIGHTS = {"softmax": "raw softmax", "renormalised": "renormalised", "uniform": "uniform"}
"""The weightings of static curves, in words."""

WEAK_MARGIN = 0.2
"""A margin above this proportion of the baseline's accuracy beyond guessing is called wide."""


@dataclass(frozen=True)
class Finding:
    """A statement and the file of its numbers.

    Attributes:
        text: one or more sentences of Markdown.
        source: file of its numbers, relative to the results folder.
        verdict: the outcome that chose the sentence, for tests.
    """

    text: str
    source: str
    verdict: str = ""

    def __str__(self) -> str:
        return self.text


def primary(table: pd.DataFrame, confidence: float) -> Finding:
    """State the primary contrast from ``statistics/primary.csv``."""
    if table.empty:
        return Finding("The primary contrast was not computed.", PRIMARY_FILE, "missing")
    row = main_row(table)
    outcome = Verdict(row["verdict"])
    return Finding(f"{_contrast(row, outcome)} {_numbers(row, confidence)}", PRIMARY_FILE, outcome)


def main_measure_rows(table: pd.DataFrame, main: dict[str, str]) -> pd.DataFrame:
    """Return the rows of the main measure of each data set, ``main`` by data set."""
    return table[table["metric"] == table["dataset"].map(main)]


def main_row(table: pd.DataFrame) -> pd.Series:
    """Return the row of the primary contrast on its data set's main metric."""
    return table[truth_values(table["main"])].iloc[0]


def _contrast(row: pd.Series, outcome: Verdict) -> str:
    """Return the sentence about a comparison with the baseline, without its numbers."""
    arm, baseline = f"`{row['strategy']}`", f"`{row['baseline']}`"
    where = DATASETS[row["dataset"]].label
    margin = row.get("margin", float("nan"))
    limit = f"{wording.magnitude(margin, row['metric'])} or more" if pd.notna(margin) else ""
    measure = METRICS[row["metric"]]
    not_ruled_out = limit and str(row.get("noninferior", "")).lower() == "false"
    sentences = {
        Verdict.IDENTICAL: f"On {where}, {arm} and {baseline} had the same result on every item"
        + (
            f", but with so few items a loss of {limit} is not ruled out." if not_ruled_out else "."
        ),
        Verdict.BETTER: f"On {where}, {arm} {measure.better} than {baseline}.",
        Verdict.WORSE: f"On {where}, {arm} {measure.worse} than {baseline}{_beyond(row, limit)}.",
        Verdict.WORSE_WITHIN_MARGIN: f"On {where}, {arm} {measure.worse} than {baseline}, but a "
        f"loss of {limit} is ruled out.",
        Verdict.NON_INFERIOR: f"On {where}, no difference between {arm} and {baseline} could be "
        f"shown, and a loss of {limit} is ruled out{_equal(row)}.",
        Verdict.INCONCLUSIVE: f"On {where}, no difference between {arm} and {baseline} could be "
        "shown" + (f", but neither is a loss of {limit} ruled out." if limit else "."),
    }
    return sentences[outcome]


def _equal(row: pd.Series) -> str:
    """Return what the test of equivalence adds to the test of non-inferiority."""
    equal = str(row.get("equivalent", "")).lower() == "true"
    return (
        ", and so is a gain of that size: the two are equivalent within the margin" if equal else ""
    )


def _beyond(row: pd.Series, limit: str) -> str:
    """Return how a shown loss compares with the margin, by its interval."""
    if not limit:
        return ""
    least = -row["high"] if METRICS[row["metric"]].higher_is_better else row["low"]
    if least >= row["margin"]:
        return f", by {limit}"
    return f", and a loss of {limit} is not ruled out"


def _numbers(row: pd.Series, confidence: float) -> str:
    """Return the sentence that holds the numbers of a comparison."""
    text = wording.difference(row["difference"], row["low"], row["high"], row["metric"])
    noun = wording.measure_words(row["metric"])
    parts = [f"Difference in {noun}: {text}, {wording.percent(confidence, 0)} interval"]
    parts.append(wording.p_value(row["p_adjusted"]))
    parts.append(f"n = {wording.count(row['n_items'])} items")
    return f"{'; '.join(parts)}."


def compute(table: pd.DataFrame) -> Finding:
    """State how many experts per token the primary strategy used."""
    if table.empty:
        return Finding(
            "The mean experts of the primary contrast are missing.", PRIMARY_FILE, "missing"
        )
    row = main_row(table)
    own, stock = row["mean_experts"], row["baseline_mean_experts"]
    ratio = own / stock
    outcome = "fewer" if ratio < 1 else "more"
    relation = f"{wording.percent(abs(ratio - 1), 0)} {outcome} than"
    if abs(ratio - 1) < 0.005:
        relation = "the same number as"
    text = (
        f"It used {wording.experts(own)} experts per token there, {relation} "
        f"the {wording.experts(stock)} of `{row['baseline']}`."
    )
    return Finding(text, PRIMARY_FILE, outcome)


def matched(table: pd.DataFrame) -> Finding:
    """State the primary strategy against static top-k with its weights, at matched compute."""
    if table.empty:
        return Finding("The comparison at matched compute is missing.", PRIMARY_FILE, "missing")
    row = main_row(table)
    experts, curve = (
        wording.experts(row["mean_experts"]),
        static_words(row["matched_static_family"]),
    )
    if row["matched_status"] != "matched":
        reasons = {
            OUTSIDE: f"its mean of {experts} experts lies outside the curve of {curve}",
            NO_CURVE: "no static top-k has its weights",
            UNKNOWN: "its experts were not counted",
        }
        # Points of a static curve have no row of matched compute.
        reason = reasons.get(row["matched_status"], "it is static top-k itself")
        text = f"No comparison at matched compute for `{row['strategy']}`: {reason}."
        return Finding(text, PRIMARY_FILE, "outside")
    outcome = Verdict(row["matched_verdict"])
    numbers = wording.difference(
        row["matched_difference"], row["matched_low"], row["matched_high"], row["metric"]
    )
    subject = f"{curve} and the same mean of {experts} experts"
    measure = METRICS[row["metric"]]
    sentences = {
        Verdict.BETTER: f"it {measure.better} than {subject}",
        Verdict.WORSE: f"it {measure.worse} than {subject}",
        Verdict.IDENTICAL: f"it equals {subject} on every item",
        Verdict.INCONCLUSIVE: f"no difference from {subject} could be shown",
    }
    p = wording.p_value(row["matched_p_adjusted"])
    text = (
        f"At matched compute, {sentences[outcome]} ({numbers}; {p}, a secondary test, corrected "
        "together with the exploratory ones)."
    )
    return Finding(f"{text}{_line(row, outcome)}", PRIMARY_FILE, outcome)


def _line(row: pd.Series, outcome: Verdict) -> str:
    """Return how much of a shown gain could come from interpolating between static settings."""
    if outcome != Verdict.BETTER or row["matched_k_low"] == row["matched_k_high"]:
        return ""
    ks = f"k = {wording.experts(row['matched_k_low'])} and {wording.experts(row['matched_k_high'])}"
    excess = row["matched_chord_excess"]
    line = f" Between {ks} the static curve is interpolated by a straight line"
    if pd.isna(excess):
        return (
            f"{line}. Where loss is convex in k, the line is worse than the curve; how much of "
            "the difference this explains is not known."
        )
    names = ["matched_low", "matched_high", "matched_chord_excess"]
    limits = row[names].rename(lambda name: name.removeprefix("matched_"))
    size = wording.small_difference(excess, row["metric"])
    if beyond_line(pd.DataFrame([{**limits, "metric": row["metric"]}])).item():
        return f"{line}; the difference exceeds what the convexity of the curve allows ({size})."
    return (
        f"{line}, which may be worse than a convex curve by up to {size}; this may explain the "
        "difference."
    )


def static_words(family: object) -> str | None:
    """Return the family of a static curve in words; None if the table names none."""
    return family_entry(family).words if isinstance(family, str) else None


def beyond_line(rows: pd.DataFrame) -> pd.Series:
    """Mark gains that no convex static curve through the measured points can explain.

    Args:
        rows: rows of ``statistics/matched_compute.csv`` whose verdict is better.
    """
    higher = rows["metric"].map(lambda name: METRICS[str(name)].higher_is_better)
    least = rows["low"].where(higher, -rows["high"])
    return (rows["chord_excess"] == 0) | (least > rows["chord_excess"])


def against_baseline(
    paired: pd.DataFrame, noninferiority: pd.DataFrame, families: dict[str, str], baseline: str
) -> list[Finding]:
    """Summarise the comparisons with the baseline on main metrics, one finding per data set.

    Args:
        paired: ``statistics/paired.csv``.
        noninferiority: ``statistics/noninferiority.csv``.
        families: family of each strategy.
        baseline: the strategy compared with.
    """
    if paired.empty:
        return [Finding("The paired comparisons were not computed.", PAIRED_FILE, "missing")]
    main = paired[truth_values(paired["main"])]
    findings = []
    for dataset, rows in groups_of(main, "dataset"):
        text, verdict = _differences(rows, dataset, baseline)
        text += _ruled_out(noninferiority, dataset, families)
        findings.append(Finding(text, PAIRED_FILE, verdict))
    return findings


def _differences(rows: pd.DataFrame, dataset: str, baseline: str) -> tuple[str, str]:
    """Return what was shown on one data set, and the outcome."""
    where, n = DATASETS[dataset].label, len(rows)
    groups = {v: list(rows.loc[rows["verdict"] == v, "strategy"]) for v in Verdict}
    same = groups[Verdict.IDENTICAL]
    if len(same) == n:
        text = (
            f"On {where}, every other setting gave the same result as `{baseline}` on every item."
        )
        return text, "identical"
    worse = [name for outcome in LOSSES for name in groups[outcome]]
    unshown = n - len(same) - len(worse) - len(groups[Verdict.BETTER])
    shown = [_clause(groups[Verdict.BETTER], n, "better"), _clause(worse, n, "worse")]
    shown = [clause for clause in shown if clause]
    text = f"On {where}, of {wording.plural(n, 'other setting')}, "
    if shown:
        text += f"{wording.listed(shown)} than `{baseline}` after correction for multiplicity"
        text += f"; for {wording.count(unshown)} no difference could be shown" if unshown else ""
    else:
        text += f"none could be shown to differ from `{baseline}`"
    if same:
        text += f"; {_some(same)} gave the same result on every item"
    verdict = "some better" if groups[Verdict.BETTER] else "some worse" if shown else "none shown"
    return f"{text}.", verdict


def _clause(strategies: list[str], n: int, word: str) -> str:
    if not strategies:
        return ""
    if len(strategies) == n:
        return f"all were {word}"
    return f"{_some(strategies)} {'was' if len(strategies) == 1 else 'were'} {word}"


def _some(strategies: list[str]) -> str:
    """Return how many strategies, and which if they are few."""
    names = f" ({wording.code(strategies)})" if len(strategies) <= NAMED else ""
    return f"{wording.count(len(strategies))}{names}"


def _ruled_out(table: pd.DataFrame, dataset: str, families: dict[str, str]) -> str:
    """Return for how many settings a loss as large as the margin is ruled out."""
    if table.empty:
        return ""
    rows = table[(table["dataset"] == dataset) & truth_values(table["main"])]
    if rows.empty:
        return ""
    safe = list(rows.loc[truth_values(rows["noninferior"]), "strategy"])
    margin = wording.magnitude(rows["margin"].iloc[0], rows["metric"].iloc[0])
    text = f" A loss of {margin} is ruled out for {wording.plural(len(safe), 'setting')}"
    if not safe:
        return f"{text}."
    bh = [name for name in safe if families.get(name) == "bh"]
    equal = rows.loc[
        truth_values(rows["noninferior"]) & truth_values(rows["equivalent"]), "strategy"
    ]
    also = f", and a gain of that size too for {wording.count(len(equal))}" if len(equal) else ""
    return f"{text}, {len(bh) or 'none'} of them BH{also}."


def chance(cells: pd.DataFrame, baseline: str, margin: float) -> list[Finding]:
    """State for each accuracy set whether the baseline is good enough to show a loss."""
    findings = []
    for row in rows_of(cells[cells["strategy"] == baseline]):
        if not METRICS[row.metric].is_proportion:
            continue
        guess = DATASETS[row.dataset].chance
        value = wording.estimate(row.value, row.ci_low, row.ci_high, row.metric)
        name = f"{DATASETS[row.dataset].label} ({METRICS[row.metric].label} {value} %)"
        if row.value == 0:
            text = (
                f"On {name}, the baseline `{baseline}` gets no item right, so this set cannot "
                "show what routing costs."
            )
            findings.append(Finding(text, CELLS_FILE, "at zero"))
        elif guess and row.ci_low <= guess:
            text = (
                f"On {name}, the baseline `{baseline}` cannot be distinguished from guessing "
                f"({wording.percent(guess, 0)}), so this set cannot show what routing costs."
            )
            findings.append(Finding(text, CELLS_FILE, "at chance"))
        elif margin > WEAK_MARGIN * (row.value - guess):
            text = (
                f"On {name}, the baseline `{baseline}` achieves only "
                f"{100 * (row.value - guess):.1f} percentage points"
                + (" above guessing" if guess else "")
                + f", so ruling out a loss of {wording.magnitude(margin, row.metric)} says little."
            )
            findings.append(Finding(text, CELLS_FILE, "wide margin"))
    return findings


def weighting(paired: pd.DataFrame, rule: ModelRule) -> Finding | None:
    """State what weights other than the model's cost at the model's own top k."""
    arms = {
        f"{family.name}_k{rule.top_k}": WEIGHTS[weighting]
        for weighting, family in static_families().items()
        if weighting not in ("model", rule.weighting)
    }
    if paired.empty:
        return None
    rows = paired[paired["strategy"].isin(arms) & truth_values(paired["main"])]
    if rows.empty:
        return None
    clauses, outcomes = [], set()
    for strategy, group in groups_of(rows, "strategy"):
        worse = set_names(group, LOSSES)
        better = set_names(group, (Verdict.BETTER,))
        parts = [f"worse on {wording.listed(worse)}"] if worse else []
        parts += [f"better on {wording.listed(better)}"] if better else []
        outcomes |= {"worse"} if worse else set()
        outcomes |= {"better"} if better else set()
        verb = f"was {wording.listed(parts)}" if parts else "could not be shown to differ"
        clauses.append(f"{arms[strategy]} weighting (`{strategy}`) {verb}")
    text = (
        f"With the same {rule.top_k} experts, {wording.listed(clauses)}, compared with the model's "
        f"own {WEIGHTS[rule.weighting]} weights."
    )
    return Finding(text, PAIRED_FILE, "mixed" if len(outcomes) > 1 else "".join(outcomes) or "none")


def set_names(rows: pd.DataFrame, outcomes: Sequence[Verdict]) -> list[str]:
    """Return the distinct data sets on which a comparison had one of these outcomes."""
    names = rows.loc[rows["verdict"].isin(outcomes), "dataset"].drop_duplicates()
    return [DATASETS[name].label for name in names]


def fewest_static(noninferiority: pd.DataFrame, curve: pd.DataFrame, top_k: int) -> list[Finding]:
    """State for each data set the smallest static k that rules out a loss of the margin."""
    static = curve.set_index("strategy")["k"]
    static = static[~static.index.duplicated()]
    fewer = static[static < top_k]
    if noninferiority.empty or fewer.empty:
        return []
    rows = noninferiority[
        truth_values(noninferiority["main"]) & noninferiority["strategy"].isin(fewer.index)
    ].assign(k=lambda t: t["strategy"].map(static))
    findings = []
    for dataset, group in groups_of(rows, "dataset"):
        safe = group.loc[truth_values(group["noninferior"]), "k"]
        margin = wording.magnitude(group["margin"].iloc[0], group["metric"].iloc[0])
        where = DATASETS[dataset].label
        if safe.empty:
            text = f"On {where}, a loss of {margin} is ruled out for no static k below {top_k}."
        else:
            text = (
                f"On {where}, a loss of {margin} against top-{top_k} is already ruled out for "
                f"static top-{safe.min()}."
            )
        findings.append(
            Finding(text, NONINFERIORITY_FILE, "none" if safe.empty else "fewer suffice")
        )
    return findings


def detectable(primary_table: pd.DataFrame) -> Finding | None:
    """State the minimum detectable difference of the primary contrast."""
    if primary_table.empty:
        return None
    row = main_row(primary_table)
    if pd.isna(row["minimum_detectable_difference"]):
        return None
    size = row["minimum_detectable_difference"]
    margin = row["margin"]
    text = (
        f"With {wording.count(row['n_items'])} items, the primary contrast would detect a "
        f"difference of {wording.magnitude(size, row['metric'])} in {wording.percent(POWER, 0)} of "
        "runs"
    )
    if pd.isna(margin):
        return Finding(f"{text}.", PRIMARY_FILE, "no margin")
    small = size > margin
    text += (
        f", which is more than the margin of {wording.magnitude(margin, row['metric'])}: the "
        "sample is too small to settle differences as small as the margin."
        if small
        else f", no more than the margin of {wording.magnitude(margin, row['metric'])}."
    )
    return Finding(text, PRIMARY_FILE, "too small" if small else "large enough")
