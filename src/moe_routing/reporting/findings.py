"""Findings of the declared contrasts and of the comparison with the baseline.

Every sentence that states a result, in the report and in the article, comes from a function here
or in the sibling modules, so no text can disagree with the tables. "No difference could be shown"
is a finding like the others. A finding names the file that its numbers come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.tables import groups_of, rows_of, truth_values
from moe_routing.reporting.claims import DIRECTIONS, Finding, claims, distinct
from moe_routing.reporting.names import in_words
from moe_routing.reporting.pages import CELLS_FILE, NONINFERIORITY_FILE, PAIRED_FILE, PRIMARY_FILE
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import family_entry, static_families
from moe_routing.statistics.chance import at_chance
from moe_routing.statistics.power import POWER
from moe_routing.statistics.verdict import LOSSES, Verdict
from moe_routing.vocabulary import DATASETS, METRICS

NAMED = 4
"""Up to this many strategies are named; more are counted."""

WEIGHTS = {"softmax": "raw softmax", "renormalised": "renormalised", "uniform": "uniform"}
"""The weightings of static curves, in words."""

WEAK_MARGIN = 0.2
"""A margin above this proportion of the baseline's accuracy beyond guessing is called wide."""


def primary(table: pd.DataFrame, own_weighting: str) -> list[Finding]:
    """State the declared contrasts in their order, from ``statistics/primary.csv``.

    Args:
        table: the table.
        own_weighting: the model's own weighting.
    """
    if table.empty:
        return [Finding("The declared contrasts were not computed.", PRIMARY_FILE, "missing")]
    return [_declared(row, own_weighting) for _, row in table.iterrows()]


def _declared(row: pd.Series, own_weighting: str) -> Finding:
    outcome = Verdict(row["verdict"])
    arm, against = (in_words(row[name], own_weighting) for name in ("strategy", "against"))
    metric = METRICS[row["metric"]]
    done = {
        "better": f"{arm} {metric.better} than {against}",
        "worse": f"{arm} {metric.worse} than {against}",
        "open": f"no difference between {arm} and {against} could be shown",
        "same": f"{arm} and {against} had the same result on every item",
    }[DIRECTIONS[outcome]]
    numbers = wording.difference(row["difference"], row["low"], row["high"], row["metric"])
    own, other = (wording.experts(row[name]) for name in ("mean_experts", "against_mean_experts"))
    used = f"Both use {own}" if own == other else f"They use {own} and {other}"
    text = (
        f"On {DATASETS[row['dataset']].label}, {done}: {numbers}, "
        f"{wording.p_value(row['p_value'])}. {used} experts per token.{_margin(row, outcome)}"
    )
    if str(row["confirmatory"]).lower() == "false":
        text += " This contrast is exploratory, because an earlier one showed no difference."
    return Finding(text, PRIMARY_FILE, outcome, claims(row.to_frame().T, PRIMARY_FILE, "against"))


def _margin(row: pd.Series, outcome: Verdict) -> str:
    """Return what is ruled out at the margin; nothing where no margin applies."""
    if pd.isna(row["margin"]) or outcome == Verdict.IDENTICAL:
        return ""
    size = wording.magnitude(row["margin"], row["metric"])
    if str(row["equivalent"]).lower() == "true":
        return f" A difference of {size} is ruled out in both directions."
    alpha_met = outcome in (Verdict.NON_INFERIOR, Verdict.WORSE_WITHIN_MARGIN)
    if outcome == Verdict.BETTER:
        return ""
    return f" A loss of {size} is {'' if alpha_met else 'not '}ruled out."


