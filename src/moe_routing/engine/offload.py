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


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and persistent buffers by name, detached, with their values.

    Those that accelerate has offloaded are loaded.

    Raises:
        InputError: a tensor has no values and no hook of accelerate to load them.
    """
    tensors = _present(module)
    if any(tensor.is_meta for tensor in tensors.values()):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            tensors = _present(module)
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise InputError(
                f"{type(module).__name__}: its {name} is on the meta device, without values; "
                "allowed: weights in memory, or offloaded by accelerate (dispatch_model, "
                "cpu_offload, disk_offload)"
            )
    return tensors


def _present(module: nn.Module) -> dict[str, Tensor]:
    persistent = module._buffers.keys() - module._non_persistent_buffers_set
    buffers = {name: tensor for name, tensor in module._buffers.items() if name in persistent}
    own = {**module._parameters, **buffers}
    return {name: tensor.detach() for name, tensor in own.items() if tensor is not None}


def weight_of(module: LinearRouter) -> Tensor:
    """Return the weight of a router, detached, also if accelerate has offloaded it.

    Raises:
        InputError: the weight has no values and no hook of accelerate to load them.
    """
    return own_tensors(module)["weight"]
