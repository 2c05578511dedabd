"""What every backend builds: segments in a chain, each one's features being the next one's input without a copy.

Tensors that a chain hands out (logits, features) live in the engine's memory and are good until the same segment runs
again; :class:`~aep_ext.inference.CompiledNet` copies what it gives to a user.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """How an engine shall run: its threads, "float32" or the "engine"'s own choice, and which batches get segments of
    their own shape."""

    threads: int
    precision: str = "float32"
    batches: tuple[int, ...] = ()


class Chain(ABC):
    """The segments of one engine for one batch size, or for any."""

    @abstractmethod
    def load(self, e: int, x: Tensor) -> None:
        """Makes ``x`` (contiguous) the input of segment e. It is read when the segment runs."""

    @abstractmethod
    def run(self, e: int) -> Tensor:
        """Runs segment e on what was loaded, or on the features of the one before; gives its logits (n, K)."""

    @abstractmethod
    def features(self, e: int) -> Tensor:
        """The features that segment e gave when it ran last."""

    def run_all(self, exits: int) -> Tensor:
        """Runs every segment on what was loaded for the first; gives all logits (E, n, K)."""
        return torch.stack([self.run(e) for e in range(exits)])


@dataclass
class Engine:
    """The compiled segments."""

    free: Chain
    """For any batch."""
    bound: Mapping[int, Chain] = field(default_factory=dict)
    """For one batch size each, and faster there."""
    notices: list[str] = field(default_factory=list)
    """What the user should know of the choices made."""

    def chain(self, n: int) -> Chain:
        """The chain that is fastest for a batch of ``n`` >= 1."""
        return self.bound.get(n, self.free)

    def exit_logits(self, x: Tensor, exits: int) -> Tensor:
        """(E, n, K): all segments on ``x`` (n >= 1, contiguous). May be the engine's memory."""
        chain = self.chain(len(x))
        chain.load(0, x)
        return chain.run_all(exits)


class TorchChain(Chain):
    """Segments that are torch callables: ``segment(x) -> (features, logits)`` or ``(logits,)``."""

    def __init__(self, segments: Sequence[Callable[[Tensor], tuple[Tensor, ...]]]) -> None:
        self._segments = segments
        self._inputs: dict[int, Tensor] = {}

    def load(self, e: int, x: Tensor) -> None:
        self._inputs[e] = x

    def run(self, e: int) -> Tensor:
        x = self._inputs.pop(e)  # not kept alive longer than needed
        with torch.no_grad():
            outputs = self._segments[e](x)
        if e + 1 < len(self._segments):
            self._inputs[e + 1] = outputs[0]
        return outputs[-1]

    def features(self, e: int) -> Tensor:
        return self._inputs[e + 1]


class BoundChain(Chain):
    """Fixed batch on memory that was bound once: a run is nothing but the segments' calls one after another.

    Args:
        calls: one for each segment.
        bind_images: makes a tensor the first segment's input.
        inputs: the memory that the other segments read and the ones before them write.
        logits: (E, n, K), which the segments write.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[], object]],
        bind_images: Callable[[Tensor], object],
        inputs: Sequence[Tensor],
        logits: Tensor,
    ) -> None:
        self._calls, self._bind_images, self._inputs = calls, bind_images, inputs
        self._all, self._logits = logits, list(logits)
        self._images: Tensor | None = None

    def load(self, e: int, x: Tensor) -> None:
        if e:
            self._inputs[e - 1].copy_(x)
        else:
            self._bind_images(x)
            self._images = x  # kept alive

    def run(self, e: int) -> Tensor:
        self._calls[e]()
        return self._logits[e]

    def features(self, e: int) -> Tensor:
        return self._inputs[e]

    def run_all(self, exits: int) -> Tensor:
        # Nothing of torch runs in between or after: its code is cold behind an engine's, and one small operator takes
        # tens of microseconds there.
        for call in self._calls:
            call()
        return self._all
