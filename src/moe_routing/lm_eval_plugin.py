"""A model for lm-evaluation-harness, to run any of its tasks under any routing strategy.

The harness up to 0.4.13 knows only models that have been imported. This module therefore also
provides its command line, with the model registered; releases that read the entry point
``lm_eval.models`` find the model by themselves::

    moe-routing-lm-eval run --model moe_routing --tasks hellaswag \
        --model_args pretrained=allenai/OLMoE-1B-7B-0924,strategy=stock_k4
    python -m moe_routing.lm_eval_plugin ...  # the same

In Python, import this module before ``lm_eval.simple_evaluate(model="moe_routing", ...)``.
"""

from __future__ import annotations

import hashlib
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moe_routing.cli import run
from moe_routing.engine.loading import unpack
from moe_routing.engine.requests import TokenRequest, appended_tokens, check_continuation
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Score, Scorer
from moe_routing.errors import InputError
from moe_routing.files import sha256_of
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import parse_strategy

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook
    from transformers import PreTrainedModel

MODEL_NAME = "moe_routing"
_HFLM: Any = HFLM
"""The harness's class; its decorator is untyped, so a type checker does not know the members."""


@register_model(MODEL_NAME)
class RoutedLM(_HFLM):
    """The harness's Hugging Face model, with a routing strategy and this package's scoring engine.

    Tokenisation, truncation and windows are the harness's own. ``batch_size`` applies to generation
    only; scoring packs requests under ``token_budget``.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        strategy: str = "stock",
        calibration: Calibration | str | None = None,
        token_budget: int = 8192,
        **kwargs: object,
    ) -> None:
        """Load the model.

        Args:
            pretrained: folder, Hub id, or a model.
            strategy: id of the routing strategy.
            calibration: folder written by the calibrate step, for strategies that need it.
            token_budget: maximum number of tokens in a forward pass.
            **kwargs: as for ``HFLM``.

        Raises:
            InputError: the strategy is unknown, the calibration is missing or does not fit, the
                model cannot be loaded or routed, or its tokenizer ends every text with a token.
        """
        self._strategy = parse_strategy(strategy)
        if isinstance(calibration, str | Path):
            calibration = Calibration.for_strategies(calibration, self._strategy)
        self._calibration = calibration
        self._token_budget = token_budget
        with _refusing("model_args"):
            super().__init__(pretrained, **kwargs)
        if self.add_bos_token is not False and appended_tokens(self.tokenizer):
            raise InputError(
                "the tokenizer puts a token at the end of every text, and the harness would score "
                "it; allowed: a tokenizer that does not, or add_bos_token=False"
            )
        unpack(self._routable)
        with self._routed():
            pass  # errors are raised before the tasks are built

    @property
    def _routable(self) -> PreTrainedModel:
        """The model that is routed and scored; under an adapter, the one that holds its layers.

        Raises:
            InputError: the adapter is a prompt, which only its own forward pass adds.
        """
        adapted = self.model
        if not hasattr(adapted, "get_base_model"):
            return adapted
        if adapted.active_peft_config.is_prompt_learning:
            kind = adapted.active_peft_config.peft_type
            raise InputError(f"peft has an adapter of type {kind}; allowed: adapters of layers")
        return adapted.get_base_model()

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Keep the answers of every strategy and calibration apart in the harness's cache.

        The harness's own keys are of the request alone.
        """
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            identity = f"{self._strategy.id} {_digest(self._calibration)}"
            cache_hook.dbdict.encode_key = lambda key: f"{key} {identity}"

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate under the strategy."""
        with self._routed(), _refusing("generation"):
            return super().generate_until(requests, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts under the strategy, in the harness's windows."""
        texts = [instance.args[0] for instance in requests]
        windows = [self._windows(text) for text in texts]
        flat = [window for group in windows for window in group]
        groups = [[index] for index in range(len(flat))]
        scores = iter(self._score(flat, groups, disable_tqdm, greedy=False))
        totals = [sum(next(scores).log_likelihood for _ in group) for group in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def get_model_info(self) -> dict:
        """Return what the harness writes with its results, plus the strategy."""
        return {**super().get_model_info(), "routing_strategy": self._strategy.id}

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, ((_, text), context, target) in enumerate(requests):
            check_continuation(text, len(target), self.max_length)
            groups.setdefault(tuple(context), []).append(index)
        tokens = [self._truncated(context, target) for _, context, target in requests]
        scores = self._score(tokens, list(groups.values()), disable_tqdm)
        answers = [(score.log_likelihood, bool(score.greedy)) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _windows(self, text: str) -> list[TokenRequest]:
        pairs = get_rolling_token_windows(
            self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
        )
        return [self._truncated(*make_disjoint_window(pair)) for pair in pairs]

    def _truncated(self, context: list[int], target: list[int]) -> TokenRequest:
        return TokenRequest((context + target)[-(self.max_length + 1) :][:-1], target)

    def _score(
        self,
        requests: Sequence[TokenRequest],
        groups: Sequence[Sequence[int]],
        disable_tqdm: bool,
        *,
        greedy: bool = True,
    ) -> list[Score]:
        mixed = self.mixed_precision_dtype
        scorer = Scorer(
            self._routable,
            self.tokenizer,
            token_budget=self._token_budget,
            workers=None if mixed is None else 1,  # autocast holds in this thread only
            progress=False if disable_tqdm or self.rank != 0 else None,
        )
        autocast = torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None)
        with self._routed(), autocast:
            return scorer.score_tokens(requests, groups, greedy=greedy, label=self._strategy.id)

    def _routed(self) -> AbstractContextManager:
        return routed(self._routable, self._strategy, calibration=self._calibration)


@contextmanager
def _refusing(what: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turn what the harness and its libraries raise about a setting into one line."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 240)}"
        raise InputError(f"{what}: {reason}") from error


def _digest(calibration: Calibration | None) -> str:
    """Return a hash of everything in a calibration."""
    digest = hashlib.sha256()
    if calibration is not None:
        with tempfile.TemporaryDirectory() as folder:
            calibration.save(folder)
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                digest.update(f"{path.name} {sha256_of(path)}".encode())
    return digest.hexdigest()


def main() -> NoReturn:
    """Run the harness's command line with this model registered; bad input is one line."""
    from lm_eval.__main__ import cli_evaluate

    def evaluate(_: object) -> None:
        # A task or data set that is not there; other exceptions are faults, with a traceback.
        with _refusing("lm-evaluation-harness", (OSError, ValueError, ImportError)):
            cli_evaluate()

    run(evaluate)


if __name__ == "__main__":
    main()
