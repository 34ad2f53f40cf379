"""What the Snakemake workflow catalogue and snakedeploy read, and the citation, are complete."""

from __future__ import annotations

import re
import tomllib

import yaml
from documents import ROOT, text


def test_the_catalogue_lists_what_the_workflow_offers():
    """A workflow of standardized usage has these three files."""
    assert (ROOT / "workflow" / "Snakefile").is_file()
    assert (ROOT / "config" / "README.md").is_file()
    usage = yaml.safe_load(text(".snakemake-workflow-catalog.yml"))["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"}
    assert set(usage["mandatory-flags"]) == {"desc", "flags"}
    assert all(isinstance(words, str) for words in usage["mandatory-flags"].values())
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    offered = {
        "conda": "    conda:\n" in rules,
        "apptainer": "\ncontainer: IMAGE\n" in rules,
    }
    assert usage["software-stack-deployment"] == offered
    assert usage["report"] == ("report(" in rules)


def test_the_citation_names_the_release_of_the_changelog_and_its_licence():
    citation = yaml.safe_load(text("CITATION.cff"))
    released = re.findall(r"^## \[(\d.+)\] - (.+)$", text("CHANGELOG.md"), re.MULTILINE)
    assert (citation["version"], str(citation["date-released"])) == released[0]
    project = tomllib.loads(text("pyproject.toml"))["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    wanted = {"cff-version", "message", "type", "title", "abstract", "authors", "keywords"}
    assert wanted <= citation.keys()
