"""Dockerfile and Apptainer recipe install the locked packages, by the same commands."""

from __future__ import annotations

import re

import pytest
import yaml
from documents import ROOT, text

from moe_routing.errors import InputError
from moe_routing.workflow import job_image

RECIPE = "envs/apptainer.def"


def commands(lines: str) -> list[str]:
    """Shell commands, with continued lines joined and white space normalised."""
    joined = re.sub(r"\\\n", " ", lines)
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip()]


def docker_runs() -> dict[str, list[str]]:
    """What each stage of the Dockerfile runs, by name."""
    stages = re.split(r"^FROM \S+ AS (\w+)\n", text("Dockerfile"), flags=re.MULTILINE)[1:]
    return {
        name: [line.removeprefix("RUN ") for line in commands(body) if line.startswith("RUN ")]
        for name, body in zip(stages[::2], stages[1::2], strict=True)
    }


def recipe_section(name: str) -> str:
    (body,) = re.findall(rf"^%{name}\n((?:    .*\n|\n)+)", text(RECIPE), re.MULTILINE)
    return body


def test_the_apptainer_recipe_runs_the_commands_of_the_dockerfile():
    runs = docker_runs()
    post = commands(recipe_section("post"))
    assert list(runs) == ["packages", "cuda", "cpu"]  # without --target, docker builds the last
    assert post == [
        "set -eu",
        *runs["packages"],
        'if [ "{{ target }}" = cuda ]; then',
        *runs["cuda"],
        "else",
        *runs["cpu"],
        "fi",
    ]


def test_the_packages_are_those_of_the_lock_and_torch_that_of_the_constraints():
    runs = docker_runs()
    assert runs["packages"][-1].endswith("--no-deps --require-hashes -r /opt/lock.txt")
    for target in ("cpu", "cuda"):
        (install,) = runs[target]
        assert "-c /opt/constraints.txt" in install
        assert install.endswith(" torch && pip check")
    cpu_build = "--index-url https://download.pytorch.org/whl/cpu torch"
    assert cpu_build in runs["cpu"][0]
    assert cpu_build in text("README.md")
    assert "--index-url" not in runs["cuda"][0]


def test_both_images_have_the_python_of_the_conda_environments():
    (version,) = re.findall(r"^ARG PYTHON=(.+)$", text("Dockerfile"), re.MULTILINE)
    assert f"From: python:{version}-slim-bookworm\n" in text(RECIPE)
    dependencies = yaml.safe_load(text("envs/model.yaml"))["dependencies"]
    assert f"python ={version}" in dependencies


def test_the_build_sees_only_the_files_that_it_copies():
    ignored = [line for line in text(".dockerignore").splitlines() if not line.startswith("#")]
    copied = re.findall(r"^COPY (.+) /opt/$", text("Dockerfile"), re.MULTILINE)
    (names,) = (line.split() for line in copied)
    assert ignored == ["*", *(f"!{name}" for name in names)]
    files = [line.split() for line in recipe_section("files").splitlines()]
    assert files == [[name, f"/opt/{name}"] for name in names] + [[]]


def test_an_image_is_asked_for_where_it_is_used(tmp_path):
    image = tmp_path / "envs" / "jobs.sif"
    assert job_image(tmp_path, {"conda"}) is None
    with pytest.raises(InputError) as refused:
        job_image(tmp_path, {"apptainer"})
    assert str(refused.value) == (
        f"{image}: no such image; make it with: apptainer build {image} "
        f"{tmp_path / 'envs' / 'apptainer.def'}"
    )
    image.parent.mkdir()
    image.touch()
    assert job_image(tmp_path, {"apptainer", "conda"}) == str(image)
    assert (ROOT / RECIPE).is_file()


def test_an_image_whose_path_has_a_space_is_refused(tmp_path):
    """As Snakemake does, which does not say which path."""
    image = tmp_path / "my study" / "envs" / "jobs.sif"
    image.parent.mkdir(parents=True)
    image.touch()
    with pytest.raises(InputError, match="Snakemake refuses the path of an image that has a space"):
        job_image(tmp_path / "my study", {"apptainer"})
