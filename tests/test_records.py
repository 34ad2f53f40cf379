"""CHANGELOG.md and LAB_NOTES.md keep their form; documents write rates with "per"."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from documents import ROOT, text

import moe_routing

DATE = r"\d{4}-\d{2}-\d{2}"
RATE = re.compile(
    r"\b(experts|tokens|items|pairs|nats|bits|perplexity|continuations|rows?|lines?|panels?|columns?)"
    r"\s+an?\s+(token|second|byte|word|layer|expert|character|cell|job|step|strategy|null|family)\b"
)
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "config/*.yaml", "report/**/*.qmd", "workflow/report/*")
    for path in ROOT.glob(pattern)
)


def test_the_changelog_is_grouped_by_version_and_kind():
    versions = re.findall(r"^## (.*)$", text("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(moe_routing.__version__)}\] - {DATE}", versions[1])
    for body in re.split(r"^## .*$", text("CHANGELOG.md"), flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", body, re.MULTILINE)
        order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
        assert kinds == [kind for kind in order if kind in kinds]
        assert body.strip().startswith("### ")


def test_each_lab_note_opens_with_its_conclusion_newest_first():
    notes = re.findall(rf"^## ({DATE}) .*\n\n(.*)$", text("LAB_NOTES.md"), re.MULTILINE)
    assert len(notes) == text("LAB_NOTES.md").count("\n## ")
    for _, conclusion in notes:
        assert re.fullmatch(r"\*\*[^*]*\d[^*]*\.\*\*", conclusion), conclusion
    assert all(later >= earlier for (later, _), (earlier, _) in pairwise(notes))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_rates_are_written_with_per(name):
    assert RATE.search("8 experts a token")
    assert RATE.search(text(name)) is None
