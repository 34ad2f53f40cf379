"""The model of a study: ``model.json`` describes it, and every job loads exactly that model."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.config.limits import Limits, check_limits
from moe_routing.engine.adapters import experts_of_routers, find_routers
from moe_routing.engine.loading import (
    LoadedModel,
    checkpoint_folder,
    describe,
    load_model,
    outline_checkpoint,
)
from moe_routing.engine.requests import max_length
from moe_routing.engine.weights import file_hashes, weight_files
from moe_routing.errors import InputError
from moe_routing.evaluation.calibration_tokens import check_tokens
from moe_routing.files import read_json, save_json
from moe_routing.usage import LOADING

if TYPE_CHECKING:
    from moe_routing.config.study import ModelConfig, StudyConfig

MODEL_FILE = "model.json"


def write_model(study: StudyConfig, results: Path, origin: str) -> None:
    """Fetch the model, check it and the study against it, and write ``model.json``.

    The file holds what :func:`moe_routing.engine.loading.describe` returns and ``window``, the most
    input tokens of a sequence.

    Args:
        study: the config.
        results: folder of the study.
        origin: how errors name the config file.

    Raises:
        InputError: see :func:`moe_routing.engine.loading.outline_checkpoint`,
            :func:`moe_routing.engine.adapters.experts_of_routers`, which every study needs,
            :func:`moe_routing.config.limits.check_limits` and :func:`check_tokens`.
    """
    outline = outline_checkpoint(study.model)
    routers = find_routers(outline.model)
    experts_of_routers(outline.model, f"{origin}: model.path '{study.model.path}'")
    window = max_length(outline.model.config, None)
    limits = Limits(min(r.num_experts for r in routers), routers[0].rule, window)
    check_limits(study, limits, origin)
    check_tokens(study.of_model(limits.experts, limits.rule), limits, origin)
    described = {**describe(study.model, outline), "window": window}
    save_json(described, results / MODEL_FILE)


def load_study_model(config: ModelConfig, results: Path, threads: int | None = None) -> LoadedModel:
    """Load the model of a study, and check that it is the one in ``model.json``.

    The files are hashed again after loading: a result must name the weights that it was made with,
    even if they were replaced after ``model.json`` was written. Sizes and times of files would not
    show it, because copying can keep them. The files have just been read, so hashing is cheap.
    The CPU time of loading is written to the log.

    Args:
        config: the model, under the settings of the job.
        results: folder of the study.
        threads: CPU threads.

    Raises:
        InputError: see :func:`moe_routing.engine.loading.load_model`; or a file has changed since.
    """
    described = _read_description(results / MODEL_FILE)
    before = time.process_time()
    loaded = load_model(config, threads)
    print(LOADING.format(cpu=time.process_time() - before), file=sys.stderr)
    _check_unchanged(checkpoint_folder(config), described, results / MODEL_FILE)
    weights = {"weights_sha256": described["weights_sha256"]}
    return replace(loaded, provenance={**loaded.provenance, **weights})


def _read_description(path: Path) -> dict:
    described = read_json(path)
    for key in ("weights_sha256", "files", "settings"):
        if key not in described:
            raise InputError(f"{path}: key '{key}' is missing; remove the file and run again")
    return described


def _check_unchanged(folder: Path, described: Mapping[str, dict[str, str]], origin: Path) -> None:
    """Compare the loaded weights and settings with their description."""
    settings = [folder / name for name in described["settings"]]
    for path in settings:
        if not path.is_file():
            raise InputError(f"{path}: missing; {origin} names it")
    now = file_hashes(folder, [*weight_files(folder), *settings])
    before = {**described["files"], **described["settings"]}
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise InputError(
            f"{folder / changed[0]}: is not the file that {origin} describes; allowed: that one, "
            "or the study run again from its first step on"
        )
