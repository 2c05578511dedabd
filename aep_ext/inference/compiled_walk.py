"""One walk of a batch through the units of a prepared network, in the engine's own memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aep_ext.inference.backends.chain import Chain

if TYPE_CHECKING:
    from aep_ext.inference.compiled_net import PreparedNet

__all__ = ["PreparedRun", "Turns"]


class Turns:
    """A lock that its holder cannot take again: instead of waiting for itself for ever, a thread gets an error."""

    __slots__ = ("_holder", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def take(self) -> None:
        """Waits until nobody holds it.

        Raises:
            RuntimeError: the calling thread itself does.
        """
        me = threading.get_ident()
        if self._holder == me:
            raise RuntimeError(
                "PreparedNet: must not be called while it is at work on a batch of the same thread (by a policy's own "
                "rule); prepare the network a second time for that"
            )
        self._lock.acquire()
        self._holder = me

    def give(self) -> None:
        """Lets the next one go on."""
        self._holder = None
        self._lock.release()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *exception: object) -> None:
        self.give()


class PreparedRun:
    """The units for one walk (:class:`aep_ext.inference.stages.Run`); the network is its own until it is closed.

    Nothing is copied between units: features stay where the engine has them, and the run itself stands for them.
    """

    __slots__ = ("_chain", "_net", "_unit")

    def __init__(self, net: PreparedNet) -> None:
        self._net, self._unit = net, 0
        net._turns.take()

    def __call__(self, e: int, features: Tensor | PreparedRun) -> tuple[PreparedRun, Tensor]:
        """Unit ``e``, on images (e = 0) or on what the unit before gave; logits (n, K) in the engine's memory."""
        if e == 0:
            net, x = self._net, self._net._checked(features)
            chain = net._engine.chain(len(x)) if len(x) else _Nobody(x.new_empty(0, net.num_classes))
            chain.load(0, x)
            self._chain: Chain = chain
        self._unit = e
        return self, self._chain.run(e)

    def take(self, features: PreparedRun, positions: Tensor) -> PreparedRun:
        """Goes on with the rows at ``positions`` only, on the units that are fastest for so many."""
        unit, chain = self._unit, self._chain
        survivors = self._net._engine.chain(len(positions))
        rows = chain.features(unit)
        if survivors is chain:  # its memory cannot be read and written at once
            survivors.load(unit + 1, rows.index_select(0, positions))
        else:
            survivors.gather(unit + 1, rows, positions)
        self._chain = survivors
        return self

    def tensor(self, features: PreparedRun) -> Tensor:
        """The features (n, ...) in the engine's layout."""
        return self._chain.features(self._unit)

    def close(self) -> None:
        """Lets other threads have the network."""
        self._net._turns.give()


class _Nobody(Chain):
    """An empty batch never reaches the engine."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def load(self, unit: int, x: Tensor) -> None:
        pass

    def run(self, unit: int) -> Tensor:
        return self._logits

    def features(self, unit: int) -> Tensor:
        return torch.empty_like(self._logits)
