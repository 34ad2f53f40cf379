"""The base class of strategies: a frozen specification with a stable id that builds one router.

An id is the family and its parameters, such as ``regular_k8`` or ``bh_k16_a005``. A number is a
letter and digits; a fraction is written without its decimal point (``a005`` is 0.05, ``a010`` is
0.10, ``b35`` is 3.5); a parameter that differs from its default is added by name
(``bh_k16_a005_pooled``). Where a family has one free parameter, ``b`` stands for it: the budget of
experts per token that it is fitted to (``bh_k16_b4``). Last come the parameters of every family:
what ranks the experts, which ones it may select, what stands in for a dropped one, and the scale of
the output (``regular_k4_norm_compensated``).
"""

from __future__ import annotations

from abc import abstractmethod
from decimal import Decimal
from typing import TYPE_CHECKING, ClassVar, get_args

from pydantic import Field

from moe_routing.errors import InputError
from moe_routing.schema import ClosedModel
from moe_routing.vocabulary import Candidates, Dropped, ExpertScore, Family, Scaling, Weighting

if TYPE_CHECKING:
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.certificate import Certificate
    from moe_routing.routing.rule import ModelRule
    from moe_routing.routing.types import Selector


class Strategy(ClosedModel):
    """A routing strategy. To add one, define a subclass in a new module of this folder.

    Another package registers its class as an entry point of the group ``moe_routing.strategies``.
    Torch is imported inside the selector, so that ids can be read and figures drawn without it.
    """

    family: ClassVar[Family]
    """What the stages need to know about the family; each concrete class has its own."""
    codes: ClassVar[dict[str, str]]
    """Numeric parameters and the letter of each in the id; one at its default is left out."""
    words: ClassVar[tuple[str, ...]] = ()
    """Named parameters of the family, written in the id only where they differ from the default;
    the class method ``choices`` returns the values of each."""
    common_words: ClassVar[tuple[str, ...]] = ("score", "candidates", "dropped", "scale")
    """Named parameters of every family, after those of its own."""
    in_order: ClassVar[bool] = False
    """Whether forward passes must run in order, because the routing depends on earlier ones."""

    score: ExpertScore = Field(default="probability", description="What ranks the experts.")
    candidates: Candidates = Field(default="all", description="Experts that may be selected.")
    dropped: Dropped = Field(
        default="omitted",
        description="What stands in for an expert of the model's own choice that is not selected.",
    )
    scale: Scaling = Field(
        default="unscaled", description="Whether one fitted number scales the experts' output."
    )

    @property
    def id(self) -> str:
        """The stable id."""
        parts = [self.family.name]
        for name in (*self.codes, *self.words, *self.common_words):
            value = getattr(self, name)
            if value == type(self).model_fields[name].default:
                continue
            parts.append(
                f"{self.codes[name]}{encode(value)}"
                if name in self.codes
                else value.replace("_", "-")
            )
        return "_".join(parts)

    @classmethod
    def choices(cls, word: str) -> tuple[str, ...]:
        """Return the allowed values of a named parameter: those of its type."""
        return get_args(cls.model_fields[word].annotation)

    @classmethod
    def is_fraction(cls, code: str) -> bool:
        """Return whether a numeric parameter may have decimals."""
        annotation = cls.model_fields[code].annotation
        return float in (annotation, *get_args(annotation))

    @classmethod
    def accepts(cls, word: str, value: str) -> bool:
        """Return whether a named parameter may have a value: one of its choices."""
        return value in cls.choices(word)

    def resolved(self, rule: ModelRule) -> Strategy:
        """Return this strategy with everything that it leaves to the model filled in.

        Strategies that are equal once resolved route a model in the same way.
        """
        if "weighting" in type(self).model_fields and self.weighting_kind == "model":
            return self.model_copy(update={"weighting": rule.weighting})
        return self

    @property
    def needs_null(self) -> str | None:
        """Id of the null that this strategy tests against, if any."""
        return None

    @property
    def needs_calibration(self) -> bool:
        """Whether :meth:`selector` needs calibration data."""
        return self.needs_null is not None

    @property
    def needs_outputs(self) -> bool:
        """Whether calibration data must include the outputs of experts."""
        return self.score in ("mean_norm", "norm", "consequence") or self.dropped == "compensated"

    @property
    def needs_toggles(self) -> bool:
        """Whether calibration data must include toggled experts."""
        return self.score == "consequence"

    @property
    def uses_calibration(self) -> bool:
        """Whether the strategy needs calibration data for anything."""
        return bool(
            self.needs_calibration or self.needs_outputs or self.needs_scale or self.needs_budget
        )

    @property
    def needs_certificate(self) -> bool:
        """Whether the strategy has to be certified before."""
        return False

    @property
    def needs_budget(self) -> str | None:
        """Id under which a free parameter has to be fitted to a budget before, if any."""
        return None

    @property
    def needs_cell(self) -> str | None:
        """Id of the strategy whose numbers of experts on the same text it takes, if any."""
        return None

    @property
    def needs_scale(self) -> bool:
        """Whether the scale of the experts' output has to be fitted before."""
        return self.scale == "scaled"

    @property
    def has_lever(self) -> bool:
        """Whether a parameter of every family is not that of its own family."""
        fields = type(self).model_fields
        return any(getattr(self, name) != fields[name].default for name in self.common_words)

    @property
    def nominal_experts(self) -> float | None:
        """Mean experts per token and layer that the id asks for; None if it asks for none."""
        return None

    def fitted(self, calibration: Calibration | None) -> Strategy:
        """Return this strategy with the value of its free parameter that was fitted to its budget.

        Raises:
            InputError: it was not fitted, or no value has been found.
        """
        del calibration
        return self

    def score_of(self, calibration: Calibration | None) -> ExpertScore:
        """Return what ranks the experts; a strategy may leave it to the calibration."""
        del calibration
        return self.score

    def certificate_of(self, calibration: Calibration) -> Certificate | None:
        """Return the certificate that the strategy uses, if any."""
        del calibration
        return None

    def output_scale(self, calibration: Calibration | None) -> float | None:
        """Return the factor of all weights that was fitted for this strategy; None: no factor.

        Raises:
            InputError: it was not fitted.
        """
        if not self.needs_scale:
            return None
        scales = calibration.scales if calibration else {}
        if self.id not in scales:
            known = ", ".join(scales) or "none"
            raise InputError(
                f"strategy '{self.id}': its scale is not fitted in this calibration; fitted: "
                f"{known}"
            )
        return scales[self.id]

    @property
    @abstractmethod
    def max_experts(self) -> int:
        """Maximum number of experts per token."""

    @property
    def min_experts(self) -> int:
        """Minimum number of experts per token."""
        return self.max_experts

    @property
    @abstractmethod
    def weighting_kind(self) -> Weighting:
        """How selected experts are weighted."""

    @abstractmethod
    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return the function that chooses experts."""


def encode(value: float) -> str:
    """Write a number for an id: 16 is '16', 0.05 is '005', 0.1 is '010', 3.5 is '35', 4.0 is '4'.

    Fractions below 1 have at least two decimals, other numbers none that are 0.
    """
    if isinstance(value, int):
        return str(value)
    whole, _, digits = f"{Decimal(repr(value)):f}".partition(".")
    return whole + (digits.ljust(2, "0") if value < 1 else digits.rstrip("0"))


def decode(digits: str, *, fraction: bool) -> float | int:
    """Read what :func:`encode` wrote."""
    return float(f"{digits[0]}.{digits[1:]}") if fraction else int(digits)
