"""Files are whole or absent, damage is noticed, and what goes wrong is one line."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest

from moe_routing.errors import InputError
from moe_routing.files import RECORDS, atomic_path, read_json, read_parquet, sha256_of


def write_half(path, error):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def test_success_leaves_only_the_file(tmp_path):
    with atomic_path(tmp_path / "new" / "table.csv") as temporary:
        temporary.write_text("a")
        assert not (tmp_path / "new" / "table.csv").exists()
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.csv"))
    assert names == ["new/.sha256/table.csv", "new/table.csv"]


def test_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_half(path, KeyError("stopped"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_space_left_is_one_line(tmp_path):
    path = tmp_path / "table.csv"
    message = f"{path}: cannot be written: No space left on device"
    with pytest.raises(InputError) as caught:
        write_half(path, OSError(errno.ENOSPC, "No space left on device"))
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def written(tmp_path):
    """A file with its record."""
    path = tmp_path / "table.json"
    with atomic_path(path) as temporary:
        temporary.write_text('{"a": 12}')
    return path


def test_a_written_file_is_read(written):
    assert read_json(written) == {"a": 12}


def flip(content):
    return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]


@pytest.mark.parametrize(
    "damage", [flip, lambda content: content[:-1], lambda _: b"", lambda _: b'{"a": 13}']
)
def test_other_content_than_was_written_is_refused(written, damage):
    written.write_bytes(damage(written.read_bytes()))
    with pytest.raises(InputError, match=r"table\.json: not what was written: its SHA-256 is"):
        read_json(written)


def test_a_copy_without_its_record_is_read_as_it_is(written, tmp_path):
    copy = tmp_path / "elsewhere" / "table.json"
    copy.parent.mkdir()
    copy.write_bytes(written.read_bytes())
    assert read_json(copy) == {"a": 12}


def test_a_writer_that_is_killed_leaves_no_file_beside_the_record_of_another(written):
    """The new record without the new content is noticed; the workflow removes such an output."""
    record = written.parent / RECORDS / written.name
    old = written.read_bytes()
    with atomic_path(written) as temporary:
        temporary.write_text('{"a": 13}')
    assert record.read_text().strip() == sha256_of(written)
    written.write_bytes(old)
    with pytest.raises(InputError, match="not what was written"):
        read_json(written)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"a": ', b"[1]"])
def test_what_is_no_json_object_is_one_line(tmp_path, content):
    path = tmp_path / "own.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a table, whatever it says PAR1"])
def test_what_is_no_table_is_one_line(tmp_path, content):
    path = tmp_path / "own.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"own\.parquet: not a Parquet table: ") as caught:
        read_parquet(path)
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named(tmp_path):
    path = tmp_path / "own.parquet"
    pd.DataFrame({"id": ["a"]}).to_parquet(path)
    with pytest.raises(InputError, match=r"column 'cluster' is missing; needed: id, cluster"):
        read_parquet(path, "id", "cluster")


def test_a_file_that_may_not_be_read_is_not_called_missing():
    """Root may read everything, so the child gives that up."""
    script = (
        "import os, sys; from pathlib import Path; from moe_routing.files import read_json\n"
        "os.geteuid() or os.seteuid(65534)\n"
        "try: read_json(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as folder:
        path = Path(folder) / "table.json"
        path.write_text("{}")
        path.chmod(0)
        Path(folder).chmod(0o755)
        command = [sys.executable, "-c", script, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"InputError {path}: cannot be read: Permission denied\n"


def test_leftovers_of_killed_writers_are_swept_and_those_of_live_ones_kept(tmp_path):
    script = (
        "import os, sys; from moe_routing.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); print(temporary, flush=True); {end}"
    )
    path = tmp_path / "table.json"

    def start(end):
        command = [sys.executable, "-c", script.format(end=end), str(path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)

    with start("os._exit(9)") as killed, start("sys.stdin.read()") as alive:
        names = [Path(process.stdout.readline().strip()) for process in (killed, alive)]
        killed.wait()
        assert names[0].is_file()
        with atomic_path(path) as temporary:
            temporary.write_text("{}")
        assert [name.is_file() for name in names] == [False, True]
        alive.communicate()
    assert not names[1].exists()


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written: File exists"):
        write_half(tmp_path / "file" / "table.csv", AssertionError("not reached"))
