"""The answer in a few sentences: the first screen, the abstract and the conclusion of the article.

Names are in words, every comparison is a claim (:mod:`moe_routing.reporting.claims`), and the three
texts say the same in different words, so that a reader of all of them reads no sentence twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.tables import groups_of, rows_of
from moe_routing.reporting import findings_needed
from moe_routing.reporting.claims import DIRECTIONS, Claim, Direction, Finding, claims
from moe_routing.reporting.findings_budgets import by_set, compared, leader, lever_sets, levers
from moe_routing.reporting.findings_needed import KEPT
from moe_routing.reporting.names import MIXTURE_OF, in_words, rule_words
from moe_routing.reporting.pages import (
    BUDGETS_FILE,
    CERTIFICATES,
    LEVERS_FILE,
    MODEL_FILE,
    PRIMARY_FILE,
)
from moe_routing.reporting.results import StudyResults
from moe_routing.statistics.verdict import Verdict
from moe_routing.vocabulary import DATASETS, DIVERGENCE, text_dataset

LEVER_NAMES = {
    "score": "another order of the experts",
    "tokens": "one threshold for all tokens",
    "substitute": "a substitute for dropped experts",
    "weights": "rescaled weights",
}
DID: Mapping[Direction, str] = {
    "better": "did better than",
    "worse": "did worse than",
    "open": "was not shown to differ from",
    "same": "gave the same results as",
}


def in_short(study: StudyResults) -> Iterator[Finding]:
    """Yield the answer with its uncertainty: how many experts, the primary contrast, the scope."""
    yield from _how_many(study)
    yield from _in_the_contrast(study)
    about = "The model is small: larger ones may differ."
    if not study.model.is_small:
        about = "This is one model: others may differ."
    yield Finding(about, MODEL_FILE)


def _in_the_contrast(study: StudyResults) -> Iterator[Finding]:
    """Yield the outcome of the primary contrast with its size."""
    row = _primary(study)
    if row is None:
        return
    arm, against = _pair(study, row)
    where, direction = DATASETS[row["dataset"]].label, _direction(row)
    if direction == "same":
        text = f"{arm} gave the same results as {against} on every item of {where}."
    elif direction == "open":
        text = f"Between {arm} and {against} no difference could be shown on {where}{_by(row)}."
    else:
        side = "higher" if row["difference"] > 0 else "lower"
        text = (
            f"{arm}, at {row['mean_experts']:.1f} experts per token, is {direction} than "
            f"{against}: its {wording.measure_words(row['metric'])} on {where} is {side}{_by(row)}."
        )
    yield Finding(wording.capital(text), PRIMARY_FILE, direction, _primary_claims(study))


def _by(row: pd.Series) -> str:
    """Return how large the difference of a declared contrast is, with its limits."""
    numbers = (row["difference"], row["low"], row["high"], row["metric"])
    if _direction(row) in ("better", "worse"):
        return f" by {wording.size(*numbers)}"
    return f" ({wording.difference(*numbers)})"


def _how_many(study: StudyResults) -> Iterator[Finding]:
    """Yield how many experts are enough for a bounded change; without a bound, the best rule."""
    for one in study.certificates.values():
        text = (
            f"Certified routing keeps {one.mean_experts:.1f} of {study.model.top_k} experts per "
            "token. It promises an expected change of the predictions (KL) of at most "
            f"{one.margin:g} nats per token{_measured(study, one.strategy)}."
        )
        yield Finding(text, CERTIFICATES, "certified")
        return
    row = leader(study.budgets)
    if row is None:
        return
    loss = wording.difference(row["loss_over_stock"], row["low"], row["high"], row["metric"])
    text = (
        f"At {wording.experts(row['budget'])} experts per token, {rule_words(row['kind'])} has the "
        f"lowest loss on {DATASETS[row['dataset']].label}: {loss} over the stock model."
    )
    yield Finding(text, BUDGETS_FILE, _direction(row), _leader_claims(study, row))


def _measured(study: StudyResults, strategy: str) -> str:
    """Return the change of the predictions that was measured on the text set, if it was."""
    dataset, rows = text_dataset(study.datasets), study.metrics
    rows = rows[(rows["strategy"] == strategy) & (rows["metric"] == DIVERGENCE.name)]
    for row in rows_of(rows[rows["dataset"] == dataset]):
        change = wording.interval(row.value, row.ci_low, row.ci_high)
        return f"; on {DATASETS[dataset].label} we measured {change}"
    return ""


def abstract(study: StudyResults) -> Iterator[Finding]:
    """Yield the primary contrast, the best rule, and what BH promises."""
    row = _primary(study)
    if row is not None:
        arm, against = _pair(study, row)
        text = (
            f"In the declared contrast, {arm} {DID[_direction(row)]} {against} on "
            f"{DATASETS[row['dataset']].label},{_by(row)}."
        ).replace(", (", " (")
        yield Finding(text, PRIMARY_FILE, _direction(row), _primary_claims(study))
    row = leader(study.budgets)
    if row is not None:
        text = (
            f"At a budget of {wording.experts(row['budget'])} experts, {rule_words(row['kind'])} "
            f"lost least. It was {by_set(_own(study, row))}, compared with a fixed number."
        )
        yield Finding(text, BUDGETS_FILE, _direction(row), _leader_claims(study, row))
    for finding in _rates(study):
        kept = "was not shown to exceed" if finding.verdict == KEPT else "exceeded"
        text = (
            f"On held-out text, BH {kept} the false discovery rate that it promises, which bounds "
            "waste, not damage."
        )
        yield Finding(text, finding.source, finding.verdict)


def conclusion(study: StudyResults) -> Iterator[Finding]:
    """Yield the answer without intervals, what each lever does, and what BH promises."""
    for one in study.certificates.values():
        text = (
            f"Where an expected change of {one.margin:g} nats per token is accepted, "
            f"{one.mean_experts:.1f} of {study.model.top_k} were enough on average, on text like "
            "that of the calibration."
        )
        yield Finding(text, CERTIFICATES, "certified")
        break
    row, best = _primary(study), leader(study.budgets)
    if row is not None:
        arm, against = _pair(study, row)
        text = f"On {DATASETS[row['dataset']].label}, {arm} {DID[_direction(row)]} {against}."
        yield Finding(text, PRIMARY_FILE, _direction(row), _primary_claims(study))
    if best is not None:
        text = (
            f"At a budget of {wording.experts(best['budget'])} experts, no rule lost less than "
            f"{rule_words(best['kind'])}. Compared with a fixed number, it was "
            f"{by_set(_own(study, best))}."
        )
        yield Finding(text, BUDGETS_FILE, _direction(best), _leader_claims(study, best))
    yield from _levers(study.statistics["levers"])
    yield from _promise(study)
    if study.model.is_small:
        text = "Whether larger models behave alike is open; the same workflow studies them."
        yield Finding(text, MODEL_FILE)


def _levers(rows: pd.DataFrame) -> Iterator[Finding]:
    """Yield what each lever does, those that do the same together."""
    if rows.empty:
        return
    groups: dict[str, list[str]] = {}
    for lever, own in groups_of(rows[rows["verdict"].notna()], "lever"):
        helped, cost = (lever_sets(own, direction) for direction in ("better", "worse"))
        clauses = [f"helped on {wording.listed(helped)}"] if helped else []
        clauses += [f"cost quality on {wording.listed(cost)}"] if cost else []
        done = wording.listed(clauses) if clauses else "made no difference that could be shown"
        groups.setdefault(done, []).append(LEVER_NAMES[lever])
    parts = [f"{wording.listed(names)} {done}" for done, names in groups.items()]
    stated = tuple(claim for finding in levers(rows) for claim in finding.claims)
    yield Finding(f"Taken one at a time, {'; '.join(parts)}.", LEVERS_FILE, "levers", stated)


def _promise(study: StudyResults) -> Iterator[Finding]:
    """Yield whether BH kept its error rate on held-out text, and what that rate does not cover."""
    for finding in _rates(study):
        text = (
            f"The false discovery rate of BH was {'not ' if finding.verdict == KEPT else ''}shown "
            "to be above its level on held-out text. This rate bounds the experts that are kept "
            "without need, not the damage of dropping the others."
        )
        yield Finding(text, finding.source, finding.verdict)


def _rates(study: StudyResults) -> list[Finding]:
    return findings_needed.in_short(study.table(findings_needed.RATES))


def _primary(study: StudyResults) -> pd.Series | None:
    table = study.statistics["primary"]
    return None if table.empty else table.iloc[0]


def _pair(study: StudyResults, row: pd.Series) -> tuple[str, str]:
    weighting = study.model.rule.weighting
    against = "a fixed number at equal cost"
    if not row["against"].startswith(MIXTURE_OF):
        against = in_words(row["against"], weighting)
    return in_words(row["strategy"], weighting), against


def _primary_claims(study: StudyResults) -> tuple[Claim, ...]:
    return claims(study.statistics["primary"].iloc[:1], PRIMARY_FILE, "against")


def _own(study: StudyResults, row: pd.Series) -> pd.DataFrame:
    rows = compared(study.budgets)
    return rows[rows["strategy"] == row["strategy"]]


def _leader_claims(study: StudyResults, row: pd.Series) -> tuple[Claim, ...]:
    return claims(_own(study, row), BUDGETS_FILE, "scale")


def _direction(row: pd.Series) -> Direction:
    return DIRECTIONS[Verdict(row["verdict"])]
