"""From a unit to a graph that an engine can read: one ``torch.export`` with a free batch serves them all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from aep_ext.inference.segments import Segment

__all__ = ["export", "quiet"]


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


def export(segment: Segment, example: Tensor) -> ExportedProgram:
    """``segment`` as a graph for any batch of at least one.

    Args:
        segment: one unit, in eval mode.
        example: its input (n, C, H, W). Two samples are taken: export makes a constant of a batch of one.
    """
    two = example[torch.tensor([0, len(example) - 1], device=example.device)].contiguous()
    with torch.no_grad(), quiet():
        # Not strict: strict tracing evaluates Python bytecode and refuses more of what users' modules do.
        return torch.export.export(segment, (two,), dynamic_shapes=({0: Dim("n", min=1)},), strict=False)
