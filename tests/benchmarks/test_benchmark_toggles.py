"""The benchmark of toggles at a tiny size: both ways agree, the table is there."""

from __future__ import annotations

import json

import pytest


def test_the_table(script, tmp_path):
    path = tmp_path / "toggles.json"
    options = ["--tokens", "2", "--passes", "4", "--rounds", "1", "--allocator", "default"]
    script("toggles").main([*options, "--json", str(path)])
    whole, branches = json.loads(path.read_text())["toggles"]
    assert (whole["toggles"], branches["toggles"]) == (4, 2 * 16 * 16)
    assert whole["times whole passes"] == pytest.approx(1)
    assert branches["times whole passes"] > 1
    assert branches["largest difference, %"] < 1
    assert branches["toggles/s"] == pytest.approx(16 * 16 * branches["tokens/s"])
