"""A byte-level BPE tokenizer with OLMoE's special tokens, trained on the pretraining text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moe_pretraining.corpus import leading_documents
from moe_pretraining.settings import PretrainConfig
from moe_routing.errors import InputError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, model_max_length: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) of ``vocab_size`` entries.

    With no normaliser and the full byte alphabet, any UTF-8 text survives encoding and decoding.
    Ids 0 and 1 are the end of text and padding, as in OLMoE's own tokenizer family.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def train_on_sources(config: PretrainConfig) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a run on the first ``tokenizer_bytes`` of each source, in order.

    Raises:
        InputError: the text has too few distinct pairs for ``vocab_size`` entries.
    """
    heads = (leading_documents(source, config.tokenizer_bytes) for source in config.sources)
    size = config.model.vocab_size
    tokenizer = train_tokenizer(
        chain.from_iterable(heads), size, config.model.max_position_embeddings
    )
    if len(tokenizer) < size:
        raise InputError(
            f"model.vocab_size is {size}, but the text gives only {len(tokenizer)} entries; "
            "give more text or a smaller vocabulary"
        )
    return tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a run."""
    return PreTrainedTokenizerFast.from_pretrained(folder)
