"""The store: what is finished is found again, and no two live jobs make the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from moe_routing.errors import InputError
from moe_routing.evaluation import store as module
from moe_routing.evaluation.store import (
    Piece,
    Store,
    as_settings,
    claimed,
    deliver_finished,
    eligible,
)


def piece(name, files=("model.json",), **settings):
    return Piece(f"cells/{name}/lambada", (".parquet", ".json"), as_settings(settings), files)


def writing(made):
    """Return a function that makes pieces, and notes which."""

    def make(one, path):
        made.append(one.path)
        for suffix in one.suffixes:
            path.with_name(path.name + suffix).write_text(f"{one.path}{suffix}")

    return make


@pytest.fixture
def store(tmp_path):
    (tmp_path / "model.json").write_text("weights")
    return Store(tmp_path)


def test_a_piece_is_made_once_and_delivered(store, tmp_path):
    made = []
    one = piece("shuffle.bh_k8_a005")
    for _ in range(2):
        Store(tmp_path).finish(one, [], writing(made), 1)
    assert made == [one.path]
    store.deliver(one)
    assert (tmp_path / f"{one.path}.json").read_text() == f"{one.path}.json"
    (tmp_path / f"{one.path}.json").unlink()  # as Snakemake does when the job fails
    assert store.has(one)
    asked = (one.path, one.suffixes, one.settings, [str(tmp_path / "model.json")])
    assert deliver_finished(tmp_path, *asked)
    assert (tmp_path / f"{one.path}.json").is_file()


@pytest.mark.parametrize("changed", ["settings", "file", "files", "path"])
def test_what_determines_a_piece_is_its_key(store, tmp_path, changed):
    one = piece("stock", seed=0)
    store.finish(one, [], writing([]), 1)
    if changed == "file":
        (tmp_path / "model.json").write_text("others")
        store = Store(tmp_path)
    others = {
        "settings": piece("stock", seed=1),
        "file": one,
        "files": replace(one, files=()),
        "path": piece("regular_k8", seed=0),
    }
    assert not store.has(others[changed])


def test_order_of_settings_does_not_matter(store):
    assert store.path(piece("stock", a=1, b=2)) == store.path(piece("stock", b=2, a=1))


def test_a_missing_input_is_named(store):
    with pytest.raises(InputError, match=r"data/x\.parquet: missing; cells/stock/lambada depends"):
        store.path(piece("stock", ("data/x.parquet",)))


def test_others_are_made_in_passing_as_many_as_allowed(store):
    made = []
    names = ["a", "b", "c", "d"]
    own, *others = (piece(name) for name in names)
    store.finish(own, others, writing(made), 3)
    assert made == [piece(name).path for name in names[:3]]
    del made[:]
    store.finish(own, others, writing(made), 3)
    assert made == []  # whoever only copies makes nothing in passing


def test_an_error_in_passing_is_left_to_its_own_job(store, capsys):
    def make(one, path):
        if one == bad:
            raise InputError("no good")
        writing([])(one, path)

    own, bad = piece("own"), piece("bad")
    store.finish(own, [bad, piece("more")], make, 9)
    assert store.has(own)
    assert "cells/bad/lambada, made in passing, failed" in capsys.readouterr().err
    with pytest.raises(InputError, match="no good"):
        store.finish(bad, [], make, 1)


def test_only_pieces_whose_inputs_are_up_to_date_are_made_in_passing():
    own = piece("own", ("model.json", "data"))
    fewer, more = piece("fewer", ("data",)), piece("more", ("model.json", "scale"))
    assert eligible(own, [own, fewer, more], lambda _: False) == [fewer]
    assert eligible(own, [own, fewer, more], {"scale"}.__contains__) == [fewer, more]


def test_current_is_what_was_made_with_the_inputs_of_now(store, tmp_path):
    one = piece("stock")
    assert not store.is_current(one)
    store.finish(one, [], writing([]), 1)
    assert not store.is_current(one)  # not delivered
    store.deliver(one)
    assert store.is_current(one)
    (tmp_path / f"{one.path}.parquet").write_text("of other settings")
    assert not store.is_current(one)
    assert not store.is_current(piece("other", ("no such file",)))


HOLD = """
import sys, time
from pathlib import Path
from moe_routing.evaluation.store import claimed
with claimed(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the claim of a path."""
    job = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "cell"], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert job.stdout.readline() == "True\n"
    yield job
    job.kill()
    job.communicate()


def test_a_live_job_keeps_its_claim_and_a_dead_one_loses_it(holder, tmp_path):
    with claimed(tmp_path / "cell") as mine:
        assert not mine
    holder.kill()
    holder.wait()
    with claimed(tmp_path / "cell") as mine:
        assert mine
    assert not list(tmp_path.glob("cell.claim*"))


def test_a_job_waits_for_the_one_that_makes_its_piece(store, tmp_path, monkeypatch):
    """And makes others meanwhile."""
    monkeypatch.setattr(module, "POLL", 0.01)
    own, other, made = piece("own"), piece("other"), []
    path = store.path(own)
    path.parent.mkdir(parents=True)

    def make(one, where):
        writing(made)(one, where)
        if one == other:  # the first job ends
            writing([])(own, path)

    with claimed(path) as mine:
        assert mine
        Store(tmp_path).finish(own, [other], make, 9)
    assert made == [other.path]


def test_a_silent_claim_of_another_host_is_taken_over(tmp_path, monkeypatch):
    claim = tmp_path / "cell.claim"
    claim.write_text(f"{socket.gethostname()}-2 {os.getpid()} token")
    with claimed(tmp_path / "cell") as mine:
        assert not mine
    past = time.time() - module.SILENCE - 60
    os.utime(claim, (past, past))
    with claimed(tmp_path / "cell") as mine:
        assert mine
        assert claim.read_text().startswith(f"{socket.gethostname()} ")


def test_a_holder_shows_that_it_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.01)
    with claimed(tmp_path / "cell"):
        claim = tmp_path / "cell.claim"
        os.utime(claim, (0, 0))
        deadline = time.monotonic() + 30
        while claim.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_whoever_lost_a_claim_does_not_release_that_of_another(tmp_path):
    with claimed(tmp_path / "cell"):
        (tmp_path / "cell.claim").write_text("another host 1 token")
    assert (tmp_path / "cell.claim").read_text() == "another host 1 token"
