"""The certificate of a strategy: a threshold, and the damage that it is certified not to exceed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from moe_routing.errors import InputError
from moe_routing.files import read_json, save_json


@dataclass(frozen=True)
class Certificate:
    """What conformal risk control found on calibration documents.

    The damage of a document is the mean KL(stock || routed) of its tokens' next-token
    distributions, in nats per token, clipped at ``bound``. The expected damage of a new document
    that is exchangeable with the calibration documents is at most ``margin``.

    Attributes:
        strategy: id of the strategy.
        margin: nats per token.
        threshold: smallest score of an expert that is kept, on the score's own scale; see
            :mod:`moe_routing.routing.strategies.absolute`.
        budget: mean experts per token and layer that the threshold was made for.
        bound: largest damage that a document can count with.
        documents: number of calibration documents.
        damage: their mean damage under the strategy.
        risk: (documents * d + bound) / (documents + 1), at most the margin, where d is the mean of
            their damages made monotone: each at least that under any larger budget that was tried.
        mean_experts: mean experts per token and layer on the calibration documents.
        mean_experts_L: the same by layer.
        tried: mean damage by budget, of all budgets that were tried.
        fingerprint: hash of all weights of the model.
    """

    strategy: str
    margin: float
    threshold: float
    budget: float
    bound: float
    documents: int
    damage: float
    risk: float
    mean_experts: float
    mean_experts_L: tuple[float, ...]
    tried: dict[str, float]
    fingerprint: str

    def __str__(self) -> str:
        layers = " ".join(f"{mean:.1f}" for mean in self.mean_experts_L)
        return (
            f"{self.strategy}: {self.mean_experts:.2f} experts per token ({layers} by layer); mean "
            f"damage {self.damage:.4f} nats per token on {self.documents} documents, certified: at "
            f"most {self.margin:g} on new ones"
        )

    def save(self, path: Path | str) -> None:
        """Write JSON."""
        save_json(asdict(self), path)

    @classmethod
    def load(cls, path: Path | str) -> Certificate:
        """Read a file written by :meth:`save`.

        Raises:
            InputError: the file is missing or not a certificate.
        """
        values = read_json(Path(path))
        try:
            values["mean_experts_L"] = tuple(values["mean_experts_L"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: not a certificate: {error}") from error
