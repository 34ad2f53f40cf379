"""The licences that README, model card and vocabulary name are the same."""

from __future__ import annotations

import re

import yaml
from documents import text

from moe_routing.vocabulary import DATASETS, EMBEDDED_TEXT_LICENSES


def section(title: str) -> str:
    (body,) = re.findall(rf"^## {title}\n(.+?)(?=^## |\Z)", text("README.md"), re.M | re.S)
    return " ".join(body.split())


def test_the_readme_names_the_licence_of_every_data_set():
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", text("README.md"), re.MULTILINE)
    named = {label.split(" (")[0]: license for label, license in rows}
    for dataset in DATASETS.values():
        assert named[dataset.label] == dataset.license


def test_the_text_of_the_embedded_model_has_the_licences_of_its_config():
    sources = yaml.safe_load(text("config/pretrain.yaml"))["sources"]
    assert {source["license"] for source in sources} == {*EMBEDDED_TEXT_LICENSES}
    for license in EMBEDDED_TEXT_LICENSES:
        assert license in section("Licences")
        assert license in text("resources/olmoe-nano/README.md")


def test_the_licence_of_the_code_is_named_everywhere():
    assert "license: Apache-2.0\n" in text("CITATION.cff")
    assert 'license = "Apache-2.0"\n' in text("pyproject.toml")
    assert "license: apache-2.0\n" in text("resources/olmoe-nano/README.md")
    assert "Apache-2.0" in section("Licences")
    assert "Apache License" in text("LICENSE")
