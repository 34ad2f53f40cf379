"""Fit one scale for the output of a model's experts, so that rules are compared at their best one.

Dropping experts shrinks the output of a layer, and a model may gain from more output than it has. A
rule that changes the output's size can therefore look better or worse for that alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_routing.config.study import load_config
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError
from moe_routing.evaluation.calibration_job import CalibrationJob
from moe_routing.evaluation.fitting import fit_in_passing
from moe_routing.evaluation.pieces import scale_piece
from moe_routing.evaluation.store import with_suffix
from moe_routing.routing.budget import left_out, load_budgets
from moe_routing.routing.calibration import Calibration, budgets_of, save_scale
from moe_routing.routing.strategies import Strategy

TRIED = (0.85, 1.0, 1.2, 1.4, 1.6)
"""Scales that are tried; a fitted one lies between the first and the last."""
DEGREE = 3
"""Degree of the polynomial through the losses, fewer than what it would take to meet them all."""


def fit_scale(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    strategy: Strategy,
    calibration: Calibration,
    *,
    window: int | None = None,
    token_budget: int = 8192,
) -> float:
    """Return the factor of the experts' outputs with the smallest loss on some documents.

    One factor for all layers: the minimum of the polynomial of least squares through the losses at
    :data:`TRIED`. Near the best scale the loss itself is flat and not smooth, since a change of
    scale also changes which experts later layers choose; a search would end in one of its dips.

    Args:
        model: the stock model.
        tokenizer: its tokenizer.
        texts: documents that are not evaluated on.
        strategy: a strategy whose id ends with ``scaled``.
        calibration: what it needs otherwise.
        window: most tokens of a document that are read at once.
        token_budget: most tokens of a forward pass.

    Raises:
        InputError: see :func:`moe_routing.engine.routed.routed`.
    """
    scorer = Scorer(model, tokenizer, token_budget=token_budget, window=window)

    def loss(scale: float) -> float:
        scaled = replace(calibration, scales={**calibration.scales, strategy.id: float(scale)})
        with routed(model, strategy, calibration=scaled):
            scores = scorer.score_rolling(texts, label=f"{strategy.id} at {scale:.3f}")
        return -sum(score.log_likelihood for score in scores)

    curve = np.polynomial.Polynomial.fit(TRIED, [loss(scale) for scale in TRIED], DEGREE)
    turning = curve.deriv().roots()
    ends = [*TRIED, *turning[np.isreal(turning)].real.clip(TRIED[0], TRIED[-1])]
    return round(float(min(ends, key=curve)), 3)


def scale_study(results: Path, strategy_id: str) -> None:
    """Write the fitted scale of a strategy, and fit others of the study in passing.

    The scale of a strategy whose budget could not be kept is left out as well.

    Raises:
        InputError: the strategy has no scale; see :func:`fit_scale`.
    """
    config = load_config(results / "config.yaml")
    if strategy_id not in config.scaled:
        allowed = ", ".join(config.scaled) or "ids that end with scaled"
        raise InputError(f"strategy '{strategy_id}' has no scale; allowed: {allowed}")
    folder = results / "calibration"

    def fit(name: str, job: CalibrationJob, calibration: Calibration, path: Path) -> None:
        strategy, scale = config.parsed[name], None
        if not left_out(folder, [strategy]):
            budgets = load_budgets(folder, budgets_of([strategy]))
            scale = fit_scale(
                job.loaded.model,
                job.loaded.tokenizer,
                job.texts,
                strategy,
                replace(calibration, budgets=budgets),
                window=config.evaluation.window,
                token_budget=config.evaluation.token_budget,
            )
        save_scale(strategy.id, scale, with_suffix(path, ".json"))
        print(f"{strategy.id}: {scale or 'left out'}", file=sys.stderr, flush=True)

    names = {scale_piece(config, name): name for name in (strategy_id, *config.scaled)}
    fit_in_passing(config, results, next(iter(names)), names, fit)
