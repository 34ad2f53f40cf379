"""Log-likelihoods of target tokens without the (tokens x vocabulary) logits.

Shape letters: N scored positions, C positions of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHUNK_BYTES = {"cpu": 4 << 20}
"""Logits in work at once: on the CPU what stays in cache."""
CHUNK_BYTES_ACCELERATOR = 256 << 20


def target_log_likelihoods(
    head: nn.Module, hidden_NH: Tensor, target_N: Tensor, *, greedy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the log-likelihood of each target and whether it is the most likely token.

    Args:
        head: the model's output embedding.
        hidden_NH: final hidden states at the positions that predict the targets.
        target_N: target ids.
        greedy: whether to tell the most likely token; of equal ones the first counts.

    Returns:
        Log-likelihoods in nats, (N,), and booleans, (N,), or None without ``greedy``. Logits of
        half precision are turned to float32 before the softmax.
    """
    vocabulary = head.weight.shape[0]
    limit = CHUNK_BYTES.get(hidden_NH.device.type, CHUNK_BYTES_ACCELERATOR)
    chunk = max(16, limit // (4 * vocabulary))
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    likelihood_N = torch.empty(target_N.shape, dtype=dtype, device=hidden_NH.device)
    best_N = torch.empty_like(target_N) if greedy else None
    for start in range(0, target_N.numel(), chunk):
        part = slice(start, start + chunk)
        logits_CV = head(hidden_NH[part]).to(dtype)
        chosen_C = logits_CV.gather(1, target_N[part, None])[:, 0]
        if best_N is None:
            top_C1 = logits_CV.amax(-1, keepdim=True)
        else:
            top_C1, best_C1 = logits_CV.max(-1, keepdim=True)
            best_N[part] = best_C1[:, 0]
        # In place: the logits are this loop's own, and writing them anew costs more than the sums.
        log_sum_C = logits_CV.sub_(top_C1).exp_().sum(-1).log_()
        likelihood_N[part] = chosen_C - top_C1[:, 0] - log_sum_C
    return likelihood_N, None if best_N is None else best_N == target_N
