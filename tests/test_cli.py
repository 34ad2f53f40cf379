"""Exit codes and the one line of bad input."""

from __future__ import annotations

import re

import pytest

from moe_routing.cli import run
from moe_routing.errors import InputError
from moe_routing.usage import JobClock


def test_success_exits_with_0_and_tells_what_was_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(lambda _: None)
    assert caught.value.code == 0
    assert re.fullmatch(r"usage: .* s of CPU \(.*\), peak memory \d+ MB\n", capsys.readouterr().err)


def test_bad_input_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: JobClock) -> None:
        raise InputError("file: row 3:\n column 'a' is empty")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: file: row 3: column 'a' is empty\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda _: print(1 // 0))