def power(table: pd.DataFrame) -> Finding | None:
    """State the minimum detectable difference of the primary contrast, from its pilot."""
    if table.empty:
        return None
    row = table.iloc[0]
    size, margin = row["minimum_detectable_difference"], row["margin"]
    if pd.isna(size):
        return None
    found = wording.magnitude(size, row["metric"])
    text = (
        f"With {wording.count(row['n_items'])} items, the first contrast would show a true "
        f"difference of {found} in {wording.percent(POWER, 0)} of runs, judged by the spread "
        "between controls at the same budget."
    )
    if pd.isna(margin):
        return Finding(text, PRIMARY_FILE, "no margin")
    limit = wording.magnitude(margin, row["metric"])
    if size > margin:
        text += f" That is more than the margin of {limit}: a smaller difference may go unseen."
        return Finding(text, PRIMARY_FILE, "too small")
    return Finding(f"{text} The margin is {limit}.", PRIMARY_FILE, "large enough")


def main_measure_rows(table: pd.DataFrame, main: dict[str, str]) -> pd.DataFrame:
    """Return the rows of the main measure of each data set, ``main`` by data set."""
    return table[table["metric"] == table["dataset"].map(main)]


def static_words(family: object) -> str | None:
    """Return the family of a static curve in words; None if the table names none."""
    return family_entry(family).words if isinstance(family, str) else None


def beyond_line(rows: pd.DataFrame, *, losses: bool = False) -> pd.Series:
    """Mark gains that no convex static curve through the measured points can explain.

    Args:
        rows: comparisons whose verdict is better: metric, low, high, chord_excess.
        losses: whether the limits are of losses, turned so that smaller is better.
    """
    higher = rows["metric"].map(lambda name: METRICS[str(name)].higher_is_better and not losses)
    least = rows["low"].where(higher.astype(bool), -rows["high"])
    return (rows["chord_excess"] == 0) | (least > rows["chord_excess"])


def not_evidence(unsure: int, gains: int) -> str:
    """Return why gains over a fixed number are no evidence; nothing if all of them are.

    Args:
        unsure: gains that a convex static curve can explain.
        gains: all gains.
    """
    if not unsure:
        return ""
    which = "the gain" if gains == 1 else wording.plural(gains, "gain")
    if unsure < gains:
        which = f"{wording.count(unsure)} of the {which}"
    elif gains > 1:
        which = f"the {which}"
    return (
        " We did not measure every fixed k and interpolated. Interpolation can overstate the loss "
        f"of a fixed k by more than the gain, so {which} {'is' if unsure == 1 else 'are'} not "
        "evidence."
    )


def against_baseline(paired: pd.DataFrame, noninferiority: pd.DataFrame) -> list[Finding]:
    """Summarise the comparisons with the baseline, one finding per data set, by every metric.

    Args:
        paired: ``statistics/paired.csv``.
        noninferiority: ``statistics/noninferiority.csv``.
    """
    if paired.empty:
        return [Finding("The paired comparisons were not computed.", PAIRED_FILE, "missing")]
    findings = []
    for dataset, rows in groups_of(distinct(paired), "dataset"):
        settings = wording.plural(rows["strategy"].nunique(), "other setting")
        (first, own), *others = groups_of(rows, "metric")
        text = (
            f"Of {settings} on {DATASETS[dataset].label}, by {wording.measure_words(first)}, "
            f"{outcomes(own)}.{_ruled_out(noninferiority, dataset)}"
        )
        for metric, own in others:
            text += f" By {wording.measure_words(metric)}, {outcomes(own)}."
        main = rows[truth_values(rows["main"])]
        shown = {DIRECTIONS[Verdict(v)] for v in main["verdict"]}
        verdict = "some better" if "better" in shown else "some worse" if "worse" in shown else ""
        findings.append(
            Finding(text, PAIRED_FILE, verdict or "none shown", claims(rows, PAIRED_FILE))
        )
    return findings


def outcomes(rows: pd.DataFrame) -> str:
    """Return how many comparisons were better, worse, the same and open, and which if few.

    Args:
        rows: columns strategy and verdict, one row per comparison.
    """
    found = rows["verdict"].map(lambda verdict: DIRECTIONS[Verdict(verdict)])
    words = {
        "better": "better", "worse": "worse", "same": "the same on every item",
        "open": "not shown to differ",
    }  # fmt: skip
    parts = []
    for direction, word in words.items():
        names = list(rows.loc[found == direction, "strategy"])
        if not names:
            continue
        verb = "" if parts else "was " if len(names) == 1 else "were "
        which = f" ({wording.code(names)})" if len(names) <= NAMED and direction != "open" else ""
        number = wording.count(len(names))
        if len(names) == len(rows):
            number, which = ("all", "") if len(names) > 1 else (wording.code(names), "")
        parts.append(f"{number} {verb}{word}{which}")
    return wording.listed(parts)


