"""What fewer experts save: speed of scoring and of decoding, and expert bytes that are read.

Strategies take turns, so that background load affects all alike; times are medians over turns. Only
kernels that skip experts are faster for fewer of them, and only decoding one text at a time reads
no more than the experts of one token. So the bytes say what a memory-bound machine could save, and
the times what this one does.

Shape letters: B texts (one), S tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from moe_routing.engine.adapters import find_experts
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.offload import input_device
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.evaluation.efficiency import interleaved
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import Strategy

TEXT_TOKENS = 2048
"""Tokens that are scored in one turn, about."""
PROMPT_TOKENS = 32
"""Tokens that are read before decoding begins; not timed."""
NEW_TOKENS = 32
"""Tokens that are decoded in one turn."""


@dataclass(frozen=True)
class Gain:
    """What a strategy costs.

    Attributes:
        scoring_tokens_per_second: median over turns.
        decode_tokens_per_second: median over turns, one text at a time.
        decode_experts: mean experts per decoded token and layer.
        decode_expert_bytes: bytes of expert weights that a decoded token reads; None where the
            experts of a layer are not in one module.
    """

    scoring_tokens_per_second: float
    decode_tokens_per_second: float
    decode_experts: float
    decode_expert_bytes: float | None


def measure_gains(
    loaded: LoadedModel,
    strategies: Sequence[Strategy],
    texts: Sequence[str],
    calibration: Calibration | None,
    *,
    turns: int,
    token_budget: int = 8192,
    window: int | None = None,
) -> dict[str, Gain]:
    """Return what each strategy costs, by id.

    Args:
        loaded: the model.
        strategies: the strategies.
        texts: what is scored, and the start of what is decoded.
        calibration: for strategies that need one.
        turns: how often each strategy is timed, after one turn that is not.
        token_budget: most tokens of a forward pass, in scoring.
        window: most tokens of a text that are read at once.

    Raises:
        InputError: see :func:`moe_routing.engine.routed.routed`.
    """
    model = loaded.model
    scorer = Scorer(model, loaded.tokenizer, token_budget=token_budget, window=window)
    chosen = _first_texts(scorer, texts)
    tokens = sum(len(request.target_ids) for text in chosen for request in text)
    ids_BS = _prompt(loaded, texts)

    def under(strategy: Strategy, recorder: Recorder | None = None) -> AbstractContextManager:
        return routed(model, strategy, calibration=calibration, recorder=recorder)

    def score(strategy: Strategy) -> float:
        requests = [request for text in chosen for request in text]
        groups = [[index] for index in range(len(requests))]
        with under(strategy):
            started = time.perf_counter()
            scorer.score_tokens(requests, groups, label=f"{strategy.id}, timed")
            _wait(model)
            return time.perf_counter() - started

    def decode(strategy: Strategy) -> float:
        with under(strategy):
            return decode_seconds(model, ids_BS, NEW_TOKENS)

    by_id = {strategy.id: strategy for strategy in strategies}
    scoring, decoding = (_timed(run, by_id, turns) for run in (score, decode))
    found = {}
    for name, strategy in by_id.items():
        experts_L = _decode_experts(model, ids_BS, lambda r, s=strategy: under(s, r))
        bytes_L = expert_bytes(model, len(experts_L))
        found[name] = Gain(
            scoring_tokens_per_second=tokens / statistics.median(scoring[name]),
            decode_tokens_per_second=NEW_TOKENS / statistics.median(decoding[name]),
            decode_experts=statistics.fmean(experts_L),
            decode_expert_bytes=None
            if bytes_L is None
            else sum(n * size for n, size in zip(experts_L, bytes_L, strict=True)),
        )
    return found


def _timed(
    run: Callable[[Strategy], float], strategies: Mapping[str, Strategy], turns: int
) -> dict[str, list[float]]:
    """Return the seconds of each strategy in each turn, after one that is not timed."""
    for strategy in strategies.values():
        run(strategy)
    runs = {name: partial(run, strategy) for name, strategy in strategies.items()}
    return interleaved(runs, turns, np.random.default_rng(0))


def _first_texts(scorer: Scorer, texts: Sequence[str]) -> list[list]:
    """Return the token requests of the first texts, about as many tokens as are timed."""
    chosen, tokens = [], 0
    for text in texts:
        (windows,) = scorer.encoder.rolling([text])
        chosen.append(windows)
        tokens += sum(len(window.target_ids) for window in windows)
        if tokens >= TEXT_TOKENS:
            break
    return chosen


def _prompt(loaded: LoadedModel, texts: Sequence[str]) -> Tensor:
    ids: list[int] = []
    for text in texts:
        ids += loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= PROMPT_TOKENS:
            break
    return torch.tensor([ids[:PROMPT_TOKENS]], device=input_device(loaded.model))


@torch.inference_mode()
def decode_seconds(model: PreTrainedModel, ids_BS: Tensor, tokens: int) -> float:
    """Return the time that greedy decoding takes, the reading of the prompt left out."""
    state = model(input_ids=ids_BS, use_cache=True)
    _wait(model)
    started = time.perf_counter()
    _decode(model, state, tokens)
    _wait(model)
    return time.perf_counter() - started


@torch.inference_mode()
def _decode_experts(
    model: PreTrainedModel,
    ids_BS: Tensor,
    under: Callable[[Recorder | None], AbstractContextManager],
) -> list[float]:
    """Return the mean experts of a decoded token, by layer."""
    with under(None):
        state = model(input_ids=ids_BS, use_cache=True)
    recorder = Recorder()
    with under(recorder):
        _decode(model, state, NEW_TOKENS)
    return recorder.statistics().mean_experts_L().tolist()


def _decode(model: PreTrainedModel, state: CausalLMOutputWithPast, tokens: int) -> None:
    """Decode greedily from what a forward pass with a cache returned."""
    name = "cache" if "cache" in state else "past_key_values"  # since transformers 5.24, and before
    for _ in range(tokens):
        next_B1 = cast("Tensor", state.logits)[:, -1:].argmax(-1)
        state = model(input_ids=next_B1, use_cache=True, **{name: state[name]})


def expert_bytes(model: nn.Module, layers: int) -> list[float] | None:
    """Return the bytes of one expert's weights, by layer with a router.

    Args:
        model: the model.
        layers: number of its routers.

    Returns:
        None if the experts are not in one module per router.
    """
    found = [
        sum(weight.nbytes for weight in module.parameters(recurse=False)) / module.num_experts
        for module in find_experts(model)
    ]
    return found if len(found) == layers and all(found) else None


def _wait(model: PreTrainedModel) -> None:
    """Wait until the device has done what it was asked to."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
