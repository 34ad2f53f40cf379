"""The routers and experts of a model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_routing.engine.behaviour import Behaviour, Blueprint, observe
from moe_routing.engine.experts import supports_dropless
from moe_routing.engine.module_types import Experts, LinearRouter, is_plain
from moe_routing.engine.offload import own_tensors, weight_of
from moe_routing.errors import InputError
from moe_routing.routing.rule import ModelRule

CHECKSUM_WORDS = 1 << 20
"""Words of a weight that are summed at once."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by bytes."""


ROUTERS = ("gate", "router")
"""Names that transformers gives to the router beside a module ``experts``."""


@dataclass(frozen=True)
class RouterModule:
    """One layer's router.

    Attributes:
        layer: index among the model's routers, from the input; layers without experts do not count.
        module: the router.
        behaviour: what it does.
        experts: the experts of the layer.
    """

    layer: int
    module: nn.Module
    behaviour: Behaviour
    experts: nn.Module

    @property
    def linear(self) -> LinearRouter:
        """The module that holds the router's weight, (experts, hidden size)."""
        return cast("LinearRouter", self.module.get_submodule(self.behaviour.weight))

    @property
    def num_experts(self) -> int:
        """Number of experts of the layer."""
        return self.behaviour.num_experts

    @property
    def top_k(self) -> int:
        """Experts per token that the model was trained with."""
        return self.rule.top_k

    @property
    def rule(self) -> ModelRule:
        """The model's own routing rule in this layer."""
        return self.behaviour.rule


def find_routers(model: nn.Module) -> list[RouterModule]:
    """Return the routers of a model, in layer order.

    Raises:
        InputError: the model has no experts, or a router that this package does not know.
    """
    routers = []
    for router, experts in _layers(model):
        found = _behaviour(router)
        count = getattr(experts, "num_experts", None)
        if isinstance(found, Behaviour) and count not in (None, found.num_experts):
            found = f"it selects among {found.num_experts} experts, and {count} compute something"
        if isinstance(found, str):
            raise InputError(_unsupported(model, found, type(router).__name__ if router else ""))
        routers.append(RouterModule(len(routers), cast("nn.Module", router), found, experts))
    if not routers:
        raise InputError(_unsupported(model, "none of its layers has a module 'experts'"))
    return routers


def _behaviour(router: nn.Module | None) -> Behaviour | str:
    """Return what a router does, or why it is not supported."""
    if router is None:
        return "no router stands beside its experts"
    if type(router).__module__.startswith("peft."):
        return "an adapter changes it; merge that into the weights first (merge_and_unload)"
    return observe(Blueprint.of(router))


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """Yield router and experts of each layer that has experts."""
    for module in model.modules():
        if experts := module._modules.get("experts"):
            beside = filter(None, map(module._modules.get, ROUTERS))
            yield next(beside, None), experts


def _unsupported(model: nn.Module, reason: str, router: str = "") -> str:
    """Return the one line that says why a model cannot be routed."""
    kind = getattr(getattr(model, "config", None), "model_type", "none")
    of = f" {router}:" if router else ""
    return (
        f"model class {type(model).__name__} has no supported router (model type '{kind}'):{of} "
        f"{reason}; allowed: the families of docs/families.md"
    )


See = Callable[[int, Tensor, Tensor, Tensor | None], None]
"""Takes a layer, its router's inputs, (tokens, hidden), logits, (tokens, experts), and what ranks
the experts, if that is not the logit."""


@contextmanager
def watched(model: nn.Module, see: See) -> Iterator[None]:
    """Call a function for each router in this thread's forward passes inside the context.

    Args:
        model: a model with supported routers; other threads may run it too.
        see: called with what a router reads and computes.

    Raises:
        InputError: see :func:`find_routers`.
    """
    thread = threading.get_ident()

    def hook_of(router: RouterModule) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                hidden_TH = inputs[0].reshape(-1, inputs[0].shape[-1])
                behaviour, raw_TE = router.behaviour, output[0]
                choice_TE = behaviour.choice(router.module, raw_TE, *inputs[1:])
                see(router.layer, hidden_TH, behaviour.logits(raw_TE), choice_TE)

        return hook

    with ExitStack() as stack:
        for router in find_routers(model):
            handle = router.module.register_forward_hook(hook_of(router))
            stack.callback(handle.remove)
        yield


def find_experts(model: nn.Module) -> list[Experts]:
    """Return the experts that :mod:`moe_routing.engine.experts` computes, in layer order."""
    return [experts for _, experts in _layers(model) if supports_dropless(experts)]


def experts_of_routers(model: nn.Module, what: str) -> list[Experts]:
    """Return the experts of each router, in layer order.

    Args:
        model: the model.
        what: what needs to compute experts one by one, for errors.

    Raises:
        InputError: they cannot be computed so; see :func:`why_not_one_by_one`.
    """
    if reason := why_not_one_by_one(model):
        raise InputError(f"{what}: {reason}")
    return cast("list[Experts]", [router.experts for router in find_routers(model)])


def why_not_one_by_one(model: nn.Module) -> str:
    """Return why experts cannot be computed one by one; empty if they can.

    They are quantised, say, or their weights have factors.
    """
    for router in find_routers(model):
        if router.behaviour.scale:
            return (
                f"the router of layer {router.layer} multiplies the weight of each expert by a "
                "factor; allowed: models without such factors"
            )
        if not supports_dropless(router.experts):
            return (
                f"the experts of layer {router.layer} are {type(router.experts).__name__}, which "
                "cannot be computed one by one; allowed: experts without quantised weights, "
                "without an adapter, and without a norm after them"
            )
    return ""


def router_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of the router weights, which ties a null to the routers it was fitted on.

    Raises:
        InputError: the model has no supported router, or weights without values.
    """
    digest = hashlib.sha256()
    for router in find_routers(model):
        weight_EH = weight_of(router.linear).float().cpu().contiguous()
        digest.update(str(tuple(weight_EH.shape)).encode())
        digest.update(weight_EH.numpy().tobytes())
        for name, tensor in sorted(own_tensors(router.module).items()):
            if name != "weight":
                digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
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
            for part, held in _parts(f"{path}.{name}", tensor):
                described = (part, tuple(held.shape), str(held.dtype))
                digest.update(repr((*described, *_checksums(held))).encode())
    return digest.hexdigest()


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor with its name; in place of a quantised one, its codes and scales."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if is_plain(tensor) or flatten is None:
        yield name, tensor
        return
    for part in flatten()[0]:
        yield from _parts(f"{name}.{part}", getattr(tensor, part))


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
