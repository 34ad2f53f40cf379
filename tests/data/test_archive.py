"""A wheel as a data archive: real pip, no network."""

from __future__ import annotations

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_routing.config import ArchiveSource
from moe_routing.data import archive
from moe_routing.data.sources import fetch
from moe_routing.errors import InputError

MEMBER = "toydata/set/none/validation.jsonl"
CONTENT = b'{"text": "a b"}\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArchiveSource:
    """Return the source of a wheel that pip finds in a local folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "toydata-1.0-py3-none-any.whl"
    info = "toydata-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(MEMBER, CONTENT)
        file.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: toydata\nVersion: 1.0\nRequires-Python: <3\n"
            "Requires-Dist: not-to-be-found\n",
        )
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        file.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return ArchiveSource(
        kind="archive", package="toydata", version="1.0", sha256=digest, member=MEMBER
    )


def _change(source: ArchiveSource, **values: str) -> ArchiveSource:
    return source.model_copy(update=values)


def test_member_is_extracted_and_nothing_else(source: ArchiveSource, tmp_path: Path) -> None:
    out = tmp_path / "raw" / "set.jsonl"
    fetch(source, out, tmp_path / "cache")
    assert out.read_bytes() == CONTENT
    assert list(out.parent.iterdir()) == [out]


def test_wheel_is_downloaded_once_by_jobs_side_by_side(
    source: ArchiveSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    download = archive._pip_download
    monkeypatch.setattr(
        archive, "_pip_download", lambda *args: calls.append(args) or download(*args)
    )
    outs = [tmp_path / f"{number}.jsonl" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda out: fetch(source, out, tmp_path / "cache"), outs))
    assert [out.read_bytes() for out in outs] == [CONTENT] * 4
    assert len(calls) == 1


def test_cached_wheel_that_was_damaged_is_downloaded_again(
    source: ArchiveSource, tmp_path: Path
) -> None:
    wheel = archive.fetch_wheel(source, tmp_path / "cache")
    wheel.write_bytes(wheel.read_bytes()[:-1])
    fetch(source, tmp_path / "out.jsonl", tmp_path / "cache")
    assert (tmp_path / "out.jsonl").read_bytes() == CONTENT


def test_wrong_hash(source: ArchiveSource, tmp_path: Path) -> None:
    wrong = _change(source, sha256="0" * 64)
    with pytest.raises(
        InputError,
        match=rf"^toydata-1.0-\S+: SHA-256 is {source.sha256}; source.sha256 is {'0' * 64}$",
    ):
        fetch(wrong, tmp_path / "out.jsonl", tmp_path / "cache")
    assert not (tmp_path / "out.jsonl").exists()
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_missing_member(source: ArchiveSource, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"'toydata/set/x/validation.jsonl': .* '{MEMBER}'\?$"):
        fetch(
            _change(source, member="toydata/set/x/validation.jsonl"),
            tmp_path / "out.jsonl",
            tmp_path / "cache",
        )
    with pytest.raises(InputError, match=r"'other.arrow': no such member$"):
        fetch(_change(source, member="other.arrow"), tmp_path / "out", tmp_path / "cache")
    assert not (tmp_path / "out.jsonl").exists()


def test_version_that_is_not_there(source: ArchiveSource, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"^source.package: pip cannot download toydata==2.0: No matching distribution",
    ):
        fetch(_change(source, version="2.0"), tmp_path / "out", tmp_path / "cache")
