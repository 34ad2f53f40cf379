"""Settings of a checkpoint that are damaged or of a wrong type: one line, or they do no harm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from families import build

from moe_routing.config.study import ModelConfig
from moe_routing.engine.loading import describe_checkpoint
from moe_routing.errors import InputError

NANO = Path(__file__).resolve().parents[2] / "resources" / "olmoe-nano"
WRONG = [None, True, "8", "", -1, 0, 1.5, 10**30, [], [None], {}, {"a": 1}]
SETTINGS = [
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok",
    "max_position_embeddings", "rope_parameters", "rms_norm_eps", "hidden_act", "norm_topk_prob",
    "tie_word_embeddings", "dtype", "architectures", "quantization_config", "eos_token_id",
    "transformers_weights",
]  # fmt: skip
PARTS = ["version", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"]
OF_MODEL = ["type", "vocab", "merges", "unk_token"]
BYTES = [b"", b"{", b"\xff\xfe{}", b"[]", b"null", b"\x00" * 64]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny checkpoint with the tokenizer of the embedded model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build("Olmoe", {"vocab_size": 64, "num_experts_per_tok": 2}).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    return folder


def refusal(saved, folder, name, content):
    """Return the line by which a checkpoint with other content of a file is refused, or None."""
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(content)
    try:
        describe_checkpoint(ModelConfig(path=str(folder)))
    except InputError as error:
        line = str(error)
        assert line.startswith((str(folder), f"model.path: {folder}")), line
        assert "\n" not in line
        return line
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_wrong_types(saved, tmp_path, name):
    values = json.loads((saved / "config.json").read_text())
    found = {
        repr(wrong): refusal(
            saved, tmp_path, "config.json", json.dumps(values | {name: wrong}).encode()
        )
        for wrong in WRONG
    }
    if name in ("vocab_size", "hidden_size", "num_experts", "num_experts_per_tok"):
        assert [wrong for wrong, line in found.items() if line is None] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PARTS + OF_MODEL)
def test_parts_of_a_tokenizer_of_wrong_types(saved, tmp_path, name):
    values = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    for wrong in WRONG:
        changed = (
            values | {"model": values["model"] | {name: wrong}}
            if name in OF_MODEL
            else values | {name: wrong}
        )
        refusal(saved, tmp_path, "tokenizer.json", json.dumps(changed).encode())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_settings(saved, tmp_path, name):
    for content in (*BYTES, (saved / name).read_bytes()[:-20]):
        line = refusal(saved, tmp_path, name, content)
        assert line is not None or name == "tokenizer_config.json", content
