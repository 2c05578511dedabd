"""What a graphed net asks of the device: warm up, build, launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aep_ext.inference.stages import Run

ONE_GRAPH, GRAPH_PER_STAGE = "one graph", "graph per stage"
PATHS = ("auto", ONE_GRAPH, GRAPH_PER_STAGE)


class ExitPlan(NamedTuple):
    """One exit in the graph."""

    index: int
    may_leave: bool
    """Whether a row can leave there, if its flag is set. Behind such an exit stands an IF node that holds the rest."""


@dataclass(frozen=True)
class Walk:
    """The pass to be built.

    Attributes:
        run: ``run(e, features)`` -> (features or None, logits of exit e).
        input: the static input, (N, ...).
        plan: the exits, the last of which never opens an IF node.
        tensors: the static tensors of the exits, by the names of ``_C.GatedGraph``.
        policy, on: of the gated net.
    """

    run: Run
    input: Tensor
    plan: tuple[ExitPlan, ...]
    tensors: dict[str, Tensor]
    policy: str
    on: str


class Built(Protocol):
    """A pass that can be launched."""

    path: str
    reason: str

    def launch(self) -> None:
        """Enqueues the whole pass."""


class Backend(Protocol):
    """A device that can hold a pass."""

    device_type: str

    def check(self) -> None:
        """RuntimeError where this build or this torch cannot do it."""

    def on(self, device: torch.device) -> AbstractContextManager[object]:
        """Makes ``device`` current."""

    def warm_up(self, once: Callable[[], list[Tensor]], times: int, x: Tensor) -> list[Tensor]:
        """Calls ``once`` several times apart from the stream of the caller; ValueError if it draws random numbers."""

    def build(self, walk: Walk, path: str) -> Built:
        """Captures and composes; ``path`` is one of :data:`PATHS`."""
