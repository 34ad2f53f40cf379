"""What the texts say, by topic: one plan for the article and for the short report.

A topic is a function from a study to its findings; where the study lacks their tables, it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from moe_routing.errors import InputError
from moe_routing.reporting import (
    findings,
    findings_ablation,
    findings_analyses,
    findings_budgets,
    findings_consequence,
    findings_controls,
    findings_needed,
    findings_routing,
    findings_validity,
    replications,
    summary,
)
from moe_routing.reporting.claims import Finding, hold
from moe_routing.reporting.missing import missing
from moe_routing.reporting.results import StudyResults

Topic = Callable[[StudyResults], Iterable[Finding | None]]


def _numerics(study: StudyResults) -> Iterable[Finding]:
    numerics, main = study.statistics["numerics"], study.main_measures
    yield from findings_controls.numerics(numerics, main)
    yield from findings_controls.beyond_noise_floor(numerics, study.statistics["paired"], main)


def _specialisation(study: StudyResults) -> Iterable[Finding | None]:
    yield findings_validity.domains(study.table(findings_validity.DOMAINS))
    yield findings_validity.coactivation(study.table(findings_validity.COACTIVATION))
    yield findings_validity.vocabulary(study.table(findings_validity.VOCABULARY))


def _held_out(study: StudyResults) -> Iterable[Finding | None]:
    rates = study.table(findings_needed.RATES)
    yield from findings_needed.held_out(rates)
    yield findings_needed.scores(study.table(findings_needed.SCORE_TABLE))
    yield findings_needed.shift(rates)
    yield findings_needed.routed(rates)
    yield findings_needed.guarantee(rates, study.model.experts)
    yield findings_needed.spread(study.table(findings_needed.RESAMPLED))
    yield findings_needed.worst_experts(study.table(findings_needed.WORST_EXPERTS))


def _dead(study: StudyResults) -> Iterable[Finding | None]:
    yield from findings_needed.dead_layers(study.table(findings_needed.DEAD_LAYERS))
    yield findings_needed.dead_experts(study.table(findings_needed.DEAD_EXPERTS))


def _time(study: StudyResults) -> Iterable[Finding]:
    curve = study.static_curve
    return findings_budgets.time(
        study.statistics["timing"],
        study.baseline,
        study.duplicates,
        least=list(curve.loc[curve["k"] == 1, "strategy"])[:1],
        confidence=study.config.statistics.confidence,
    )


TOPICS: Mapping[str, Topic] = MappingProxyType(
    {
        "primary": lambda study: findings.primary(
            study.statistics["primary"], study.model.rule.weighting
        ),
        "power": lambda study: [findings.power(study.statistics["primary"])],
        "answer": lambda study: [findings_budgets.answer(study.budgets)],
        "in_short": summary.in_short,
        "abstract": summary.abstract,
        "conclusion": summary.conclusion,
        "budgets": lambda study: findings_budgets.budgets(study.budgets),
        "scale": lambda study: [
            findings_budgets.scale(
                study.budgets, [one.strategy for one in study.config.statistics.contrasts]
            )
        ],
        "levers": lambda study: findings_budgets.levers(study.statistics["levers"]),
        "time": _time,
        "chance": lambda study: findings.chance(
            study.cells, study.baseline, study.config.statistics.margin_accuracy
        ),
        "baseline": lambda study: findings.against_baseline(
            study.statistics["paired"], study.statistics["noninferiority"]
        ),
        "matched_summary": lambda study: findings_routing.matched_summary(
            study.statistics["matched_compute"], study.family_of
        ),
        "controls_short": lambda study: findings_controls.in_short(
            study.statistics["controls"],
            study.main_measures,
            study.config.statistics.primary.strategy,
            study.model.rule.weighting,
        ),
        "controls": lambda study: findings_controls.controls(
            study.statistics["controls"], study.main_measures, study.strategies
        ),
        "certified": lambda study: findings_consequence.certified(
            study.certificates, study.metrics, study.budgets
        ),
        "law": lambda study: [
            findings_consequence.law(study.table(findings_consequence.LAW_FILE)),
            findings_consequence.ranking(study.table(findings_consequence.CORRELATIONS_FILE)),
        ],
        "static_curve": lambda study: findings_controls.static_curve(
            study.static_curve, study.statistics["controls"], study.main_measures, study.model.top_k
        ),
        "numerics": _numerics,
        "divergence": lambda study: [
            findings_controls.divergence(study.divergence, study.baseline)
        ],
        "fewest": lambda study: findings.fewest_static(
            study.statistics["noninferiority"], study.static_curve, study.model.top_k
        ),
        "weighting": lambda study: [
            findings.weighting(study.statistics["paired"], study.model.rule)
        ],
        "binding": lambda study: [findings_routing.binding(study.cells, study.strategies)],
        "cap": lambda study: [findings_routing.cap(study.cells)],
        "pareto": lambda study: findings_routing.pareto(study.statistics["pareto"], study.baseline),
        "pareto_time": lambda study: findings_routing.pareto(
            study.statistics["pareto_time"], study.baseline, "seconds_per_1000_tokens"
        ),
        "router": lambda study: findings_analyses.router(study.folder),
        "specialisation": _specialisation,
        "recommendation": lambda study: findings_analyses.recommendation(study.folder),
        "held_out": _held_out,
        "held_out_short": lambda study: findings_needed.in_short(
            study.table(findings_needed.RATES)
        ),
        "dead": _dead,
        "validity": lambda study: findings_analyses.validity(
            study.table(findings_analyses.VERDICT_TABLE), study.cells["null"]
        ),
        "procedures": lambda study: findings_validity.procedures(
            study.table(findings_validity.SIMULATION), study.config.statistics.confidence
        ),
        "ablation": lambda study: findings_ablation.discoveries(
            study.table(findings_ablation.DISCOVERIES), study.config
        ),
        "left_out": lambda study: findings_ablation.beside(
            study.table(findings_ablation.LEFT_OUT),
            study.table(findings_ablation.JOINT),
            study.table(findings_ablation.STATES),
        ),
        "needs": lambda study: [
            findings_ablation.needed(study.table(findings_ablation.NEEDED)),
            findings_ablation.contrasts(study.table(findings_ablation.CONTRASTS)),
            findings_ablation.presence(study.table(findings_ablation.PRESENCE)),
        ],
        "headroom": lambda study: findings_ablation.headroom(
            study.table(findings_ablation.HEADROOM)
        ),
        "replications": lambda study: [replications.replications(study)],
        "missing": missing,
    }
)
"""By name; in a page: ``a.say("primary")`` or ``a.listing("primary")``."""

SHORT_REPORT = (
    "primary", "power", "answer", "budgets", "levers", "chance", "certified", "law", "baseline",
    "matched_summary", "controls", "static_curve", "numerics", "divergence", "fewest", "weighting",
    "binding", "cap", "pareto", "time", "pareto_time",
)  # fmt: skip
"""The topics of the short report, in its order."""


def findings_on(study: StudyResults, topics: Sequence[str]) -> list[Finding]:
    """Return the findings on topics, in order; their claims agree with the tables.

    Raises:
        InputError: there is no such topic, or a verdict contradicts the numbers beside it.
    """
    for topic in topics:
        if topic not in TOPICS:
            raise InputError(f"topic '{topic}'; allowed: {', '.join(TOPICS)}")
    found = [finding for topic in topics for finding in TOPICS[topic](study)]
    stated = [finding for finding in found if finding is not None]
    hold(stated, study.statistics, 1 - study.config.statistics.confidence)
    return stated
