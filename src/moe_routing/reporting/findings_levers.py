"""Findings about levers: which experts, for which tokens, and what stands in for dropped ones.

A rule is compared with another at equal mean experts, on the straight lines between the settings of
the other. A difference is shown if the two intervals do not overlap. Whether a difference is about
which experts, about which tokens or about what stands in for dropped experts is said only from
losses at fitted scale, the reference's own scale being fitted too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from moe_routing.analysis.tables import groups_of
from moe_routing.reporting import wording
from moe_routing.reporting.findings import Finding
from moe_routing.reporting.pages import LEVERS_FILE
from moe_routing.statistics.lever_kinds import (
    CERTIFIED,
    COMPENSATED,
    MASS_MATCHED,
    OMITTED,
    OWN_WEIGHTS,
    PLAIN,
    PROBABILITY,
    SCALED,
    STATIC,
    THRESHOLD,
    UNSCALED,
    Curve,
    LeverKind,
    Loss,
    curves,
)
from moe_routing.vocabulary import DATASETS, METRICS


@dataclass(frozen=True)
class _Scene:
    """The curves of one data set, by kind.

    Attributes:
        dataset: its name.
        metric: the loss that is compared.
        as_is: curves without a fitted scale.
        scaled: curves at fitted scale; empty if nothing was scored there.
        references: what the losses are over, as is and at fitted scale.
    """

    dataset: str
    metric: str
    as_is: Mapping[LeverKind, Curve]
    scaled: Mapping[LeverKind, Curve]
    references: tuple[str, str]

    @property
    def where(self) -> str:
        """The data set in text."""
        return DATASETS[self.dataset].label

    def said(self, loss: Loss) -> str:
        """Return a loss in text."""
        return wording.difference(loss.value, loss.low, loss.high, self.metric)


def _scenes(rows: pd.DataFrame, top_k: int) -> Iterator[_Scene]:
    for dataset, own in groups_of(rows, "dataset") if len(rows) else ():
        as_is, scaled = own[own["scale"] == UNSCALED], own[own["scale"] == SCALED]
        references = [
            f"`{part['reference'].iloc[0]}`" if len(part) else "" for part in (as_is, scaled)
        ]
        yield _Scene(
            dataset=dataset,
            metric=own["metric"].iloc[0],
            as_is=_rules(own, UNSCALED, top_k),
            scaled=_rules(own, SCALED, top_k),
            references=(references[0], references[1]),
        )


def _rules(rows: pd.DataFrame, scale: str, top_k: int) -> dict[LeverKind, Curve]:
    found = curves(rows, scale, top_k)
    return {kind: curve for kind, curve in found if kind.rule != CERTIFIED}


def _settings(curves_by_kind: Mapping[LeverKind, Curve]) -> dict[float, dict[LeverKind, pd.Series]]:
    """Return the row of each kind at each budget, without static top-k by probability."""
    found: dict[float, dict[LeverKind, pd.Series]] = {}
    for kind, curve in curves_by_kind.items():
        for _, row in curve.rows.iterrows():
            if kind != PLAIN and pd.notna(row["budget"]):
                found.setdefault(row["budget"], {})[kind] = row
    return dict(sorted(found.items()))


def _lowest(settings: Mapping[LeverKind, pd.Series]) -> tuple[LeverKind, pd.Series]:
    return min(settings.items(), key=lambda item: item[1]["difference"])


def cheapest(rows: pd.DataFrame, top_k: int) -> list[Finding]:
    """State for each data set and budget the rule of lowest loss, and what scale explains.

    Where some budgets were scored at fitted scale, only these: a difference as is supports no claim
    about experts or tokens.

    Args:
        rows: ``statistics/levers.csv`` with kinds
            (:func:`moe_routing.statistics.lever_kinds.with_kinds`).
        top_k: experts per token of the model.
    """
    return [
        finding
        for scene in _scenes(rows, top_k)
        if PLAIN in scene.as_is
        for budget, settings in _comparable(scene).items()
        if (finding := _cheapest(scene, budget, settings))
    ]


def _comparable(scene: _Scene) -> dict[float, dict[LeverKind, pd.Series]]:
    """Return the settings as is of the budgets that were scored at fitted scale; of all if none."""
    as_is, scaled = _settings(scene.as_is), _settings(scene.scaled)
    return {budget: as_is[budget] for budget in as_is if budget in scaled} or as_is


def _cheapest(
    scene: _Scene, budget: float, settings: Mapping[LeverKind, pd.Series]
) -> Finding | None:
    kind, row = _lowest(settings)
    own = Loss.of(row)
    plain = scene.as_is[PLAIN].at(row["mean_experts"])
    if plain is None:
        return None
    text = (
        f"On {scene.where} at a budget of {wording.experts(budget)} experts per token, "
        f"{kind.words} (`{row['strategy']}`, {wording.experts(row['mean_experts'])} used) has the "
        f"lowest loss of {_rules_said(len(settings))}: {scene.said(own)} over "
        f"{scene.references[0]}, and {PLAIN.words} at as many experts {scene.said(plain)}; "
        f"{_outcome(own, plain)}."
    )
    scaled, outcome = _at_fitted_scale(scene, budget, kind, own, plain)
    return Finding(f"{text} {scaled}", LEVERS_FILE, outcome)


def _rules_said(n: int) -> str:
    """Return how many rules were compared, without static top-k by probability."""
    return f"{wording.count(n)} rules other than {PLAIN.words}" if n > 1 else "the one rule scored"


def _outcome(own: Loss, other: Loss) -> str:
    if own.below(other):
        return "it loses less"
    if other.below(own):
        return "it loses more, so no rule is better"
    return "no difference could be shown"


def _at_fitted_scale(
    scene: _Scene, budget: float, kind: LeverKind, own: Loss, plain: Loss
) -> tuple[str, str]:
    """Return what is left at fitted scale, and the outcome of both comparisons."""
    better, worse = own.below(plain), plain.below(own)
    row = _settings(scene.scaled).get(budget, {}).get(kind)
    other = (
        scene.scaled[PLAIN].at(row["mean_experts"])
        if row is not None and PLAIN in scene.scaled
        else None
    )
    if row is None or other is None:
        text = (
            "It was not compared at fitted scale, so a change of scale may explain the difference."
        )
        if not better and not worse:
            text = "It was not compared at fitted scale."
        return text, "not scaled"
    fitted = Loss.of(row)
    numbers = (
        f"At fitted scale, the losses over {scene.references[1]} are {scene.said(fitted)} and "
        f"{scene.said(other)}"
    )
    if fitted.below(other):
        kept = "scale does not explain the difference" if better else "a difference is shown there"
        return f"{numbers}: {kept}.", "beyond scale"
    if other.below(fitted):
        return f"{numbers}: there it loses more.", "worse"
    if better:
        return (
            f"{numbers}: no difference could be shown there, so a change of scale may explain it.",
            "scale",
        )
    return f"{numbers}: no difference could be shown there either.", "worse" if worse else "none"


@dataclass(frozen=True)
class _Factor:
    """One lever: what it changes, and the kind without it.

    Attributes:
        question: what it decides.
        does: what is done.
        matters: what a shown gain means.
        idle: what cannot be shown without one.
        base: the kind without the lever; None for kinds that lack it.
    """

    question: str
    does: str
    matters: str
    idle: str
    base: Callable[[LeverKind], LeverKind | None]

    def meaning(self, *, lower: bool, higher: bool) -> tuple[str, str]:
        """Return the outcome of comparisons at fitted scale, and what it means.

        Args:
            lower: whether the lever lowered the loss somewhere.
            higher: whether it raised the loss somewhere.
        """
        if lower and higher:
            return "mixed", "there is no general answer"
        if lower:
            return "matters", f"{self.matters}, beyond scale"
        if higher:
            return "costs", "the change costs quality"
        return "none", f"nothing shows that {self.idle}"


def _by_probability(kind: LeverKind) -> LeverKind | None:
    changed = replace(kind, score=PROBABILITY, widened=False)
    return None if kind.score == PROBABILITY else changed


def _static(kind: LeverKind) -> LeverKind | None:
    return replace(kind, rule=STATIC) if kind.rule == THRESHOLD else None


def _omitted(kind: LeverKind) -> LeverKind | None:
    return replace(kind, dropped=OMITTED) if kind.dropped == COMPENSATED else None


def _own_weights(kind: LeverKind) -> LeverKind | None:
    return replace(kind, weighting=OWN_WEIGHTS) if kind.weighting in MASS_MATCHED else None


FACTORS = (
    _Factor(
        "Which experts",
        "ranking by predicted norm or consequence instead of by probability",
        "which experts are kept matters",
        "which experts are kept matters",
        _by_probability,
    ),
    _Factor(
        "For which tokens",
        "one threshold for all tokens and layers instead of the same number for every token",
        "for which tokens and layers experts are kept matters",
        "it matters for which tokens and layers experts are kept",
        _static,
    ),
    _Factor(
        "What stands in",
        "the mean output in place of dropped experts instead of nothing",
        "what stands in for dropped experts matters",
        "it matters what stands in for dropped experts",
        _omitted,
    ),
    _Factor(
        "Which weights",
        "rescaling the weights of the kept experts to the mass of the model's own choice",
        "how the kept experts are weighted matters",
        "it matters how the kept experts are weighted",
        _own_weights,
    ),
)
"""The levers; see :class:`_Factor`."""


def factors(rows: pd.DataFrame, top_k: int) -> list[Finding]:
    """State for each lever on which data sets it lowered the loss, as is and beyond scale.

    Args:
        rows: as in :func:`cheapest`.
        top_k: experts per token of the model.
    """
    scenes = list(_scenes(rows, top_k))
    found = [_factor(scenes, factor) for factor in FACTORS]
    return [finding for finding in found if finding]


def _factor(scenes: Sequence[_Scene], factor: _Factor) -> Finding | None:
    every = [outcome for scene in scenes for outcome in _tally(scene.as_is, factor)]
    scaled = {scene.where: _tally(scene.scaled, factor) for scene in scenes}
    fitted = [outcome for outcomes in scaled.values() for outcome in outcomes]
    lead = f"{factor.question}: {factor.does}"
    if not every and not fitted:
        return None
    if not fitted:
        text = (
            f"{lead} lowered the loss in {_some(every, -1)} at equal mean experts as is. Nothing "
            "was compared at fitted scale, so a change of scale may explain this."
        )
        return Finding(text, LEVERS_FILE, "not scaled")
    parts = [f"{_some(found, -1)} on {where}" for where, found in scaled.items() if found]
    raised = [f"{_some(found, 1)} on {where}" for where, found in scaled.items() if 1 in found]
    text = f"{lead} lowered the loss at fitted scale in {wording.listed(parts)}"
    text += f", and raised it in {wording.listed(raised)}" if raised else ""
    if 0 in fitted:
        text += f"; in {wording.count(fitted.count(0))} no difference could be shown"
    text += f" (as is, it lowered the loss in {_some(every, -1)})" if every else ""
    outcome, meaning = factor.meaning(lower=-1 in fitted, higher=1 in fitted)
    return Finding(f"{text}: {meaning}.", LEVERS_FILE, outcome)


def _some(outcomes: Sequence[int], wanted: int) -> str:
    n = outcomes.count(wanted)
    return f"{wording.count(n) if n else 'none'} of {wording.plural(len(outcomes), 'comparison')}"


def _tally(curves_by_kind: Mapping[LeverKind, Curve], factor: _Factor) -> list[int]:
    """Return -1 for each comparison in which the lever lowers the loss, 1 where it raises it."""
    outcomes = []
    for kind, curve in curves_by_kind.items():
        base = factor.base(kind)
        if base is None or base not in curves_by_kind:
            continue
        for _, row in curve.rows.iterrows():
            other = curves_by_kind[base].at(row["mean_experts"])
            if other is not None:
                own = Loss.of(row)
                outcomes.append(-1 if own.below(other) else 1 if other.below(own) else 0)
    return outcomes


def plain_experts(rows: pd.DataFrame, top_k: int) -> list[Finding]:
    """State for each data set how many plain experts lose as much as the best rule at each budget.

    Estimates without intervals, from the losses in ``statistics/levers.csv``.

    Args:
        rows: as in :func:`cheapest`.
        top_k: experts per token of the model.
    """
    found = [_plain(scene, top_k) for scene in _scenes(rows, top_k) if PLAIN in scene.as_is]
    return [finding for finding in found if finding]


def _plain(scene: _Scene, top_k: int) -> Finding | None:
    clauses: dict[LeverKind, list[str]] = {}
    as_is, fitted = [], []
    scaled = _settings(scene.scaled) if PLAIN in scene.scaled else {}
    for budget, settings in _settings(scene.as_is).items():
        kind, row = _lowest(settings)
        used, also = row["mean_experts"], "not compared at fitted scale"
        equal = _equal(scene.as_is[PLAIN], row["difference"])
        as_is.append(equal[0] > used)
        if (twin := scaled.get(budget, {}).get(kind)) is not None:
            other = _equal(scene.scaled[PLAIN], twin["difference"])
            fitted.append(other[0] > used)
            also = f"at fitted scale {_experts_said(other, scene.scaled[PLAIN], top_k)}"
        said = _experts_said(equal, scene.as_is[PLAIN], top_k)
        clauses.setdefault(kind, []).append(
            f"with {wording.experts(used)} experts per token no more than with {said} ({also})"
        )
    if not clauses:
        return None
    parts = [f"{kind.words} loses {wording.listed(found)}" for kind, found in clauses.items()]
    text = (
        f"Compared with {PLAIN.words} on {scene.where}, by the estimates in "
        f"{METRICS[scene.metric].unit}: {'; '.join(parts)}."
    )
    outcome = "not fewer" if not all(as_is) else "fewer" if all(fitted) else "fewer as is"
    return Finding(text, LEVERS_FILE, outcome)


def _equal(plain: Curve, loss: float) -> tuple[float, float]:
    """Return the plain experts that lose as much; beyond the ends of the curve, infinity or 0."""
    found = plain.experts_for(loss)
    if found is not None:
        return found
    end = float("inf") if loss < plain.points["difference"].min() else 0.0
    return end, end


def _experts_said(experts: tuple[float, float], plain: Curve, top_k: int) -> str:
    low, high = experts
    if low == float("inf"):
        return f"more than the model's {top_k}"
    if not low:
        least = wording.experts(plain.rows["mean_experts"].min())
        return f"at most {least}, the fewest scored"
    if low == high:
        return f"{low:.1f}"
    return f"{wording.experts(low)} to {wording.experts(high)}, with none scored between"
