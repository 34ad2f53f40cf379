"""What the Snakefile needs to know about a config. The package uses no Snakemake objects."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import yaml

from moe_routing.analysis.outputs import (
    ABLATION,
    BASELINE,
    BH,
    CONSEQUENCE,
    VALIDITY,
    Analysis,
)
from moe_routing.config import cells
from moe_routing.config.cells import data_file, sections
from moe_routing.config.limits import Limits, check_limits
from moe_routing.config.study import CALIBRATION, LocalSource, Source, StudyConfig
from moe_routing.data.sources import CERTIFICATION_FILE, raw_path, source_of
from moe_routing.engine.weights import file_hashes
from moe_routing.errors import InputError
from moe_routing.evaluation.archive import ARCHIVED
from moe_routing.evaluation.calibration_tokens import check_tokens
from moe_routing.evaluation.held_out_files import HeldOutFiles
from moe_routing.files import atomic_path, read_json
from moe_routing.schema import Model, parse, read_yaml
from moe_routing.vocabulary import text_dataset

__all__ = ["sections"]  # for the rules


def validate_config(
    model: type[Model],
    values: Mapping[str, object],
    given: Mapping[str, object],
    files: Sequence[Path | str],
) -> Model:
    """Validate the merged config of a workflow run.

    Args:
        model: what it configures.
        values: the config.
        given: the part of it that was given on the command line.
        files: the config files.

    Raises:
        InputError: see :func:`moe_routing.schema.parse`.
    """
    return parse(model, typed(values, given), config_origin(given, files))


def config_origin(given: Mapping[str, object], files: Sequence[Path | str]) -> str:
    """Return what errors call a config: its last file, and the command line if that changed it.

    >>> config_origin({}, ["config/config.yaml"]), config_origin({"seed": "1"}, ["mine.yaml"])
    ('config/config.yaml', 'mine.yaml and --config')
    """
    named = [_from_here(Path(file)).as_posix() for file in files[-1:]]
    return " and ".join(named + ["--config"] * bool(given)) or "config"


def _from_here(path: Path) -> Path:
    """Return a path relative to the working directory, if it is in there."""
    here = Path.cwd().resolve()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path


def typed(values: object, given: object) -> object:
    """Return a config in which what the command line gave has types.

    Snakemake leaves numbers inside mappings and lists of ``--config`` as text.

    >>> typed({"a": {"b": "1", "c": "1"}}, {"a": {"b": "1"}})
    {'a': {'b': 1, 'c': '1'}}
    """
    if isinstance(values, Mapping) and isinstance(given, Mapping):
        return {
            key: typed(value, given[key]) if key in given else value
            for key, value in values.items()
        }
    if isinstance(values, list) and values == given:
        return [typed(value, value) for value in values]
    if not isinstance(values, str) or values != given:
        return values
    try:
        value = yaml.safe_load(values)
    except yaml.YAMLError:
        return values
    return value if isinstance(value, int | float | None) else values


def checkout_of(rules: str) -> Path:
    """Return the folder of the root Snakefile, given that of a rule file.

    Relative to the working directory if it is in there, so that commands and inputs stay the same
    when both are moved.

    Raises:
        InputError: the rules are not files of this machine: Snakemake reads a module from a hosting
            service file by file, but the jobs run scripts.
    """
    if "://" in rules:
        raise InputError(
            f"{rules}: the jobs run scripts of the checkout; allowed as the snakefile of a module: "
            "the Snakefile of a clone on this machine"
        )
    return _from_here(Path(rules).resolve().parents[1])


def located(study: StudyConfig, checkout: Path) -> StudyConfig:
    """Return a config whose relative paths are found: in the working directory or the checkout."""

    def found(path: str) -> str:
        there = checkout / path
        return str(there) if not Path(path).exists() and there.exists() else path

    def sourced(source: Source) -> Source:
        if not isinstance(source, LocalSource):
            return source
        return source.model_copy(update={"path": found(source.path)})

    model = study.model
    if model.revision is None:
        model = model.model_copy(update={"path": found(model.path)})
    source = sourced(study.calibration.source)
    datasets = {
        name: one.model_copy(update={"source": sourced(one.source)})
        for name, one in study.datasets.items()
    }
    calibration = study.calibration.model_copy(update={"source": source})
    return study.model_copy(
        update={
            "model": model,
            "calibration": calibration,
            "datasets": datasets,
            "replications": [found(path) for path in study.replications],
        }
    )


def finished_elsewhere(study: StudyConfig, results: Path, *, own_python: bool) -> bool:
    """Return whether finished cells were brought to a machine that cannot make them.

    Statistics, figures and the article are then made from what is there, and the rules before them
    are left out. So it is with an archive, without the folder of a local model, and without torch.

    Args:
        study: the config.
        results: folder of the study.
        own_python: whether the jobs run in the Python of this process, not in environments of
            their own.
    """
    if (results / ARCHIVED).is_file():
        return True
    files = (results / f"{cell.path}.json" for cell in cells.cells_of(study))
    if not (results / cells.MODEL_FILE).is_file() or not all(file.is_file() for file in files):
        return False
    without_model = study.model.revision is None and not Path(study.model.path).is_dir()
    return without_model or (own_python and not _has_torch())


def _has_torch() -> bool:
    """Return whether torch is installed, without importing it."""
    try:
        return find_spec("torch") is not None
    except ModuleNotFoundError:  # from a finder that hides it
        return False


def refuse_templates(files: Iterable[Path | str]) -> None:
    """Reject config files that are templates: a config is data.

    Snakemake evaluates a file with ``__use_yte__`` (https://yte-template-engine.github.io) before
    it reads the Snakefile. The template's code has run by then, but this check reports it and
    prevents any job from running.

    Raises:
        InputError: a file is a template, or not YAML.
    """
    for file in files:
        values = read_yaml(file)
        if isinstance(values, dict) and "__use_yte__" in values:
            raise InputError(
                f"{file}: __use_yte__ makes it a template, whose code Snakemake has run; allowed: "
                "plain YAML"
            )


def refuse_dollar(folder: Path) -> None:
    """Reject a working directory with a dollar sign, for jobs that a cluster runs.

    Snakemake's commands there have paths in double quotes, in which a shell expands it.

    Raises:
        InputError: there is one.
    """
    if "$" in str(folder):
        raise InputError(
            f"{folder}: has a dollar sign, which Snakemake's commands on a cluster would expand; "
            "allowed there: folders without"
        )


def check_known_model(study: StudyConfig, results: Path, origin: str) -> None:
    """Check a study against its model, if an earlier run has described the model.

    The job that describes it also checks the study, but is not rerun when settings change.

    Args:
        study: the config.
        results: folder of the study.
        origin: name of the config in error messages.

    Raises:
        InputError: see :func:`moe_routing.config.limits.check_limits` and :func:`check_tokens`.
    """
    file = results / "model.json"
    described = read_json(file) if file.is_file() else {}
    if _describes(described, study):
        limits = Limits.of(described)
        check_limits(study, limits, origin)
        check_tokens(study.of_model(limits.experts, limits.rule), limits, origin)


def _describes(described: dict, study: StudyConfig) -> bool:
    """Return whether ``model.json`` describes the config's model in its current state."""
    model = study.model
    named = {"path": model.path, "revision": model.revision}
    if (
        not {"window", "weighting"} <= described.keys()
        or {key: described[key] for key in named} != named
    ):
        return False
    if model.revision is not None:
        return True
    folder, name = Path(model.path), "config.json"
    now = file_hashes(folder, [path for path in (folder / name,) if path.is_file()])
    return now == {name: described["settings"][name]}


def job_prefix(checkout: Path | str, *, own_python: bool = False, **variables: str) -> str:
    """Return the prefix of every shell command of a rule, with braces doubled for Snakemake.

    Jobs import the package from the checkout, even inside conda environments, and work offline.
    ``$SCRIPTS`` is the folder of the scripts.
    A rule that downloads restores the user's own setting: ``HF_HUB_OFFLINE=$USER_OFFLINE``.

    Args:
        checkout: folder of the Snakefile.
        own_python: whether jobs run in the Python of this process, not in environments of their
            own. They then do so even if the shell's ``python`` is another one.
        **variables: additional environment variables for the jobs.
    """
    package, scripts, program = (
        shlex.quote(str(path)).replace("{", "{{").replace("}", "}}")
        for path in (f"{checkout}/src", f"{checkout}/scripts", sys.executable)
    )
    other = own_python and not _is_own_python()
    python = f'python() {{{{ {program} "$@"; }}}}; ' if other else ""
    others = "".join(f" {name}={value}" for name, value in variables.items())
    return (
        f"set -euo pipefail; export PYTHONPATH={package} SCRIPTS={scripts} "
        f"USER_OFFLINE=${{{{HF_HUB_OFFLINE:-}}}} HF_HUB_OFFLINE=1{others}; {python}"
    )


def model_environment(gpu: int | bool) -> str:
    """Return the conda environment of the jobs that run a model, relative to a rule file.

    One for a CPU and one for a GPU: without a driver, as on a login node, conda takes a PyTorch for
    CPUs unless it is told otherwise.
    """
    return f"../../envs/model{'-gpu' if gpu else ''}.yaml"


def report_environment(system: str = "", machine: str = "") -> str:
    """Return the conda environment that renders the article, relative to a rule file.

    conda-forge has no build of Quarto for Linux on ARM, where the article is a preview.

    Args:
        system: name of the system, of this machine by default.
        machine: its processor, by the name that Python has for it.

    >>> report_environment("Linux", "aarch64"), report_environment("Darwin", "arm64")
    ('../../envs/report-preview.yaml', '../../envs/report.yaml')
    """
    here = (system or platform.system(), machine or platform.machine())
    return f"../../envs/report{'-preview' if here == ('Linux', 'aarch64') else ''}.yaml"


def job_image(checkout: Path, methods: Iterable[object]) -> str | None:
    """Return the container image that the jobs of this run use, if they use one.

    Args:
        checkout: folder of the Snakefile.
        methods: what ``--sdm`` was given.

    Raises:
        InputError: it is used, but has not been built, or Snakemake refuses its path.
    """
    if "apptainer" not in map(str, methods):
        return None
    image, recipe = checkout / "envs/jobs.sif", checkout / "envs/apptainer.def"
    if not image.is_file():
        raise InputError(f"{image}: no such image; make it with: apptainer build {image} {recipe}")
    if " " in str(image):
        raise InputError(f"{image}: Snakemake refuses the path of an image that has a space")
    return str(image)


def _is_own_python() -> bool:
    """Return whether the shell's ``python`` is of the environment of this process.

    It is not where Snakemake is started by its path, in an environment that is not activated.
    """
    ask = ["python", "-I", "-c", "import sys; print(sys.prefix)"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return False
    return done.stdout.strip() == sys.prefix


def intervention_files(nulls: Iterable[str], results: str) -> list[str]:
    """Return the files of toggled experts and of expert outputs if a null needs them."""
    return in_results(results, cells.intervention_files(nulls))


def null_files(nulls: Iterable[str], results: str) -> list[str]:
    """Return the files of fitted nulls, and those of interventions if a null is bound to them."""
    return in_results(results, cells.null_files(nulls))


def in_results(results: str, files: Iterable[str]) -> list[str]:
    """Return the paths of files that are named relative to the results folder."""
    return [f"{results}/{file}" for file in files]


def held_out_inputs(study: StudyConfig, results: str) -> list[str]:
    """Return the files that held-out interventions on all texts read, besides the model."""
    # The null of the BH arm does not depend on the model's own k.
    return [
        *held_out_documents(study.held_out_texts, results),
        f"{results}/calibration/router_logits.safetensors",
        f"{results}/calibration/expert_outputs.safetensors",
        *null_files([study.bh_arm(1).needs_null], results),
    ]


def held_out_documents(texts: Iterable[str], results: str) -> list[str]:
    """Return the files of calibration documents, and of the held-out ones of texts."""
    names = [CERTIFICATION_FILE if text == CALIBRATION else f"{text}.parquet" for text in texts]
    return [f"{results}/data/{name}" for name in ("calibration.parquet", *names)]


def analysis_inputs(study: StudyConfig, analysis: Analysis, results: str) -> list[str]:
    """Return the files that an analysis reads."""
    calibration, model = f"{results}/calibration", f"{results}/model.json"
    toggled = [f"{calibration}/{name}.safetensors" for name in ("toggles", "expert_outputs")]
    sample = f"{calibration}/router_logits.safetensors"
    held_out = HeldOutFiles(Path(results)).all(study)

    def fitted(nulls: list[str] | None) -> list[str]:
        names = nulls or study.calibration.nulls
        text = f"{results}/{data_file(text_dataset(study.datasets))}"
        return [model, text, sample, *null_files(names, results)]

    files = {
        BASELINE: [model, *(f"{results}/{data_file(name)}" for name in study.datasets)],
        BH: fitted(study.analysis.bh.nulls),
        VALIDITY: [
            sample,
            f"{results}/baseline/router_logits.safetensors",
            *toggled,
            *held_out,
        ],
        ABLATION: [
            sample,
            *toggled,
            *held_out,
            *null_files(
                dict.fromkeys(
                    [
                        *(study.analysis.ablation.nulls or study.calibration.nulls),
                        study.bh_arm(1).needs_null,
                    ]
                ),
                results,
            ),
        ],
        CONSEQUENCE: toggled,
    }
    return files[analysis]


def write_config(study: StudyConfig, path: Path | str) -> None:
    """Write the complete config, including defaults."""
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False))


