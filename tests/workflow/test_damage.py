"""Every file of a finished study, damaged: its reader says so in one line."""

from __future__ import annotations

import random
import shutil
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from resource import RLIM_INFINITY, RLIMIT_FSIZE, getrlimit, setrlimit

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from moe_routing.analysis.captured import Capture
from moe_routing.analysis.tables import read_csv, write_csv, write_json
from moe_routing.config.study import load_config
from moe_routing.data.items import read_items, write_items
from moe_routing.data.rows import read_rows
from moe_routing.errors import InputError
from moe_routing.evaluation.archive import write_archive
from moe_routing.evaluation.cells import write_cell
from moe_routing.evaluation.record import CellRecord
from moe_routing.figures.style import save
from moe_routing.files import RECORDED, RECORDS, read_json, read_parquet
from moe_routing.routing.calibration import load_scale, save_scale
from moe_routing.routing.certificate import Certificate
from moe_routing.routing.nulls import load_null, save_null
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.toggles import Toggles

NOT_READ = ("store/*", "logs/*", "benchmarks/*", "report/*")
"""What no reader takes for what it says: the store's files are copied, and compared as copies."""


@pytest.fixture(scope="module")
def results(smoke_run, tmp_path_factory):
    """A copy of the study that may be damaged."""
    folder = tmp_path_factory.mktemp("damage") / "smoke"
    shutil.copytree(smoke_run[0] / "results" / "smoke", folder)
    return folder


def read_cell(path):
    """Read the record of a cell, or why it is left out."""
    return left_out if (left_out := read_json(path).get("left_out")) else CellRecord.read(path)


def readers(results):
    """Return the reader of each kind of file, by pattern; the first that fits is taken."""
    sample = cache(
        lambda: CalibrationSample.load(results / "calibration/router_logits.safetensors")
    )
    toggles = cache(lambda: Toggles.load(results / "calibration/toggles.safetensors"))
    return {
        "data/raw/*": read_rows,
        "data/calibration.parquet": read_parquet,
        "data/certification.parquet": read_parquet,
        "data/*.parquet": read_items,
        "calibration/router_logits.safetensors": CalibrationSample.load,
        "calibration/expert_outputs.safetensors": ExpertOutputs.load,
        "calibration/nulls/*.safetensors": lambda path: load_null(path, sample(), toggles()),
        "calibration/scales/*": load_scale,
        "calibration/certificates/*": Certificate.load,
        "baseline/router_logits.safetensors": Capture.load,
        "*.safetensors": Toggles.load,
        "cells/*.json": read_cell,
        "numerics/*.json": CellRecord.read,
        "*.parquet": read_parquet,
        "*.csv": read_csv,
        "*.json": read_json,
    }


def files_of(results):
    """Return the files that readers compare with their records."""
    found = []
    for path in sorted(results.rglob("*")):
        name = path.relative_to(results).as_posix()
        left_out = RECORDS in path.parts or any(fnmatch(name, pattern) for pattern in NOT_READ)
        if path.is_file() and path.suffix in RECORDED and not left_out:
            found.append(path)
    return found


def reader_of(path, results, by_pattern):
    name = path.relative_to(results).as_posix()
    return next(reader for pattern, reader in by_pattern.items() if fnmatch(name, pattern))


