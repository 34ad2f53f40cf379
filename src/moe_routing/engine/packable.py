"""What the packed engine assumes about a model, and up to what request length it is exact.

A packed batch is one row of tokens of many requests. It gives the same results as a plain forward
pass of each request only if

- attention is causal and goes through transformers' interface: no other kind of layer (recurrent,
  convolutional, chunked), no distance bias, no attention sink, no cap on the scores;
- position ids alone determine a token's position, and its rotary embedding does not depend on the
  longest sequence in the batch;
- weights are on the device that computes, and nothing is random.

The config says some of this. The rest shows in a comparison: the engine computes the final hidden
states of short requests, and so does the model's own forward pass. A model that does not satisfy
these, or for which the two differ, falls back to plain forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe_routing.engine.adapters import find_routers
from moe_routing.engine.attention import ATTENTION_IMPLEMENTATION, Layout
from moe_routing.engine.offload import is_offloaded
from moe_routing.engine.packing import Span, build, group_by_prefix
from moe_routing.engine.passes import Packed, Plain, out_of_memory
from moe_routing.engine.patching import own_forward, patched_forward
from moe_routing.engine.requests import TokenRequest
from moe_routing.errors import InputError

FIXED_ROPES = ("default", "linear", "llama3", "proportional", "yarn")
"""Rotary embeddings that depend on a token's position alone."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers that can be packed."""

PLAIN_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention", ATTENTION_IMPLEMENTATION)
"""Prefixes of the names of plain attention implementations."""


ROUNDING = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Relative difference of a token's final hidden states that may be rounding in any case. Norms and
rotary embeddings are computed in float32, also in a model of float64."""
NOISE = 8.0
"""Up to this multiple of what another batch shape makes of the model's own pass may be, too."""
LENGTHS = (40, 40, 3, 3)
"""Most tokens of the requests of the comparison. The first two share half of theirs; in the last
ones a convolution over neighbouring tokens shows."""


class Packable(NamedTuple):
    """The longest request that the packed engine is exact for, and why not longer ones, if any."""

    longest: float
    reason: str


def packable(model: PreTrainedModel) -> Packable:
    """Return up to what length the packed engine is exact for a model; 0 tokens if never."""
    if is_offloaded(model):
        return Packable(0, "some of its weights are offloaded")
    return packable_attention(model)


def packable_attention(model: PreTrainedModel) -> Packable:
    """Return up to what length packed attention is exact for a model.

    Its weights may be offloaded: nothing but attention is replaced.
    """
    windows: set[int | None] = set()
    reason = _obstacle(model) or _difference(model, windows)
    if reason:
        return Packable(0, reason)
    window = configured_window(model.config)
    if window not in windows:
        return Packable(window or math.inf, f"attention may slide over {window} tokens")
    rope = rope_span(model.config)
    if rope == math.inf:
        return Packable(rope, "")
    return Packable(rope, f"rotary embeddings depend on the longest sequence from {rope} tokens on")


def _obstacle(model: PreTrainedModel) -> str:
    """Return why a model cannot be packed at any request length; empty if it can."""
    config = model.config
    if not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} is not a class of transformers"
    if model._forward_hooks or model._forward_pre_hooks:
        return "it has forward hooks"
    if not str(config._attn_implementation or "eager").startswith(PLAIN_ATTENTION):
        return f"its attention implementation is '{config._attn_implementation}'"
    kinds = set(getattr(config, "layer_types", None) or []) - {FULL, SLIDING}
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}"
    if not rope_span(config):
        return "its rotary embeddings may depend on more than a token's position"
    return ""


