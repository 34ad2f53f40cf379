"""What the real study takes from the hub, laid out as there: the embedded model, real items."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hub_stand_in import Repository
from safetensors.torch import load_file, save

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "resources" / "olmoe-nano"
DATA_FILES = ROOT / "tests" / "data_files"
N_SHARDS = 3
HELLASWAG_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/validation-*
---
"""
WIKIPEDIA_CARD = """---
configs:
- config_name: 20231101.de
  data_files:
  - split: train
    path: 20231101.de/*
- config_name: 20231101.en
  data_files:
  - split: train
    path: 20231101.en/*
---
"""
PLAIN_CARD = "---\nlicense: cc-by-sa-3.0\n---\nNo files are declared here.\n"


@cache
def checkpoint(layers: int = 4) -> dict[str, bytes]:
    """Return the embedded model's files as OLMoE-1B-7B-0924 has them: experts apart, in shards.

    Args:
        layers: how many of the 16 layers there are, from the first on. With all of them, a study
            takes three times as long, and no job does more.
    """
    tensors = {
        name: tensor
        for name, tensor in _experts_apart(load_file(NANO / "model.safetensors"))
        if not (found := re.match(r"model\.layers\.(\d+)\.", name)) or int(found[1]) < layers
    }
    config = json.loads((NANO / "config.json").read_text(encoding="utf-8"))
    shards = {
        f"model-{number + 1:05d}-of-{N_SHARDS:05d}.safetensors": list(tensors)[number::N_SHARDS]
        for number in range(N_SHARDS)
    }
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    small = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    return {
        "config.json": json.dumps(config | {"num_hidden_layers": layers}).encode(),
        **{name: (NANO / name).read_bytes() for name in small},
        **{
            file: save({name: tensors[name] for name in names}, {"format": "pt"})
            for file, names in shards.items()
        },
        "model.safetensors.index.json": json.dumps(index).encode(),
        "README.md": b"# A model card, which no job reads\n",
        "pytorch_model.bin": b"a pickle, which no job reads",
    }


def _experts_apart(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors with a layer's experts, kept in two, as three of each expert."""
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name)
        if not found:
            yield name, tensor
            continue
        for number, expert in enumerate(tensor):
            parts = {"down": expert}
            if found[2] == "gate_up":
                parts = dict(zip(("gate", "up"), expert.chunk(2), strict=True))
            for part, weights in parts.items():
                yield f"{found[1]}.{number}.{part}_proj.weight", weights.contiguous()


def repositories(config: dict) -> dict[str, Repository]:
    """Return the repositories that a study's config names, at its commits, by their path."""
    sources = [config["calibration"]["source"], *(d["source"] for d in config["datasets"].values())]
    commits = {source["dataset"]: source["revision"] for source in sources}
    model = config["model"]
    return {f"models/{model['path']}": Repository(model["revision"], checkpoint())} | {
        f"datasets/{name}": Repository(commits[name], files) for name, files in data_sets().items()
    }


def pretraining_text() -> dict[str, dict[str, bytes]]:
    """Return a few real passages in the files and columns of the sets that pretraining streams."""
    rows = [{"id": str(n), "text": row["passage"]} for n, row in enumerate(_json_rows("wikipedia"))]
    return {
        "wikimedia/wikipedia": {
            "README.md": WIKIPEDIA_CARD.encode(),
            "20231101.de/train-00000-of-00001.parquet": _parquet([{"text": "Auf Deutsch."}]),
            "20231101.en/train-00000-of-00002.parquet": _parquet(rows[:8]),
            "20231101.en/train-00001-of-00002.parquet": _parquet(rows[8:]),
        },
        "roneneldan/TinyStories": {
            "README.md": PLAIN_CARD.encode(),
            "TinyStoriesV2-GPT4-train.txt": b"Another edition.",
            "data/train-00000-of-00001.parquet": _parquet([{"text": row["text"]} for row in rows]),
            "data/validation-00000-of-00001.parquet": _parquet([{"text": "Held out."}]),
        },
    }


def data_sets() -> dict[str, dict[str, bytes]]:
    """Return a few real items of each set, in the real sets' files and columns."""
    wikitext, raw = "wikitext-2-raw-v1", (DATA_FILES / "wikitext.txt").read_text(encoding="utf-8")
    pages = re.split(r"(?m)^(?= = [^=].*[^=] = $)", raw)[1:]
    passages = (DATA_FILES / "calibration.txt").read_text(encoding="utf-8").split("\n\n")
    hellaswag = _json_rows("hellaswag")[:5]
    return {
        "EleutherAI/wikitext_document_level": {
            "README.md": PLAIN_CARD.encode(),
            f"{wikitext}/{wikitext}-test.parquet": _parquet([{"page": p} for p in pages[:3]]),
            f"{wikitext}/{wikitext}-validation.parquet": _parquet([{"page": p} for p in passages]),
            "wikitext-2-v1/wikitext-2-v1-test.parquet": _parquet([{"page": " = Another = "}]),
        },
        "Rowan/hellaswag": {
            "README.md": HELLASWAG_CARD.encode(),
            "data/validation-00000-of-00002.parquet": _parquet(hellaswag[:3]),
            "data/validation-00001-of-00002.parquet": _parquet(hellaswag[3:]),
            "data/train-00000-of-00001.parquet": _parquet([{"other": 1}]),
        },
        "EleutherAI/lambada_openai": {
            "default/test/0000.parquet": _parquet(_json_rows("lambada")[:5]),
            "de/test/0000.parquet": _parquet([{"text": "ein Wort"}]),
        },
    }


def _json_rows(name: str) -> list[dict]:
    lines = (DATA_FILES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _parquet(rows: list[dict]) -> bytes:
    with BytesIO() as stream:
        pq.write_table(pa.Table.from_pylist(rows), stream)
        return stream.getvalue()
