"""Models whose weights accelerate offloads to the disk or the host.

Between forward passes the parameters of such a model are on the meta device, without values; hooks
load them for each module's forward. Code that reads a weight outside a forward uses this module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_routing.engine.module_types import LinearRouter
from moe_routing.errors import InputError


def is_offloaded(model: nn.Module) -> bool:
    """Return whether some weights are offloaded."""
    return any(parameter.is_meta for parameter in model.parameters())


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of a model's inputs; accelerate's hooks move them on from the host."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def weight_of(module: LinearRouter) -> Tensor:
    """Return the weight of a router, detached, also if accelerate has offloaded it.

    Raises:
        InputError: the weight has no values and no hook of accelerate to load them, or it is
            sharded across processes.
    """
    weight = module.weight
    if weight.is_meta:
        from accelerate.utils import align_module_device

        with align_module_device(module):
            weight = module.weight
    name = type(module).__name__
    if weight.is_meta:
        raise InputError(
            f"{name}: its weight is on the meta device, without values; allowed: weights in "
            "memory, or offloaded by accelerate (dispatch_model, cpu_offload, disk_offload)"
        )
    if weight.ndim != 2:
        raise InputError(
            f"{name}: its weight has the shape {tuple(weight.shape)}; allowed: whole weights, "
            "(experts, hidden size), not divided among processes"
        )
    return weight.detach()
