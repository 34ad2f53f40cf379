"""The Python code of README.md and of the guides in docs/ runs, and does what the text says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from documents import ROOT, blocks

from moe_routing.data import tasks
from moe_routing.errors import InputError
from moe_routing.evaluation.calibrate import calibrate
from moe_routing.routing import nulls
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.types import RouterInputs

QUESTION = {
    "question": "What do plants take in?",
    "choices": ["iron", "carbon dioxide", "helium"],
    "labels": ["A", "B", "C"],
    "answer": "B",
}


def execute(code: str, **names: object) -> dict[str, object]:
    exec(compile(code, "guide", "exec"), names)  # noqa: S102 (our own documents)
    return names


def test_the_three_lines_of_the_readme_route_a_model(model, tokenizer, monkeypatch):
    (code,) = blocks("README.md", "python")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    texts = (ROOT / "tests/data_files/calibration.txt").read_text(encoding="utf-8").split("\n\n")
    before = model(**inputs).logits
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 2)
    for name, few in (("tokens", 1024), ("toggled_tokens", 20), ("documents", 12)):
        monkeypatch.setitem(calibrate.__kwdefaults__, name, few)
    execute(code, model=model, tokenizer=tokenizer, texts=texts, inputs=inputs)
    assert torch.equal(model(**inputs).logits, before)


def small_sample() -> CalibrationSample:
    logits_LTE = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 50, 8))).float()
    norm_LT = torch.ones(2, 50)
    return CalibrationSample(
        logits_LTE, logits_LTE, norm_LT, norm_LT, torch.ones(2, 8),
        hidden_size=4, rule=ModelRule(2, "softmax"), fingerprint="x",
    )  # fmt: skip


def test_the_null_of_the_guide_counts_draws(tmp_path, monkeypatch):
    (code,) = blocks("docs/adding-a-null.md", "python")
    null, sample = execute(code)["LowerHalf"], small_sample()
    monkeypatch.setattr(nulls, "NULLS", {null.id: null})
    nulls.save_null(nulls.fit_null("lower_half", sample), sample, tmp_path / "null.safetensors")
    fitted = nulls.load_null(tmp_path / "null.safetensors", sample)
    logits_TE = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.1, 0.5, 1.0, -torch.inf]])
    p_TE = fitted.p_values(RouterInputs(1, logits_TE))
    draws = sorted(x for row in sample.logits_LTE[1].tolist() for x in sorted(row)[:4])
    expected = [(1 + sum(x >= value for x in draws)) / 201 for value in logits_TE[0].tolist()]
    torch.testing.assert_close(p_TE[0], torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.fixture
def load_arc(tmp_path, monkeypatch):
    """Load rows as the guide's data set."""
    (code,) = blocks("docs/adding-a-data-set.md", "python")
    monkeypatch.setattr(tasks, "ITEM_MAKERS", {"arc": execute(code)["arc_items"]})
    path = tmp_path / "arc.jsonl"

    def load(*rows: dict) -> list:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return tasks.load_items("arc", path)

    return load


def test_the_data_set_of_the_guide_has_items(load_arc):
    first, second = load_arc(QUESTION, {**QUESTION, "answer": "C"})
    assert (first.id, first.cluster, second.id) == ("arc-00000", "arc-00000", "arc-00001")
    assert first.context == "Question: What do plants take in?\nAnswer:"
    assert first.continuations == (" iron", " carbon dioxide", " helium")
    assert (first.label, second.label) == (1, 2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answer": "D"}, r"row 2: column 'answer' is 'D'; allowed: A, B, C"),
        ({"labels": ["A", "B"]}, r"row 2: column 'labels' has 2 entries; choices has 3"),
        ({"question": " "}, r"row 2: column 'question' is empty"),
    ],
)
def test_a_bad_row_of_the_guide_s_data_set_is_named(load_arc, change, problem):
    with pytest.raises(InputError, match=problem):
        load_arc(QUESTION, {**QUESTION, **change})
