"""Fused norms and rotary embeddings, and faster linear layers, for inference on the CPU.

Norms and rotary embeddings, in single or double precision, make about half as many passes over
memory as the model's own code; linear layers use the faster library
(:mod:`moe_routing.engine.linear`). Results agree up to rounding.

Shape letters: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_routing.engine.linear import linear, prefers_onednn
from moe_routing.engine.patching import patched_forward

NORM_CLASSES = (
    "OlmoeRMSNorm",
    "FlexOlmoRMSNorm",
    "MixtralRMSNorm",
    "Qwen2MoeRMSNorm",
    "Qwen3MoeRMSNorm",
)
"""Norms that return ``weight * x / sqrt(mean(x^2) + variance_epsilon)``; the rotary embeddings of
their model families rotate the first half of a head's dimensions with the second."""

ROTARY = "apply_rotary_pos_emb"
"""Name of the function that rotates, in the module of each family."""


@contextmanager
def fused_cpu_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Use the fused kernels inside the context; models that they do not fit stay unchanged."""
    with ExitStack() as stack:
        if model.device.type == "cpu" and model.dtype in (torch.float32, torch.float64):
            norms = [m for m in model.modules() if type(m).__name__ in NORM_CLASSES]
            families = {type(norm).__module__ for norm in norms}
            for module in model.modules():
                if fused := _fused(type(module), families):
                    stack.enter_context(
                        patched_forward(module, partial(_replacement, module, fused))
                    )
        yield


Fused = Callable[[nn.Module], Callable[..., object]]
"""From a module to its fused forward."""


def _fused(kind: type[nn.Module], families: set[str]) -> Fused | None:
    """Return the maker of a class's fused forward; None if there is none."""
    if kind.__name__ in NORM_CLASSES:
        return _norm_forward
    if kind is nn.Linear:
        return _linear_forward if prefers_onednn() else None
    rotates = ROTARY in getattr(getattr(kind.forward, "__code__", None), "co_names", ())
    return _rotary_forward if rotates and kind.__module__ in families else None


def _replacement(module: nn.Module, fused: Fused, forward: Callable) -> Callable:
    """Return the fused forward, or the present one if it is not the class's own."""
    own = getattr(forward, "__func__", None) is type(module).forward
    return fused(module) if own else forward


def _norm_forward(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = length.square_().div_(hidden.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
        return (hidden * scale).mul_(norm.weight)

    return forward


def _linear_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda rows: linear(rows, layer.weight, layer.bias)


def _rotary_forward(attention: nn.Module) -> Callable[..., object]:
    """Return the same method with another rotation function.

    The original function belongs to the module of the model's family, which other models share.
    """
    own = type(attention).forward
    names = {**own.__globals__, ROTARY: apply_rotary}
    fused = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    fused.__kwdefaults__ = own.__kwdefaults__
    return MethodType(fused, attention)


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, as ``apply_rotary_pos_emb`` of transformers does.

    Args:
        q: queries, (batch, heads, T, d).
        k: keys, (batch, key heads, T, d).
        cos: cosines, (batch, T, d); the second half repeats the first.
        sin: sines, likewise.
        unsqueeze_dim: position of the heads' dimension.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = rows.shape[-1] // 2
    out = rows * cos
    out[..., :half].addcmul_(rows[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(rows[..., :half], sin[..., half:])
    return out
