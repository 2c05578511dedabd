"""What a subset is chosen for: objectives, and constraints on what it may cost or lose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

MEASURES: dict[str, int] = {"top1": 1, "top5": 1, "nll": -1, "macs": -1, "parameters": -1, "latency": -1}
"""What is known of a subset, and the sign that makes more of it better."""
OBJECTIVES = ("published", *MEASURES)
"""What can be chosen for. "published" and "top1" are the same choice."""
_ACCURACIES = ("top1", "top5")
_FORMS = {
    **dict.fromkeys(_ACCURACIES, "a fraction (0.9), '90%', or signed points against the reference ('-0.5')"),
    **dict.fromkeys(("nll", "macs", "parameters", "latency"), "a positive number, or '50%' of the reference's"),
}
_FORMS["nll"] += ", or signed nats against the reference ('+0.01')"


class Measured(Protocol):
    """A subset, or another network, whose measures are known."""

    def measure(self, name: str) -> float | None:
        """The value of a measure; None where it was not taken."""


@dataclass(frozen=True)
class Limit:
    """A constraint: the least top-1 or top-5 accuracy, or the most of anything else.

    Attributes:
        measure: a name of ``MEASURES``.
        value: the limit, or what is added to the reference's value, or the factor that this is multiplied by.
        relation: "" for a limit by itself, "+" or "*" for one that is taken from the reference.
        given: as the user wrote it.
    """

    measure: str
    value: float
    relation: str
    given: float | str

    @classmethod
    def parse(cls, measure: str, given: Any) -> Limit:
        """A number, or text: "0.9", "90%", "-0.5" for an accuracy; "1e6", "50%" for a cost; "+0.01" for the NLL.

        Raises:
            ValueError: no such measure, or another form.
        """
        if measure not in MEASURES:
            raise ValueError(f"constraints must be on {', '.join(MEASURES)}, got {measure!r}")
        wrong = f"the constraint on {measure} must be {_FORMS[measure]}, got {given!r}"
        text = given.strip() if isinstance(given, str) else ""
        try:
            value = float(text.removesuffix("%") if isinstance(given, str) else given)
        except (TypeError, ValueError):
            raise ValueError(wrong) from None
        accuracy, percent, signed = measure in _ACCURACIES, text.endswith("%"), text[:1] in ("+", "-")
        value /= 100 if percent or (signed and accuracy) else 1
        relation = "+" if signed else "*" if percent and not accuracy else ""
        if relation == "+":
            holds = not percent and (abs(value) <= 1 if accuracy else measure == "nll")
        else:
            holds = 0 <= value <= 1 if accuracy else value > 0
        if isinstance(given, bool) or not isinstance(given, (str, Real)) or not (holds and math.isfinite(value)):
            raise ValueError(wrong)
        return cls(measure, value, relation, given if isinstance(given, str) else value)

    def resolve(self, reference: Measured) -> float:
        """The limit as a value of the measure.

        Raises:
            ValueError: the reference's value is needed and not known.
        """
        if not self.relation:
            return self.value
        base = reference.measure(self.measure)
        if base is None or math.isnan(base):
            raise ValueError(f"the constraint on {self.measure} needs the reference's {self.measure}, which is unknown")
        return base + self.value if self.relation == "+" else base * self.value


def parse_constraints(constraints: Mapping[str, Any] | Iterable[str] | None) -> tuple[Limit, ...]:
    """Constraints by measure, or as texts such as "top1=-0.5".

    Raises:
        ValueError: one has another form, or a measure comes twice.
    """
    if isinstance(constraints, Mapping):
        return tuple(Limit.parse(name, value) for name, value in constraints.items())
    limits = []
    for text in [constraints] if isinstance(constraints, str) else constraints or ():
        name, equals, value = str(text).partition("=")
        if not equals:
            raise ValueError(f"a constraint must be MEASURE=LIMIT, for example macs=50%, got {text!r}")
        limits.append(Limit.parse(name.strip(), value))
    if len({limit.measure for limit in limits}) < len(limits):
        raise ValueError(f"constraints must be on different measures, got {', '.join(one.measure for one in limits)}")
    return tuple(limits)


def written(measure: str, value: float) -> str:
    """A value in a message: accuracies in percent."""
    if measure in _ACCURACIES:
        return f"{100 * value:.2f} %"
    return f"{value:,.0f}" if measure in ("macs", "parameters") else f"{value:.4g}"


def bound_words(measure: str, value: float) -> str:
    """A limit in words: ``top1 at least 90.00 %``."""
    return f"{measure} {'at least' if MEASURES[measure] > 0 else 'at most'} {written(measure, value)}"
