"""Certify a strategy: the fewest experts whose expected damage is at most a margin."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_routing.config.study import load_config
from moe_routing.data.sources import CERTIFICATION_FILE
from moe_routing.engine.adapters import model_fingerprint
from moe_routing.engine.patching import sole_replacement
from moe_routing.errors import InputError
from moe_routing.evaluation.damage import Damage, Documents
from moe_routing.evaluation.study_model import load_study_model
from moe_routing.files import read_parquet
from moe_routing.routing.calibration import Calibration, certificate_path
from moe_routing.routing.certificate import Certificate
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.strategies.absolute import Absolute, budget_threshold
from moe_routing.routing.strategies.certified import Certified
from moe_routing.statistics.risk_control import check_examples, least_controlled, risk

BUDGETS_PER_EXPERT = 40
"""Budgets that are told apart, per expert. A coarse grid leaves part of the margin unused."""
KEEP_ALL = sys.float_info.min
"""A threshold that every score is above."""
CLIP = 10
"""A document counts with a damage of at most this many margins."""


def certify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    strategy: Certified,
    calibration: Calibration,
    *,
    window: int | None = None,
    token_budget: int = 8192,
) -> Certificate:
    """Return the certificate of a strategy on calibration documents.

    Conformal risk control (:mod:`moe_routing.statistics.risk_control`) over thresholds of the
    score, which are made for a grid of mean experts on the calibration sample.

    Args:
        model: the stock model.
        tokenizer: its tokenizer.
        texts: documents; neither evaluated on, nor used for the rest of the calibration.
        strategy: what to certify.
        calibration: what its scores need.
        window: most tokens of a document that are read; None: the model's longest sequence.
        token_budget: most tokens of a forward pass.

    Raises:
        InputError: too few documents for the margin, a margin that cannot be kept, a text without a
            token, a calibration of another model, or a model that is routed.
    """
    if routing := sole_replacement(model):
        raise InputError(f"certificate: the model is {routing}; allowed: the stock model")
    check_documents(len(texts), strategy.margin)
    documents = Documents(model, tokenizer, texts, window=window, token_budget=token_budget)
    return certify_on(documents, strategy, calibration)


def check_documents(n: int, margin: float) -> None:
    """Check that a margin can be certified on ``n`` documents.

    Raises:
        InputError: there are too few.
    """
    check_examples(n, margin, CLIP * margin)


def certify_on(documents: Documents, strategy: Certified, calibration: Calibration) -> Certificate:
    """Return the certificate of a strategy on documents; see :func:`certify`."""
    bound = CLIP * strategy.margin
    trial = _Trial(documents, strategy, calibration, bound)
    found = least_controlled(trial.losses, trial.levels, strategy.margin, bound)
    statistics = trial.damages[found.level].statistics
    return Certificate(
        strategy=strategy.id,
        margin=strategy.margin,
        threshold=trial.threshold(found.level),
        budget=trial.budget(found.level),
        bound=bound,
        documents=len(found.loss_n),
        damage=found.mean_losses[found.level],
        risk=risk(found.loss_n, bound),
        mean_experts=statistics.mean_experts(),
        mean_experts_L=tuple(statistics.mean_experts_L().tolist()),
        tried={f"{trial.budget(level):g}": mean for level, mean in found.mean_losses.items()},
        fingerprint=model_fingerprint(documents.model),
    )


def certify_study(results: Path, strategy_ids: Sequence[str]) -> Iterator[Certificate]:
    """Certify strategies on the documents of a study, and write and yield their certificates.

    Raises:
        InputError: a strategy that is not certified; see :func:`certify`.
    """
    config = load_config(results / "config.yaml")
    strategies = []
    for name in strategy_ids:
        strategy = parse_strategy(name)
        if not isinstance(strategy, Certified):
            allowed = ", ".join(config.certified) or "ids such as certified_k8_m001"
            raise InputError(f"strategy '{name}' has no certificate; allowed: {allowed}")
        strategies.append(strategy)
    calibration = Calibration.for_strategies(
        results / "calibration", *strategies, fitted_by_running=False
    )
    texts = list(read_parquet(results / "data" / CERTIFICATION_FILE, "text")["text"])
    for strategy in strategies:
        check_documents(len(texts), strategy.margin)
    loaded = load_study_model(config.model, results, config.resources.threads)
    documents = Documents(
        loaded.model,
        loaded.tokenizer,
        texts,
        window=config.evaluation.window,
        token_budget=config.evaluation.token_budget,
    )
    for strategy in strategies:
        certificate = certify_on(documents, strategy, calibration)
        certificate.save(certificate_path(results / "calibration", strategy.id))
        yield certificate


@dataclass
class _Trial:
    """Runs a strategy at the budgets of the grid, each at most once."""

    documents: Documents
    strategy: Certified
    calibration: Calibration
    bound: float
    damages: dict[int, Damage] = field(default_factory=dict)

    @property
    def levels(self) -> int:
        """Number of budgets: one step, two steps, ..., and all that may be kept."""
        return round(self._most * BUDGETS_PER_EXPERT)

    @property
    def _most(self) -> int:
        sample = self.calibration.sample
        candidates = sample.top_k if self.strategy.candidates == "own" else sample.num_experts
        return min(self.strategy.max_k, candidates)

    def budget(self, level: int) -> float:
        """Return the mean experts that a level is made for."""
        return (level + 1) / BUDGETS_PER_EXPERT

    def threshold(self, level: int) -> float:
        """Return the smallest score that is kept; the last level keeps all that it may."""
        if level == self.levels - 1:
            return KEEP_ALL
        return budget_threshold(self._score_LTK, self.budget(level))

    @cached_property
    def _score_LTK(self) -> Tensor:
        return self.strategy.sample_scores(self.calibration)

    def _rule(self, threshold: float) -> Absolute:
        strategy = self.strategy
        return Absolute(
            max_k=strategy.max_k,
            weighting=strategy.weighting,
            score=strategy.score,
            candidates=strategy.candidates,
            dropped=strategy.dropped,
            threshold=threshold,
        )

    def losses(self, level: int) -> NDArray[np.float64]:
        """Return the clipped damage of every document, (n,)."""
        rule = self._rule(self.threshold(level))
        self.damages[level] = self.documents.damage(rule, self.calibration)
        return np.minimum(self.damages[level].kl_n, self.bound)
