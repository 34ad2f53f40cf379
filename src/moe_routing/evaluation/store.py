"""What a study's jobs have finished, kept by what it depends on, and who is making what.

Snakemake removes the outputs of a job that fails. So a job writes each piece of work (a cell, a
scale) into ``results/<study>/store`` as soon as it is finished, and its outputs are copies. A job
that is started again finds there what it had finished, and a job may finish pieces of other jobs in
passing, which saves them the start of Python and the loading of the model. The folder may be
removed at any time: what it holds is then made again if it is needed.

The name of a file is a fingerprint of everything that determines its content, except the code.
Nothing here imports torch or the config: looking something up takes a job a twentieth of a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

from moe_routing.errors import InputError
from moe_routing.files import atomic_path, sha256_of

FOLDER = "store"
CELL_SUFFIXES = (".parquet", ".json")
FITTED_SUFFIXES = (".json",)
NULL_SUFFIXES = (".csv", ".safetensors")
BEAT = 15.0
"""Seconds after which the holder of a claim says again that it is alive."""
SILENCE = 180.0
"""Seconds without that after which a claim is abandoned; more than file systems cache times for."""
POLL = 1.0
"""Seconds between looks at what another job is making."""


@dataclass(frozen=True)
class Piece:
    """A piece of work: what one job makes as a whole.

    Attributes:
        path: where it belongs, relative to the results folder and without suffix, such as
            ``cells/stock/wikipedia``.
        suffixes: its files; the last one is written last.
        settings: the settings that determine it, as JSON; see :func:`as_settings`.
        files: the files that determine it, relative to the results folder.
    """

    path: str
    suffixes: tuple[str, ...]
    settings: str
    files: tuple[str, ...]


def as_settings(values: Mapping[str, object]) -> str:
    """Return settings as one line of JSON, the same for equal settings."""
    return json.dumps(values, sort_keys=True)


class Store:
    """The store of a study."""

    def __init__(self, results: Path) -> None:
        """Use the store in a results folder, which need not exist yet."""
        self.results = results
        self._hash = cache(sha256_of)  # a job reads its inputs once

    def path(self, piece: Piece) -> Path:
        """Return where the store keeps a piece, without suffix.

        Raises:
            InputError: a file that determines it is missing.
        """
        try:
            hashes = {name: self._hash(self.results / name) for name in piece.files}
        except OSError as error:
            raise InputError(f"{error.filename}: missing; {piece.path} depends on it") from error
        text = json.dumps([piece.path, piece.settings, hashes], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        return self.results / FOLDER / f"{piece.path}.{key}"

    def check_unchanged(self, name: str) -> None:
        """Check that a file is still the one that pieces are named by.

        Raises:
            InputError: it has been written again meanwhile.
        """
        if sha256_of(self.results / name) != self._hash(self.results / name):
            raise InputError(f"{self.results / name}: changed while a job was reading it")

    def has(self, piece: Piece) -> bool:
        """Return whether a piece is finished."""
        return with_suffix(self.path(piece), piece.suffixes[-1]).is_file()

    def deliver(self, piece: Piece) -> None:
        """Copy a finished piece to where it belongs."""
        for suffix in piece.suffixes:
            with atomic_path(with_suffix(self.results / piece.path, suffix)) as temporary:
                shutil.copyfile(with_suffix(self.path(piece), suffix), temporary)

    def is_current(self, piece: Piece) -> bool:
        """Return whether a finished piece is also where it belongs."""
        if not all((self.results / name).is_file() for name in piece.files) or not self.has(piece):
            return False
        pairs = [
            (with_suffix(self.path(piece), suffix), with_suffix(self.results / piece.path, suffix))
            for suffix in piece.suffixes
        ]
        return all(there.is_file() and _same(kept, there) for kept, there in pairs)

    def finish(
        self,
        own: Piece,
        others: Sequence[Piece],
        make: Callable[[Piece, Path], None],
        most: int,
    ) -> None:
        """Make a piece unless it is finished, and others in passing.

        No piece is made that is finished or that another live job is making. If that holds for the
        own piece, others are made meanwhile. An error in another piece is left to its own job.

        Args:
            own: the piece that must be finished.
            others: pieces that may be made in passing, once something has to be made.
            make: writes a piece to a path without suffix.
            most: most pieces to make.
        """
        made = int(self._attempt(own, make))
        for piece in others:
            if made >= most or (self.has(own) and not made):
                break
            try:
                made += self._attempt(piece, make)
            except Exception:
                print(f"{piece.path}, made in passing, failed:", file=sys.stderr)
                traceback.print_exc()
                break
        told = False
        while not self.has(own) and not self._attempt(own, make):
            if not told:
                print(f"{own.path}: another job is making it", file=sys.stderr, flush=True)
                told = True
            time.sleep(POLL)

    def _attempt(self, piece: Piece, make: Callable[[Piece, Path], None]) -> bool:
        """Make a piece unless it is finished or claimed; return whether it was made."""
        if self.has(piece):
            return False
        path = self.path(piece)
        with claimed(path) as mine:
            if not mine or self.has(piece):
                return False
            make(piece, path)
            return True


def add_piece_arguments(parser: ArgumentParser, what: str) -> None:
    """Add the options by which the workflow says what determines a piece."""
    parser.add_argument(
        "--settings", help=f"what determines the {what}, as JSON (default: by the config)"
    )
    parser.add_argument(
        "--inputs", nargs="+", default=[], help="files that determine it (default: by the config)"
    )


def deliver_finished(
    results: Path, path: str, suffixes: tuple[str, ...], settings: str | None, inputs: Sequence[str]
) -> bool:
    """Deliver a piece if it is finished; return whether it is.

    The workflow knows what determines a piece, so no config has to be read for a copy.

    Args:
        results: folder of the study.
        path: see :class:`Piece`.
        suffixes: see :class:`Piece`.
        settings: see :class:`Piece`; None: unknown, so that nothing is delivered.
        inputs: paths of the files that determine it, in the results folder.
    """
    if settings is None:
        return False
    files = tuple(Path(name).relative_to(results).as_posix() for name in inputs)
    piece, store = Piece(path, suffixes, settings, files), Store(results)
    if not store.has(piece):
        return False
    store.deliver(piece)
    return True


def eligible(own: Piece, others: Iterable[Piece], current: Callable[[str], bool]) -> list[Piece]:
    """Return the pieces that a job may make in passing: their inputs are certain to be up to date.

    Args:
        own: the piece of the job, whose inputs the workflow has brought up to date.
        others: pieces of other jobs.
        current: whether another file is up to date.
    """
    known = set(own.files)
    return [
        piece
        for piece in others
        if piece != own and all(name in known or current(name) for name in piece.files)
    ]


def currency(
    store: Store, known: Iterable[str], pieces: Mapping[str, Piece]
) -> Callable[[str], bool]:
    """Return a function that says whether a file is certain to be up to date.

    Args:
        store: the store.
        known: files that are.
        pieces: pieces of other jobs, by their file. One is up to date if it has been delivered, and
            if what determines it is up to date.
    """
    certain = set(known)

    def current(name: str) -> bool:
        if name in certain:
            return True
        piece = pieces.get(name)
        if piece is None:
            return False
        return all(current(file) for file in piece.files) and store.is_current(piece)

    return current


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Claim the making of a file; yield whether no other live job holds the claim.

    The claim is a file beside the path, with host and process; its time shows that the holder is
    alive. A claim of a dead process of this host, or one that has been silent, is taken over. If
    two jobs ever hold the same claim, the worst is that they write the same file one after another.
    """
    lock = path.with_name(f"{path.name}.claim")
    lock.parent.mkdir(parents=True, exist_ok=True)
    token = f"{socket.gethostname()} {os.getpid()} {uuid4().hex}"
    if not _take(lock, token):
        yield False
        return
    stop = Event()
    beat = Thread(target=_stay_alive, args=(lock, stop), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        stop.set()
        beat.join()
        if _holder(lock) == token:
            lock.unlink(missing_ok=True)


def _take(lock: Path, token: str) -> bool:
    """Write a claim unless a live job holds it."""
    for _ in range(2):
        try:
            with lock.open("x") as stream:
                stream.write(token)
            return True
        except FileExistsError:
            if not _is_abandoned(lock):
                return False
            # Renamed first: of several jobs that find it abandoned, one removes it.
            removed = lock.with_name(f"{lock.name}.{uuid4().hex}")
            try:
                lock.rename(removed)
            except FileNotFoundError:
                continue
            removed.unlink()
    return False


def _holder(lock: Path) -> str | None:
    try:
        return lock.read_text()
    except FileNotFoundError:
        return None


def _is_abandoned(lock: Path) -> bool:
    """Return whether the holder of a claim is dead, as far as this host can tell."""
    host, _, rest = (_holder(lock) or "").partition(" ")
    process = rest.partition(" ")[0]
    if host == socket.gethostname() and process.isdigit() and not _is_alive(int(process)):
        return True
    # By the clock of the file system: clocks of hosts differ.
    probe = lock.with_name(f"{lock.name}.{uuid4().hex}")
    probe.touch()
    try:
        return probe.stat().st_mtime - lock.stat().st_mtime > SILENCE
    except FileNotFoundError:  # released meanwhile
        return False
    finally:
        probe.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True


def _stay_alive(lock: Path, stop: Event) -> None:
    """Renew the time of a claim until it is released or taken over."""
    while not stop.wait(BEAT):
        try:
            os.utime(lock)
        except FileNotFoundError:
            return


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def with_suffix(path: Path, suffix: str) -> Path:
    """Return a path with a suffix added: names such as ``shuffle.bh_k8_a005`` have dots."""
    return path.with_name(path.name + suffix)
