"""``moe-routing compare`` on the embedded model: a study's numbers, and one line on bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from commands_shared import FILES, MODEL

from moe_routing.config.cells import cells_of
from moe_routing.config.study import StudyConfig
from moe_routing.data.prepare import prepare_dataset
from moe_routing.evaluation.cells import complete_cell
from moe_routing.evaluation.collect import write_tables
from moe_routing.evaluation.study_model import write_model
from moe_routing.schema import parse
from moe_routing.statistics.study_tables import write_statistics
from moe_routing.workflow import write_config

TASKS = ("wikipedia", "lambada")
STRATEGIES = ("regular_k4", "uniform_k4")
MIXTURE = "mixture.topp_k8_p050"
LIMIT = 8
COMPARED = ["value", "difference", "low", "high", "p_value", "p_adjusted", "lost", "gained"]


@pytest.fixture(scope="module")
def receipt(tmp_path_factory):
    """The folder that the command wrote; strategies are timed once."""
    from moe_routing.commands.main import make_parser

    out = tmp_path_factory.mktemp("receipt")
    arguments = make_parser().parse_args(
        [
            "compare", MODEL, "--strategies", *STRATEGIES, "--limit", str(LIMIT),
            "--tasks", *(f"{name}={FILES / name}.jsonl" for name in TASKS),
            "--turns", "1", "--kl-items", "4", "--out", str(out),
        ]
    )  # fmt: skip
    arguments.run(arguments)
    return out


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study of the same strategies on the same files."""
    results = tmp_path_factory.mktemp("study")
    sources = {name: {"kind": "local", "path": f"{FILES / name}.jsonl"} for name in TASKS}
    values = {
        "study": "same",
        "model": {"path": MODEL},
        "calibration": {"source": {"kind": "local", "path": str(FILES / "calibration.txt")}},
        "datasets": {name: {"source": source, "items": LIMIT} for name, source in sources.items()},
        "strategies": ["stock", *STRATEGIES],
        "evaluation": {"kl_items": 4},
        "statistics": {"primary": {"strategy": STRATEGIES[0], "dataset": TASKS[0]}},
        "resources": {"strategies_per_job": 3},
    }
    config = parse(StudyConfig, values, "test")
    write_config(config, results / "config.yaml")
    write_model(config, results, "test")
    for name, source in sources.items():
        raw = results / "data" / "raw" / f"{name}.jsonl"
        raw.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source["path"], raw)
        prepare_dataset(config, name, raw.parent, results / "data" / f"{name}.parquet")
    for cell in cells_of(config):
        complete_cell(config, results, cell)
    write_tables(config, results)
    write_statistics(config, results)
    return results


def record_of(receipt):
    return json.loads((receipt / "receipt.json").read_text(encoding="utf-8"))


def test_the_cells_are_those_of_a_study(receipt, study):
    for name in TASKS:
        for strategy in ("stock", *STRATEGIES):
            path = f"cells/{strategy}/{name}.parquet"
            found, expected = (pd.read_parquet(folder / path) for folder in (receipt, study))
            pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-5)


def test_the_differences_are_those_of_a_study(receipt, study):
    key = ["strategy", "dataset", "metric"]
    expected = pd.read_csv(study / "statistics" / "paired.csv").set_index(key)
    found = pd.DataFrame(record_of(receipt)["differences"]).set_index(key)
    assert set(found.index) == set(expected.index)
    found = found.loc[expected.index]
    assert found["verdict"].tolist() == expected["verdict"].tolist()
    for name in COMPARED:
        values = [table[name].to_numpy(dtype=float) for table in (found, expected)]
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_receipt_names_what_it_was_made_with(receipt):
    record = record_of(receipt)
    assert record["provenance"]["path"] == MODEL
    assert len(record["provenance"]["weights_sha256"]) == 64
    assert record["command"]["limit"] == LIMIT
    assert "torch" in record["environment"]["packages"]
    assert {cell["dataset"] for cell in record["cells"]} == set(TASKS)


def test_gains_are_measured(receipt):
    gains = record_of(receipt)["gains"]
    stock, four = gains["stock"], gains["regular_k4"]
    assert (stock["decode_experts"], four["decode_experts"]) == (8, 4)
    # 8 of 64 experts in each of 16 layers: gate, up and down, 128 x 32 each, in float32.
    assert stock["decode_expert_bytes"] == 8 * 16 * 3 * 128 * 32 * 4
    assert four["decode_expert_bytes"] == stock["decode_expert_bytes"] / 2
    assert min(gain["decode_tokens_per_second"] for gain in gains.values()) > 0


