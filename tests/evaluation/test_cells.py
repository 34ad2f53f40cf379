"""A cell is scored once: by its own job or in passing, under whichever of its ids."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from documents import ROOT

from moe_routing.config.cells import parse_cell
from moe_routing.config.study import StudyConfig
from moe_routing.data.items import write_items
from moe_routing.data.tasks import load_items
from moe_routing.engine.loading import LoadedModel
from moe_routing.errors import InputError
from moe_routing.evaluation import cells
from moe_routing.evaluation.collect import read_cells
from moe_routing.evaluation.pieces import scale_piece
from moe_routing.evaluation.store import Store, with_suffix
from moe_routing.routing.budget import Budget, budget_path
from moe_routing.routing.calibration import save_scale

SOURCE = {"kind": "local", "path": "unused"}
DATASETS = ("hellaswag", "lambada")


@pytest.fixture(scope="module")
def tiny(nano, make_model):
    """A random OLMoE of 8 experts, top-2 with raw softmax weights: stock is regular_k2."""
    model = make_model("Olmoe", vocab_size=nano.model.config.vocab_size, norm_topk_prob=False)
    provenance = {
        "path": "tiny", "revision": "", "dtype": "float32", "device": "cpu",
        "router_fingerprint": "f" * 64, "weights_sha256": "0" * 64,
    }  # fmt: skip
    return LoadedModel(model, nano.tokenizer, provenance)


@pytest.fixture
def study():
    return StudyConfig.model_validate(
        {
            "study": "tiny",
            "model": {"path": "unused"},
            "calibration": {"source": SOURCE},
            "datasets": {name: {"source": SOURCE} for name in DATASETS},
            "strategies": ["regular_k2", "regular_k1", "stock", "normalized_k2"],
            "statistics": {
                "primary": {"strategy": "regular_k1", "dataset": "lambada"},
                "resamples": 100,
            },
            "numerics": [
                {"name": "eager", "experts_implementation": "eager"},
                {"name": "half", "dtype": "bfloat16"},
            ],
            "evaluation": {"window": 96, "token_budget": 400, "kl_items": 2},
        }
    )


@pytest.fixture
def scored(tmp_path, monkeypatch, tiny):
    """Items in place of a prepared study; the (strategy, set) pairs that are really scored."""
    for name in DATASETS:
        items = load_items(name, ROOT / "tests" / "data_files" / f"{name}.jsonl")[:4]
        write_items(items, tmp_path / "data" / f"{name}.parquet")
    calls, score_items = [], cells.score_items

    def counted(loaded, strategy, items, dataset, *rest):
        calls.append((strategy.id, dataset))
        return score_items(loaded, strategy, items, dataset, *rest)

    (tmp_path / "model.json").write_text('{"weights_sha256": "0"}')
    monkeypatch.setattr(cells, "score_items", counted)
    monkeypatch.setattr(cells, "load_study_model", lambda *_: tiny)
    return calls


def complete(study, results, *paths, most=1):
    for path in paths:
        cells.complete_cell(study, results, parse_cell(study, path), most=most)


def cell(results, strategy, dataset):
    path = results / "cells" / strategy / dataset
    record = json.loads(path.with_suffix(".json").read_text())
    return path.with_suffix(".parquet").read_bytes(), record


def assert_same_cell_but_for_the_id(results, dataset="lambada"):
    items, record = cell(results, "stock", dataset)
    same_items, same_record = cell(results, "regular_k2", dataset)
    assert same_items == items
    differing = {key for key in record if record[key] != same_record[key]}
    assert differing == {"strategy"}  # the timings are those of the one pass
    specifications = record["strategy"], same_record["strategy"]
    assert [s["id"] for s in specifications] == ["stock", "regular_k2"]
    assert [s["family"] for s in specifications] == ["stock", "regular"]
    assert [(s["k"], s["weighting"]) for s in specifications] == [(2, "softmax")] * 2


@pytest.mark.parametrize("first", ["stock", "regular_k2"])
def test_the_same_routing_is_scored_once(tmp_path, study, scored, first):
    names = sorted(["stock", "regular_k2"], key=lambda name: name != first)
    complete(study, tmp_path, *(f"cells/{name}/lambada" for name in names))
    assert scored == [("stock", "lambada")]
    assert_same_cell_but_for_the_id(tmp_path)


def test_other_weights_of_the_same_experts_are_another_routing(tmp_path, study, scored):
    complete(study, tmp_path, "cells/stock/lambada", "cells/normalized_k2/lambada")
    assert scored == [("stock", "lambada"), ("normalized_k2", "lambada")]
    assert cell(tmp_path, "stock", "lambada")[0] != cell(tmp_path, "normalized_k2", "lambada")[0]


def test_cells_of_the_set_are_scored_in_passing(tmp_path, study, scored):
    complete(study, tmp_path, "cells/regular_k1/lambada", most=9)
    ids = ["regular_k1", "stock", "normalized_k2"]  # regular_k2 is stock
    assert scored[:3] == [(name, "lambada") for name in ids]
    assert scored[3:] == [("stock", "lambada")]  # the arm that is scored with the loaded model
    assert not (tmp_path / "cells" / "stock").exists()  # the outputs of other jobs are theirs
    every = [f"cells/{name}/lambada" for name in study.strategies]
    complete(study, tmp_path, *every, "numerics/eager/lambada")
    assert len(scored) == 4
    assert_same_cell_but_for_the_id(tmp_path)
    complete(study, tmp_path, "numerics/half/lambada")
    assert scored[4:] == [("stock", "lambada")]


def test_a_cell_made_in_passing_is_the_cell_made_alone(tmp_path, study, scored):
    for name in ("alone", "passing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(tmp_path / "data")
        (tmp_path / name / "model.json").symlink_to(tmp_path / "model.json")
    complete(study, tmp_path / "alone", "cells/normalized_k2/lambada")
    complete(study, tmp_path / "passing", "cells/regular_k1/lambada", most=9)
    before = len(scored)
    complete(study, tmp_path / "passing", "cells/normalized_k2/lambada")
    assert len(scored) == before
    alone, passing = (
        cell(tmp_path / name, "normalized_k2", "lambada") for name in ("alone", "passing")
    )
    assert alone[0] == passing[0]
    assert {key for key in alone[1] if alone[1][key] != passing[1][key]} <= {"timings"}


def test_an_arm_has_its_setting_and_no_divergence(tmp_path, study, scored):
    complete(study, tmp_path, "numerics/eager/lambada", "cells/stock/lambada")
    record = json.loads((tmp_path / "numerics/eager/lambada.json").read_text())
    assert record["numerics"] == {"arm": "eager", "experts_implementation": "eager"}
    assert record["strategy"]["id"] == "stock"
    assert record["provenance"]["experts_implementation"] == "eager"
    assert "kl" not in pd.read_parquet(tmp_path / "numerics/eager/lambada.parquet")
    assert "kl" in pd.read_parquet(tmp_path / "cells/stock/lambada.parquet")


def test_each_dtype_is_loaded_for_itself(tmp_path, study, scored, monkeypatch, tiny):
    loaded = []

    def load(model, results, threads):
        loaded.append((model.dtype, model.experts_implementation))
        return tiny

    monkeypatch.setattr(cells, "load_study_model", load)
    complete(study, tmp_path, "cells/stock/lambada", most=9)
    complete(study, tmp_path, "numerics/half/lambada", most=9)
    assert loaded == [("float32", "dropless"), ("bfloat16", "dropless")]


EDITS = {
    "resamples": {"statistics": {"resamples": 200}},
    "confidence": {"statistics": {"confidence": 0.9}},
    "primary": {"statistics": {"primary": {"strategy": "normalized_k2", "dataset": "lambada"}}},
    "grouping": {"resources": {"strategies_per_job": 5, "threads": 2}},
    "another strategy": {"strategies": ["regular_k1", "stock", "regular_k4"]},
    "calibration": {"calibration": {"source": SOURCE, "tokens": 99}},
    "seed": {"seed": 1},
    "budget": {"evaluation": {"token_budget": 500, "window": 96, "kl_items": 2}},
    "divergence": {"evaluation": {"token_budget": 400, "window": 96, "kl_items": 3}},
    "dtype": {"model": {"path": "unused", "dtype": "float16"}},
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_score_again_what_depends_on_them(tmp_path, study, scored, edit):
    complete(study, tmp_path, "cells/regular_k1/lambada", "numerics/eager/lambada")
    values = study.model_dump()
    for key, value in EDITS[edit].items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    edited = StudyConfig.model_validate(values)
    del scored[:]
    complete(edited, tmp_path, "cells/regular_k1/lambada", "numerics/eager/lambada")
    both = [("regular_k1", "lambada"), ("stock", "lambada")]
    expected = {"seed": both, "budget": both, "dtype": both, "divergence": both[:1]}
    assert scored == expected.get(edit, [])


@pytest.mark.parametrize("file", ["model.json", "data/lambada.parquet"])
def test_another_model_or_other_items_are_scored_again(tmp_path, study, scored, file):
    complete(study, tmp_path, "cells/regular_k1/lambada")
    if file == "model.json":
        (tmp_path / file).write_text("{}")
    else:
        items = load_items("lambada", ROOT / "tests" / "data_files" / "lambada.jsonl")[:3]
        write_items(items, tmp_path / file)
    complete(study, tmp_path, "cells/regular_k1/lambada")
    assert scored == [("regular_k1", "lambada")] * 2


def test_an_unknown_cell_is_named(study):
    with pytest.raises(InputError, match="cell 'cells/regular_k3/lambada'; allowed: cells/"):
        parse_cell(study, "cells/regular_k3/lambada")


def test_scaled_cells_are_scored_in_passing_once_their_scales_are_up_to_date(tmp_path, study):
    """Calibration text is up to date for a job if the logits that were sampled on it are."""
    levers = ["regular_k1_scaled", "regular_k2_scaled", "absolute_k2_b1"]
    config = study.model_copy(update={"levers": levers})
    for name in (
        "model.json", "data/lambada.parquet", "data/calibration.parquet",
        "calibration/router_logits.safetensors", "calibration/budgets/absolute_k2_b1.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(cell):
        job = cells.ScoringJob(config, tmp_path, parse_cell(config, cell))
        return {piece.path.split("/")[1] for piece in job.others}

    static = {"regular_k1", "regular_k2", "stock", "normalized_k2"}
    assert names("cells/regular_k1/lambada") == static - {"regular_k1"} | {"eager"}
    assert names("cells/absolute_k2_b1/lambada") == static | {"eager"}
    store, scale = Store(tmp_path), scale_piece(config, "regular_k2_scaled")
    store.finish(scale, [], lambda _, path: save_scale("x", 1.5, with_suffix(path, ".json")), 1)
    assert names("cells/absolute_k2_b1/lambada") == static | {"eager"}
    store.deliver(scale)
    assert names("cells/absolute_k2_b1/lambada") == static | {"eager", "regular_k2_scaled"}
    assert "regular_k2_scaled" not in names("cells/regular_k1/lambada")
    (tmp_path / "data/calibration.parquet").write_text("other text")
    assert names("cells/absolute_k2_b1/lambada") == static | {"eager"}


def test_cells_of_other_sets_are_scored_after_the_own_ones_if_text_was_drawn_apart(tmp_path, study):
    config = study.model_copy(update={"levers": ["absolute_k2_b1"]})
    for name in (
        "model.json", "data/lambada.parquet", "calibration/router_logits.safetensors",
        "calibration/budgets/absolute_k2_b1.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def sets(cell):
        job = cells.ScoringJob(config, tmp_path, parse_cell(config, cell))
        return [piece.path.split("/")[2] for piece in job.others]

    assert sets("cells/absolute_k2_b1/lambada") == ["lambada"] * 5
    (tmp_path / "data/hellaswag.parquet").write_text("prepared")
    assert sets("cells/absolute_k2_b1/lambada") == ["lambada"] * 5 + ["hellaswag"] * 6
    assert sets("cells/stock/lambada") == ["lambada"] * 4


def test_a_set_that_is_prepared_again_meanwhile_is_not_scored(tmp_path, study, scored):
    cell = parse_cell(study, "cells/regular_k1/lambada")
    job = cells.ScoringJob(study, tmp_path, cell)
    items = load_items("lambada", ROOT / "tests" / "data_files" / "lambada.jsonl")[:3]
    write_items(items, tmp_path / "data" / "lambada.parquet")
    with pytest.raises(InputError, match=r"lambada.parquet: changed while a job was reading it"):
        job.store.finish(job.own, [], job.score, 1)
    assert scored == []


def test_a_control_at_equal_budget_takes_its_number_from_the_cell_of_its_base(
    tmp_path, study, scored
):
    base, controls = "minp_k2_t090", ["mixture.minp_k2_t090", "counts.minp_k2_t090"]
    config = study.model_copy(update={"controls": [base, *controls]})
    with pytest.raises(InputError, match=r"cells/minp_k2_t090/lambada.json: missing; cells/"):
        complete(config, tmp_path, f"cells/{controls[0]}/lambada")
    complete(config, tmp_path, f"cells/{base}/lambada", most=9)
    assert not {name for name, _ in scored} & set(controls)  # the base was not delivered yet
    complete(config, tmp_path, f"cells/{controls[0]}/lambada", most=2)
    assert [name for name, _ in scored[-2:]] == controls
    complete(config, tmp_path, f"cells/{controls[1]}/lambada")
    own = cell(tmp_path, base, "lambada")[1]["routing"]["mean_experts"]
    for name in controls:
        _, record = cell(tmp_path, name, "lambada")
        assert 1 < own < 2
        assert record["routing"]["mean_experts"] == pytest.approx(own, abs=0.05)
        assert record["strategy"]["base"]["ratio"] == 0.9
        assert "histogram" not in record["strategy"]


def test_what_is_left_out_has_no_items(tmp_path, study, scored):
    name = "minp_k2_b15"
    config = study.model_copy(update={"budgets": [name], "controls": [f"mixture.{name}"]})
    for file in ("data/calibration.parquet", "calibration/router_logits.safetensors"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(file)
    budget = Budget(
        name, "ratio", None, 1.5, 1.9, (1.9,), 100, "left out", "no ratio keeps 1.5 experts"
    )
    budget.save(budget_path(tmp_path / "calibration", name))
    complete(config, tmp_path, f"cells/{name}/lambada", f"cells/mixture.{name}/lambada")
    for one in (name, f"mixture.{name}"):
        assert pd.read_parquet(tmp_path / "cells" / one / "lambada.parquet").empty
        record = json.loads((tmp_path / "cells" / one / "lambada.json").read_text())
        assert record == {"left_out": "left out: no ratio keeps 1.5 experts"}
    assert scored == []
    complete(config, tmp_path, *(f"cells/{one}/lambada" for one in study.strategies))
    alone = config.model_copy(update={"datasets": {"lambada": config.datasets["lambada"]}})
    assert [record.strategy["id"] for record in read_cells(alone, tmp_path)] == study.strategies
