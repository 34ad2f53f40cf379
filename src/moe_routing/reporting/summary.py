"""The answer in a few sentences: the first screen, the abstract and the conclusion of the article.

Names are in words, and every comparison is a claim (:mod:`moe_routing.reporting.claims`).
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from moe_routing.analysis.tables import groups_of
from moe_routing.reporting import wording
from moe_routing.reporting.claims import DIRECTIONS, Finding, claims
from moe_routing.reporting.findings import contrast_words
from moe_routing.reporting.findings_budgets import by_set, compared, leader, lever_sets, levers
from moe_routing.reporting.names import rule_words
from moe_routing.reporting.pages import BUDGETS_FILE, LEVERS_FILE, PRIMARY_FILE
from moe_routing.reporting.results import StudyResults
from moe_routing.statistics.verdict import Verdict
from moe_routing.vocabulary import DATASETS, METRICS

LEVER_NAMES = {
    "score": "another order of experts",
    "tokens": "another choice of tokens",
    "substitute": "a substitute for dropped experts",
    "weights": "other weights",
}


def in_short(study: StudyResults) -> Iterator[Finding]:
    """Yield the answer with its uncertainty: the primary contrast, then the best rule."""
    yield from _primary(study, numbers=True)
    row = leader(study.budgets)
    if row is None:
        return
    loss = wording.difference(row["loss_over_stock"], row["low"], row["high"], row["metric"])
    versus = wording.difference(
        row["versus_static"], row["static_low"], row["static_high"], row["metric"]
    ).replace(f" {METRICS[row['metric']].unit}", "")
    text = (
        f"Of the rules at a budget of {wording.experts(row['budget'])}, "
        f"{rule_words(row['kind'])} lost least there: {loss} over the stock model. Against a fixed "
        f"number of experts at the same mean the difference is {versus}; it was "
        f"{_sets(study, row)}."
    )
    yield Finding(text, BUDGETS_FILE, _direction(row), _leader_claims(study, row))


def abstract(study: StudyResults) -> Iterator[Finding]:
    """Yield the same with the numbers of the primary contrast alone."""
    yield from _primary(study, numbers=True)
    yield from _leader(study)


def conclusion(study: StudyResults) -> Iterator[Finding]:
    """Yield the answer without numbers, and what each lever does."""
    yield from _primary(study, numbers=False)
    yield from _leader(study)
    rows = study.statistics["levers"]
    if rows.empty:
        return
    parts = []
    for lever, own in groups_of(rows[rows["verdict"].notna()], "lever"):
        helped, cost = (lever_sets(own, direction) for direction in ("better", "worse"))
        clauses = [f"helped on {wording.listed(helped)}"] if helped else []
        clauses += [f"cost quality on {wording.listed(cost)}"] if cost else []
        done = wording.listed(clauses) if clauses else "was not shown to make a difference"
        parts.append(f"{LEVER_NAMES[lever]} {done}")
    stated = tuple(claim for finding in levers(rows) for claim in finding.claims)
    yield Finding(f"Taken one at a time, {'; '.join(parts)}.", LEVERS_FILE, "levers", stated)


def _primary(study: StudyResults, *, numbers: bool) -> Iterator[Finding]:
    table = study.statistics["primary"]
    if table.empty:
        return
    row = table.iloc[0]
    text = f"On {DATASETS[row['dataset']].label}, "
    text += contrast_words(row, study.model.rule.weighting, ids=False)
    if numbers:
        text += f": {wording.difference(row['difference'], row['low'], row['high'], row['metric'])}"
    stated = claims(table.iloc[:1], PRIMARY_FILE, "against")
    yield Finding(f"{text}.", PRIMARY_FILE, _direction(row), stated)


def _leader(study: StudyResults) -> Iterator[Finding]:
    row = leader(study.budgets)
    if row is None:
        return
    text = (
        f"Of the rules at one budget, {rule_words(row['kind'])} lost least on "
        f"{DATASETS[row['dataset']].label}; against a fixed number of experts at the same mean it "
        f"was {_sets(study, row)}."
    )
    yield Finding(text, BUDGETS_FILE, _direction(row), _leader_claims(study, row))


def _own(study: StudyResults, row: pd.Series) -> pd.DataFrame:
    rows = compared(study.budgets)
    return rows[rows["strategy"] == row["strategy"]]


def _sets(study: StudyResults, row: pd.Series) -> str:
    return by_set(_own(study, row))


def _leader_claims(study: StudyResults, row: pd.Series) -> tuple:
    return claims(_own(study, row), BUDGETS_FILE, "scale")


def _direction(row: pd.Series) -> str:
    return DIRECTIONS[Verdict(row["verdict"])]
