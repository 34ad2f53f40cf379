from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_pretraining.corpus import tokenize_source
from moe_pretraining.settings import PretrainConfig
from moe_pretraining.tokenizer import train_on_sources
from moe_routing.schema import parse

WORDS = ("Ein", "Wort", "the", "of", "naïve", "rain", "and", "tea", "for", "two", "kettle", "—")


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    """A trainer sets the number of threads of its process; tests share one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    sources = []
    for name, weight in (("first", 3.0), ("second", 1.0)):
        documents = [" ".join(rng.choice(WORDS, 40)) for _ in range(200)]
        (folder / f"{name}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        sources.append(
            {
                "kind": "local",
                "name": name,
                "path": str(folder / f"{name}.txt"),
                "weight": weight,
                "license": "CC0",
                "url": "https://example.org",
            }
        )
    return parse(
        PretrainConfig,
        {
            "name": "tiny",
            "sources": sources,
            "model": {
                "vocab_size": 300,
                "hidden_size": 16,
                "intermediate_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "max_position_embeddings": 32,
            },
            "threads": 1,
            "steps": 24,
            "batch_size": 4,
            "sequence_length": 16,
            "warmup_steps": 4,
            "validation_share": 0.1,
            "validation_interval": 8,
            "validation_batches": 2,
            "checkpoint_interval": 8,
            "card_tokens": 600,
        },
        "config",
    )


@pytest.fixture(scope="session")
def tokenizer(config: PretrainConfig):
    return train_on_sources(config)


@pytest.fixture(scope="session")
def tokens(config: PretrainConfig, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    for source in config.sources:
        tokenize_source(
            source, tokenizer, folder, validation_share=config.validation_share, seed=config.seed
        )
    return folder
