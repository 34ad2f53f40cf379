"""Leaner norms, rotary embeddings and linear layers for inference on the CPU.

Norms and rotary embeddings, in single or double precision, make about half the passes over memory
of the model's own code; linear layers use the faster library (:mod:`moe_routing.engine.linear`).
Results agree to rounding.

Shape letters: T tokens, H hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_routing.engine.linear import linear, prefers_onednn
from moe_routing.engine.patching import swapped

NORM_CLASSES = (
    "OlmoeRMSNorm",
    "FlexOlmoRMSNorm",
    "MixtralRMSNorm",
    "Qwen2MoeRMSNorm",
    "Qwen3MoeRMSNorm",
)
"""Norms that return ``weight * x / sqrt(mean(x^2) + variance_epsilon)``; the rotary embeddings of
their model families turn the first half of a head's dimensions against the second."""


@contextmanager
def lean_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Use the lean kernels inside the context; a model that they do not fit stays as it is."""
    with ExitStack() as stack:
        if model.device.type == "cpu" and model.dtype in (torch.float32, torch.float64):
            norms = [m for m in model.modules() if type(m).__name__ in NORM_CLASSES]
            for norm in norms:
                stack.enter_context(swapped(norm, "forward", _norm_forward(norm)))
            for module in model.modules() if prefers_onednn() else ():
                if type(module) is nn.Linear:
                    forward = partial(linear, weight_YX=module.weight, bias_Y=module.bias)
                    stack.enter_context(swapped(module, "forward", forward))
            for source in {type(norm).__module__ for norm in norms}:
                family = sys.modules[source]
                stack.enter_context(swapped(family, "apply_rotary_pos_emb", apply_rotary))
        yield


def _norm_forward(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = length.square_().div_(hidden.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
        return (hidden * scale).mul_(norm.weight)

    return forward


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, as ``apply_rotary_pos_emb`` of transformers does.

    Args:
        q: queries, (batch, heads, T, d).
        k: keys, (batch, key heads, T, d).
        cos: cosines, (batch, T, d); the second half repeats the first.
        sin: sines, likewise.
        unsqueeze_dim: where the heads' dimension is put in.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = rows.shape[-1] // 2
    out = rows * cos
    out[..., :half].addcmul_(rows[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(rows[..., :half], sin[..., half:])
    return out
