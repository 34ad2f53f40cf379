"""The benchmark of the false discovery rate at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import yaml

from moe_routing.routing.calibration import OUTPUTS_FILE, SAMPLE_FILE

ROOT = Path(__file__).resolve().parents[2]


def test_the_table(script, tmp_path, calibration):
    settings = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text(encoding="utf-8"))
    settings["model"]["path"] = str(ROOT / "resources" / "olmoe-nano")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    text = (ROOT / "tests" / "data_files" / "calibration.txt").read_text(encoding="utf-8")
    (tmp_path / "data").mkdir()
    pd.DataFrame({"text": text.split("\n\n")}).to_parquet(tmp_path / "data" / "calibration.parquet")
    (tmp_path / "calibration").mkdir()
    calibration.sample.save(tmp_path / "calibration" / SAMPLE_FILE)
    calibration.outputs.save(tmp_path / "calibration" / OUTPUTS_FILE)
    path = tmp_path / "rates.json"
    options = ["--tokens", "24", "--splits", "2", "--null", "needed", "--alpha", "0.2", "0.4"]
    script("false_discoveries").main(
        ["--results", str(tmp_path), *options, "--allocator", "default", "--json", str(path)]
    )
    rows = pd.DataFrame(json.loads(path.read_text())["false discoveries"])
    assert rows["procedure"].tolist() == ["BH", "BH", "BY", "BY"]
    assert rows["alpha"].tolist() == [0.2, 0.4, 0.2, 0.4]
    assert rows["rate"].between(rows["smallest"], rows["largest"]).all()
    bh, by = rows["experts kept"][:2], rows["experts kept"][2:]
    assert bh.is_monotonic_increasing
    assert (bh.to_numpy() > by.to_numpy()).all()
    assert (rows["test tokens"] == 12).all()
