"""The baseline analysis: the stock router on evaluation text and on prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from moe_routing.analysis.capture import capture_texts, watch_ids
from moe_routing.analysis.captured import CAPTURE_FILE, Capture
from moe_routing.analysis.findings import depth_trend, ease_and_weight, imbalance, loads_by_document
from moe_routing.analysis.layers import expert_load, layer_table, token_statistics, top_experts
from moe_routing.analysis.specialisation import (
    coactivation,
    domain_specialisation,
    vocabulary_specialisation,
)
from moe_routing.analysis.tables import write_csv, write_json
from moe_routing.analysis.text import data_path, text_dataset
from moe_routing.config.study import StudyConfig
from moe_routing.data.items import read_items
from moe_routing.engine.adapters import find_routers
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.requests import max_length, own_tokens
from moe_routing.errors import InputError
from moe_routing.evaluation.study_model import load_study_model

Array = NDArray[np.float32]

HISTOGRAM_BINS = 80


def write_baseline(config: StudyConfig, results: Path) -> pd.DataFrame:
    """Run the baseline analysis, write ``baseline/``, and return the table by layer.

    Files: ``router_logits.safetensors`` (the capture on evaluation text),
    ``baseline_routing_stats.csv``, ``baseline_prompts.csv``, ``baseline_findings.json``,
    ``expert_usage.csv``, ``prompt_usage.csv``, ``logit_histogram.csv``, ``coactivation.csv``,
    ``domain_specialisation.csv`` and ``vocabulary_specialisation.csv``.

    Raises:
        InputError: no perplexity set, a prompt that does not fit the window, or non-finite router
            logits.
    """
    folder = results / "baseline"
    loaded = load_study_model(config.model, results, config.resources.threads)
    top_k = find_routers(loaded.model)[0].top_k
    resampling = {
        "confidence": config.statistics.confidence,
        "resamples": config.analysis.resamples,
        "rng": np.random.default_rng(config.seed),
    }
    name = text_dataset(config.datasets)
    captures = {
        dataset: _capture(config, results, loaded, dataset, first=dataset == name)
        for dataset in config.datasets
    }
    text = captures[name]
    text.save(folder / CAPTURE_FILE)
    window = max_length(loaded.model.config, config.evaluation.window)
    table = layer_table(text.logits_LTE.numpy(), text.document_T.numpy(), top_k, **resampling)
    table = table.assign(dataset=name, window=window)
    write_csv(table, folder / "baseline_routing_stats.csv")
    logits = prompt_logits(loaded, config.analysis.baseline.prompts, window)
    _write_prompts(logits, top_k, {**resampling, "resamples": 1}, folder)
    write_json(
        {"dataset": name, "n_tokens": text.tokens, **key_findings(text, top_k, resampling)},
        folder / "baseline_findings.json",
    )
    _write_usage(text, top_k, folder)
    _write_specialisation(captures, text, top_k, resampling["rng"], folder)
    return table


def key_findings(text: Capture, top_k: int, resampling: dict[str, Any]) -> dict[str, dict]:
    """Return the computed answers to the three questions of the baseline analysis.

    Args:
        text: the capture on evaluation text.
        top_k: experts per token.
        resampling: ``confidence``, ``resamples`` and ``rng`` of the intervals.
    """
    logits_LTE, document_T = text.logits_LTE.numpy(), text.document_T.numpy()
    token = token_statistics(logits_LTE, top_k)
    index_LTK = top_experts(logits_LTE, top_k)
    load_DLE = loads_by_document(index_LTK, document_T, logits_LTE.shape[-1])
    loss_T = text.loss_T.double().numpy()
    return {
        "imbalance": imbalance(load_DLE, **resampling),
        "entropy_and_depth": depth_trend(token["entropy"], document_T, **resampling),
        "ease_and_weight": ease_and_weight(
            loss_T, token["avg_max_weight"], document_T, **resampling
        ),
    }


def _capture(
    config: StudyConfig, results: Path, loaded: LoadedModel, dataset: str, *, first: bool
) -> Capture:
    settings = config.analysis.baseline
    return capture_texts(
        loaded.model,
        loaded.tokenizer,
        [item.text for item in read_items(data_path(results, dataset))],
        tokens=settings.tokens if first else settings.domain_tokens,
        window=config.evaluation.window,
        label=f"watch {dataset}",
    )


def prompt_logits(loaded: LoadedModel, prompts: Sequence[str], window: int) -> dict[str, Array]:
    """Return the router logits of every token of each prompt, (layers, tokens, experts).

    A prompt is read as in generation: all of its own tokens and nothing before them.

    Raises:
        InputError: a prompt has no token or more than the window, or a router logit is not finite.
    """
    logits = {}
    for prompt in prompts:
        ids_S = torch.tensor(own_tokens(loaded.tokenizer, prompt))
        if not 0 < len(ids_S) <= window:
            raise InputError(
                f"analysis.baseline.prompts has {prompt[:40]!r}, of {len(ids_S)} tokens; allowed: "
                f"1 to {window}"
            )
        logits[prompt] = watch_ids(loaded.model, ids_S, "watch prompt")[0].numpy()
    return logits


def _write_prompts(
    logits: dict[str, Array], top_k: int, resampling: dict[str, Any], folder: Path
) -> None:
    """Write the table by layer and the loads of each prompt; too few tokens for intervals."""
    tables, usages = [], []
    for prompt, logits_LTE in logits.items():
        table = layer_table(logits_LTE, np.zeros(logits_LTE.shape[1], int), top_k, **resampling)
        limits = [name for name in map(str, table) if name.endswith(("_low", "_high"))]
        table = table.drop(columns=[*limits, "n_documents"])
        table.insert(0, "prompt", prompt)
        tables.append(table)
        usages.append(_usage(logits_LTE, top_k).assign(prompt=prompt))
    write_csv(pd.concat(tables, ignore_index=True), folder / "baseline_prompts.csv")
    write_csv(pd.concat(usages, ignore_index=True), folder / "prompt_usage.csv")


def _usage(logits_LTE: Array, top_k: int) -> pd.DataFrame:
    """Return how many tokens select each expert, one row per expert of a layer."""
    layers, tokens, experts = logits_LTE.shape
    load_LE = expert_load(top_experts(logits_LTE, top_k), experts)
    layer, expert = np.divmod(np.arange(layers * experts), experts)
    usage = {"layer": layer, "expert": expert, "tokens": load_LE.ravel()}
    return pd.DataFrame({**usage, "proportion_of_tokens": load_LE.ravel() / tokens})


def _write_usage(text: Capture, top_k: int, folder: Path) -> None:
    """Write what the figures draw: loads of experts, and histograms of logits."""
    logits_LTE = text.logits_LTE.numpy()
    write_csv(_usage(logits_LTE, top_k), folder / "expert_usage.csv")
    low, high = np.quantile(logits_LTE, [0.0005, 0.9995])
    edges = np.linspace(low, high, HISTOGRAM_BINS + 1)
    density = [np.histogram(values.ravel(), edges, density=True)[0] for values in logits_LTE]
    bins = {"low": edges[:-1], "high": edges[1:]}
    parts = [
        pd.DataFrame({"layer": layer, **bins, "density": heights})
        for layer, heights in enumerate(density)
    ]
    write_csv(pd.concat(parts), folder / "logit_histogram.csv")


def _write_specialisation(
    captures: dict[str, Capture], text: Capture, top_k: int, rng: np.random.Generator, folder: Path
) -> None:
    index_LTK = top_experts(text.logits_LTE.numpy(), top_k)
    experts = text.logits_LTE.shape[-1]
    write_csv(coactivation(index_LTK, experts), folder / "coactivation.csv")
    loads = {
        dataset: (
            expert_load(top_experts(capture.logits_LTE.numpy(), top_k), experts),
            capture.tokens,
        )
        for dataset, capture in captures.items()
    }
    write_csv(domain_specialisation(loads), folder / "domain_specialisation.csv")
    ids = {"input": text.token_T, "next": text.next_T, "predicted": text.predicted_T}
    vocabulary = vocabulary_specialisation(
        index_LTK[..., 0], {role: id_T.numpy() for role, id_T in ids.items()}, rng
    )
    write_csv(vocabulary, folder / "vocabulary_specialisation.csv")
