"""The routers and experts of a model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_routing.engine.module_types import Experts, LinearRouter
from moe_routing.engine.offload import own_tensors, weight_of
from moe_routing.errors import InputError
from moe_routing.routing.rule import ModelRule

ROUTER_CLASSES = (
    "OlmoeTopKRouter",
    "FlexOlmoTopKRouter",
    "MixtralTopKRouter",
    "Qwen2MoeTopKRouter",
    "Qwen3MoeTopKRouter",
)
"""Routers of transformers 5 that return (logits, weights, indices) of a linear softmax top-k.

To support another family with such a router, add the name of its class.
"""


CHECKSUM_WORDS = 1 << 20
"""Words of a weight that are summed at once."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by bytes."""


@dataclass(frozen=True)
class RouterModule:
    """One layer's router.

    Attributes:
        layer: index among the model's routers, from the input.
        module: the router.
    """

    layer: int
    module: LinearRouter

    @property
    def num_experts(self) -> int:
        """Number of experts of the layer."""
        return self.module.weight.shape[0]

    @property
    def top_k(self) -> int:
        """Experts per token that the model was trained with."""
        return self.module.top_k

    @property
    def rule(self) -> ModelRule:
        """The model's own routing rule in this layer."""
        renormalises = getattr(self.module, "norm_topk_prob", True)  # Mixtral always does
        return ModelRule(self.top_k, "renormalised" if renormalises else "softmax")

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights that the router returns."""
        # The others round to the model's dtype; Mixtral's keeps the float32 of the softmax.
        rounds = hasattr(self.module, "norm_topk_prob")
        return self.module.weight.dtype if rounds else torch.float32


def find_routers(model: nn.Module) -> list[RouterModule]:
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


@contextmanager
def watched(model: nn.Module, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call a function for each router in this thread's forward passes inside the context.

    Args:
        model: a model with supported routers; other threads may run it too.
        see: called with the layer, the router's inputs, (tokens, hidden), and its logits, (tokens,
            experts).

    Raises:
        InputError: the model has no router of a supported class.
    """
    thread = threading.get_ident()

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                see(layer, inputs[0].reshape(-1, inputs[0].shape[-1]), output[0])

        return hook

    with ExitStack() as stack:
        for router in find_routers(model):
            handle = router.module.register_forward_hook(hook_of(router.layer))
            stack.callback(handle.remove)
        yield


def find_experts(model: nn.Module) -> list[Experts]:
    """Return the experts whose implementation can be chosen in transformers, in layer order."""
    return [module for module in model.modules() if _is_experts(module)]


def _is_router(module: nn.Module) -> TypeGuard[LinearRouter]:
    return type(module).__name__ in ROUTER_CLASSES


def _is_experts(module: nn.Module) -> TypeGuard[Experts]:
    marks = ("has_gate", "is_transposed", "config")  # set by transformers' decorator of experts
    return all(hasattr(module, mark) for mark in marks)


def router_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of the router weights, which ties a null to the routers it was fitted on.

    Raises:
        InputError: the model has no supported router, or weights without values.
    """
    digest = hashlib.sha256()
    for router in find_routers(model):
        weight_EH = weight_of(router.module).float().cpu().contiguous()
        digest.update(str(tuple(weight_EH.shape)).encode())
        digest.update(weight_EH.numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def model_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of all weights, which ties a calibration to the model it was made on.

    It covers the name, shape and dtype of every parameter and persistent buffer, and two checksums
    of its bits, computed where it lies. A change of any single element changes the hash.

    Raises:
        InputError: weights without values.
    """
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        for name, tensor in own_tensors(module).items():
            described = (f"{path}.{name}", tuple(tensor.shape), str(tensor.dtype))
            digest.update(repr((*described, *_checksums(tensor))).encode())
    return digest.hexdigest()


def _checksums(tensor: Tensor) -> tuple[int, int]:
    """Return the sum of a tensor's bits as integers, and the sum weighted by place, modulo 2^64.

    The integers are as wide as the tensor's size permits, so that few are summed.
    """
    flat = tensor.contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    width = next(w for w in sorted(INTEGERS, reverse=True) if flat.nbytes % w == 0)
    if flat.storage_offset() or flat.data_ptr() % width:
        flat = flat.clone()  # memory is read as wider integers only from a multiple of their width
    words = flat.view(INTEGERS[width])
    place_N = torch.arange(min(CHECKSUM_WORDS, words.numel()), device=words.device)
    total = weighted = 0
    for index, word_N in enumerate(words.split(CHECKSUM_WORDS)):
        word_N = word_N.long()
        part = int(word_N.sum())
        total += part
        weighted += index * CHECKSUM_WORDS * part + int((place_N[: word_N.numel()] * word_N).sum())
    return total % 2**64, weighted % 2**64