def _ruled_out(table: pd.DataFrame, dataset: str) -> str:
    """Return for how many settings a loss as large as the margin is ruled out."""
    if table.empty:
        return ""
    rows = table[(table["dataset"] == dataset) & truth_values(table["main"])]
    if rows.empty:
        return ""
    safe = int(truth_values(rows["noninferior"]).sum())
    margin = wording.magnitude(rows["margin"].iloc[0], rows["metric"].iloc[0])
    return f" A loss of {margin} is ruled out for {wording.plural(safe, 'setting')}."


def chance(cells: pd.DataFrame, baseline: str, margin: float) -> list[Finding]:
    """State for each accuracy set whether the baseline is good enough to show a loss."""
    findings = []
    for row in rows_of(cells[cells["strategy"] == baseline]):
        if not METRICS[row.metric].is_proportion:
            continue
        guess = DATASETS[row.dataset].chance
        value = wording.estimate(row.value, row.ci_low, row.ci_high, row.metric)
        name = f"{DATASETS[row.dataset].label} ({METRICS[row.metric].label} {value} %)"
        if at_chance(row.dataset, row.metric, row.ci_low):
            at = f"cannot be told from guessing ({wording.percent(guess, 0)})"
            text = (
                f"On {name}, the baseline `{baseline}` {at if guess else 'gets no item right'}. "
                "This metric cannot show what routing costs."
            )
            findings.append(Finding(text, CELLS_FILE, "at chance"))
        elif margin > WEAK_MARGIN * (row.value - guess):
            text = (
                f"On {name}, the baseline `{baseline}` is only "
                f"{100 * (row.value - guess):.1f} percentage points above "
                f"{'guessing' if guess else 'zero'}. Ruling out a loss of "
                f"{wording.magnitude(margin, row.metric)} says little there."
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
    clauses, found = [], set()
    for strategy, group in groups_of(rows, "strategy"):
        worse = set_names(group, LOSSES)
        better = set_names(group, (Verdict.BETTER,))
        parts = [f"worse on {wording.listed(worse)}"] if worse else []
        parts += [f"better on {wording.listed(better)}"] if better else []
        found |= {"worse"} if worse else set()
        found |= {"better"} if better else set()
        verb = f"was {wording.listed(parts)}" if parts else "could not be shown to differ"
        clauses.append(f"{arms[strategy]} weighting (`{strategy}`) {verb}.")
    text = (
        f"Other weights for the same {rule.top_k} experts were compared with the model's own "
        f"{WEIGHTS[rule.weighting]} weights, in the main metric of each set. "
    ) + " ".join(map(wording.capital, clauses))
    verdict = "mixed" if len(found) > 1 else "".join(found) or "none"
    return Finding(text, PAIRED_FILE, verdict, claims(rows, PAIRED_FILE))


def set_names(rows: pd.DataFrame, outcomes: Sequence[Verdict]) -> list[str]:
    """Return the distinct data sets on which a comparison had one of these outcomes."""
    names = rows.loc[rows["verdict"].isin(outcomes), "dataset"].drop_duplicates()
    return [DATASETS[name].label for name in names]


def fewest_static(noninferiority: pd.DataFrame, curve: pd.DataFrame, top_k: int) -> list[Finding]:
    """State for each data set the smallest fixed k that rules out a loss of the margin."""
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
        text = f"On {where}, no fixed k below {top_k} was shown to lose less than {margin}."
        if len(safe):
            text = (
                f"On {where}, {wording.count(safe.min())} experts for every token were shown to "
                f"lose less than {margin}."
            )
        findings.append(
            Finding(text, NONINFERIORITY_FILE, "none" if safe.empty else "fewer suffice")
        )
    return findings
