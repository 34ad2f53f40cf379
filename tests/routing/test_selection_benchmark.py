from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "selection.py"


def test_the_benchmark_prints_a_row_for_every_strategy(capsys):
    specification = importlib.util.spec_from_file_location("selection_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.main(["--tokens", "64", "--cap", "4", "--pairs", "1"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header == "| strategy | stock top-4, ms | ours, ms | ratio |"
    assert rows[0].startswith("| regular_k4 |")
    assert rows[1].startswith("| bh_k4_a005 |")
    assert all(float(row.split("|")[4]) > 0 for row in rows)
