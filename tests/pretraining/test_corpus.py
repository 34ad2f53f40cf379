from __future__ import annotations

import gzip
import hashlib
import lzma
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_pretraining import corpus
from moe_pretraining.corpus import (
    SHORTEST_PERIOD,
    PackedCorpus,
    leading_documents,
    read_documents,
    recurring,
    tokenize_source,
    uncommon_word_starts,
)
from moe_pretraining.settings import LocalTextSource, PretrainConfig
from moe_routing.errors import InputError

TEXT = "Title\nA line.\n\n\n \nSecond\ndocument, ünïcode\n"
DOCUMENTS = ["Title\nA line.", "Second\ndocument, ünïcode"]


def local(path: Path, **values: object) -> LocalTextSource:
    about = {"kind": "local", "name": "a", "license": "CC0", "url": "here"}
    return LocalTextSource(**about, path=str(path), **values)


def open_corpus(tokens: Path, config: PretrainConfig, split: str, seed: int = 0) -> PackedCorpus:
    return PackedCorpus.open(tokens, config.sources, split, config.sequence_length, seed)


def period_of(window) -> int | None:
    """Return the least distance at which a window repeats itself up to its end."""
    distances = range(1, window.size // 2 + 1)
    return next((d for d in distances if (window[d:] == window[:-d]).all()), None)


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_documents_are_blocks_of_lines_in_every_format(tmp_path: Path, suffix: str, opener):
    path = tmp_path / f"a.txt{suffix}"
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.write(TEXT)
    assert list(read_documents(local(path))) == DOCUMENTS
    assert list(read_documents(local(path, max_documents=1))) == DOCUMENTS[:1]


def test_leading_documents_stop_at_the_document_that_reaches_the_size(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(["äb"] * 5), encoding="utf-8")  # 3 bytes each
    assert [len(list(leading_documents(local(path), size))) for size in (1, 3, 4, 99)] == [
        1,
        1,
        2,
        5,
    ]


def test_missing_file_and_other_hash_are_named(tmp_path: Path):
    path = tmp_path / "a.txt"
    with pytest.raises(InputError, match=r"source 'a': path: .*a\.txt: no such file"):
        next(read_documents(local(path)))
    path.write_text(TEXT, encoding="utf-8")
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(read_documents(local(path, sha256=right))) == DOCUMENTS
    with pytest.raises(InputError, match=f"sha256 is {right}; the config asks for {'0' * 64}"):
        next(read_documents(local(path, sha256="0" * 64)))


def test_tokens_are_the_documents_split_by_draw(config: PretrainConfig, tokenizer, tokens: Path):
    source = config.sources[0]
    draws = np.random.default_rng(config.seed).random(200)
    expected = {"train": [], "validation": []}
    for document, draw in zip(read_documents(source), draws, strict=True):
        split = "validation" if draw < config.validation_share else "train"
        expected[split] += [*tokenizer.encode(document), tokenizer.eos_token_id]
    for split, ids in expected.items():
        found = np.load(tokens / f"{source.name}.{split}.npy")
        assert found.dtype == np.uint16
        assert found.tolist() == ids


def test_a_split_without_documents_is_said(config: PretrainConfig, tokenizer, tmp_path: Path):
    source = config.sources[0].model_copy(update={"max_documents": 3})
    with pytest.raises(InputError, match="no document for the validation split"):
        tokenize_source(source, tokenizer, tmp_path, validation_share=1e-9, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_source_shorter_than_a_window_is_said(tokens: Path, config: PretrainConfig):
    with pytest.raises(InputError, match=r"source 'first': \d+ train tokens; at least 1000001"):
        PackedCorpus.open(tokens, config.sources, "train", 1_000_000, seed=0)


def test_batches_from_a_later_step_are_the_tail(tokens: Path, config: PretrainConfig):
    corpus = open_corpus(tokens, config, "train")
    whole = list(corpus.batches(range(0, 1601, 4)))  # several epochs
    assert whole[0].shape == (4, config.sequence_length + 1)
    for first in (1, 7, 399):
        tail = list(corpus.batches(range(4 * first, 1601, 4)))
        assert len(tail) == 400 - first
        assert all(np.array_equal(a, b) for a, b in zip(tail, whole[first:], strict=True))
    shorter = list(corpus.batches(range(0, 37, 4)))
    assert all(np.array_equal(a, b) for a, b in zip(shorter, whole[:9], strict=True))


def test_order_depends_on_the_seed(tokens: Path, config: PretrainConfig):
    first, other = (
        next(open_corpus(tokens, config, "train", s).batches(range(0, 9, 8))) for s in (0, 1)
    )
    assert not np.array_equal(first, other)


def test_each_window_comes_once_an_epoch_in_a_new_order(tokens: Path, config: PretrainConfig):
    length = config.sequence_length
    array = np.load(tokens / "first.train.npy").astype(np.int64)
    windows = [array[n : n + length + 1].tobytes() for n in range(0, array.size - length, length)]
    corpus = PackedCorpus((array,), (1.0,), length, seed=0)
    seen = [batch[0].tobytes() for batch in corpus.batches(range(2 * len(windows) + 1))]
    first, second = seen[: len(windows)], seen[len(windows) :]
    assert Counter(first) == Counter(second) == Counter(windows)
    assert first != second
    assert first != windows


def test_sources_are_mixed_by_weight(config: PretrainConfig):
    ones, twos = np.full(100, 1), np.full(100, 2)
    corpus = PackedCorpus((ones, twos), (3.0, 1.0), length=9, seed=0)
    drawn = np.concatenate([batch[:, 0] for batch in corpus.batches(range(0, 10001, 10))])
    # 10,000 draws: 5 standard deviations are 0.022.
    assert abs((drawn == 1).mean() - 0.75) < 0.022


def test_no_validation_window_is_trained_on(tokens: Path, config: PretrainConfig):
    trained = {
        row[1:].tobytes()
        for batch in open_corpus(tokens, config, "train").batches(range(0, 1201, 4))
        for row in batch
    }
    held_out = [
        row[1:].tobytes()
        for batch in open_corpus(tokens, config, "validation").batches(range(0, 41, 4))
        for row in batch
    ]
    assert len(held_out) == 40
    assert not trained & set(held_out)


def test_a_share_of_the_windows_repeats_its_first_tokens(tokens: Path, config: PretrainConfig):
    length = 40
    plain = PackedCorpus.open(tokens, config.sources, "train", length, seed=0)
    corpus = replace(plain, repeats=0.3, repeats_end=4 * 200)
    pairs = [
        (before, after)
        for batches in zip(
            plain.batches(range(0, 1201, 4)), corpus.batches(range(0, 1201, 4)), strict=True
        )
        for before, after in zip(*batches, strict=True)
    ]
    changed = [(before, after) for before, after in pairs[:800] if (before != after).any()]
    assert len(changed) / 800 == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 800) ** 0.5)
    assert all((before == after).all() for before, after in pairs[800:])
    for before, after in changed:
        period = period_of(after)
        assert (after[:period] == before[:period]).all()
    periods = {period_of(after) for _, after in changed}
    assert (min(periods), max(periods)) == (SHORTEST_PERIOD, (length + 1) // 2)


def test_repeats_do_not_depend_on_the_first_step(tokens: Path, config: PretrainConfig):
    corpus = replace(open_corpus(tokens, config, "train"), repeats=0.5)
    whole = np.stack(list(corpus.batches(range(0, 161, 4))))
    np.testing.assert_array_equal(np.stack(list(corpus.batches(range(68, 161, 4)))), whole[17:])


def test_tokens_that_recur_by_a_loop():
    rng = np.random.default_rng(0)
    ids_BL, eligible_V = rng.integers(0, 20, (5, 30)), rng.random(20) < 0.5
    expected = [
        [bool(eligible_V[token]) and token in row[:place] for place, token in enumerate(row)]
        for row in ids_BL.tolist()
    ]
    assert recurring(ids_BL, eligible_V).tolist() == expected


def test_uncommon_word_starts(tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "COMMON_TOKENS", 1)
    rain, tea = (tokenizer.encode(f"a {word}")[1:] for word in ("rain", "tea"))
    starts_V = uncommon_word_starts([np.array(rain + 3 * tea[:1]), np.array(tea)], tokenizer)
    assert starts_V.shape == (len(tokenizer),)
    assert starts_V[rain[0]]
    assert not starts_V[tea[0]]  # the most frequent token
    names = tokenizer.convert_ids_to_tokens(np.flatnonzero(starts_V).tolist())
    assert all(tokenizer.convert_tokens_to_string([name]).startswith(" ") for name in names)


def test_batches_of_any_sizes_are_the_same_windows(tokens: Path, config: PretrainConfig):
    corpus = open_corpus(tokens, config, "train")
    whole = np.concatenate(list(corpus.batches(range(0, 41, 4))))
    batches = list(corpus.batches([0, 1, 2, 9, 40]))
    assert [len(batch) for batch in batches] == [1, 1, 7, 31]
    np.testing.assert_array_equal(np.concatenate(batches), whole)
