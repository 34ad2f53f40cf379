"""Where a model keeps its routers and experts."""

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
    def top_k(self) -> int:
        """Experts per token that the model was trained with."""
        return self.module.top_k


def find_routers(model: PreTrainedModel) -> list[RouterModule]:
    """Return the routers of a model, in layer order.

    Raises:
        InputError: the model has no router of a supported class.
    """
    modules = [module for module in model.modules() if _is_router(module)]
    if not modules:
        raise InputError(
            f"model class {type(model).__name__} has no supported router; "
            f"allowed: {', '.join(ROUTER_CLASSES)}"
        )
    return [RouterModule(layer, module) for layer, module in enumerate(modules)]


def last_experts(model: PreTrainedModel) -> nn.Module | None:
    """Return the experts behind the router of the last layer; None if it has no such router."""
    layers = getattr(model.base_model, "layers", [nn.Identity()])
    blocks = (m for m in layers[-1].modules() if hasattr(m, "gate") and hasattr(m, "experts"))
    return next((block.experts for block in blocks if _is_router(block.gate)), None)


def _is_router(module: nn.Module) -> bool:
    return type(module).__name__ in ROUTER_CLASSES


def router_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of the router weights: a null belongs to the routers it was fitted on."""
    digest = hashlib.sha256()
    for router in find_routers(model):
        weight_EH = router.module.weight.detach().float().cpu().contiguous()
        digest.update(str(tuple(weight_EH.shape)).encode())
        digest.update(weight_EH.numpy().tobytes())
    return digest.hexdigest()
