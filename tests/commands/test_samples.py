"""Samples of lm-evaluation-harness, compared: metrics, same documents, one line on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.registry import is_higher_better

from moe_routing.commands.compare_samples import receipt_of_files
from moe_routing.commands.samples import LIKELIHOODS, LOWER_IS_BETTER, sample_panels, task_of
from moe_routing.errors import InputError
from moe_routing.statistics.proportions import exact_mcnemar


def sample(doc, value, *, metric="acc", filter_key="none", **changes):
    return {
        "doc_id": doc,
        "doc_hash": f"doc {doc}",
        "target_hash": f"target {doc}",
        "filter": filter_key,
        "metrics": [metric],
        metric: value,
    } | changes


def write(path, samples):
    path.write_text("".join(json.dumps(one) + "\n" for one in samples), encoding="utf-8")
    return str(path)


@pytest.fixture
def right(tmp_path):
    """Two files of 60 answers: 5 right answers are lost, and 2 gained."""
    first = np.array([1] * 40 + [0] * 20)
    second = first.copy()
    second[:5], second[-2:] = 0, 1
    files = []
    for label, values in (("stock", first), ("four", second)):
        samples = map(sample, range(60), map(float, values))
        files.append(f"{label}={write(tmp_path / f'samples_quiz_{label}.jsonl', samples)}")
    return files


def test_answers_are_paired(right):
    receipt = receipt_of_files(right, seed=0)
    (row,) = receipt.record["differences"]
    assert (row["lost"], row["gained"], row["n_items"]) == (5, 2, 60)
    assert row["difference"] == pytest.approx(-3 / 60)
    assert row["p_mcnemar"] == exact_mcnemar(5, 2)
    (margin,) = receipt.record["noninferiority"]
    assert margin["margin"] == 0.01
    assert set(receipt.record["files"]) == {"stock", "four"}
    assert receipt.sections[0].title == "quiz: differences from stock"
    assert "| four | acc | 66.67 | 61.67 | -5.00 [" in receipt.markdown


def test_the_command_line_reads_files(command, right, tmp_path):
    code, out, _ = command("compare", "--samples", *right, "--out", tmp_path / "receipt")
    assert code == 0
    assert out == (tmp_path / "receipt" / "receipt.md").read_text(encoding="utf-8")


def test_the_order_of_documents_does_not_matter():
    one = [sample(doc, float(doc % 3 == 0)) for doc in range(9)]
    (panel,) = sample_panels("quiz", {"a": one, "b": one[::-1]})
    values_NS = panel.values(panel.metric)
    np.testing.assert_array_equal(values_NS[:, 0], values_NS[:, 1])


def test_likelihoods_become_nats_per_unit():
    arms = {
        name: [sample(doc, [-factor * 10.0, 5], metric="word_perplexity") for doc in range(4)]
        for name, factor in (("a", 1), ("b", 2))
    }
    (panel,) = sample_panels("text", arms)
    assert [panel.value(panel.metric, name) for name in arms] == [2, 4]
    assert not panel.metric.higher_is_better
    assert panel.metric.unit == "nats per word"


def test_each_filter_is_a_metric_of_its_own():
    arm = [sample(doc, 1.0, filter_key=key) for doc in range(3) for key in ("strict", "flexible")]
    panels = sample_panels("quiz", {"a": arm, "b": arm})
    assert [panel.metric.name for panel in panels] == ["acc,strict", "acc,flexible"]


def test_values_that_are_no_numbers_are_left_out():
    arm = [sample(doc, 1.0, metrics=["acc", "bleu"], bleu=["a", "b"]) for doc in range(3)]
    assert [panel.metric.name for panel in sample_panels("quiz", {"a": arm, "b": arm})] == ["acc"]


@pytest.mark.parametrize("name", sorted(LOWER_IS_BETTER | LIKELIHOODS))
def test_directions_are_those_of_the_harness(name):
    known = is_higher_better(name)
    assert known is None or known is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arm: arm[:-1], "b and a: quiz: 1 documents are in one of them only, such as 4"),
        (
            lambda arm: [arm[0] | {"target_hash": "other"}, *arm[1:]],
            "b and a: quiz: document 0 is not the same",
        ),
        (lambda arm: [*arm, arm[0]], "b: quiz: document 0 has metric 'acc' twice"),
        (lambda arm: [one | {"metrics": ["em"], "em": 1} for one in arm], "b: quiz: no metric"),
    ],
)
def test_other_documents_are_refused(change, message):
    arm = [sample(doc, 1.0) for doc in range(5)]
    with pytest.raises(InputError, match=message):
        sample_panels("quiz", {"a": arm, "b": change(arm)})


def test_a_task_without_a_number_is_refused():
    arm = [sample(0, "text")]
    with pytest.raises(InputError, match="a: quiz: no metric of single documents is a number"):
        sample_panels("quiz", {"a": arm, "b": arm})


def test_bad_files_are_one_line(refused, right, tmp_path):
    assert refused("compare", "--samples", right[0]).startswith("error: --samples has one file")
    assert "--samples has 'stock' twice" in refused("compare", "--samples", right[0], right[0])
    assert "no such file" in refused("compare", "--samples", "a=none.jsonl", "b=none.jsonl")
    other = write(tmp_path / "other.jsonl", [{"text": "no sample"}])
    assert "column 'metrics' is missing" in refused("compare", "--samples", "a=" + other, right[1])


def test_the_task_is_in_the_name_of_the_file():
    assert task_of(Path("x/samples_arc_easy_2026-01-01T10-00-00.jsonl")) == "arc_easy"
    assert task_of(Path("x/mine.jsonl")) == "mine"
