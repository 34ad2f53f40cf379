from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moe_pretraining.measure import token_bytes
from moe_pretraining.settings import PretrainConfig
from moe_pretraining.tokenizer import (
    END_OF_TEXT,
    PADDING,
    load_tokenizer,
    train_on_sources,
    train_tokenizer,
)
from moe_routing.errors import InputError

ROOT = Path(__file__).parents[2]
TOKENIZER = train_tokenizer(["the cat sat on the mat, naïvely — 猫"] * 3, 300, 64)
TEXT = st.text(st.characters(codec="utf-8"))


SHIPPED = AutoTokenizer.from_pretrained(ROOT / "resources" / "olmoe-nano")


@pytest.mark.parametrize("tokenizer", [TOKENIZER, SHIPPED], ids=["new", "shipped"])
@given(text=TEXT)
def test_any_text_survives_encoding_and_decoding(tokenizer, text: str):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text


@given(TEXT)
def test_token_bytes_add_up_to_the_texts(text: str):
    ids = TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert token_bytes(TOKENIZER)[ids].sum() == len(text.encode())


def test_special_tokens_of_the_shipped_tokenizer_are_olmoes():
    special = [SHIPPED.eos_token, SHIPPED.pad_token]
    assert special == [END_OF_TEXT, PADDING] == ["<|endoftext|>", "<|padding|>"]


def test_special_tokens_are_the_first_two_and_have_no_bytes():
    assert TOKENIZER.convert_tokens_to_ids([END_OF_TEXT, PADDING]) == [0, 1]
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (0, 1)
    assert token_bytes(TOKENIZER)[:2].tolist() == [0, 0]
    assert TOKENIZER.encode(f"a{END_OF_TEXT}b")[1] == 0


def test_training_is_deterministic_and_survives_the_disk(
    config: PretrainConfig, tokenizer, tmp_path: Path
):
    tokenizer.save_pretrained(tmp_path / "once")
    train_on_sources(config).save_pretrained(tmp_path / "twice")
    once, twice = (tmp_path / name / "tokenizer.json" for name in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()
    assert len(json.loads(once.read_text(encoding="utf-8"))["model"]["vocab"]) == 300
    text = "the naïve kettle"
    for loaded in (load_tokenizer(tmp_path / "once"), AutoTokenizer.from_pretrained(once.parent)):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.model_max_length == 32


def test_too_little_text_for_the_vocabulary_is_said(config: PretrainConfig):
    wide = config.model.model_copy(update={"vocab_size": 5000})
    with pytest.raises(InputError, match=r"vocab_size is 5000, but the text gives only \d+ entr"):
        train_on_sources(config.model_copy(update={"model": wide}))
