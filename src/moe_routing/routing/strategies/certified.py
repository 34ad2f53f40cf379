"""The fewest experts for a certified change of the model's predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moe_routing.errors import InputError
from moe_routing.routing.strategies.absolute import Thresholded
from moe_routing.vocabulary import Dropped, ExpertScore, Family, Look

if TYPE_CHECKING:
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.certificate import Certificate


class Certified(Thresholded):
    """One threshold, certified for an expected KL divergence of at most ``margin``.

    The threshold is that of the strategy's certificate
    (:class:`moe_routing.routing.certificate.Certificate`). Unless its id says otherwise, the score
    is the predicted consequence, a dropped expert is replaced by its mean output, and only experts
    of the model's own choice are kept.
    """

    family: ClassVar[Family] = Family(
        "certified",
        label="Certified",
        look=Look("#A0F5D8", (7, 1, 0)),
        definition="Certified threshold, at most {k}, weights {weighting}",
        selection="the fewest experts for a certified KL divergence from the model "
        "[@angelopoulos2024]",
        words="certified routing",
    )
    codes: ClassVar[dict[str, str]] = {"max_k": "k", "margin": "m"}

    margin: float = Field(gt=0, lt=10, description="Largest expected KL, nats per token.")
    score: ExpertScore = Field(default="consequence", description="What ranks the experts.")
    dropped: Dropped = Field(
        default="compensated",
        description="What stands in for an expert of the model's own choice that is not selected.",
    )

    @property
    def needs_calibration(self) -> bool:
        """The threshold comes from a certificate."""
        return True

    @property
    def needs_certificate(self) -> bool:
        """It is what the threshold comes from."""
        return True

    def threshold_of(self, calibration: Calibration) -> float:
        """Return the certified threshold.

        Raises:
            InputError: the strategy is not certified.
        """
        return self.certificate_of(calibration).threshold

    def certificate_of(self, calibration: Calibration) -> Certificate:
        """Return the strategy's certificate.

        Raises:
            InputError: the strategy is not certified.
        """
        if self.id not in calibration.certificates:
            known = ", ".join(calibration.certificates) or "none"
            raise InputError(
                f"strategy '{self.id}' has no certificate in this calibration; certified: {known} "
                f"(calibrate with margin = {self.margin:g} to certify it)"
            )
        return calibration.certificates[self.id]
