"""The study of OLMoE-1B-7B, from the hub to the article, on small stand-ins of both.

Every key of ``config/olmoe-1b-7b.yaml`` is walked. The hub is a server on this machine, its model
the embedded one in the files of the real one, its data sets a few real items in their files.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from hub_files import N_SHARDS, checkpoint, repositories
from hub_stand_in import serving
from warm_python import warm_python
from workflow_runs import ROOT, make_checkout, snakemake

REAL = yaml.safe_load((ROOT / "config" / "olmoe-1b-7b.yaml").read_text(encoding="utf-8"))
RESULTS = f"results/{REAL['study']}"
RAW = f"{RESULTS}/data/raw/lambada.parquet"
STRATEGIES = ["stock", "regular_k4", "adaptive_k8", "bh_k8_a005"]
CONTROLS = ["shuffle.bh_k8_a005", "perlayer_k6", "dynskip_k8_q030"]
LEVERS = ["certified_k8_m005", "absolute_k8_b3_consequence_compensated"]
BUDGETS = ["topp_k8_b3"]
MIXTURES = ["mixture.bh_k8_a005", "mixture.certified_k8_m005"]
"""What the contrasts are against, on one set."""
NULLS = ["within_token", "pooled"]
BH = {"tokens": 256, "nulls": ["needed", "pooled"], "max_k": [8, 64], "alpha": [0.05]}
# What this machine has no time or no room for, and the small model no place. All else is as there.
SMALLER = {
    "model": {"device": "cpu", "dtype": "float32"},
    "calibration": {"tokens": 1280, "toggled_tokens": 20, "documents": 12},
    "strategies": STRATEGIES,
    "controls": CONTROLS,
    "levers": LEVERS,
    "budgets": BUDGETS,
    "evaluation": {"window": 256, "kl_items": 2},
    "analysis": {
        "resamples": 200,
        "baseline": {"tokens": 256, "domain_tokens": 128},
        "bh": {**BH, "fewer_k": [4], "new_tokens": 4},
        "validity": {"tokens": 256, "nulls": NULLS, "alpha": [0.05], "repeats": 200},
        "ablation": {"alpha": [0.05], "epsilon": [0.01]},
        "held_out": {"tokens": 24, "dataset_tokens": 12, "dead_tokens": 20},
        "efficiency": {"tokens": 64},
    },
    "statistics": {
        "resamples": 200,
        "primary": {"strategy": "bh_k8_a005"},
        "sequence": [{"strategy": "certified_k8_m005", "against": "mixture"}],
    },
    "resources": {"threads": 1, "mem_mb": 1000, "gpu": 0, "strategies_per_job": 20},
}


def merged(values, changes):
    """Return nested mappings with changes; whatever is no mapping is replaced as a whole."""
    if not (isinstance(values, dict) and isinstance(changes, dict)):
        return changes
    return values | {key: merged(values.get(key), value) for key, value in changes.items()}


def key_paths(values):
    """Return the keys of nested mappings, such as ``("model", "path")``."""
    if not isinstance(values, dict):
        return {()}
    return {(key, *path) for key, value in values.items() for path in key_paths(value)}


@pytest.fixture(scope="module")
def hub():
    with serving() as hub:
        hub.repositories |= repositories(REAL)
        yield hub


@pytest.fixture(scope="module")
def run_study(hub):
    """A function that runs Snakemake on the small copy of the real study, in some checkout."""

    def run(folder, *arguments, **variables):
        config = folder / "config" / "small.yaml"
        text = yaml.safe_dump(merged(REAL, SMALLER), sort_keys=False)
        config.write_text(text, encoding="utf-8")
        environment = hub.environment(folder / "home") | variables
        options = ("--cores", "2", "--configfile", "config/small.yaml")
        return snakemake(folder, *options, *arguments, environment=environment, timeout=1800)

    return run


@pytest.fixture(scope="module")
def fetched(hub, run_study, tmp_path_factory):
    """A checkout that has everything from the hub, and the files that the hub gave for it."""
    folder = make_checkout(tmp_path_factory.mktemp("hub"))
    done = run_study(folder, "--until", "fetch_data")
    assert done.returncode == 0, done.stderr[-4000:]
    given = hub.files_given()
    # Nothing was asked for by another host's name, nor of this one as a proxy.
    assert {request.split()[0] for request in hub.requests} == {"GET", "HEAD"}
    assert all(request.split()[1].startswith("/") for request in hub.requests)
    hub.requests.clear()
    return folder, given


@pytest.fixture(scope="module")
def finished(hub, fetched, run_study):
    folder, _ = fetched
    with warm_python(hub.environment(folder / "home")) as path:
        done = run_study(folder, PATH=path)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / RESULTS


def test_only_what_the_study_reads_is_downloaded_and_each_file_once(fetched):
    _, given = fetched
    model = [name for name in checkpoint() if name.endswith((".json", ".safetensors"))]
    assert len([name for name in model if name.startswith("model-")]) == N_SHARDS
    wikitext = [f"wikitext-2-raw-v1/wikitext-2-raw-v1-{s}.parquet" for s in ("test", "validation")]
    hellaswag = [f"data/validation-0000{n}-of-00002.parquet" for n in range(2)]
    data = [*wikitext, *hellaswag, "default/test/0000.parquet"]
    # Cards of data sets say where their splits are.
    assert [name for name in given if name != "README.md"] == sorted(model + data)


def test_after_the_fetch_no_job_asks_the_hub_for_anything(hub, finished):
    assert hub.requests == []


def test_the_walk_ends_in_the_whole_table_and_the_article(finished):
    cells = pd.read_csv(finished / "comparison" / "full_routing_results.csv")
    assert len(cells) == len(STRATEGIES) * len(REAL["datasets"])
    assert set(cells["dataset"]) == set(REAL["datasets"])
    assert cells.notna().all(axis=None)
    controls = pd.read_csv(finished / "comparison" / "controls.csv")
    assert list(controls["strategy"].unique()) == CONTROLS + MIXTURES
    numerics = pd.read_csv(finished / "statistics" / "numerics.csv")
    assert set(numerics["arm"]) == {arm["name"] for arm in REAL["numerics"]}
    article = (finished / "report" / "index.html").read_text(encoding="utf-8")
    for source in (dataset["source"] for dataset in REAL["datasets"].values()):
        assert source["dataset"] in article
        assert source["revision"][:10] in article
    assert REAL["model"]["revision"] in article


def test_every_cell_is_of_the_model_that_the_config_pins(finished):
    described = json.loads((finished / "model.json").read_text(encoding="utf-8"))
    assert len(described["files"]) == N_SHARDS
    paths = list((finished / "cells").glob("*/*.json"))
    everywhere = STRATEGIES + CONTROLS + LEVERS + BUDGETS
    assert len(paths) == len(everywhere) * len(REAL["datasets"]) + len(MIXTURES)
    for path in paths:
        provenance = json.loads(path.read_text(encoding="utf-8"))["provenance"]
        assert provenance["path"] == REAL["model"]["path"]
        assert provenance["revision"] == REAL["model"]["revision"]
        assert provenance["weights_sha256"] == described["weights_sha256"]


def test_no_key_of_the_real_config_is_left_out(finished):
    walked = yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    assert key_paths(REAL) <= key_paths(walked)
    assert key_paths(SMALLER) <= key_paths(walked)


def test_who_forbids_the_network_gets_no_download(hub, run_study, checkout):
    hub.requests.clear()
    done = run_study(checkout, "--until", "fetch_model", HF_HUB_OFFLINE="1")
    assert done.returncode != 0
    assert "and HF_HUB_OFFLINE forbids downloading it" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.requests == []
    assert {p.name for p in (checkout / RESULTS).glob("[!.]*")} == {
        "config.yaml",
        "run.json",
        "logs",
    }


@pytest.mark.parametrize(
    ("script", "options", "where"),
    [
        (
            "fetch_model.py",
            ["--results", RESULTS],
            f"model.path: {REAL['model']['path']}@{REAL['model']['revision']}",
        ),
        (
            "fetch_data.py",
            ["--config", f"{RESULTS}/config.yaml", "--dataset", "lambada", "--out", RAW],
            "hub data set EleutherAI/lambada_openai @ 900124bf3b82",
        ),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_line(hub, checkout, script, options, where):
    results = checkout / RESULTS
    results.mkdir(parents=True)
    (results / "config.yaml").write_text(yaml.safe_dump(merged(REAL, SMALLER)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, f"scripts/{script}", *options],
        cwd=checkout,
        env=hub.environment(checkout / "home") | {"HF_ENDPOINT": "https://hub.example"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {where}: cannot be fetched from https://hub.example: ProxyError: 403 Forbidden"
    ]
    assert [path.name for path in results.iterdir()] == ["config.yaml"]
