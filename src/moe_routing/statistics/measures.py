"""What is compared between strategies: additive measures of items.

Perplexities are compared through nats, whose mean is additive over items; a difference of d nats a
token is a ratio of exp(d) in token perplexity. Word and byte perplexity differ from it only by a
constant factor of d, so that testing them too would be the same test again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measure:
    """A ratio of sums over items.

    Attributes:
        name: its name in tables.
        column: item column of the numerator.
        sign: -1 turns log-likelihood into nats.
        unit: item column of the denominator; None counts items.
        higher_is_better: orientation.
        margin: which non-inferiority margin of the config applies, if one does.
    """

    name: str
    column: str
    sign: float
    unit: str | None
    higher_is_better: bool
    margin: Literal["accuracy", "nats"] | None

    @property
    def is_share(self) -> bool:
        """Whether items are right or wrong."""
        return self.higher_is_better

    def loss(self, value: float) -> float:
        """Return a value or difference with the sign by which smaller is better."""
        return 0.0 - value if self.higher_is_better else value  # never -0.0


ACCURACY = Measure("accuracy", "correct", 1.0, None, True, "accuracy")
ACCURACY_NORM = Measure("accuracy_norm", "correct_norm", 1.0, None, True, "accuracy")
NATS_PER_TOKEN = Measure("nats_per_token", "log_likelihood", -1.0, "tokens", False, "nats")
# The margin is one of nats a token, and a last word has several: no margin applies.
NATS_PER_TARGET = Measure("nats_per_target", "log_likelihood", -1.0, None, False, None)

MEASURES: dict[str, tuple[Measure, ...]] = {
    "perplexity": (NATS_PER_TOKEN,),
    "multiple_choice": (ACCURACY_NORM, ACCURACY),
    "last_word": (ACCURACY, NATS_PER_TARGET),
}
"""Measures of each task; the first one is its main measure."""


def is_main(measure: Measure, task: str) -> bool:
    """Return whether a measure stands for its task where only one can be shown."""
    return measure is MEASURES[task][0]