def write_run(files: Iterable[Path | str], *, changed: bool, path: Path) -> None:
    """Write ``run.json``: the config file that reproduces the study, relative to this folder.

    Usually that is the file given to the workflow. If several files or additional settings on the
    command line were given, no single file is complete; a file outside the repository is not part
    of a copy of it. In these cases it is the complete config beside ``path``.

    Args:
        files: config files of the run.
        changed: whether the command line changed settings.
        path: file to write.
    """
    given = [Path(os.path.relpath(file)) for file in files]
    whole = len(given) == 1 and not changed and ".." not in given[0].parts
    file = given[0] if whole else Path(os.path.relpath(path.with_name("config.yaml")))
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"config_file": file.as_posix()}) + "\n")


def model_files(study: StudyConfig) -> list[str]:
    """Return the files of a local checkpoint, so that the study is rerun if they change.

    A Hub id has none: its revision identifies the weights. A missing folder has none either; the
    job reports it.
    """
    if study.model.revision is not None:
        return []
    folder = Path(study.model.path)
    return sorted(str(p) for pattern in ("*.json", "*.safetensors") for p in folder.glob(pattern))


def raw_file(study: StudyConfig, results: str, name: str) -> str:
    """Return the downloaded file of an evaluation set or of ``calibration``."""
    return str(raw_path(Path(results) / "data" / "raw", name, source_of(study, name)))


def dataset_of(file: str) -> str:
    """Return the data set that a downloaded file belongs to: the part before the first dot."""
    return file.split(".")[0]


def source_section(study: StudyConfig, file: str) -> dict[str, object]:
    """Return the source of a downloaded file, so that only a change of it downloads again."""
    return source_of(study, dataset_of(file)).model_dump(mode="json")
