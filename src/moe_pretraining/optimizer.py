"""AdamW for all parameters, or Muon for the matrices of attention and experts, AdamW for others.

Shape letters: B matrices, M rows, N columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_pretraining.settings import PretrainConfig

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's quintic: steepest at zero; singular values end between about 0.7 and 1.2."""
NEWTON_SCHULZ_STEPS = 5
UPDATE_RMS = 0.2
"""Root mean square of Muon's update before the learning rate: about that of AdamW's, so that both
can share one rate and one weight decay (Liu et al. 2025, 2502.16982)."""
FUSED_PAIR = "gate_up_proj"
"""Parameters whose rows hold two matrices, one below the other."""
MUON_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", FUSED_PAIR, "down_proj")


def orthogonalize(matrices_BMN: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrix to each, by five Newton-Schulz steps.

    The result is approximate: singular values of any size become values near 1.

    Args:
        matrices_BMN: (matrices, rows, columns), float32.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices_BMN.shape[-2] <= matrices_BMN.shape[-1]
    x_BMN = matrices_BMN if wide else matrices_BMN.mT
    norm_B = torch.linalg.vector_norm(x_BMN, dim=(-2, -1), keepdim=True)
    x_BMN = x_BMN / norm_B.clamp_min(1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram_BMM = x_BMN @ x_BMN.mT
        polynomial_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        x_BMN = torch.baddbmm(x_BMN, polynomial_BMM, x_BMN, beta=a)
    return x_BMN if wide else x_BMN.mT


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with decoupled weight decay, also for stacks of matrices.

    The update is the orthogonalised Nesterov momentum, scaled to :data:`UPDATE_RMS`. A parameter of
    more than two dimensions is a stack of matrices, each orthogonalised separately. The group
    option ``matrices_of_rows`` is the number of matrices into which the rows are split first.
    ``torch.optim.Muon`` does the same, but only for single matrices.
    """

    def __init__(
        self, groups: list[dict], *, lr: float, weight_decay: float, momentum: float = MOMENTUM
    ) -> None:
        """Take groups of parameters, as in ``torch.optim``."""
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "matrices_of_rows": 1
        }  # fmt: skip
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, grad: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer, momentum = state["momentum_buffer"], group["momentum"]
        buffer.lerp_(grad, 1 - momentum)
        rows = parameter.shape[-2] // group["matrices_of_rows"]
        matrices_BMN = grad.lerp(buffer, momentum).reshape(-1, rows, parameter.shape[-1])
        update = orthogonalize(matrices_BMN).reshape(parameter.shape)
        scale = UPDATE_RMS * math.sqrt(max(rows, parameter.shape[-1]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)


def build_optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW, preceded by Muon for attention and experts if the config selects it.

    Weight decay applies to matrices, not to norms.
    """
    named = dict(model.named_parameters())
    chosen = {n: p for n, p in named.items() if config.optimizer == "muon" and _is_muon(n)}
    pairs = [p for n, p in chosen.items() if FUSED_PAIR in n]
    single = [p for n, p in chosen.items() if FUSED_PAIR not in n]
    rest = [p for n, p in named.items() if n not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=True)
    if not chosen:
        return [adamw]
    muon_groups = [{"params": single}, {"params": pairs, "matrices_of_rows": 2}]
    muon = Muon(muon_groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    return [muon, adamw]


def _is_muon(name: str) -> bool:
    return any(part in MUON_NAMES for part in name.split("."))
