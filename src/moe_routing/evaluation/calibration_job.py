"""What every script that calibrates a study's model starts with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moe_routing.config.study import load_config
from moe_routing.engine.loading import LoadedModel
from moe_routing.evaluation.study_model import load_study_model
from moe_routing.files import read_parquet

if TYPE_CHECKING:
    from moe_routing.config.study import StudyConfig


class CalibrationJob(NamedTuple):
    """The config, the model and the calibration text of a study."""

    config: StudyConfig
    loaded: LoadedModel
    texts: list[str]


def load_calibration_job(results: Path) -> CalibrationJob:
    """Read what calibrates the model of a study.

    Args:
        results: folder of the study.

    Raises:
        InputError: the config or the model cannot be read, or is not the study's.
    """
    config = load_config(results / "config.yaml")
    loaded = load_study_model(config.model, results, config.resources.threads)
    texts = read_parquet(results / "data" / "calibration.parquet", "text")["text"]
    return CalibrationJob(config, loaded, list(texts))
