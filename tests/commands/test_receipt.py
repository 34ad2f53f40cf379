"""A receipt is text on the terminal, and a page that shows what it is given as text."""

from __future__ import annotations

import json

import pandas as pd

from moe_routing.commands.receipt import Receipt, Section

HOSTILE = "<script>alert('it|s')</script>"


def test_markup_in_names_stays_text(tmp_path):
    """Of a model's path, a label of samples or a task, which users and others choose."""
    table = pd.DataFrame({"strategy": [HOSTILE, "stock"], HOSTILE: ["a|b", "1 & 2"]})
    section = Section(HOSTILE, HOSTILE, table)
    receipt = Receipt(HOSTILE, (HOSTILE,), (section,), {"model": HOSTILE})
    receipt.write(tmp_path)
    page = (tmp_path / "receipt.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 7
    assert "1 &amp; 2" in page
    lines = (tmp_path / "receipt.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3}
    assert json.loads((tmp_path / "receipt.json").read_text(encoding="utf-8")) == {"model": HOSTILE}
