"""Make experts dead, temporarily: their outputs are zero, whatever they read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_routing.engine.adapters import experts_of_routers
from moe_routing.engine.experts import tensor_names
from moe_routing.engine.offload import is_offloaded
from moe_routing.errors import InputError


@contextmanager
def dead_experts(model: nn.Module, dead: Sequence[Sequence[int]]) -> Iterator[None]:
    """Set the down projections of experts to zero inside the context, and restore them exactly.

    Their biases, if experts have some, are zero too. Such an expert adds nothing, so removing it
    changes nothing: the null that it is not needed is true. Routers below and in the layer read the
    same as before.

    Args:
        model: the model; no other thread may run it inside the context.
        dead: experts of each layer.

    Raises:
        InputError: another number of layers than the model has, an expert that it lacks, or weights
            that accelerate offloads.
    """
    modules = experts_of_routers(model, "dead experts")
    if len(dead) != len(modules):
        raise InputError(f"dead experts of {len(dead)} layers; allowed: of {len(modules)} layers")
    for layer, (module, experts) in enumerate(zip(modules, dead, strict=True)):
        for expert in experts:
            if not 0 <= expert < module.num_experts:
                raise InputError(
                    f"dead expert {expert} in layer {layer}; allowed: 0 to {module.num_experts - 1}"
                )
    if is_offloaded(model):
        raise InputError(
            "dead experts: weights of the model are offloaded, and cannot be set to zero; allowed: "
            "weights in memory (more memory, or more GPUs)"
        )
    kept: list[tuple[Tensor, list[int], Tensor]] = []
    try:
        for module, experts in zip(modules, map(list, dead), strict=True):
            for name in tensor_names(module):
                if name.startswith("down_proj"):
                    weight = getattr(module, name).detach()
                    kept.append((weight, experts, weight[experts].clone()))
                    with torch.no_grad():
                        weight[experts] = 0
        yield
    finally:
        with torch.no_grad():
            for weight, experts, values in kept:
                weight[experts] = values
