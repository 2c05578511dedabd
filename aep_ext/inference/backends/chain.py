"""What every engine offers: units in a chain, each one's features being the next one's input without a copy.

Tensors that a chain hands out (logits, features) live in the engine's memory and are good until the same unit runs
again; :class:`aep_ext.deploy.PreparedNet` copies what it gives to a user. Features are in the engine's own layout, rows
first, and only go back into a chain of the same engine; ``Engine.from_engine`` shows them as (n, C, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from aep_ext.inference.segments import Segment

__all__ = ["Chain", "Engine", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How an engine shall run: its threads, "float32" or the "engine"'s own choice, and which batches get units of
    their own shape."""

    threads: int
    precision: str = "float32"
    batches: tuple[int, ...] = ()


class Chain:
    """The units of one engine for one batch size, or for any."""

    def load(self, unit: int, x: Tensor) -> None:
        """Makes ``x`` (contiguous, in the engine's layout) the input of a unit. It is read when the unit runs."""
        raise NotImplementedError

    def run(self, unit: int) -> Tensor:
        """Runs a unit on what was loaded, or on the features of the unit before; gives its logits (n, K)."""
        raise NotImplementedError

    def features(self, unit: int) -> Tensor:
        """The features that a unit gave when it ran last."""
        raise NotImplementedError

    def gather(self, unit: int, source: Tensor, rows: Tensor) -> None:
        """Makes ``source[rows]`` the input of a unit; ``source`` are features of another run, (m, ...)."""
        self.load(unit, source.index_select(0, rows))

    def run_all(self) -> Tensor:
        """Runs all units on what was loaded into the first; (E, n, K), which may be the engine's memory."""
        raise NotImplementedError


class Engine:
    """Compiles units. The constructor raises whatever the engine raises when it cannot.

    Args:
        segments: the units as modules.
        inputs: each one's input at the example's batch.
        settings: see :class:`Settings`.
    """

    name: ClassVar[str]

    def __init__(self, segments: Sequence[Segment], inputs: Sequence[Tensor], settings: Settings) -> None:
        raise NotImplementedError

    notices: list[str]
    """What the user should know of the choices made."""

    def chain(self, n: int) -> Chain:
        """The chain that is fastest for a batch of ``n`` >= 1."""
        raise NotImplementedError

    def to_engine(self, features: Tensor) -> Tensor:
        """Features (n, C, H, W) in the engine's layout, contiguous; the same memory where it fits."""
        return features.contiguous()

    def from_engine(self, features: Tensor) -> Tensor:
        """A view of the engine's features as (n, C, H, W)."""
        return features


@dataclass
class TorchChain(Chain):
    """Units that are torch callables: ``unit(x) -> (features, logits)`` or ``(logits,)``."""

    units: Sequence[object]
    _inputs: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inputs = [None] * (len(self.units) + 1)

    def load(self, unit: int, x: Tensor) -> None:
        self._inputs[unit] = x

    def run(self, unit: int) -> Tensor:
        x, self._inputs[unit] = self._inputs[unit], None  # not kept alive longer than needed
        with torch.no_grad():
            outputs = self.units[unit](x)
        if unit + 1 < len(self.units):
            self._inputs[unit + 1] = outputs[0]
        return outputs[-1]

    def features(self, unit: int) -> Tensor:
        return self._inputs[unit + 1]

    def run_all(self) -> Tensor:
        return torch.stack([self.run(unit) for unit in range(len(self.units))])
