"""What the packed engine assumes about a model, and up to what request length it is exact.

A packed batch is one row of tokens of many requests. It gives the same results as a plain forward
pass of each request only if

- attention is causal, sees every earlier token, and goes through transformers' interface: no
  sliding window shorter than a request, no other kind of layer (recurrent, convolutional, chunked),
  no distance bias, no attention sink, no cap on the scores;
- position ids alone determine a token's position, and its rotary embedding does not depend on the
  longest sequence in the batch;
- only a linear layer lies between the final hidden states and the logits: no scale, no cap, no
  adapter, no hook;
- weights are on the device that computes, and nothing is random.

Any model not known to satisfy these falls back to plain forward passes.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe_routing.engine.attention import ATTENTION_IMPLEMENTATION
from moe_routing.engine.head import plain_head
from moe_routing.engine.offload import is_offloaded

PACKED_CLASSES = (
    "FlexOlmoForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Models of transformers whose code was checked against the above. Config settings that could break
it are checked below."""

FIXED_ROPES = ("default", "linear", "llama3", "proportional", "yarn")
"""Rotary embeddings that depend on a token's position alone."""

PLAIN_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention", ATTENTION_IMPLEMENTATION)
"""Prefixes of the names of plain attention implementations."""


class Packable(NamedTuple):
    """The longest request that the packed engine is exact for, and why not longer ones."""

    longest: float
    reason: str


def packable(model: PreTrainedModel) -> Packable:
    """Return up to what length the packed engine is exact for a model; 0 tokens if never."""
    if is_offloaded(model):
        return Packable(0, "some of its weights are offloaded")
    found = packable_attention(model)
    if found.longest and plain_head(model) is None:
        return Packable(0, "its logits are not those of a linear output layer alone")
    return found


def packable_attention(model: PreTrainedModel) -> Packable:
    """Return up to what length packed attention is exact for a model, whatever its head.

    Its weights may be offloaded: nothing but attention is replaced.
    """
    reason = _obstacle(model)
    if reason:
        return Packable(0, reason)
    attention, rope = attention_span(model.config), rope_span(model.config)
    if attention <= rope:
        return Packable(attention, f"attention slides over {attention} tokens")
    return Packable(rope, f"rotary embeddings depend on the longest sequence from {rope} tokens on")


def _obstacle(model: PreTrainedModel) -> str:
    """Return why a model's attention cannot be packed at any request length; empty if it can."""
    kind, config = type(model), model.config
    if kind.__name__ not in PACKED_CLASSES or not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} is not among the models that the packed engine knows"
    if model._forward_hooks or model._forward_pre_hooks:
        return "it has forward hooks"
    if not str(config._attn_implementation or "eager").startswith(PLAIN_ATTENTION):
        return f"its attention implementation is '{config._attn_implementation}'"
    return ""


def attention_span(config: PreTrainedConfig) -> float:
    """Return the fewest tokens that a token sees in any layer, including itself."""
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return math.inf
    if kinds - {"full_attention", "sliding_attention"}:
        return 0
    # Without a list of layers, a window applies to all of them.
    listed = bool(getattr(config, "layer_types", None))
    return getattr(config, "sliding_window", None) or (0 if listed else math.inf)


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


@torch.inference_mode()
def reset_rope(model: PreTrainedModel) -> None:
    """Reset dynamic rotary embeddings, which grow with the longest sequence seen."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            device = cast("Tensor", module.inv_freq).device
            first = torch.zeros(1, 1, dtype=torch.int64, device=device)
            module(first.float(), position_ids=first)