def test_the_pages_say_the_same_and_load_nothing(receipt):
    page, text = (
        (receipt / f"receipt.{end}").read_text(encoding="utf-8") for end in ("html", "md")
    )
    for shown in ("regular_k4", "nats_per_token", "What is gained", "wikipedia: differences"):
        assert shown in page
        assert shown in text
    assert not [word for word in ("http", "src=", "<link", "<script", "url(") if word in page]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "error: compare: give either MODEL with --strategies, or --samples"),
        ([MODEL], "error: --strategies has none but the baseline 'stock'; allowed: at least one"),
        (
            [MODEL, "--strategies", "stok_k4"],
            "error: unknown strategy 'stok_k4'; did you mean 'stock'?",
        ),
        (
            [MODEL, "--strategies", "bh_k8_a005"],
            "error: strategy 'bh_k8_a005' needs a calibration of the model; allowed: --text FILE "
            "or --calibration DIR",
        ),
        (
            ["no/such/folder", "--strategies", "stock_k4"],
            "error: MODEL is 'no/such/folder': no such folder",
        ),
        (
            [MODEL, "--strategies", "stock_k4", "--tasks", "wikipedia=none.txt"],
            "error: --tasks has 'wikipedia=none.txt': no such file",
        ),
        (
            [MODEL, "--strategies", "stock_k4", "--tasks", "gsm8k=none.txt"],
            "error: --tasks has 'gsm8k=none.txt'; allowed with a file: ",
        ),
        (
            [MODEL, "--strategies", MIXTURE],
            f"error: strategy '{MIXTURE}' has as many experts as 'topp_k8_p050'; allowed: both",
        ),
        (
            [MODEL, "--strategies", MIXTURE, "topp_k8_p050", "--tasks", "gsm8k"],
            f"error: strategy '{MIXTURE}': --tasks has 'gsm8k'; allowed with it: wikitext",
        ),
        (
            [MODEL, "--strategies", "stock_k4", "--revision", "abc"],
            f"error: --revision is 'abc', and {MODEL} is a folder; allowed: none",
        ),
        (
            [MODEL, "--strategies", "stock_k4", "--device", "cuda:99"],
            "error: --device is 'cuda:99', but no GPU is visible; allowed here: cpu",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else "",
)
def test_bad_input_is_one_line_before_the_model_is_loaded(refused, monkeypatch, arguments, line):
    monkeypatch.setattr("moe_routing.engine.loading.load_model", None)
    assert refused("compare", *arguments).startswith(line)


def test_more_experts_than_the_model_has(refused):
    tasks = f"wikipedia={FILES / 'wikipedia.jsonl'}"
    line = refused("compare", MODEL, "--strategies", "regular_k65", "--tasks", tasks)
    assert line == (
        "error: command line: strategies has 'regular_k65', which may select 65; allowed: at most "
        "the model's 64 experts"
    )


def test_the_same_routing_under_another_id_is_said(refused):
    tasks = f"wikipedia={FILES / 'wikipedia.jsonl'}"
    line = refused("compare", MODEL, "--strategies", "stock_k8", "--tasks", tasks)
    assert "`stock_k8` is the routing of `stock` on this model" in line


def test_the_static_mixture_has_the_experts_of_its_base(command, tmp_path):
    tasks = f"lambada={FILES / 'lambada.jsonl'}"
    code, _, err = command(
        "compare", MODEL, "--strategies", MIXTURE, "topp_k8_p050", "--tasks", tasks, "--limit", 4,
        "--kl-items", 2, "--turns", 0, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    cells = {cell["strategy"]["id"]: cell["routing"] for cell in record_of(tmp_path)["cells"]}
    mean, base = (cells[name]["mean_experts"] for name in (MIXTURE, "topp_k8_p050"))
    assert mean == pytest.approx(base, abs=0.1)


def test_text_that_is_evaluated_is_not_calibrated_on(capsys):
    from moe_routing.commands.compare_model import _apart
    from moe_routing.data.items import document_item
    from moe_routing.evaluation.cells import EvaluationSet

    words = " ".join(f"word{n}" for n in range(20))
    item = document_item("wikipedia", 0, words, words)
    data = EvaluationSet("wikipedia", [item], "")
    assert _apart([words, "another text"], [data]) == ["another text"]
    assert "1 of 2 documents of --text share 13 words in a row" in capsys.readouterr().err
