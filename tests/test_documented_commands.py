"""The workflows of the continuous integration run what README.md and CONTRIBUTING.md document."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest
import yaml
from documents import ROOT, blocks, text

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TORCH = "--index-url https://download.pytorch.org/whl/cpu torch"


def jobs(name: str) -> list[dict]:
    workflow = yaml.safe_load(text(f".github/workflows/{name}.yml"))
    return [*workflow["jobs"].values()]


def commands(name: str) -> list[str]:
    """The commands of a workflow's one job; the CPU build of PyTorch comes first."""
    (job,) = jobs(name)
    torch, *rest = [step["run"] for step in job["steps"] if "run" in step]
    assert torch.endswith(TORCH)
    return rest


def fenced(number: int) -> list[str]:
    """The lines of a fenced block of the README, counted from 0."""
    return blocks("README.md", r"\w*")[number].splitlines()


def section(title: str) -> list[str]:
    """The commands of an indented block of CONTRIBUTING.md, by the heading above it."""
    (body,) = re.findall(rf"^## {title}\n\n((?:    .*\n)+)", text("CONTRIBUTING.md"), re.MULTILINE)
    return [line.strip() for line in body.splitlines()]


def test_the_tests_are_the_second_block_of_the_readme():
    environment, *rest = fenced(1)
    assert environment == "python3 -m venv .venv && . .venv/bin/activate"
    assert commands("tests") == rest


def test_the_study_is_installed_as_in_the_first_block():
    _, install, study = fenced(0)
    assert commands("smoke") == [install, f"{study} --configfile config/smoke.yaml"]


def test_every_check_of_contributing_is_run():
    _, install, _ = section("Set up")
    lint, smoke = commands("lint"), commands("smoke")
    assert lint[0] == install
    assert section("Before you propose a change") == ["pytest -n 2", *lint[1:], smoke[1]]


def test_the_weekly_run_takes_the_newest_releases():
    install, _, *rest = commands("weekly")
    assert install == fenced(1)[1].replace(" -c constraints.txt", "")
    assert rest == ["pytest -n 2 -m 'slow or not slow'", commands("smoke")[1]]
    assert "constraints" not in "".join(commands("weekly"))


def test_conda_and_the_container_are_tried_by_the_commands_of_the_readme():
    readme = " ".join(text("README.md").replace("\\\n", " ").split())
    conda, container = (
        [line.strip() for step in job["steps"] for line in step.get("run", "").splitlines()]
        for job in jobs("ways")
    )
    make_runner, _, install, study = conda[:4]
    assert make_runner.removeprefix("$CONDA/bin/") in readme
    assert install in readme
    assert study.removesuffix(" --configfile config/smoke.yaml") in readme
    build, run = container
    assert build in readme
    assert run.removesuffix(" --configfile config/smoke.yaml") in readme


def test_the_readme_names_the_cpu_build_of_pytorch():
    (job,) = jobs("tests")
    torch = next(step["run"] for step in job["steps"] if "run" in step)
    assert f"\n    {torch}\n" in text("README.md")


def test_the_tested_versions_of_python_are_the_declared_ones():
    (job,) = jobs("tests")
    tested = job["strategy"]["matrix"]["python"]
    project = tomllib.loads(text("pyproject.toml"))["project"]
    declared = [name for name in project["classifiers"] if name.count("3.")]
    assert declared == [f"Programming Language :: Python :: {version}" for version in tested]
    assert project["requires-python"] == f">={tested[0]}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_few_rights_and_ends(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"].startswith(path.stem)
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert "run" in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
            shlex.split(step.get("run", ""))


def test_badges_and_addresses_are_those_of_the_repository():
    """No address, no badge: CITATION.cff is where the address is set."""
    address = yaml.safe_load(text("CITATION.cff")).get("repository-code", "")
    pages = [f"{address}/actions/workflows/{name}.yml" for name in ("tests", "lint", "smoke")]
    badges = [f"[![{page.rpartition('/')[2][:-4]}]({page}/badge.svg)]({page})" for page in pages]
    shown = [line for line in text("README.md").splitlines() if line.startswith("[![")]
    assert shown == (badges if address else [])
    urls = tomllib.loads(text("pyproject.toml"))["project"].get("urls", {})
    assert urls == ({"Repository": address} if address else {})
