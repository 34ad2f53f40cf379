"""The three losses of pretraining: next token, load balancing, and router z-loss.

Shape letters: L layers, T tokens, C tokens of a chunk, H hidden size, V vocabulary, E experts,
K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies of ``hidden @ weight.T``; gradients in the forward pass.

    Logits are processed in chunks that fit in cache; the whole matrix is never stored.
    """

    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        hidden_TH: Tensor,
        weight_VH: Tensor,
        target_T: Tensor,
        proportion_T: Tensor,
    ) -> Tensor:
        total = hidden_TH.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_TH)
        grad_weight = torch.zeros_like(weight_VH)
        for start in range(0, target_T.numel(), CHUNK):
            hidden_CH = hidden_TH[start : start + CHUNK]
            target_C = target_T[start : start + CHUNK, None]
            proportion_C = proportion_T[start : start + CHUNK, None]
            logits_CV = (hidden_CH @ weight_VH.T).float()
            logsumexp_C = logits_CV.logsumexp(-1, keepdim=True)
            total += ((logsumexp_C - logits_CV.gather(1, target_C)) * proportion_C).sum()
            if any(ctx.needs_input_grad):
                grad_CV = logits_CV.sub_(logsumexp_C).exp_()
                grad_CV.scatter_add_(1, target_C, grad_CV.new_full(target_C.shape, -1.0))
                grad_CV = grad_CV.mul_(proportion_C).to(hidden_TH.dtype)
                grad_hidden[start : start + CHUNK] = grad_CV @ weight_VH
                grad_weight.addmm_(grad_CV.T, hidden_CH)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN001
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None


def linear_cross_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, emphasis_T: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy in nats of predicting ``target_T``; a float32 scalar.

    Args:
        hidden_TH: final hidden states, (tokens, hidden).
        weight_VH: weight of the head, (vocabulary, hidden), same dtype.
        target_T: target ids, (tokens,).
        emphasis_T: positive weight of each target in the mean, (tokens,); None: all the same.
    """
    if emphasis_T is None:
        emphasis_T = hidden_TH.new_ones(target_T.shape, dtype=torch.float32)
    proportion_T = emphasis_T / emphasis_T.sum()
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, target_T, proportion_T)


@dataclass(frozen=True)
class RouterLosses:
    """Auxiliary losses of one batch and the largest max/mean expert load of any layer."""

    load_balancing: Tensor
    z_loss: Tensor
    max_load: Tensor


def router_losses(logits_LTE: tuple[Tensor, ...], top_k: int) -> RouterLosses:
    r"""Compute load balancing and z-loss for each layer, and sum them over layers.

    Load balancing (Fedus et al. 2021, eq. 4-6) is :math:`E \sum_e f_e P_e` with f the proportion of
    assignments and P the mean probability: 1 per layer when balanced. Over concatenated layers, as
    in transformers, it can be at its optimum while single layers collapse. The z-loss (Zoph et al.
    2022, eq. 5) is the mean squared log-sum-exp.
    """
    balance, z_loss, loads = [], [], []
    for logits_TE in logits_LTE:
        logits_TE = logits_TE.float()
        probability_E = logits_TE.softmax(-1).mean(0)
        index_TK = logits_TE.detach().topk(top_k).indices
        proportion_E = index_TK.flatten().bincount(minlength=logits_TE.shape[1]) / index_TK.numel()
        balance.append(logits_TE.shape[1] * (proportion_E * probability_E).sum())
        z_loss.append(logits_TE.logsumexp(-1).square().mean())
        loads.append(proportion_E.max() * logits_TE.shape[1])
    return RouterLosses(
        torch.stack(balance).sum(), torch.stack(z_loss).sum(), torch.stack(loads).max()
    )
