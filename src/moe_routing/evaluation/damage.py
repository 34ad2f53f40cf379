"""How far a strategy moves the predictions of a model, document by document.

Shape letters: n documents, N scored positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_routing.engine.recorder import Recorder, RoutingStatistics
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError
from moe_routing.evaluation.divergence import request_divergences
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import Strategy


@dataclass(frozen=True)
class Damage:
    """What a strategy does to the predictions on some documents.

    Attributes:
        kl_n: mean KL(stock || routed) of a document's next-token distributions, nats per token.
        statistics: how the strategy routed.
    """

    kl_n: NDArray[np.float64]
    statistics: RoutingStatistics


class Documents:
    """Documents, and what the stock model predicts in them.

    Every text is a document of its own, read after the tokenizer's prefix token and cut at the
    window. The stock model is run once; its final hidden states are kept on the host.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        *,
        window: int | None = None,
        token_budget: int = 8192,
    ) -> None:
        """Run the stock model.

        Args:
            model: the stock model.
            tokenizer: its tokenizer.
            texts: the documents.
            window: most tokens of a document that are read; None: the model's longest sequence.
            token_budget: most tokens of a forward pass.

        Raises:
            InputError: a text without a token.
        """
        self.model = model
        self._scorer = partial(Scorer, model, tokenizer, token_budget=token_budget, window=window)
        stock = self._scorer()
        self._windows = [first for first, *_ in stock.encoder.rolling(texts)]
        self._stock_nNH = stock.final_states(self._windows, label="stock")
        self._exact = stock.packable

    def damage(self, strategy: Strategy, calibration: Calibration | None) -> Damage:
        """Return the damage of a strategy.

        Raises:
            InputError: see :func:`moe_routing.engine.routed.routed`; or a divergence that is not
                finite.
        """
        recorder = Recorder()
        with routed(self.model, strategy, calibration=calibration, recorder=recorder):
            scorer = self._scorer(recorder=recorder, exact=self._exact)
            routed_nNH = scorer.final_states(self._windows, label=strategy.id)
        found = request_divergences(self.model, self._stock_nNH, routed_nNH)
        kl_n = np.array([float(kl_N.mean()) for kl_N in found])
        if not np.isfinite(kl_n).all():
            raise InputError(
                f"{strategy.id}: the divergence of a calibration document is not finite"
            )
        return Damage(kl_n, recorder.statistics())
