"""Hub data sets out of a local hub cache laid out like the real one, offline.

Files of a split are either declared in the data set's card or named after subset and split, as in
EleutherAI/wikitext_document_level and the Parquet branch of EleutherAI/lambada_openai.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from moe_routing.config.study import HubSource
from moe_routing.data.sources import fetch
from moe_routing.data.tasks import load_items
from moe_routing.errors import InputError

COMMIT = "0123456789" * 4
CARD = """---
license: mit
configs:
- config_name: {subset}
  data_files:
  - split: train
    path: {folder}/train-*
  - split: {split}
    path: {folder}/{split}-*
---
# A data set
"""

Publish = Callable[[str, dict[str, list[dict] | str]], Path]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Return a function that puts files of a data set into a hub cache of this test."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(dataset: str, files: dict[str, list[dict] | str]) -> Path:
        root = cache / f"datasets--{dataset.replace('/', '--')}"
        snapshot = root / "snapshots" / COMMIT
        for number, (name, content) in enumerate(files.items()):
            blob = root / "blobs" / f"{number:040x}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                blob.write_text(content, encoding="utf-8")
            else:
                pq.write_table(pa.Table.from_pylist(content), blob)
            file = snapshot / name
            file.parent.mkdir(parents=True, exist_ok=True)
            # The real cache holds relative links into blobs/.
            file.symlink_to(os.path.relpath(blob, file.parent))
        return snapshot

    return put


def _source(dataset: str, split: str, subset: str | None = None) -> HubSource:
    return HubSource(kind="hub", dataset=dataset, subset=subset, split=split, revision=COMMIT)


def _fetch(source: HubSource, tmp_path: Path) -> Path:
    path = tmp_path / "raw" / "set.parquet"
    fetch(source, path, tmp_path / "unused")
    return path


def test_hellaswag_declared_in_the_card(
    publish: Publish, json_rows: Callable[[str], list[dict]], data_files: Path, tmp_path: Path
) -> None:
    rows = json_rows("hellaswag")
    publish(
        "Rowan/hellaswag",
        {
            "README.md": CARD.format(subset="default", folder="data", split="validation"),
            "data/validation-00000-of-00002.parquet": rows[:10],
            "data/validation-00001-of-00002.parquet": rows[10:],
            "data/test-00000-of-00001.parquet": [{"other": 1}],
        },
    )
    path = _fetch(_source("Rowan/hellaswag", "validation"), tmp_path)
    expected = load_items("hellaswag", data_files / "hellaswag.jsonl")
    assert load_items("hellaswag", path) == expected


@pytest.mark.parametrize("card", [True, False])
def test_wikitext_lines(publish: Publish, data_files: Path, tmp_path: Path, card: bool) -> None:
    lines = (data_files / "wikitext.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [{"text": line if line.strip() else ""} for line in lines]
    subset = "wikitext-2-raw-v1"
    files: dict[str, list[dict] | str] = {
        f"{subset}/test-00000-of-00001.parquet": rows,
        "wikitext-2-v1/test-00000-of-00001.parquet": [{"text": "<unk>"}],
        "wikitext-103-raw-v1/test-00000-of-00001.parquet": [{"text": "more"}],
    }
    if card:
        files["README.md"] = CARD.format(subset=subset, folder=subset, split="test")
    publish("Salesforce/wikitext", files)
    path = _fetch(_source("Salesforce/wikitext", "test", subset), tmp_path)
    assert load_items("wikitext", path) == load_items("wikitext", data_files / "wikitext.txt")


def test_wikitext_pages_and_lambada_named_after_subset_and_split(
    publish: Publish, json_rows: Callable[[str], list[dict]], data_files: Path, tmp_path: Path
) -> None:
    expected = load_items("lambada", data_files / "lambada.jsonl")
    german = [{"text": "ein Wort"}]
    publish(
        "EleutherAI/lambada_openai",
        {"default/test/0000.parquet": json_rows("lambada"), "de/test/0000.parquet": german},
    )
    path = _fetch(_source("EleutherAI/lambada_openai", "test", "default"), tmp_path)
    assert load_items("lambada", path) == expected

    subset = "wikitext-2-raw-v1"
    publish(
        "EleutherAI/wikitext_document_level",
        {
            "README.md": "---\nlicense: cc-by-sa-3.0\n---\nNo files are declared here.\n",
            f"{subset}/{subset}-test.parquet": [{"page": " = A = \n"}, {"page": " = B = \n b"}],
            f"{subset}/{subset}-train.parquet": [{"page": "train"}],
            "wikitext-2-v1/wikitext-2-v1-test.parquet": [{"page": "other"}],
        },
    )
    path = _fetch(_source("EleutherAI/wikitext_document_level", "test", subset), tmp_path)
    items = load_items("wikitext", path)
    assert [item.continuations[0] for item in items] == [" = A =\n", " = B =\nb"]


@pytest.mark.parametrize(
    ("dataset", "split", "subset", "problem"),
    [
        (
            "absent/data",
            "test",
            None,
            "missing or incomplete in the local Hub cache .* HF_HUB_OFFLINE forbids downloading",
        ),
        ("with/card", "test", "default", r"split is 'test'; allowed: train, validation$"),
        ("with/card", "train", "small", r"subset is 'small'; allowed: default$"),
        ("no/card", "validation", None, r"no data file of split 'validation'$"),
        ("no/card", "test", "fr", r"no data file of split 'test' and subset 'fr'$"),
        ("no/card", "test", None, r"several files could be .*: data/x_test.jsonl, .*; set subset$"),
        ("n" * 97, "test", None, "cannot be fetched from .*: Repo id must"),
    ],
)
def test_what_is_not_there_is_one_line(
    publish: Publish, tmp_path: Path, dataset: str, split: str, subset: str | None, problem: str
) -> None:
    card = CARD.format(subset="default", folder="data", split="validation")
    publish("with/card", {"README.md": card, "data/train-0.parquet": [{"a": 1}]})
    publish("no/card", {"data/x_test.jsonl": '{"text": "a"}', "data/x_test_de.jsonl": "{}"})
    with pytest.raises(InputError, match=problem) as caught:
        _fetch(_source(dataset, split, subset), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"hub data set {dataset} @ {COMMIT[:12]}: ")
    assert "\n" not in message
    assert not (tmp_path / "raw").exists()


def test_another_commit_in_the_cache_is_not_taken(publish: Publish, tmp_path: Path) -> None:
    publish("some/data", {"data/test-0.parquet": [{"text": "a b"}]})
    other = _source("some/data", "test").model_copy(update={"revision": "f" * 40})
    with pytest.raises(
        InputError, match=r"some/data @ ffffffffffff: missing or incomplete in the local Hub cache"
    ):
        _fetch(other, tmp_path)
