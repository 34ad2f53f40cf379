"""What the hub says, or fails to say, is a folder of files or one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import Hub, Repository, serving
from huggingface_hub import close_session, constants

from moe_routing.errors import InputError
from moe_routing.hub import snapshot
from moe_routing.workflow import job_prefix

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789" * 4
WEIGHTS = bytes(range(256)) * 4096
FILES = {"config.json": b"{}", "a.safetensors": WEIGHTS, "b.safetensors": b"b", "c.bin": b"c"}
WANTED = ["a.safetensors", "b.safetensors", "config.json"]
FETCH = f"""
from types import SimpleNamespace
from moe_routing.engine.loading import checkpoint_folder
checkpoint_folder(SimpleNamespace(path="some/model", revision="{COMMIT}"), download=True)
"""


@pytest.fixture
def served():
    with serving() as hub:
        hub.repositories["models/some/model"] = Repository(COMMIT, FILES)
        yield hub


@pytest.fixture
def hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub with one model, known to this process, which has an empty cache."""
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()  # one from before may know a proxy
    yield served
    close_session()


def fetch(repository: str = "some/model", revision: str = COMMIT, **options: bool) -> Path:
    patterns = ["*.json", "*.safetensors"]
    return snapshot("model.path: m", repository, revision, patterns, kind="model", **options)


def error_of(*arguments: str, **options: bool) -> str:
    with pytest.raises(InputError) as caught:
        fetch(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model.path: m: ")
    return message.removeprefix("model.path: m: ")


def test_files_that_match_come_whole_and_once(hub: Hub):
    folder = fetch()
    assert sorted(path.name for path in folder.iterdir()) == WANTED
    assert (folder / "a.safetensors").read_bytes() == WEIGHTS
    assert fetch() == fetch(cached_only=True) == folder
    assert hub.files_given() == WANTED


def test_a_broken_connection_is_resumed_where_it_broke(hub: Hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what is lost at the most
    hub.broken_off.add("a.safetensors")
    assert (fetch() / "a.safetensors").read_bytes() == WEIGHTS
    assert hub.files_given() == ["a.safetensors", *WANTED]
    assert hub.ranges == [f"bytes={len(WEIGHTS) // 2}-"]


def test_after_an_interruption_only_what_lacks_is_downloaded(hub: Hub):
    lost = fetch() / "a.safetensors"
    lost.resolve().unlink()
    lost.unlink()
    assert "; download it where there is a network" in error_of(cached_only=True)
    hub.requests.clear()
    assert fetch() == lost.parent
    assert hub.files_given() == ["a.safetensors"]


@pytest.mark.parametrize(
    ("repository", "revision", "said"),
    [
        ("some/model", "f" * 40, "no such commit on {url}"),
        ("no/model", COMMIT, "no such repository on {url}; for a private one, log in with"),
        ("gated/model", COMMIT, "access is restricted: accept the terms on its Hub page"),
        ("not a name", COMMIT, "cannot be fetched from {url}: HFValidationError: Repo id must"),
    ],
)
def test_a_refusal_is_one_line(hub: Hub, tmp_path: Path, repository: str, revision: str, said: str):
    hub.repositories["models/gated/model"] = Repository(COMMIT, FILES, gated=True)
    assert error_of(repository, revision).startswith(said.format(url=hub.url))
    assert not [
        path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".incomplete")
    ]


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("http://127.0.0.1:9", "ConnectError: "),
        ("https://hub.example", "ProxyError: 403"),
        ("hub.example", "UnsupportedProtocol: "),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_line(hub: Hub, monkeypatch, endpoint: str, said: str):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setenv("HTTPS_PROXY", hub.url)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's own retries
    close_session()
    assert error_of().startswith(f"cannot be fetched from {endpoint}: {said}")


def test_offline_nothing_is_asked_for(hub: Hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = re.escape(constants.HF_HUB_CACHE)
    forbidden = ", and HF_HUB_OFFLINE forbids downloading it; "
    assert re.match(f"missing or incomplete in the local Hub cache {cache}{forbidden}", error_of())
    assert hub.requests == []


@pytest.mark.parametrize(
    ("variables", "downloads"),
    [
        ({}, True),
        ({"HF_HUB_OFFLINE": ""}, True),
        ({"HF_HUB_OFFLINE": "0"}, True),
        ({"HF_HUB_OFFLINE": "1"}, False),
        ({"TRANSFORMERS_OFFLINE": "0"}, True),
        ({"TRANSFORMERS_OFFLINE": "1"}, False),
        ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}, True),
    ],
)
def test_a_rule_that_fetches_does_as_the_user_says(
    served: Hub, tmp_path: Path, variables: dict[str, str], downloads: bool
):
    job = f"echo $HF_HUB_OFFLINE; HF_HUB_OFFLINE=$USER_OFFLINE {sys.executable} -c '{FETCH}'"
    done = subprocess.run(
        ["bash", "-c", job_prefix(ROOT).format() + job],
        env=served.environment(tmp_path) | variables,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1\n"  # whatever the user says, no other rule uses a network
    assert (done.returncode == 0) == downloads, done.stderr
    assert served.files_given() == (WANTED if downloads else [])
    assert downloads or "HF_HUB_OFFLINE forbids downloading it" in done.stderr
