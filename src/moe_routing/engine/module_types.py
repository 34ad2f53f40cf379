"""What the engine reads from modules that transformers builds, as declared types.

Every attribute of a plain module is a tensor or a module to a type checker. The classes are never
made: :mod:`moe_routing.engine.adapters` finds modules that have their attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class LinearRouter(nn.Module):
    """A module that holds the weight of a router.

    Attributes:
        weight: (experts, hidden size).
    """

    weight: Tensor


class Experts(nn.Module):
    """The experts of a layer, after transformers' decorator ``use_experts_implementation``.

    Attributes:
        config: the config that names the experts implementation.
        num_experts: number of experts.
        gate_up_proj: gate and up projections of all experts, in one tensor; experts without a gate
            have an ``up_proj``.
        down_proj: down projections of all experts.
        is_transposed: whether the weights are right-hand factors.
        has_gate: whether the up projection is gated.
        has_bias: whether projections have a bias.
        has_post_expert_norm: whether a norm follows the down projection.
        act_fn: activation of experts without a gate.
    """

    config: PreTrainedConfig
    num_experts: int
    gate_up_proj: Tensor
    down_proj: Tensor
    is_transposed: bool
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]


def is_plain(tensor: object) -> TypeGuard[Tensor]:
    """Return whether a tensor holds its own values, not codes and scales that stand for them.

    Libraries for quantised weights make subclasses, whose dtype is that of the values.
    """
    return isinstance(tensor, Tensor) and type(tensor.data) is Tensor
