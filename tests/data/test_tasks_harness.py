"""Items against the requests that lm-evaluation-harness itself builds from the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_routing.data.hellaswag import preprocess
from moe_routing.data.tasks import load_items
from moe_routing.data.wikitext import detokenize

HarnessTask = Callable[[str, Path, str], Any]


def _requests(task: object) -> list[tuple[str, str]]:
    return [instance.args for instance in task.instances]


def test_hellaswag_is_the_harness_s(data_files: Path, harness_task: HarnessTask) -> None:
    path = data_files / "hellaswag.jsonl"
    items = load_items("hellaswag", path)
    task = harness_task("hellaswag/hellaswag.yaml", path, "validation")
    ours = [(item.context, text) for item in items for text in item.continuations]
    assert ours == _requests(task)
    documents = list(task.eval_docs)
    assert [item.label for item in items] == [task.doc_to_target(d) for d in documents]
    assert [list(item.choices) for item in items] == [task.doc_to_choice(d) for d in documents]
    # The delicate case is there: a removed title leaves a space that belongs to the choice.
    assert any(choice.startswith(" ") for item in items for choice in item.choices)


def test_acc_norm_divides_by_characters_of_the_choice(
    data_files: Path, harness_task: HarnessTask, write_json_lines: Callable[[list[dict]], Path]
) -> None:
    row = json.loads((data_files / "hellaswag.jsonl").read_text(encoding="utf-8").splitlines()[0])
    # Two bytes per character: by bytes it would win whenever all are nearly alike by characters.
    row["endings"][0] = "éé éé éé"
    path = write_json_lines([row])
    item = load_items("hellaswag", path)[0]
    task = harness_task("hellaswag/hellaswag.yaml", path, "validation")
    document = next(iter(task.eval_docs))
    for best, choice in enumerate(item.choices):
        # A log-likelihood of -1 a character but for one choice, a little better than that.
        scores = [-float(len(text)) for text in item.choices]
        scores[best] = -(len(choice) - 0.01)
        results = task.process_results(document, [(score, False) for score in scores])
        assert results["acc_norm"] == float(best == item.label)


def test_lambada_is_the_harness_s(data_files: Path, harness_task: HarnessTask) -> None:
    path = data_files / "lambada.jsonl"
    items = load_items("lambada", path)
    task = harness_task("lambada/lambada_openai.yaml", path, "test")
    assert [(item.context, item.continuations[0]) for item in items] == _requests(task)
    assert any("\n" in item.continuations[0] for item in items)


def test_wikitext_is_the_harness_s(
    data_files: Path, harness_task: HarnessTask, write_json_lines: Callable[[list[dict]], Path]
) -> None:
    raw = (data_files / "wikitext.txt").read_text(encoding="utf-8")
    path = write_json_lines([{"page": page} for page in _pages_by_hub_script(raw)])
    task = harness_task("wikitext/wikitext.yaml", path, "test")
    documents = list(task.eval_docs)
    for file in (data_files / "wikitext.txt", path):
        items = load_items("wikitext", file)
        assert [item.continuations for item in items] == _requests(task)
        for item, document in zip(items, documents, strict=True):
            counts = task.process_results(document, [-1.0])
            assert counts["word_perplexity"] == (-1.0, item.words)
            assert counts["byte_perplexity"] == (-1.0, item.bytes)


def _pages_by_hub_script(raw: str) -> list[str]:
    """Split as EleutherAI/wikitext_document_level's loading script did, told in other words."""
    lines = raw.split("\n")
    starts = [0]
    for place, line in enumerate(lines):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare[:2] == "= " and bare[-2:] == " =":
            starts.append(place)
    pages = ["\n".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return [page for page in pages if page.strip()]


PIECES = st.lists(
    st.sampled_from(
        [
            *"abN5 \n().[]{}'\"°=/:;!?,",
            " @-@ ",
            " @,@ ",
            " @.@ ",
            " 's",
            "s '",
            "= = =",
            "/' [0-9]/",
        ]
    ),
    max_size=40,
).map("".join)


@given(PIECES)
def test_detokenize_equals_the_harness_s_on_any_text(text: str) -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    assert detokenize(text) == wikitext_detokenizer({"page": text})


@given(st.lists(st.sampled_from([*"ab[] \n.", " [title]", "  "]), max_size=30).map("".join))
def test_preprocess_equals_the_harness_s_on_any_text(text: str) -> None:
    from lm_eval.tasks.hellaswag.utils import preprocess as reference

    assert preprocess(text) == reference(text)


@pytest.mark.parametrize("dataset", ["hellaswag", "lambada", "wikipedia"])
def test_every_item_is_numbered_as_the_harness_numbers_documents(
    data_files: Path, dataset: str
) -> None:
    items = load_items(dataset, data_files / f"{dataset}.jsonl")
    assert [item.id for item in items] == [f"{dataset}-{n:05d}" for n in range(len(items))]


def test_hellaswag_clusters_are_source_ids(data_files: Path) -> None:
    path = data_files / "hellaswag.jsonl"
    items = load_items("hellaswag", path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [item.cluster for item in items] == [row["source_id"] for row in rows]
    assert len({item.cluster for item in items}) == 21
