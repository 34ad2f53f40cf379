"""Run a half-precision model in single precision, without a second copy of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from moe_routing.engine.module_types import is_plain
from moe_routing.engine.patching import Forward, patched_forward


@contextmanager
def upcast(model: nn.Module) -> Iterator[None]:
    """Compute in float32 inside the context where the weights are of half precision.

    Each module converts the weights that it holds for the time of its own forward, and those of its
    children without children, which some models read without calling them. So the extra memory is
    twice that of the largest module in half precision, in practice all experts of one layer;
    weights of float32 or better stay as they are. Weights that accelerate offloads are converted
    after they were loaded. No other thread may run the model inside the context.
    """
    with ExitStack() as stack:
        for module in model.modules():
            held = _held(module)
            if any(w is not None and _is_coarse(w) for part in held for w in part.values()):
                stack.enter_context(patched_forward(module, partial(_wide, held)))
        yield


Held = dict[str, nn.Parameter | None]


def _held(module: nn.Module) -> list[Held]:
    """Return the parameters of a module, and of its children that have no children."""
    leaves = [child for child in module.children() if next(child.children(), None) is None]
    read = [module, *(child for child in leaves if not isinstance(child, nn.Embedding))]
    return [part._parameters for part in read]


def _is_coarse(weight: Tensor) -> bool:
    # Numbers of eight bits are codes, meaningless without their scales.
    return is_plain(weight) and weight.dtype in (torch.bfloat16, torch.float16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the dtype itself if it is finer."""
    return torch.promote_types(dtype, torch.float32)


def _wide(parts: Sequence[Held], inner: Forward) -> Callable[..., object]:
    def forward(*args: object, **kwargs: object) -> object:
        kept = [(held, dict(held)) for held in parts]
        try:
            for held, before in kept:
                for name, weight in before.items():
                    if weight is not None and _is_coarse(weight) and not weight.is_meta:
                        held[name] = nn.Parameter(weight.detach().float(), requires_grad=False)
            return inner(*args, **kwargs)
        finally:
            for held, before in kept:
                held.update(before)

    return forward
