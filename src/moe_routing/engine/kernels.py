"""Fused norms and faster linear layers for inference on the CPU.

Norms, in single or double precision, make about half as many passes over memory as the model's own
code; linear layers use the faster library (:mod:`moe_routing.engine.linear`). Results agree up to
rounding.

Shape letters: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_routing.engine.linear import linear, prefers_onednn
from moe_routing.engine.module_types import is_plain
from moe_routing.engine.patching import patched_forward

NORM_CLASSES = (
    "OlmoeRMSNorm",
    "FlexOlmoRMSNorm",
    "MixtralRMSNorm",
    "Qwen2MoeRMSNorm",
    "Qwen3MoeRMSNorm",
)
"""Norms that return ``weight * x / sqrt(mean(x^2) + variance_epsilon)``."""

Forward = Callable[[Tensor], Tensor]
Fuse = Callable[[Any], Forward]
"""From a module of the class that it is for to the module's fused forward."""


@contextmanager
def fused_cpu_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Use the fused kernels inside the context; models that they do not fit stay unchanged."""
    with ExitStack() as stack:
        if model.device.type == "cpu" and model.dtype in (torch.float32, torch.float64):
            for module in model.modules():
                if fused := _fused(module):
                    replace = partial(_replacement, module, fused)
                    stack.enter_context(patched_forward(module, replace))
        yield


def _fused(module: nn.Module) -> Fuse | None:
    """Return the maker of a module's fused forward; None if there is none."""
    if type(module).__name__ in NORM_CLASSES:
        return _norm_forward
    plain = type(module) is nn.Linear and is_plain(module.weight)
    return _linear_forward if plain and prefers_onednn() else None


def _replacement(module: nn.Module, fused: Fuse, forward: Callable) -> Callable:
    """Return the fused forward, or the present one if it is not the class's own."""
    own = getattr(forward, "__func__", None) is type(module).forward
    return fused(module) if own else forward


def _norm_forward(norm: nn.Module) -> Forward:
    def forward(hidden: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = length.square_().div_(hidden.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
        return (hidden * scale).mul_(norm.weight)

    return forward


def _linear_forward(layer: nn.Linear) -> Forward:
    return lambda rows: linear(rows, layer.weight, layer.bias)
