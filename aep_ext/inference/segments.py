"""What is compiled: everything between two exits together with the later exit's head, as one module."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from aep_ext.surgery.multi_exit import MultiExitNet


class Segment(nn.Module):
    """``features -> (features, logits)``, the last one ``features -> (logits,)``.

    Shapes: (N, C, H, W) -> (N, C', H', W'), (N, K).
    """

    def __init__(self, stages: Iterable[nn.Module], exit: nn.Module, last: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*stages)
        self.exit = exit
        self.last = last

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.body(x)
        logits = self.exit(x)
        return (logits,) if self.last else (x, logits)


def cut(net: MultiExitNet) -> list[Segment]:
    """The segments of ``net`` (in eval mode), one for each exit, on its own modules; not to be changed."""
    segments: list[Segment] = []
    start = 0
    for end, head in zip(net.exit_stages, net.exits, strict=True):
        segments.append(Segment(net.stages[start : end + 1], head, end == net.exit_stages[-1]).eval())
        start = end + 1
    return segments


def segment_inputs(segments: Iterable[Segment], x: Tensor) -> list[Tensor]:
    """The input of every segment when the first one is given ``x``, by plain eager calls."""
    inputs = []
    with torch.no_grad():
        for segment in segments:
            inputs.append(x)
            x = segment(x)[0]
    return inputs


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings, by either way, that exporters give of torch's and their own internals."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def exported(segment: nn.Module, example: Tensor) -> ExportedProgram:
    """``segment`` as a graph for any batch of at least one, which the engines' frontends read.

    Args:
        segment: in eval mode.
        example: its input (n, C, H, W). Two samples are taken: export makes a constant of a batch of one.
    """
    two = example[torch.tensor([0, len(example) - 1], device=example.device)].contiguous()
    with torch.no_grad(), quiet():
        # Not strict: strict tracing evaluates Python bytecode and refuses more of what users' modules do.
        return torch.export.export(segment, (two,), dynamic_shapes=({0: Dim("n", min=1)},), strict=False)
