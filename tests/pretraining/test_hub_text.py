"""Pretraining text of ``config/pretrain-hub.yaml``, streamed from a stand-in of the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_files import DATA_FILES, ROOT, pretraining_text
from hub_stand_in import Repository, serving

SOURCES = yaml.safe_load((ROOT / "config" / "pretrain-hub.yaml").read_text())["sources"]
# Clients read their settings when they are imported, so that a process of its own is needed.
READ = """
import json, sys
from moe_routing.errors import InputError
from moe_pretraining.settings import HubTextSource
from moe_pretraining.corpus import read_documents
for values in json.loads(sys.argv[1]):
    try:
        print(json.dumps(list(read_documents(HubTextSource(**values)))))
    except InputError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def read(tmp_path: Path):
    """A function that returns what each source gives: its documents, or one line of error."""

    def run(*sources: dict, **variables: str) -> list:
        done = subprocess.run(
            [sys.executable, "-c", READ, json.dumps(sources)],
            env=hub.environment(tmp_path) | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    with serving() as hub:
        text = pretraining_text()
        hub.repositories |= {
            f"datasets/{source['dataset']}": Repository(source["revision"], text[source["dataset"]])
            for source in SOURCES
        }
        yield run


def test_the_pinned_rows_are_streamed_and_whatever_is_not_there_is_one_line(read):
    lines = (DATA_FILES / "wikipedia.jsonl").read_text(encoding="utf-8").splitlines()
    passages = [json.loads(line)["passage"] for line in lines]
    wikipedia, stories = SOURCES
    few = {**wikipedia, "max_documents": 10}
    wrong = [{"column": "body"}, {"split": "tset"}, {"subset": "xx"}, {"revision": "f" * 40}]
    found = read(stories, few, *({**wikipedia, **change} for change in wrong))
    assert found[:2] == [passages, passages[:10]]
    said = [
        "no column 'body'; allowed: id, text",
        "ValueError: Bad split: tset. Available splits: ['train']",
        "ValueError: BuilderConfig 'xx' not found. Available: ['20231101.de', '20231101.en']",
        f"DatasetNotFoundError: Revision '{'f' * 40}' doesn't exist for dataset",
    ]
    for error, part in zip(found[2:], said, strict=True):
        assert error.startswith("pretraining source 'wikipedia': ")
        assert part in error
        assert "\n" not in error


def test_a_hub_that_cannot_be_reached_is_one_line(read):
    (error,) = read(SOURCES[0], HF_ENDPOINT="https://hub.example")
    assert error == (
        "pretraining source 'wikipedia': wikimedia/wikipedia: "
        "cannot be fetched from https://hub.example: ProxyError: 403 Forbidden"
    )
