"""Whether plain values read from a JSON file have the shape that a reader relies on; the first one that has not is
named by its place in the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aep_ext._utils import UserError


@dataclass(frozen=True)
class Rule:
    """What one value must be: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


NUMBER = Rule("a finite number", _number)
NOT_NEGATIVE = Rule("a finite number of at least 0", lambda value: _number(value) and value >= 0)
POSITIVE = Rule("a finite number greater than 0", lambda value: _number(value) and value > 0)
FRACTION = Rule("a number within 0..1", lambda value: _number(value) and 0 <= value <= 1)
COUNT = Rule("a whole number of at least 0", _whole)
TEXT = Rule("a string", lambda value: isinstance(value, str))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
INTERVAL = Rule(
    "[low, high] with low <= high",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] <= value[1],
)


@dataclass(frozen=True)
class Each:
    """A list whose entries, or an object whose values, all have one shape."""

    of: Any
    kind: type = list
    empty: bool = False


@dataclass(frozen=True)
class Maybe:
    """A shape, or null (which a number that does not exist becomes in JSON), or, where ``absent`` says so, nothing."""

    of: Any
    absent: bool = True


def check(value: Any, shape: Any, where: str, what: str = "") -> None:
    """Compare a value with a shape: a :class:`Rule`, a dict of required entries, :class:`Each` or :class:`Maybe`.

    Args:
        value: as ``json.load`` gives it.
        shape: what it must be. Entries that a dict does not name are allowed.
        where: the file's name, for the message.
        what: the place in the file, ``methods.mixed.seeds[0]``.

    Raises:
        UserError: it has another shape; the message names file, place, rule and the value found.
    """
    if isinstance(shape, Maybe):
        if value is not None:
            check(value, shape.of, where, what)
    elif isinstance(shape, Rule):
        if not shape.holds(value):
            raise misfit(where, what, shape.words, value)
    elif isinstance(shape, Each):
        if not isinstance(value, shape.kind) or not (value or shape.empty):
            kind = "a list" if shape.kind is list else "an object"
            raise misfit(where, what, f"{kind}{'' if shape.empty else ' with at least one entry'}", value)
        entries = enumerate(value) if shape.kind is list else value.items()
        for key, entry in entries:
            check(entry, shape.of, where, f"{what}[{key}]" if shape.kind is list else f"{what}.{key}")
    else:
        if not isinstance(value, dict):
            raise misfit(where, what, "an object", value)
        for key, inner in shape.items():
            place = f"{what}.{key}" if what else key
            if key not in value and not (isinstance(inner, Maybe) and inner.absent):
                raise UserError(f"{where} is not complete: {place} is missing")
            check(value.get(key), inner, where, place)


def misfit(where: str, what: str, rule: str, value: Any) -> UserError:
    """The error for a value that breaks a rule."""
    found = repr(value)
    return UserError(f"{where}: {what} must be {rule}, got {found if len(found) <= 60 else found[:57] + '...'}")
