"""Where a model keeps its routers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from moe_routing.errors import InputError

ROUTER_CLASSES = (
    "OlmoeTopKRouter",
    "FlexOlmoTopKRouter",
    "MixtralTopKRouter",
    "Qwen2MoeTopKRouter",
    "Qwen3MoeTopKRouter",
)
"""Routers of transformers 5 that return (logits, weights, indices) of a linear softmax top-k.

A family whose router does the same is supported by adding the name of its class here.
"""


@dataclass(frozen=True)
class RouterModule:
    """One layer's router.

    Attributes:
        layer: index among the model's routers, from the input on.
        module: the router; ``weight`` is (experts, hidden), ``top_k`` the trained k.
    """

    layer: int
    module: nn.Module

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self.module.weight.shape[0]

    @property
    def native_k(self) -> int:
        """Experts a token that the model was trained with."""
        return self.module.top_k


def find_routers(model: PreTrainedModel) -> list[RouterModule]:
    """Return the routers of a model, in layer order.

    Raises:
        InputError: the model has no router of a supported class.
    """
    modules = [m for m in model.modules() if type(m).__name__ in ROUTER_CLASSES]
    if not modules:
        raise InputError(
            f"model class {type(model).__name__} has no supported router; "
            f"allowed: {', '.join(ROUTER_CLASSES)}"
        )
    return [RouterModule(layer, module) for layer, module in enumerate(modules)]


def router_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of the router weights: a null belongs to the routers it was fitted on."""
    digest = hashlib.sha256()
    for router in find_routers(model):
        weight_EH = router.module.weight.detach().float().cpu().contiguous()
        digest.update(str(tuple(weight_EH.shape)).encode())
        digest.update(weight_EH.numpy().tobytes())
    return digest.hexdigest()
