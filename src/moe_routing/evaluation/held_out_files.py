"""Names of the files of held-out interventions, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moe_routing.config.study import StudyConfig

FOLDER = "held_out"
DEAD_PARTS = ("calibration", "held_out")
"""What the model with dead experts is calibrated on, and what is tested on it."""


class HeldOutFiles(NamedTuple):
    """The files in a study's folder; see :mod:`moe_routing.evaluation.held_out`."""

    results: Path

    @property
    def folder(self) -> Path:
        """The folder of all files."""
        return self.results / FOLDER

    def toggles(self, text: str) -> Path:
        """Experts of the stock model that are toggled, one at a time, on a text."""
        return self.folder / "toggles" / f"{text}.safetensors"

    def tokens(self, text: str) -> Path:
        """What the toggled tokens of a text are, one row each."""
        return self.folder / "tokens" / f"{text}.parquet"

    def together(self, text: str) -> Path:
        """Experts of the tokens of a text that are removed together."""
        return self.folder / "together" / f"{text}.parquet"

    @property
    def routed(self) -> Path:
        """Experts that are removed in the states of the model under BH."""
        return self.folder / "routed.safetensors"

    def dead(self, part: str) -> Path:
        """Experts that are toggled in the model with dead experts; a part of ``DEAD_PARTS``."""
        return self.folder / "dead" / f"{part}.safetensors"

    @property
    def dead_experts(self) -> Path:
        """Which experts are dead there."""
        return self.folder / "dead" / "experts.csv"

    def of_text(self, text: str) -> list[str]:
        """Return the paths of all files of a text."""
        return [str(path(text)) for path in (self.toggles, self.tokens, self.together)]

    def of_stock(self, study: StudyConfig) -> list[str]:
        """Return the paths of all files of the stock model, and of its states under BH."""
        texts = [path for text in study.held_out_texts for path in self.of_text(text)]
        return [*texts, str(self.routed)]

    def of_dead(self) -> list[str]:
        """Return the paths of all files of the model with dead experts."""
        return [*(str(self.dead(part)) for part in DEAD_PARTS), str(self.dead_experts)]

    def all(self, study: StudyConfig) -> list[str]:
        """Return the paths of all files of a study."""
        return [*self.of_stock(study), *self.of_dead()]
