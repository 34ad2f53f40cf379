"""The sources of the console command are those of the configs."""

from __future__ import annotations

import pytest
from documents import ROOT

from moe_routing.config.study import LocalSource, load_config
from moe_routing.data.public import PUBLIC_SOURCES, cache_folder, cached_file


@pytest.mark.parametrize(
    ("file", "names"),
    [("config", ("wikipedia", "hellaswag", "lambada")), ("olmoe-1b-7b", ("wikitext",))],
)
def test_they_are_those_of_the_configs(file, names):
    datasets = load_config(ROOT / "config" / f"{file}.yaml").datasets
    assert {name: PUBLIC_SOURCES[name] for name in names} == {
        name: datasets[name].source for name in names
    }


def test_a_local_file_is_read_where_it_lies():
    source = LocalSource(kind="local", path="some/file.jsonl")
    assert str(cached_file("lambada", source)) == "some/file.jsonl"


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "moe-routing"


def test_another_source_is_fetched_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fetched = []

    def fetch(source, path, wheels):
        fetched.append((source, wheels))
        path.parent.mkdir(parents=True)
        path.write_text("{}")

    monkeypatch.setattr("moe_routing.data.public.fetch", fetch)
    first, second = (cached_file("lambada", PUBLIC_SOURCES["lambada"]) for _ in range(2))
    assert first == second
    assert first.name == "lambada.jsonl.gz"
    assert fetched == [(PUBLIC_SOURCES["lambada"], tmp_path / "moe-routing" / "wheels")]
