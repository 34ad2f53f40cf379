"""Run the stock model on text and keep router logits, losses and tokens.

Shape letters: L layers, T tokens, E experts, B windows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_routing.analysis.captured import Capture
from moe_routing.engine.offload import input_device
from moe_routing.engine.packable import rope_span
from moe_routing.engine.requests import Encoder, TokenRequest, max_length
from moe_routing.evaluation.watch import watch_routers

BATCH_TOKENS = 4096
"""Most tokens in a forward pass; their logits over the vocabulary are in memory at once."""


def documents_within(
    encoder: Encoder, texts: Sequence[str], tokens: int
) -> list[tuple[int, TokenRequest]]:
    """Return the windows of the first whole documents that hold at least ``tokens`` tokens.

    Returns:
        (index of the document, window) pairs; every document if all are needed.
    """
    windows: list[tuple[int, TokenRequest]] = []
    total = 0
    for index, text in enumerate(texts):
        for window in encoder.rolling([text])[0]:
            windows.append((index, window))
            total += len(window.target_ids)
        if total >= tokens:
            break
    return windows


def capture_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int,
    window: int | None,
    label: str,
) -> Capture:
    """Run the stock model over the first texts that hold at least ``tokens`` tokens.

    Texts are read as for perplexity: after the prefix token, in windows that predict every token
    once.

    Raises:
        InputError: a text has no token, or a router logit is not finite.
    """
    encoder = Encoder(tokenizer, max_length(model.config, window))
    windows = documents_within(encoder, texts, tokens)
    batches = list(_batches(windows, rope_span(model.config)))
    parts = [_watch(model, batch, label) for batch in tqdm(batches, desc=label, unit="batch")]
    joined = {
        name: torch.cat([part[name] for part in parts], dim=1 if name.count("_L") else 0)
        for name in Capture.FIELDS
    }
    return Capture(**joined)


@torch.inference_mode()
def watch_ids(model: PreTrainedModel, ids_S: Tensor, label: str) -> tuple[Tensor, Tensor]:
    """Run the model on one sequence, and return what its routers see of every token.

    Args:
        model: the model, stock or routed.
        ids_S: token ids, int64, (positions,).
        label: what is read, for the error.

    Returns:
        Router logits, float32, (layers, positions, experts), and norms of the routers' inputs,
        (layers, positions).

    Raises:
        InputError: a router logit is not finite.
    """
    with watch_routers(model) as watch:
        model.base_model(ids_S[None].to(input_device(model)), use_cache=False)
    return watch.logits_LTE(label), watch.norm_LT()


def _batches(
    windows: Sequence[tuple[int, TokenRequest]], padded: float
) -> Iterator[list[tuple[int, TokenRequest]]]:
    """Group windows of similar length under the budget of tokens.

    Those of more than ``padded`` tokens are grouped with windows of the same length only.
    """
    batch: list[tuple[int, TokenRequest]] = []
    for entry in sorted(windows, key=lambda entry: -len(entry[1].input_ids)):
        longest, length = (len(e[1].input_ids) for e in ((batch or [entry])[0], entry))
        full = (len(batch) + 1) * longest > BATCH_TOKENS
        if batch and (full or padded < longest != length):
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


@torch.inference_mode()
def _watch(
    model: PreTrainedModel, batch: Sequence[tuple[int, TokenRequest]], label: str
) -> dict[str, Tensor]:
    """Return the fields of a capture for one batch, padding left out."""
    longest = len(batch[0][1].input_ids)
    ids_BS = np.zeros((len(batch), longest), dtype=np.int64)
    next_BS = np.full((len(batch), longest), -1, dtype=np.int64)
    for row, (_, window) in enumerate(batch):
        end = len(window.input_ids)
        ids_BS[row, :end] = window.input_ids
        # A later window begins with tokens that were already captured.
        next_BS[row, end - len(window.target_ids) : end] = window.target_ids
    # Attention is causal and padding is on the right, so no real token sees it. Tokens that predict
    # a target are kept.
    keep_T = torch.from_numpy(next_BS >= 0).flatten()
    with watch_routers(model, keep_T) as watch:
        ids = torch.from_numpy(ids_BS).to(input_device(model))
        logits_BSV = model(ids, use_cache=False).logits
    logits_TV = logits_BSV.flatten(0, 1)[keep_T.to(logits_BSV.device)].float()
    next_T = torch.from_numpy(next_BS).flatten()[keep_T]
    loss_T = F.cross_entropy(logits_TV, next_T.to(logits_TV.device), reduction="none")
    document_B = torch.tensor([index for index, _ in batch])
    return {
        "logits_LTE": watch.logits_LTE(label),
        "input_norm_LT": watch.norm_LT(),
        "token_T": torch.from_numpy(ids_BS).flatten()[keep_T],
        "next_T": next_T,
        "predicted_T": logits_TV.argmax(1).cpu(),
        "loss_T": loss_T.cpu(),
        "document_T": document_B[:, None].expand(next_BS.shape).flatten()[keep_T],
    }
