"""ExitPolicy: the record of when a network stops early."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from aep_ext._utils import html_table, per_exit
from aep_ext.inference.criteria import check_criterion, criterion_name


@dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """When a network of E exits stops early: everything that an executor, a file or the simulator needs to know.

    A sample leaves at the first enabled exit e whose criterion reaches that exit's threshold. The criterion is taken on
    ``softmax(R_e / T_e)``, R_e being the running ensemble ``sum_{j<=e} b_j O_j / sum_{j<=e} b_j``, or, with
    ``criterion_on="exit"``, on ``softmax(O_e / T_e)``. Its answer is R_e. The last exit always answers, with
    ``last_alone`` by O_e: a network that was given early exits then answers there as it did before, bit for bit.

    Args:
        output_weights: E positive numbers b; their count settles E.
        thresholds: E-1 numbers in the criterion's unit (probability, nats, exits in a row, votes), or one for all.
        criterion: "confidence" and "margin" leave at >= threshold, "entropy" at <=, "patience" when as many exits in a
            row agree, "vote" when a class has as many votes; or a callable, see
            :class:`~aep_ext.inference.criteria.ExitState`.
        criterion_on: "ensemble" or "exit".
        temperatures: E positive numbers, or one for all.
        enabled: E-1 flags, or one for all. A disabled exit lets nobody leave, but patience and votes count it.
        exits: the exits' numbers in the network as it was built, ascending; 0..E-1 by default.
        last_alone: the last exit answers with its own logits; R_E is O_E then.

    All numbers are kept as Python tuples (float64).

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a count or a value breaks these rules.
    """

    output_weights: tuple[float, ...]
    thresholds: tuple[float, ...] = 1.0  # type: ignore[assignment]  # one number stands for all, see __post_init__
    criterion: str | Callable[..., Tensor] = "confidence"
    criterion_on: str = "ensemble"
    temperatures: tuple[float, ...] = 1.0  # type: ignore[assignment]
    enabled: tuple[bool, ...] = True  # type: ignore[assignment]
    exits: tuple[int, ...] = ()
    last_alone: bool = False

    def __post_init__(self) -> None:
        weights: Any = self.output_weights
        weights = weights.tolist() if hasattr(weights, "tolist") else weights
        if isinstance(weights, numbers.Real) or not isinstance(weights, Sequence) or not len(weights):
            raise TypeError(f"ExitPolicy: output_weights must be at least one number, got {weights!r}")
        count = len(weights)
        check_criterion("ExitPolicy", self.criterion, self.criterion_on)
        values = {
            "output_weights": per_exit("ExitPolicy", "output_weights", weights, count, positive=True),
            "thresholds": per_exit("ExitPolicy", "thresholds", self.thresholds, count - 1),
            "temperatures": per_exit("ExitPolicy", "temperatures", self.temperatures, count, positive=True),
            "enabled": _flags(self.enabled, count - 1),
            "exits": _exits(self.exits, count),
        }
        if not isinstance(self.last_alone, bool):
            raise TypeError(f"ExitPolicy: last_alone must be True or False, got {self.last_alone!r}")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def num_exits(self) -> int:
        """E."""
        return len(self.output_weights)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON.

        Raises:
            ValueError: the criterion is a callable, which no file can hold.
        """
        if not isinstance(self.criterion, str):
            raise ValueError(f"ExitPolicy.to_dict: criterion must be a name, got {criterion_name(self.criterion)}")
        values = asdict(self) if self.last_alone else {k: v for k, v in asdict(self).items() if k != "last_alone"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExitPolicy:
        """The reverse of :meth:`to_dict`.

        Raises:
            TypeError, ValueError: an entry is missing, unknown, or breaks the rules of the class.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"ExitPolicy.from_dict: values must be a mapping, got {type(values).__name__}")
        known = set(cls.__dataclass_fields__) - {"last_alone"}  # written where it is True
        if set(values) - {"last_alone"} != known:
            wrong = sorted((set(values) - {"last_alone"}) ^ known)
            raise ValueError(f"ExitPolicy.from_dict: entries must be {', '.join(sorted(known))}; differing: {wrong}")
        return cls(**values)

    def starts_anew(self, e: int) -> bool:
        """Whether exit e forgets the sum of those before it: its weight is then 1."""
        return self.last_alone and e == self.num_exits - 1

    def __str__(self) -> str:
        lines = [
            f"  exit {number}: {rule}, temperature {temperature}, output weight {weight}"
            for number, rule, temperature, weight in self._rows()
        ]
        return "\n".join([f"ExitPolicy: {self._criterion()}", *lines])

    def _repr_html_(self, name: str = "ExitPolicy") -> str:
        head = ["exit", "leaves", "temperature", "output weight"]
        return html_table(f"{name}: {self._criterion()}", head, self._rows())

    def _criterion(self) -> str:
        return f"{criterion_name(self.criterion)} of the {self.criterion_on}"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """For each exit, counted from 1: when samples leave, temperature, output weight."""
        rules = [
            f"threshold {threshold:.4g}" if enabled else "disabled"
            for threshold, enabled in zip(self.thresholds, self.enabled, strict=True)
        ]
        rest = "answers the rest alone" if self.last_alone else "answers the rest"
        each = zip(self.exits, [*rules, rest], self.temperatures, self.output_weights, strict=True)
        return [(str(number + 1), rule, f"{t:.4g}", f"{weight:.4g}") for number, rule, t, weight in each]


def _flags(values: Any, count: int) -> tuple[bool, ...]:
    values = values.tolist() if hasattr(values, "tolist") else values
    listed = [values] * count if isinstance(values, bool) else values
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise TypeError(f"ExitPolicy: enabled must be flags, got {values!r}")
    if len(listed) != count:
        raise ValueError(f"ExitPolicy: enabled must have {count} entries, got {len(listed)}")
    strange = next((value for value in listed if not isinstance(value, bool)), None)
    if strange is not None:
        raise TypeError(f"ExitPolicy: enabled must be True or False for each exit, got {strange!r}")
    return tuple(listed)


def _exits(values: Any, count: int) -> tuple[int, ...]:
    listed = tuple(values) or tuple(range(count))
    if len(listed) != count:
        raise ValueError(f"ExitPolicy: exits must have {count} entries, got {len(listed)}")
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in listed):
        raise TypeError(f"ExitPolicy: exits must be whole numbers, got {list(listed)}")
    if listed[0] < 0 or any(b <= a for a, b in zip(listed, listed[1:], strict=False)):
        raise ValueError(f"ExitPolicy: exits must be ascending from 0 on, got {list(listed)}")
    return listed
