"""Fit the free parameter of a strategy so that it keeps a mean number of experts.

Routing changes the states that later layers read, and with them how many experts they keep. So the
parameter is fitted by running the routed model: what it keeps of the calibration tokens under the
stock model is only where the search starts.

Shape letters: L layers, N numbers that are aimed at (1, or one of each layer).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_routing.config.study import load_config
from moe_routing.engine.recorder import Recorder, RoutingStatistics
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError
from moe_routing.evaluation.calibration_job import CalibrationJob
from moe_routing.evaluation.fitting import fit_in_passing
from moe_routing.evaluation.pieces import budget_piece
from moe_routing.evaluation.store import with_suffix
from moe_routing.routing.budget import FITTED, LEFT_OUT, Budget, Value
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import Budgeted, parse_strategy

CLOSE = 0.05
"""Experts per token and layer within which the search ends."""
ALLOWED = 0.1
"""Experts per token and layer within which a budget counts as kept."""
PASSES = 8
"""Most values that are tried."""


@dataclass(frozen=True)
class Trial:
    """A value of the free parameter, and what the routed model keeps with it."""

    value: Value
    statistics: RoutingStatistics

    def realised_N(self, *, by_layer: bool) -> NDArray[np.float64]:
        """Return the mean experts over all layers, or of each layer."""
        mean_L = self.statistics.mean_experts_L()
        return mean_L if by_layer else mean_L.mean(keepdims=True)

    def error(self, budget: float, *, by_layer: bool) -> float:
        """Return the largest distance from the budget."""
        return float(np.abs(self.realised_N(by_layer=by_layer) - budget).max())


def fit_budget(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    strategy: Budgeted,
    calibration: Calibration,
    *,
    window: int | None = None,
    token_budget: int = 8192,
) -> Budget:
    """Fit the free parameter of a strategy to its budget on some documents.

    The value that keeps the budget on the calibration sample is run; by what it misses, another
    number is aimed at on the sample. This ends within :data:`CLOSE` of the budget, or at a limit
    of the parameter. The point is left out if nothing within :data:`ALLOWED` has been found.

    Args:
        model: the stock model.
        tokenizer: its tokenizer.
        texts: documents that are not evaluated on.
        strategy: a strategy with a budget.
        calibration: what it needs otherwise.
        window: most tokens of a document that are read at once.
        token_budget: most tokens of a forward pass.

    Raises:
        InputError: the sample has too few candidates for the budget; see also
            :func:`moe_routing.engine.routed.routed`.
    """
    experts, by_layer = calibration.sample.num_experts, strategy.by_layer
    budget = float(strategy.budget or 0)
    value_for = strategy.on_sample(calibration, experts)
    scorer = Scorer(model, tokenizer, token_budget=token_budget, window=window)
    windows = [part for parts in scorer.encoder.rolling(texts) for part in parts]

    def run(value: Value) -> Trial:
        recorder = Recorder()
        with routed(model, strategy.at(value), calibration=calibration, recorder=recorder):
            reader = Scorer(
                model,
                tokenizer,
                token_budget=token_budget,
                window=window,
                recorder=recorder,
                exact=scorer.packable,
            )
            reader.final_states(windows, label=strategy.id)
        return Trial(value, recorder.statistics())

    trials: list[Trial] = []
    aim_N = np.full(calibration.sample.num_layers if by_layer else 1, budget)
    for _ in range(PASSES):
        value = value_for(aim_N.tolist())
        if any(trial.value == value for trial in trials):
            break  # a limit, or a step of the counts
        trials.append(run(value))
        if trials[-1].error(budget, by_layer=by_layer) <= CLOSE:
            break
        missing_N = budget - trials[-1].realised_N(by_layer=by_layer)
        aim_N = (aim_N + missing_N).clip(CLOSE, strategy.max_experts)
    return _best(strategy, trials, budget, strategy.limits(calibration, experts))


def _best(
    strategy: Budgeted, trials: Sequence[Trial], budget: float, limits: tuple[float, float]
) -> Budget:
    """Return the trial closest to the budget as a result."""
    best = min(trials, key=lambda trial: trial.error(budget, by_layer=strategy.by_layer))
    realised = best.statistics.mean_experts()
    kept = abs(realised - budget) <= ALLOWED
    reason = ""
    if not kept:
        reason = f"no {strategy.free} keeps {budget:g} experts per token on calibration text"
        if best.value in limits:
            reason += f": {best.value:.3g}, the limit, keeps {realised:.2f}"
        else:
            reason += f"; the closest keeps {realised:.2f}"
    return Budget(
        strategy=strategy.id,
        parameter=strategy.free,
        value=best.value if kept else None,
        budget=budget,
        realised=realised,
        realised_by_layer=tuple(best.statistics.mean_experts_L().tolist()),
        tokens=best.statistics.tokens,
        status=FITTED if kept else LEFT_OUT,
        reason=reason,
    )


def budget_study(results: Path, strategy_id: str) -> None:
    """Write the fitted budget of a strategy, and fit others of the study in passing.

    Raises:
        InputError: the strategy has no budget; see :func:`fit_budget`.
    """
    config = load_config(results / "config.yaml")
    if strategy_id not in config.budgeted:
        allowed = ", ".join(config.budgeted) or "ids such as topp_k8_b4"
        raise InputError(f"strategy '{strategy_id}' has no budget to fit; allowed: {allowed}")

    def fit(name: str, job: CalibrationJob, calibration: Calibration, path: Path) -> None:
        strategy = cast("Budgeted", parse_strategy(name))
        budget = fit_budget(
            job.loaded.model,
            job.loaded.tokenizer,
            job.texts,
            strategy,
            calibration,
            window=config.evaluation.window,
            token_budget=config.evaluation.token_budget,
        )
        budget.save(with_suffix(path, ".json"))
        print(budget, file=sys.stderr, flush=True)

    names = {budget_piece(config, name): name for name in (strategy_id, *config.budgeted)}
    fit_in_passing(config, results, next(iter(names)), names, fit)
