"""The small real data files, and the evaluation harness's own reading of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def data_files() -> Path:
    """Return the folder of real excerpts."""
    return Path(__file__).parent.parent / "data_files"


@pytest.fixture
def json_rows(data_files: Path) -> Callable[[str], list[dict]]:
    """Return a reader of the rows of a data set's excerpt."""

    def read(dataset: str) -> list[dict]:
        lines = (data_files / f"{dataset}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return read


@pytest.fixture
def write_json_lines(tmp_path: Path) -> Callable[[list[dict]], Path]:
    """Return a writer of rows to a temporary .jsonl file."""

    def write(rows: list[dict]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def harness_task(tmp_path: Path) -> Callable[[str, Path, str], Any]:
    """Return a builder of lm-evaluation-harness's task over a local .jsonl file."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    def build(config: str, path: Path, split: str) -> Any:
        values = load_yaml(Path(lm_eval.__file__).parent / "tasks" / config)
        values |= dict.fromkeys(("training_split", "validation_split", "test_split"))
        values |= {
            "dataset_path": "json",
            "dataset_name": None,
            "test_split": split,
            "dataset_kwargs": {"data_files": {split: str(path)}, "cache_dir": str(tmp_path)},
        }
        task = ConfigurableTask(config=values)
        task.build_all_requests(rank=0, world_size=1)
        return task

    return build
