"""Divergence of predictions: KL of a strategy from the baseline's next-token distribution.

Accuracies can agree while answers flip; the divergence of the distributions shows it (Dutta et al.
2024, arXiv 2407.09141). It is measured on some items of each set, the same for every strategy, in
the pass that scores them. Logits are computed for a block of positions at a time.

Shape letters: N scored positions, C positions of a block, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from moe_routing.config.study import StudyConfig
from moe_routing.data.items import Item
from moe_routing.data.subset import data_rng, seeded_subset
from moe_routing.engine.head import logits_of
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.packable import Packable
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Score, Scorer
from moe_routing.errors import InputError
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import Strategy

BLOCK = 256
"""Positions whose logits are in memory at once, under both strategies."""
Head = Callable[[Tensor], Tensor]
"""From final hidden states, (N, H), to logits, (N, V)."""


def divergence_subset(items: Sequence[Item], dataset: str, config: StudyConfig) -> list[Item]:
    """Return the items that divergences are measured on: a seeded subset, or all if there are few.

    The draw depends on seed and data set only, so it is the same for every strategy.
    """
    size = min(config.evaluation.kl_items, len(items))
    return seeded_subset(items, size, data_rng(config.seed, f"{dataset} divergence"))


class BaselineDivergence:
    """KL(baseline || strategy) on the same items, for one strategy after another.

    The baseline is run once; its final hidden states are kept on the host. Those of a strategy come
    from the pass that scores it (:meth:`moe_routing.engine.scorer.Scorer.score_items`).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        items: Sequence[Item],
        task: str,
        config: StudyConfig,
        calibration: Calibration | None,
        exact: Packable | None = None,
    ) -> None:
        """Run the baseline on the items.

        Args:
            loaded: the model.
            items: what to measure on; see :func:`divergence_subset`.
            task: kind of the evaluation set.
            config: the study.
            calibration: for the baseline, if it needs one.
            exact: see :class:`moe_routing.engine.scorer.Scorer`.

        Raises:
            InputError: an item does not fit into the window.
        """
        self.loaded = loaded
        self.baseline = config.parsed[config.statistics.baseline]
        self._scorer = Scorer(
            loaded.model,
            loaded.tokenizer,
            token_budget=config.evaluation.token_budget,
            window=config.evaluation.window,
            exact=exact,
        )
        ids = [item.id for item in items]
        with routed(
            loaded.model,
            self.baseline,
            calibration=calibration,
            experts_implementation=config.model.experts_implementation,
        ):
            scores = self._scorer.score_items(items, task, f"{self.baseline.id} divergence", ids)
        self._states = states_of(items, scores)

    @property
    def ids(self) -> Set[str]:
        """The items that are measured on."""
        return self._states.keys()

    @property
    def packable(self) -> Packable:
        """Up to what length the packed engine is exact for the model."""
        return self._scorer.packable

    def of(self, strategy: Strategy, states: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the divergence of each item by id, nats, summed over its scored positions.

        These are the positions that predict the tokens of the document (perplexity), of the last
        word, or of the right choice. The baseline itself, under any id, has 0.

        Args:
            strategy: the strategy.
            states: final hidden states of each item under the strategy, at these positions.

        Raises:
            InputError: a divergence is not finite.
        """
        rule = self.loaded.rule
        if strategy.resolved(rule) == self.baseline.resolved(rule):
            return dict.fromkeys(self._states, 0.0)
        found = request_divergences(
            self.loaded.model, list(self._states.values()), [states[name] for name in self._states]
        )
        divergence = {
            name: float(kl_N.sum()) for name, kl_N in zip(self._states, found, strict=True)
        }
        for name, value in divergence.items():
            if not value < float("inf"):
                raise InputError(f"{strategy.id}: the divergence of item '{name}' is not finite")
        return divergence


def states_of(items: Sequence[Item], scores: Sequence[Sequence[Score]]) -> dict[str, Tensor]:
    """Return the final hidden states of items, of those whose states were kept, by id."""
    pairs = zip(items, scores, strict=True)
    kept = ((item.id, group[item.right].states) for item, group in pairs)
    return {name: states for name, states in kept if states is not None}


@torch.inference_mode()
def request_divergences(
    model: PreTrainedModel, reference: Sequence[Tensor], arm: Sequence[Tensor]
) -> list[Tensor]:
    """Return :func:`next_token_divergences` of each request, by final hidden states of both."""
    head = partial(logits_of, model)
    pairs = zip(reference, arm, strict=True)
    return [next_token_divergences(head, *pair) for pair in pairs]


def next_token_divergences(head: Head, reference_NH: Tensor, arm_NH: Tensor) -> Tensor:
    """Return KL(reference || arm) of the next token's distribution at each position.

    Args:
        head: from final hidden states to logits.
        reference_NH: final hidden states under the reference, on any device.
        arm_NH: final hidden states at the same positions under the arm.

    Returns:
        Nats, (N,), float64. Half-precision logits are converted to float32 before the softmax.
    """
    blocks = zip(reference_NH.split(BLOCK), arm_NH.split(BLOCK), strict=True)
    return torch.cat([_divergence(head, *block) for block in blocks])


def _divergence(head: Head, reference_CH: Tensor, arm_CH: Tensor) -> Tensor:
    log_p_CV, log_q_CV = (_log_probabilities(head, rows_CH) for rows_CH in (reference_CH, arm_CH))
    kl_CV = F.kl_div(log_q_CV, log_p_CV, reduction="none", log_target=True)
    # Divergences are not negative, but rounding errors may be.
    return kl_CV.sum(1, dtype=torch.float64).clamp_(min=0)


def _log_probabilities(head: Head, hidden_CH: Tensor) -> Tensor:
    logits_CV = head(hidden_CH)
    return logits_CV.log_softmax(1, dtype=torch.promote_types(logits_CV.dtype, torch.float32))
