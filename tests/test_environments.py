"""What the code imports is declared, and every place that pins a version pins the same one."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import yaml

from moe_routing.workflow import model_environment, report_environment

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {
    "matplotlib-base": "matplotlib",
    "pytorch": "torch",
    "pytorch-gpu": "torch",
    "seaborn-base": "seaborn",
    "snakemake-minimal": "snakemake",
}
CONDA_ONLY = {"pandoc", "pip", "python", "quarto"}
BIOCONDA = {"snakemake-minimal"}
"""Packages that conda-forge does not have."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    return canonical(re.match(r"[\w.-]+", requirement)[0])


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonical(name): version for name, version in pins}


def imported_packages(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module.split(".")[0])
    own, of_type_checkers = {"moe_routing", "moe_pretraining"}, {"_typeshed"}
    return modules - set(sys.stdlib_module_names) - own - of_type_checkers


def test_every_import_of_the_package_is_a_declared_dependency():
    extras = project()["optional-dependencies"]
    declared = {requirement_name(r) for r in [*project()["dependencies"], *extras["report"]]}
    # The first two come with pydantic and nbclient, whose errors they are, IPython with ipykernel;
    # whoever loads the harness's plugin has the harness.
    declared |= {"pydantic-core", "jupyter-client", "ipython", "lm-eval"}
    distributions = packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)}: {module}"
        for folder in ("src", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        for module in imported_packages(path)
        if not {canonical(name) for name in distributions.get(module, [module])} & declared
    }
    assert undeclared == set()


def test_runner_has_what_snakemake_needs_for_its_report():
    """The minimal package leaves out what snakemake[reports] names."""
    environment = yaml.safe_load((ROOT / "envs" / "runner.yaml").read_text(encoding="utf-8"))
    needed = {requirement_name(r) for r in requires("snakemake") if 'extra == "reports"' in r}
    assert needed
    assert needed <= {requirement_name(r) for r in environment["dependencies"]}


def test_no_dependency_is_declared_twice():
    lists = [project()["dependencies"], *project()["optional-dependencies"].values()]
    for names in (list(map(requirement_name, declared)) for declared in lists):
        assert sorted(set(names)) == sorted(names)


def test_constraints_pin_every_declared_dependency():
    extras = project()["optional-dependencies"].values()
    declared = {requirement_name(r) for r in sum(extras, project()["dependencies"])}
    assert declared <= constraints().keys()
    assert constraints()["torch"] == "2.13.0"


@pytest.mark.parametrize("path", sorted((ROOT / "envs").glob("*.yaml")), ids=lambda path: path.name)
def test_conda_environments_pin_the_constraints_versions(path: Path):
    environment = yaml.safe_load(path.read_text(encoding="utf-8"))
    pins = dict([*dependency.split(" ="), ""][:2] for dependency in environment["dependencies"])
    channels = ["conda-forge", *(["bioconda"] if BIOCONDA & pins.keys() else []), "nodefaults"]
    assert environment["channels"] == channels
    assert pins.pop("python") == "3.12"
    for name, version in pins.items():
        if name not in CONDA_ONLY:
            assert version, f"{name} is not pinned"
            pinned = constraints()[canonical(CONDA_NAMES.get(name, name))]
            assert f"{pinned}.".startswith(f"{version}."), name


@pytest.mark.parametrize(
    ("other", "name", "lacks", "has"),
    [
        ("model-gpu", "model", "pytorch =2.13", "pytorch-gpu =2.13"),
        ("report-preview", "report", "quarto =1", None),
    ],
)
def test_an_environment_for_another_machine_differs_in_one_package(other, name, lacks, has):
    first, second = (
        yaml.safe_load((ROOT / "envs" / f"{file}.yaml").read_text(encoding="utf-8"))
        for file in (name, other)
    )
    assert {*first["dependencies"]} - {*second["dependencies"]} == {lacks}
    assert {*second["dependencies"]} - {*first["dependencies"]} == ({has} if has else set())


def test_every_environment_file_is_used():
    used = {
        Path(file).name
        for file in (
            model_environment(gpu=0),
            model_environment(gpu=1),
            report_environment("Linux", "x86_64"),
            report_environment("Linux", "aarch64"),
            "envs/analysis.yaml",  # named in the rules
            "envs/runner.yaml",  # for Snakemake itself
        )
    }
    assert {path.name for path in (ROOT / "envs").glob("*.yaml")} == used


def locked() -> dict[str, tuple[str, int]]:
    """Return version and number of hashes of each package in the lock file."""
    text = (ROOT / "lock.txt").read_text(encoding="utf-8")
    entries = re.findall(r"^([\w.-]+)==([^\s;]+)[^\n]*((?:\n    --hash=\S+(?: \\)?)+)", text, re.M)
    return {
        canonical(name): (version, hashes.count("sha256:")) for name, version, hashes in entries
    }


def test_lock_has_the_versions_of_the_constraints_with_hashes_and_no_build_of_torch():
    found, pins = locked(), constraints()
    text = (ROOT / "lock.txt").read_text(encoding="utf-8")
    assert len(found) == len(re.findall(r"^[\w.-]+==", text, re.M)) > 100
    assert all(hashes > 0 for _, hashes in found.values())
    other = {
        name: version for name, (version, _) in found.items() if pins.get(name, version) != version
    }
    assert other == {}
    assert not [name for name in found if re.match(r"torch$|nvidia-|cuda-|triton$", name)]
    extras = project()["optional-dependencies"]
    needed = [*project()["dependencies"], *extras["workflow"], *extras["report"]]
    assert {requirement_name(r) for r in needed} - {"torch"} <= found.keys()
