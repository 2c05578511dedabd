"""Exit criteria: when an answer is good enough to stop. One step of a gate, shared by the simulator and the executors.

A criterion is a name that :func:`aep_ext.ops.gate` knows, or a user's own rule, which eager executors and the simulator
take. It may keep an int64 state per sample, (n, S).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import GateResult

CRITERIA = ("confidence", "entropy", "margin", "patience", "vote")
"""The criteria that run everywhere."""
STATELESS = ("confidence", "entropy", "margin")
"""Those that look at one exit alone."""


class ExitState(NamedTuple):
    """What a user's own criterion sees at one exit: the n samples that are still there, in their order.

    The criterion returns (n,) bool, True for those that leave. A sample whose distribution holds a NaN stays in any
    case. It is called at every enabled exit but the last.
    """

    exit_index: int
    """Number of the exit in the network at hand, from 0."""
    indices: Tensor
    """(n,) int64: the samples' numbers in the batch."""
    logits: Tensor
    """(n, K) float32 or float64: R_e / T_e, or O_e / T_e with ``criterion_on="exit"``."""
    stats: Tensor
    """(n, 3) float32: confidence, entropy in nats and margin of the softmax of ``logits``."""
    prediction: Tensor
    """(n,) int64: the answer of a sample that leaves here."""
    threshold: float | Tensor
    """This exit's threshold."""


def check_criterion(function: str, criterion: Any, criterion_on: Any) -> None:
    """An error unless ``criterion`` is a name of :data:`CRITERIA` or callable, and ``criterion_on`` one of its two.

    Raises:
        TypeError: neither a name nor callable.
        ValueError: no such name.
    """
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ValueError(f"{function}: criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    elif not callable(criterion):
        raise TypeError(f"{function}: criterion must be a name or callable, got {type(criterion).__name__}")
    if criterion_on not in ("ensemble", "exit"):
        raise ValueError(f"{function}: criterion_on must be 'ensemble' or 'exit', got {criterion_on!r}")


def criterion_name(criterion: str | Callable[..., Tensor]) -> str:
    """The name, or that of the callable."""
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)


def initial_state(
    criterion: str | Callable[..., Tensor], n: int, num_classes: int, device: torch.device | str | None = None
) -> Tensor:
    """The state before the first exit, (n, S) int64: S = 2 for "patience" (the class of the last exit, or -1, and how
    many exits in a row agree), K for "vote" (votes per class), else 0."""
    size = {"patience": 2, "vote": num_classes}.get(criterion, 0) if isinstance(criterion, str) else 0
    state = torch.zeros(n, size, dtype=torch.int64, device=device)
    if criterion == "patience":
        state[:, 0] = -1
    return state


def gate_step(
    criterion: str | Callable[..., Tensor],
    criterion_on: str,
    features: Tensor,
    running: Tensor,
    weight_sum: float | Tensor,
    indices: Tensor,
    state: Tensor,
    exit_logits: Tensor,
    *,
    exit_index: int,
    weight: float | Tensor,
    threshold: float | Tensor,
    temperature: float | Tensor = 1.0,
    enabled: bool = True,
    last: bool = False,
) -> GateResult:
    """One exit of a gate: arguments and result are those of :func:`aep_ext.ops.gate`.

    Args:
        criterion, criterion_on: see :class:`~aep_ext.inference.ExitPolicy`.
        exit_index: the exit's number in the network at hand, from 0.
    """
    rows = (features, running, weight_sum, indices, state, exit_logits)
    numbers: dict[str, Any] = {"weight": weight, "temperature": temperature, "criterion_on": criterion_on, "last": last}
    if isinstance(criterion, str):
        return ops.gate(*rows, threshold=threshold, criterion=criterion, enabled=enabled, **numbers)
    # With the gate disabled the operator returns every row in its place: only the decision is made here.
    kept = ops.gate(*rows, threshold=0.0, enabled=False, **numbers)
    if last or not enabled:
        return kept
    if criterion_on == "ensemble":
        logits = kept.running / (kept.weight_sum * temperature)
    else:
        logits = exit_logits.to(kept.running.dtype) / temperature
    leaves = criterion(ExitState(exit_index, indices, logits, kept.stats, kept.argmax, threshold))
    if not isinstance(leaves, Tensor) or leaves.dtype != torch.bool or leaves.shape != indices.shape:
        found = f"{leaves.dtype} {list(leaves.shape)}" if isinstance(leaves, Tensor) else type(leaves).__name__
        raise ValueError(
            f"criterion {criterion_name(criterion)}: must return a bool tensor of shape {list(indices.shape)}, "
            f"got {found}"
        )
    leaves = leaves & ~kept.stats[:, 0].isnan()
    order = torch.argsort(leaves.to(torch.uint8), stable=True)
    gone = leaves[order]
    answered = torch.where(gone[:, None], kept.running[order] / kept.weight_sum, kept.running[order])
    compacted = torch.empty_like(features).copy_(features[order])  # channels_last stays so
    compacted.masked_fill_(gone.view(-1, *[1] * (features.dim() - 1)), 0)
    return GateResult(
        compacted,
        answered,
        kept.indices[order],
        kept.state[order],
        kept.stats[order],
        kept.argmax[order],
        kept.weight_sum,
        leaves.numel() - leaves.sum(),
    )
