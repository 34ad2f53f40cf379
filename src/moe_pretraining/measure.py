"""Measurements of a trained model on validation text, for its model card.

Shape letters: W windows, L tokens of a window (and the one after them), V vocabulary, T tokens,
E experts, K experts per token, D documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from moe_pretraining.settings import PretrainConfig, TextSource
from moe_routing.config.study import ModelConfig
from moe_routing.engine.loading import describe_checkpoint, load_model
from moe_routing.engine.recorder import Recorder, RoutingStatistics
from moe_routing.engine.routed import routed
from moe_routing.evaluation.record import environment
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.ranking import Ranker, Ranking, by_score
from moe_routing.routing.strategies import Strategy
from moe_routing.routing.strategies.controls import RandomIdentity
from moe_routing.routing.strategies.rivals import Rival
from moe_routing.routing.strategies.topk import Regular
from moe_routing.routing.types import RouterInputs
from moe_routing.statistics.bootstrap import bootstrap_items, studentised_interval
from moe_routing.vocabulary import Family, Look

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATIC_K = (1, 2, 4, 6, 8, 12, 16, 32, 64)
WINDOWS_AT_ONCE = 8
CONFIDENCE = 0.95
RESAMPLES = 2000


class FixedCount(Rival):
    """Top ``max_k`` for every token, as a ranking, so that a control can replace the experts."""

    family: ClassVar[Family] = Family(
        "fixed",
        label="Top-k as a ranking",
        look=Look("#999999", "."),
        definition="top {k}, weights {weighting}",
        selection="the k largest logits",
        words="top-k as a ranking",
    )
    codes: ClassVar[dict[str, str]] = {"max_k": "k"}

    max_k: int = Field(ge=1, description="Experts per token.")

    @property
    def max_experts(self) -> int:
        """Number of experts per token."""
        return self.max_k

    def ranker(self, calibration: Calibration | None, num_experts: int) -> Ranker:
        """Return a ranker by logit with a constant count."""

        def rank(inputs: RouterInputs, probability_TE: Tensor) -> Ranking:
            logits_TE, order_TE = by_score(inputs)
            count_T = torch.full_like(order_TE[:, 0], self.max_k)
            return Ranking.counted(order_TE, logits_TE, count_T, self.max_k)

        return rank


@dataclass(frozen=True)
class Windows:
    """Validation windows.

    Attributes:
        ids_WL: token ids; all but the first of each window are predicted.
        source_W: name of each window's source.
        document_W: the document in which each window begins, the resampling unit of intervals.
        bytes_W: UTF-8 bytes of the predicted tokens; the end-of-text token has none.
    """

    ids_WL: np.ndarray
    source_W: np.ndarray
    document_W: np.ndarray
    bytes_W: np.ndarray

    @property
    def tokens_W(self) -> np.ndarray:
        """Number of predicted tokens of each window."""
        return np.full(len(self.ids_WL), self.ids_WL.shape[1] - 1)


def validation_windows(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, corpus_folder: Path
) -> Windows:
    """Draw ``card_tokens`` tokens of validation windows, equally many from each source."""
    count = math.ceil(config.card_tokens / config.sequence_length / len(config.sources))
    end_of_text = cast("int", tokenizer.eos_token_id)
    parts = [
        _source_windows(source, place, corpus_folder, count, config, end_of_text)
        for place, source in enumerate(config.sources)
    ]
    ids_WL, source_W, document_W = (np.concatenate(column) for column in zip(*parts, strict=True))
    bytes_W = token_bytes(tokenizer)[ids_WL[:, 1:]].sum(1)
    return Windows(ids_WL, source_W, document_W, bytes_W)


def _source_windows(
    source: TextSource,
    place: int,
    corpus_folder: Path,
    count: int,
    config: PretrainConfig,
    end_of_text: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    length = config.sequence_length
    tokens = np.load(corpus_folder / f"{source.name}.validation.npy").astype(np.int64)
    rng = np.random.default_rng([config.seed, place])
    start_W = np.sort(rng.permutation((tokens.size - 1) // length)[:count]) * length
    ids_WL = tokens[start_W[:, None] + np.arange(length + 1)]
    ends_before = np.concatenate([[0], np.cumsum(tokens == end_of_text)])
    names = [f"{source.name}/{number}" for number in ends_before[start_W]]
    return ids_WL, np.full(start_W.size, source.name), np.array(names)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the UTF-8 bytes of each entry of a byte-level vocabulary; 0 for special tokens."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    return np.array([0 if token in special else len(token) for token in tokens])


@torch.no_grad()
def window_losses(model: PreTrainedModel, ids_WL: np.ndarray, label: str) -> np.ndarray:
    """Return the loss of each window in nats, summed over its tokens; float64, (windows,)."""
    losses = []
    starts = range(0, len(ids_WL), WINDOWS_AT_ONCE)
    for start in tqdm(starts, desc=label, unit="batch", mininterval=2.0):
        ids_BL = torch.from_numpy(ids_WL[start : start + WINDOWS_AT_ONCE]).to(model.device)
        logits_BLV = model(ids_BL[:, :-1], use_cache=False).logits.float()
        loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), ids_BL[:, 1:], reduction="none")
        losses.append(loss_BL.double().sum(1).cpu().numpy())
    return np.concatenate(losses)


def measure_model(config: PretrainConfig, folder: Path, corpus_folder: Path) -> dict[str, object]:
    """Measure an exported model on validation windows; returns plain values, for JSON.

    Args:
        config: the config of the run.
        folder: the exported model.
        corpus_folder: token files, as :func:`tokenize_source` writes them.

    Returns:
        ``parameters`` (total, and active per token), ``weights_bytes`` and ``weights_sha256``,
        ``validation`` (loss in nats per token and bits per byte, overall and by source, with
        intervals of level ``confidence``), ``copying`` (loss at a text's first and second reading
        in one window), ``routing`` by layer, ``static_k`` (loss by fixed number of experts),
        ``random_experts`` (the loss without the router's choice, and its difference from the loss
        with it), and ``provenance``.

    Raises:
        InputError: the folder holds no model that can be loaded.
    """
    checkpoint = ModelConfig(path=str(folder), device=config.device)
    loaded = load_model(checkpoint, config.threads)
    model = loaded.model
    windows = validation_windows(config, loaded.tokenizer, corpus_folder)
    top_k, experts = config.model.num_experts_per_tok, config.model.num_experts
    recorder = Recorder()
    nats_W = _losses(model, windows, Regular(k=top_k), recorder)
    random_W = _losses(model, windows, random_experts(top_k, config.seed))
    sweep = sorted({top_k, *(k for k in STATIC_K if k <= experts)})
    static = {k: nats_W if k == top_k else _losses(model, windows, Regular(k=k)) for k in sweep}
    rng = np.random.default_rng(config.seed)
    tokens = int(windows.tokens_W.sum())
    difference = _ratio(random_W - nats_W, windows.tokens_W, windows.document_W, rng)
    return {
        "parameters": count_parameters(model),
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "weights_sha256": describe_checkpoint(checkpoint)["weights_sha256"],
        "confidence": CONFIDENCE,
        "validation": _validation(windows, nats_W, rng),
        "copying": _copying(model, windows, Regular(k=top_k)),
        "routing": _routing(recorder.statistics()),
        "static_k": {str(k): float(loss_W.sum() / tokens) for k, loss_W in static.items()},
        "random_experts": {"loss": float(random_W.sum() / tokens), "difference": difference},
        "provenance": {**loaded.provenance, **environment(config.seed, torch.get_num_threads())},
    }


def random_experts(k: int, seed: int) -> Strategy:
    """Return the control that uses k experts per token, drawn at random.

    Weights are rescaled to the mass of the token's own top k, so that the layer's output keeps its
    scale and only the choice of experts is lost.
    """
    return RandomIdentity(base=FixedCount(max_k=k, weighting="mass_matched"), seed=seed)


def _losses(
    model: PreTrainedModel, windows: Windows, strategy: Strategy, recorder: Recorder | None = None
) -> np.ndarray:
    with routed(model, strategy, recorder=recorder):
        return window_losses(model, windows.ids_WL, strategy.id)


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Return how many parameters there are, and how many are active per token (no embeddings)."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    embeddings = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" in name)
    proportion = config.num_experts_per_tok / config.num_experts
    return {"total": total, "active": round(total - embeddings - experts * (1 - proportion))}


def _validation(windows: Windows, nats_W: np.ndarray, rng: np.random.Generator) -> dict:
    def summary(mask_W: np.ndarray) -> dict[str, object]:
        documents_W = windows.document_W[mask_W]
        bits_W = nats_W[mask_W] / math.log(2)
        return {
            "windows": int(mask_W.sum()),
            "documents": len(np.unique(documents_W)),
            "tokens": int(windows.tokens_W[mask_W].sum()),
            "nats_per_token": _ratio(nats_W[mask_W], windows.tokens_W[mask_W], documents_W, rng),
            "bits_per_byte": _ratio(bits_W, windows.bytes_W[mask_W], documents_W, rng),
        }

    names = list(dict.fromkeys(windows.source_W.tolist()))
    return {
        "all": summary(np.ones(len(nats_W), dtype=bool)),
        "sources": {name: summary(windows.source_W == name) for name in names},
    }


def _copying(model: PreTrainedModel, windows: Windows, strategy: Strategy) -> dict[str, float]:
    """Return the loss in nats per token of the windows' first halves when read once and again."""
    half_WL = windows.ids_WL[:, : windows.ids_WL.shape[1] // 2]
    count, size = half_WL.shape
    with routed(model, strategy):
        once_W = window_losses(model, half_WL, "read once")
        twice_W = window_losses(model, np.concatenate([half_WL, half_WL], axis=1), "read twice")
    return {
        "tokens": size,
        "first": float(once_W.sum() / (count * (size - 1))),
        "second": float((twice_W - once_W).sum() / (count * size)),
    }


def _ratio(
    numerator_W: np.ndarray, denominator_W: np.ndarray, document_W: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, float]:  # fmt: skip
    """Return a ratio of sums, with its interval from resampling documents."""
    boot = bootstrap_items(numerator_W, denominator_W, document_W, resamples=RESAMPLES, rng=rng)
    low, high = studentised_interval(boot, CONFIDENCE)
    return {"estimate": float(boot.ratio_S[0]), "low": float(low[0]), "high": float(high[0])}


def _routing(statistics: RoutingStatistics) -> dict[str, object]:
    load_LE = statistics.load_LE
    return {
        "tokens": statistics.tokens,
        "max_mean_load": (load_LE.max(1) / load_LE.mean(1)).tolist(),
        "dead_experts": (load_LE == 0).sum(1).tolist(),
        "entropy": statistics.entropy_L.tolist(),
        "max_probability": statistics.max_probability_L.tolist(),
        "selected_mass": statistics.selected_mass_L.tolist(),
    }