def configured_window(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a token sees in some layer, by the config; None: all."""
    kinds = getattr(config, "layer_types", None) or [SLIDING]
    return getattr(config, "sliding_window", None) if SLIDING in kinds else None


class _Watched:
    """A layout that tells which windows layers ask for."""

    def __init__(
        self,
        inner: Callable[[Sequence[Span], torch.dtype, torch.device], Layout],
        windows: set[int | None],
        spans: Sequence[Span],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._inner, self._windows = inner(spans, dtype, device), windows

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None = None,
    ) -> Tensor:
        self._windows.add(window or None)
        return self._inner.attend(query, key, value, scaling, window)


def _difference(model: PreTrainedModel, windows: set[int | None]) -> str:
    """Compare the engine with the model's own forward pass; return the reason if they differ.

    Both route as the model does, whatever strategy is active. Of each request the median token
    counts, because rounding may give a token another expert.

    Args:
        model: the model.
        windows: the windows that its layers ask for are added.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    lengths = [int(min(length, rope_span(model.config))) for length in LENGTHS]
    ids = [
        torch.randint(model.config.vocab_size, (length + 1,), generator=generator).tolist()
        for length in lengths
    ]
    ids[1][: lengths[1] // 2] = ids[0][: lengths[1] // 2]
    requests = [TokenRequest(row[:-1], row[1:]) for row in ids]
    packed, plain = Packed(model, None), Plain(model)
    packed.layout = partial(_Watched, packed.layout, windows)
    with torch.inference_mode(), unrouted(model):
        try:
            with plain.prepared():
                alone_TH = _states(plain, requests, [[0]])
                own_TH = torch.cat(
                    [_states(plain, requests, pair) for pair in ([[0], [1]], [[2], [3]])]
                )
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return "there is no memory to compare the packed engine with its own forward pass"
        noise = _far(own_TH[: lengths[0]], alone_TH, lengths[:1])
        try:
            with packed.prepared():
                found_TH = _states(packed, requests, [[0, 1], [2], [3]])
        except InputError:
            raise
        except Exception as error:  # whatever the code of a model raises
            return f"the packed engine fails on it ({type(error).__name__}: {error})"
    far = _far(found_TH, own_TH, lengths)
    rounding = ROUNDING.get(model.dtype, max(ROUNDING.values()))
    if far <= max(rounding, NOISE * noise):
        return ""
    return (
        f"the packed engine gives it other hidden states than its own forward pass (by {far:.1g} "
        f"of their length; another batch shape: {noise:.1g})"
    )


def _states(
    runner: Packed | Plain, requests: list[TokenRequest], groups: list[list[int]]
) -> Tensor:
    """Return the final hidden states of requests in one forward pass, in their order."""
    batch = build(requests, group_by_prefix(requests, groups))
    parts = runner.states(batch).split(batch.targets.tolist())
    return torch.cat([parts[batch.members.index(member)] for member in sorted(batch.members)])


def _far(found_TH: Tensor, expected_TH: Tensor, lengths: list[int]) -> float:
    """Return the largest median over a request's tokens of how far hidden states are apart."""
    found_TH, expected_TH = found_TH.double(), expected_TH.double()
    far_T = (found_TH - expected_TH).norm(dim=1) / expected_TH.norm(dim=1)
    medians = torch.stack([part.median() for part in far_T.split(lengths)])
    return float(medians.max().nan_to_num(math.inf))


@contextmanager
def unrouted(model: PreTrainedModel) -> Iterator[None]:
    """Let routers and experts compute what they do without a strategy, inside the context."""
    with ExitStack() as stack:
        for router in find_routers(model):
            for module in (router.module, router.experts):
                stack.enter_context(patched_forward(module, own_forward))
        yield


def rope_span(config: PreTrainedConfig) -> float:
    """Return up to what longest sequence length rotary embeddings do not depend on it."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        return 0  # one for each kind of layer
    kind = parameters.get("rope_type", "default")
    if kind in FIXED_ROPES:
        return math.inf
    longest = config.max_position_embeddings
    if kind == "longrope":
        return parameters.get("original_max_position_embeddings", longest)
    return longest if kind == "dynamic" else 0
