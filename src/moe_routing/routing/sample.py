"""Router logits of calibration tokens, the data that nulls and thresholds are fitted to.

Shape letters: L layers, T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_routing.errors import InputError
from moe_routing.files import atomic_path
from moe_routing.routing.rule import ModelRule
from moe_routing.vocabulary import OwnWeighting


@dataclass(frozen=True)
class CalibrationSample:
    """Router logits of one model on calibration text.

    Attributes:
        logits_LTE: float32 router logits on the text, (layers, tokens, experts).
        permuted_LTE: the same on the text with the tokens of each window shuffled, so that every
            token is in a mismatched context.
        input_norm_LT: Euclidean norm of the router's input, (layers, tokens).
        permuted_norm_LT: the same on the shuffled text.
        centred_norm_LE: Euclidean norm of each expert's router vector minus their mean,
            (layers, experts).
        hidden_size: width of the router's input.
        rule: the model's own routing rule.
        fingerprint: hash of the router weights, see
            :func:`moe_routing.engine.adapters.router_fingerprint`.
    """

    logits_LTE: Tensor
    permuted_LTE: Tensor
    input_norm_LT: Tensor
    permuted_norm_LT: Tensor
    centred_norm_LE: Tensor
    hidden_size: int
    rule: ModelRule
    fingerprint: str

    TENSORS = (
        "logits_LTE", "permuted_LTE", "input_norm_LT", "permuted_norm_LT", "centred_norm_LE",
    )  # fmt: skip

    @property
    def top_k(self) -> int:
        """Experts per token that the model was trained with."""
        return self.rule.top_k

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.logits_LTE.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of sampled tokens."""
        return self.logits_LTE.shape[1]

    @property
    def num_experts(self) -> int:
        """Number of experts per layer."""
        return self.logits_LTE.shape[2]

    def save(self, path: Path | str) -> None:
        """Write a safetensors file."""
        tensors = {name: getattr(self, name).contiguous() for name in self.TENSORS}
        metadata = {
            "hidden_size": str(self.hidden_size),
            "top_k": str(self.rule.top_k),
            "weighting": self.rule.weighting,
            "fingerprint": self.fingerprint,
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: Path | str) -> CalibrationSample:
        """Read a file written by :meth:`save`.

        Raises:
            InputError: the file is missing or not such a file.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in cls.TENSORS}
            return cls(
                **tensors,
                hidden_size=int(metadata["hidden_size"]),
                rule=ModelRule(int(metadata["top_k"]), cast("OwnWeighting", metadata["weighting"])),
                fingerprint=metadata["fingerprint"],
            )
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{path}: not a calibration sample: {error}") from error
