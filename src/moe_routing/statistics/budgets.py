"""Rules at matched budgets: what each costs over the stock model, and against a fixed number.

Every comparison is paired, as is and with one scale of the experts' output fitted for each setting,
the baseline included, so that no rule is credited with a change of scale.

Shape letters: N items, S strategies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moe_routing.config.study import StatisticsConfig
from moe_routing.routing.strategies import Strategy, parse_strategy
from moe_routing.statistics.cells import Panel
from moe_routing.statistics.comparison import named_rng
from moe_routing.statistics.contrasts import ResultRow
from moe_routing.statistics.matched import Bracket, bracket, bracket_columns, gaps
from moe_routing.statistics.multiplicity import holm
from moe_routing.statistics.rules import (
    LEVERS,
    OF_THE_NULL,
    PLAIN,
    SCALED,
    SCALES,
    UNSCALED,
    RuleKind,
    budget_of,
    kind_of,
)
from moe_routing.statistics.verdict import verdict

BEYOND = 0.1
"""A curve is compared beyond its ends by at most this part of the experts at the end."""


@dataclass(frozen=True)
class Setting:
    """A strategy at a budget.

    Attributes:
        strategy: its specification.
        kind: its rule; None for the baseline.
        experts: mean experts per token and layer on the data set; NaN if not counted.
    """

    strategy: Strategy
    kind: RuleKind | None
    experts: float


@dataclass(frozen=True)
class _Scene:
    """The settings of one data set at one scale.

    Attributes:
        panel: cells of the settings and their reference.
        settings: by id, the reference left out.
        reference: the baseline at this scale.
        top_k: its mean experts.
    """

    panel: Panel
    settings: Mapping[str, Setting]
    reference: str
    top_k: float

    def curve(self, kind: RuleKind) -> dict[str, float]:
        """Return the experts of the points of a kind, ascending, the reference last if it is one.

        Settings of one kind with equal experts are one point, the first.
        """
        own = {n: s.experts for n, s in self.settings.items() if s.kind == kind}
        if kind.ends_at_stock:
            own = {name: x for name, x in own.items() if x < self.top_k}
            own[self.reference] = self.top_k
        first: dict[float, str] = {}
        for name, experts in own.items():
            if np.isfinite(experts):
                first.setdefault(round(experts, 6), name)
        return {first[experts]: experts for experts in sorted(first)}


def reference_of(scale: str, baseline: str) -> str:
    """Return what losses at a scale are over: the baseline, at its own fitted scale too.

    >>> reference_of("scaled", "stock"), reference_of("unscaled", "stock")
    ('stock_scaled', 'stock')
    """
    scaled = parse_strategy(baseline).model_copy(update={"scale": SCALED}).id
    return scaled if scale == SCALED else baseline


def _scenes(
    panel: Panel, baseline: str, experts: Mapping[str, float], own_weighting: str
) -> dict[str, _Scene]:
    """Return the scene of each scale that has its reference."""
    found = {}
    for scale in SCALES:
        reference = reference_of(scale, baseline)
        parsed = {name: parse_strategy(name) for name in panel.strategies if name != reference}
        settings = {
            name: Setting(one, kind_of(one, own_weighting), experts.get(name, np.nan))
            for name, one in parsed.items()
            if one.scale == scale
        }
        if reference in panel.strategies:
            own = panel.only([reference, *settings])
            found[scale] = _Scene(own, settings, reference, experts.get(reference, np.nan))
    return found


def budget_rows(
    panel: Panel,
    settings: StatisticsConfig,
    seed: int,
    experts: Mapping[str, float],
    own_weighting: str,
    fits: Mapping[str, Mapping[str, Any]],
) -> list[ResultRow]:
    """Return the rows of ``matched_budgets.csv`` of a data set, on its main metric.

    Losses are differences turned so that a larger one is worse. Both tests are corrected by Holm
    within the data set: over all rows, as is and at fitted scale.

    Args:
        panel: the cells of one data set: the baseline, as is and scaled, and every setting.
        settings: baseline, levels, resamples.
        seed: seed of the study.
        experts: mean experts per token of each strategy on this data set.
        own_weighting: the model's own weighting.
        fits: what was fitted for a budget, by strategy: parameter, value, realised.
    """
    rows: list[ResultRow] = []
    scenes = _scenes(panel, settings.baseline, experts, own_weighting)
    for scale, scene in scenes.items():
        over_stock = _gaps(scene, settings, seed, f"budgets {scale} stock", _stock(scene))
        curve = scene.curve(PLAIN)
        compared = {
            name: curve
            for name, one in scene.settings.items()
            if one.kind not in (None, PLAIN) and name not in curve
        }
        versus = _gaps(scene, settings, seed, f"budgets {scale} static", compared)
        same = panel.same_as
        for name, one in scene.settings.items():
            own, static = over_stock[name], versus.get(name, {})
            rows.append(
                {
                    **_about(scene, name, one, fits.get(name, {})),
                    "loss_over_stock": own["loss"],
                    "low": own["low"],
                    "high": own["high"],
                    "p_stock": own["p_value"],
                    "versus_static": static.get("loss", np.nan),
                    "static_low": static.get("low", np.nan),
                    "static_high": static.get("high", np.nan),
                    "chord_excess": static.get("chord_excess", np.nan),
                    "p_value": static.get("p_value", np.nan),
                    "identical": static.get("identical", False),
                    "same_as": same.get(name),
                }
            )
    if SCALED in scenes and UNSCALED in scenes:
        rows.append(_scaled_reference(panel, scenes[SCALED], settings, seed))
    return _with_verdicts(rows, settings, "versus_static", "p_stock", "p_value")


def _scaled_reference(
    panel: Panel, scene: _Scene, settings: StatisticsConfig, seed: int
) -> ResultRow:
    """Return the row of the baseline at fitted scale: what scale alone changes."""
    name, baseline = scene.reference, settings.baseline
    one = Setting(parse_strategy(name), None, scene.top_k)
    own = _Scene(panel.only([baseline, name]), {name: one}, baseline, scene.top_k)
    found = _gaps(own, settings, seed, "budgets scaled reference", _stock(own))[name]
    missing = dict.fromkeys(
        ("versus_static", "static_low", "static_high", "chord_excess", "p_value"), np.nan
    )
    return {
        **_about(own, name, one, {}),
        "loss_over_stock": found["loss"],
        "low": found["low"],
        "high": found["high"],
        "p_stock": found["p_value"],
        **missing,
        "identical": False,
        "same_as": None,
    }


def _about(scene: _Scene, name: str, one: Setting, fit: Mapping[str, Any]) -> ResultRow:
    """Return what a row says about its setting and its data set."""
    panel, metric, strategy = scene.panel, scene.panel.main_measure, one.strategy
    return {
        "strategy": name,
        "dataset": panel.dataset,
        "rule": one.kind.name if one.kind else strategy.family.label,
        "score": strategy.score or OF_THE_NULL,
        "candidates": strategy.candidates,
        "dropped": strategy.dropped,
        "scale": SCALES[strategy.scale],
        "budget": budget_of(strategy),
        "parameter": fit.get("parameter"),
        "fitted_value": fit.get("value", np.nan),
        "realised_calibration": fit.get("realised", np.nan),
        "mean_experts": one.experts,
        "metric": metric.name,
        "reference": scene.reference,
        "value": panel.value(metric, name),
        "n_items": panel.n_items,
        "n_clusters": panel.n_clusters,
    }


def _stock(scene: _Scene) -> dict[str, dict[str, float]]:
    """Return for each setting the curve of one point that is its reference."""
    return {
        name: {scene.reference: one.experts if np.isfinite(one.experts) else 0.0}
        for name, one in scene.settings.items()
    }


def _gaps(
    scene: _Scene,
    settings: StatisticsConfig,
    seed: int,
    label: str,
    curves: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, Any]]:
    """Return the loss of settings over a curve at their own mean experts, with test and limits."""
    panel, metric = scene.panel, scene.panel.main_measure
    single = Bracket(0, 0, 0.0)
    brackets = {
        name: single
        if list(curve) == [scene.reference]
        else bracket(scene.settings[name].experts, list(curve.values()), BEYOND)
        for name, curve in curves.items()
    }
    rng = named_rng(seed, label, panel.dataset)
    found = gaps(panel, metric, settings, rng, curves, brackets)
    for name, own in found.items():
        at = brackets[name]
        if at is not None:
            own |= bracket_columns(panel, metric, curves[name], at)
        own["loss"] = metric.loss(own["difference"])
        own["low"], own["high"] = sorted(metric.loss(own[side]) for side in ("low", "high"))
    return found


def _with_verdicts(
    rows: Sequence[ResultRow], settings: StatisticsConfig, loss: str, *p_values: str
) -> list[ResultRow]:
    """Add p-values adjusted by Holm within the data set, and verdicts on a loss.

    Duplicates are tested once: their rows repeat the result of the first.

    Args:
        rows: rows of one data set.
        settings: level.
        loss: column of the loss that the verdict is about; its test is ``p_value``.
        p_values: columns to adjust; ``p_adjusted`` is that of ``p_value``.
    """
    table = pd.DataFrame(rows)
    if table.empty:
        return []
    again = table["same_as"].isin(table["strategy"])
    for name in p_values:
        adjusted = f"{name.removesuffix('_value')}_adjusted"
        table[adjusted] = holm(table[name].mask(again))
        by_name = table.set_index("strategy")[adjusted].to_dict()
        table.loc[again, adjusted] = table.loc[again, "same_as"].map(by_name)
    return [row | {"verdict": _verdict(row, row[loss], settings)} for row in _records(table)]


def _records(table: pd.DataFrame) -> list[ResultRow]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _verdict(row: Mapping[str, Any], loss: float, settings: StatisticsConfig) -> str | None:
    if not np.isfinite(row["p_adjusted"]):
        return None
    return str(
        verdict(
            loss, row["p_adjusted"], higher_is_better=False, confidence=settings.confidence,
            identical=row["identical"],
        )
    )  # fmt: skip


def lever_rows(
    panel: Panel,
    settings: StatisticsConfig,
    seed: int,
    experts: Mapping[str, float],
    own_weighting: str,
) -> list[ResultRow]:
    """Return the rows of ``levers.csv`` of a data set: each setting against itself without a lever.

    The setting is compared with the curve of the kind that lacks the lever, at its own mean
    experts; corrected by Holm within the data set.

    Args:
        panel: as in :func:`budget_rows`.
        settings: baseline, levels, resamples.
        seed: seed of the study.
        experts: mean experts per token of each strategy on this data set.
        own_weighting: the model's own weighting.
    """
    rows: list[ResultRow] = []
    for scale, scene in _scenes(panel, settings.baseline, experts, own_weighting).items():
        for lever, without in LEVERS.items():
            bases = {
                name: base
                for name, one in scene.settings.items()
                if one.kind and (base := without(one.kind))
            }
            curves = {name: scene.curve(base) for name, base in bases.items()}
            curves = {n: c for n, c in curves.items() if set(c) - {scene.reference}}
            found = _gaps(scene, settings, seed, f"levers {scale} {lever}", curves)
            for name, own in found.items():
                one = scene.settings[name]
                rows.append(
                    {
                        "lever": lever,
                        "strategy": name,
                        "without": bases[name].words,
                        "dataset": panel.dataset,
                        "metric": panel.main_measure.name,
                        "scale": SCALES[scale],
                        "budget": budget_of(one.strategy),
                        "mean_experts": one.experts,
                        "difference": own["loss"],
                        "low": own["low"],
                        "high": own["high"],
                        "chord_excess": own["chord_excess"],
                        "p_value": own["p_value"],
                        "identical": own["identical"],
                        "same_as": None,
                    }
                )
    return _with_verdicts(rows, settings, "difference", "p_value")
