"""Fixtures of the console command: how it is run."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``moe-routing`` in this process; return its exit code, output and errors."""

    def run(*arguments):
        from moe_routing.commands.main import main

        monkeypatch.setattr(sys, "argv", ["moe-routing", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        return caught.value.code, said.out, said.err

    return run


@pytest.fixture
def refused(command):
    """Run ``moe-routing`` on bad input; return the one line it ends with."""

    def run(*arguments):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        return err.splitlines()[-1]

    return run
