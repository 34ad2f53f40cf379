"""Tasks of lm-evaluation-harness in ``moe-routing compare``, generation included."""

from __future__ import annotations

import json

import pytest
from commands_shared import MODEL

TASK = """\
task: echo
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 4, until: ["\\n"], do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A folder with a task of three documents."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "docs.jsonl"
    rows = [{"question": f"The number {n} is", "answer": "even"} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "echo.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    return folder


def test_a_task_that_generates(command, task, tmp_path):
    code, out, err = command(
        "compare", MODEL, "--strategies", "regular_k4", "--tasks", "echo", "--include-path", task,
        "--limit", 2, "--turns", 0, "--out", tmp_path / "receipt",
    )  # fmt: skip
    assert code == 0, err
    assert "## echo: differences from stock" in out
    record = json.loads((tmp_path / "receipt" / "receipt.json").read_text(encoding="utf-8"))
    (row,) = record["differences"]
    assert (row["strategy"], row["metric"], row["n_items"]) == ("regular_k4", "exact_match", 2)


def test_an_unknown_task_is_one_line(refused):
    line = refused("compare", MODEL, "--strategies", "regular_k4", "--tasks", "gsm9k")
    assert line.startswith("error: --tasks has 'gsm9k'; allowed: the sets of this package")