def flipped(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


DAMAGES = {
    "emptied": lambda content, other, rng: b"",
    "cut": lambda content, other, rng: content[: len(content) // 2],
    "flipped": lambda content, other, rng: flipped(content, rng),
    "exchanged": lambda content, other, rng: other,
    "foreign": lambda content, other, rng: rng.randbytes(200),
}


def refusal(reader, path):
    """Return the one line by which a reader refuses a file, or None."""
    message = None
    try:
        reader(path)
    except InputError as error:
        message = str(error)
    assert message is None or (path.name in message and "\n" not in message), path
    return message


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damaged_file_is_refused_in_one_line(results, kind):
    paths, by_pattern, rng = files_of(results), readers(results), random.Random(0)  # noqa: S311
    assert len(paths) > 100
    contents = {path: path.read_bytes() for path in paths}
    accepted = []
    for path in paths:
        others = [
            other
            for other in paths
            if other.suffix == path.suffix and contents[other] != contents[path]
        ]
        other = contents[rng.choice(others)] if others else b"{}"
        path.write_bytes(DAMAGES[kind](contents[path], other, rng))
        if refusal(reader_of(path, results, by_pattern), path) is None:
            accepted.append(path)
        path.write_bytes(contents[path])
    assert accepted == []
    assert [path for path in paths if refusal(reader_of(path, results, by_pattern), path)] == []


@pytest.mark.parametrize("kind", ["emptied", "cut", "foreign"])
def test_damage_that_shows_is_refused_without_records_too(results, tmp_path, kind):
    """A cut-off CSV or text file without a record is a shorter one, and cannot be told from it."""
    copy, rng = tmp_path / "smoke", random.Random(1)  # noqa: S311
    shutil.copytree(results, copy, ignore=shutil.ignore_patterns(RECORDS))
    paths, by_pattern, accepted = files_of(copy), readers(copy), []
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(DAMAGES[kind](content, b"", rng))
        if refusal(reader_of(path, copy, by_pattern), path) is None:
            accepted.append(path.suffix)
        path.write_bytes(content)
    assert set(accepted) <= ({".csv", ".txt"} if kind == "cut" else set())


@contextmanager
def files_of_at_most(limit):
    """Let no file grow beyond a number of bytes, as on a full disk: the kernel refuses."""
    before = getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        setrlimit(RLIMIT_FSIZE, before)


def writers(results):
    """Return a call for each way in which files of a study are written."""
    table = pd.DataFrame({"a": range(1000)})
    cell = next(results.glob("cells/*/wikipedia.json"))
    items, record = read_parquet(cell.with_suffix(".parquet")), CellRecord.read(cell)
    calibration = results / "calibration"
    sample = CalibrationSample.load(calibration / "router_logits.safetensors")
    null = next((calibration / "nulls").glob("pooled.safetensors"))
    certificate = next((calibration / "certificates").glob("*.json"))
    figure, _ = plt.subplots()
    return {
        "items": lambda out: write_items(read_items(results / "data/lambada.parquet"), out / "x"),
        "cell": lambda out: write_cell(out / "x", items, record),
        "record": lambda out: record.write(out / "x.json"),
        "sample": lambda out: sample.save(out / "x.safetensors"),
        "null": lambda out: save_null(load_null(null, sample), sample, out / "x.safetensors"),
        "capture": lambda out: Capture.load(results / "baseline/router_logits.safetensors").save(
            out / "x.safetensors"
        ),
        "certificate": lambda out: Certificate.load(certificate).save(out / "x.json"),
        "scale": lambda out: save_scale("s" * 200, 1.0, out / "x.json"),
        "table": lambda out: write_csv(table, out / "x.csv"),
        "json": lambda out: write_json({"a": list(range(1000))}, out / "x.json"),
        "figure": lambda out: save(figure, out / "x"),
        "archive": lambda out: write_archive(results, out / "x.tar.gz"),
    }


def test_every_writer_on_a_full_disk_is_one_line_and_leaves_nothing(results, tmp_path):
    assert getrlimit(RLIMIT_FSIZE)[0] == RLIM_INFINITY
    for name, write in writers(results).items():
        out = tmp_path / name
        out.mkdir()
        with files_of_at_most(100), pytest.raises(InputError) as caught:
            write(out)
        assert "cannot be written: " in str(caught.value), name
        assert "\n" not in str(caught.value), name
        assert [path for path in out.rglob("*") if path.is_file()] == [], name


def test_a_config_of_the_study_that_is_damaged_is_one_line(results):
    path = results / "config.yaml"
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\xff" + content):
        path.write_bytes(damaged)
        assert refusal(load_config, path) is not None
    path.write_bytes(content)
