"""What was captured from the stock model on text, as a file. Reading it needs no model.

Shape letters: L layers, T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from moe_routing.files import reading
from moe_routing.routing.tensors import save_tensors

CAPTURE_FILE = "router_logits.safetensors"


@dataclass(frozen=True)
class Capture:
    """What the routers and the head of the stock model returned for each token.

    Attributes:
        logits_LTE: float32 router logits, (layers, tokens, experts).
        input_norm_LT: Euclidean norm of the router's input, (layers, tokens).
        token_T: id of the token, int64.
        next_T: id of the token that follows, int64.
        predicted_T: id of the most likely next token, int64.
        loss_T: negative log-likelihood of the following token, nats, float32.
        document_T: index of the document, int64.
    """

    logits_LTE: Tensor
    input_norm_LT: Tensor
    token_T: Tensor
    next_T: Tensor
    predicted_T: Tensor
    loss_T: Tensor
    document_T: Tensor

    FIELDS = (
        "logits_LTE", "input_norm_LT", "token_T", "next_T", "predicted_T", "loss_T", "document_T",
    )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.loss_T.numel()

    def save(self, path: Path | str) -> None:
        """Write a safetensors file."""
        tensors = {name: getattr(self, name).contiguous() for name in self.FIELDS}
        save_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path | str) -> Capture:
        """Read a file written by :meth:`save`.

        Raises:
            InputError: the file is missing or not such a file.
        """
        with reading(path, "a capture"), safe_open(path, "pt") as file:
            return cls(**{name: file.get_tensor(name) for name in cls.FIELDS})
