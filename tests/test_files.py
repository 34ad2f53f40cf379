"""Files are whole or absent, and a full disk is one line."""

from __future__ import annotations

import errno

import pytest

from moe_routing.errors import InputError
from moe_routing.files import atomic_path


def write_half(path, error):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def test_success_leaves_only_the_file(tmp_path):
    with atomic_path(tmp_path / "new" / "table.csv") as temporary:
        temporary.write_text("a")
        assert not (tmp_path / "new" / "table.csv").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.csv"]


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
