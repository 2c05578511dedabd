"""The gate: one exit's decision for every row still under way, and for one row alone, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from aep_ext.ops import _checks, _native, reference
from aep_ext.ops._dispatch import use_native
from aep_ext.ops.types import GateResult

STATELESS = ("confidence", "entropy", "margin")
CRITERIA = (*STATELESS, "patience", "vote")
_USUAL = ("confidence", "ensemble", True, False)  # defaults, which cost less than arguments
_new = tuple.__new__  # a named tuple from a tuple, in half the time


def gate(
    features: Tensor,
    running: Tensor,
    weight_sum: float | Tensor,
    indices: Tensor,
    state: Tensor,
    exit_logits: Tensor,
    *,
    weight: float | Tensor,
    threshold: float | Tensor,
    temperature: float | Tensor = 1.0,
    criterion: str = "confidence",
    criterion_on: str = "ensemble",
    enabled: bool = True,
    last: bool = False,
) -> GateResult:
    """Adds one exit to the running ensemble, decides which rows leave, and puts the rows that stay in front.

    Args:
        features: (n, ...) floating point: what the next stage reads.
        running: (n, K): the sum of weight * logits so far, in the accumulation dtype of ``exit_logits`` (float64 for
            float64, else float32) or in the dtype of ``exit_logits``; zeros before the first exit.
        weight_sum: the sum of the exit weights so far; 0 before the first exit.
        indices: (n,) int64: the caller's row numbers.
        state: (n, S) int64, the criterion's memory. S = 2 for "patience" (last class or -1, length of its run), K
            for "vote" (votes per class), else 0. Start with -1, 0 and with zeros.
        exit_logits: (n, K): this exit's logits.
        weight: this exit's output weight.
        threshold: a row leaves where the criterion's quantity reaches it; see below.
        temperature: divides the logits before the softmax; above 0.
        criterion: "confidence" and "margin" leave at >= threshold, "entropy" (nats) at <=; "patience" when the run of
            equal predicted classes is >= threshold exits long, "vote" when a class has >= threshold votes.
        criterion_on: "ensemble" looks at ``softmax(running' / (weight_sum' * temperature))``, "exit" at
            ``softmax(exit_logits / temperature)``.
        enabled: False: nobody leaves, everything else (the state too) advances as usual.
        last: True: this is the last exit, where every row leaves, whatever the threshold, ``enabled`` and NaN say.

        ``weight_sum``, ``weight``, ``threshold`` and ``temperature`` are numbers, or 0-d floating tensors on the device
        of the features, whose values are not read back. They are converted to the accumulation dtype; statistics are
        compared in float32.

    Returns:
        :class:`GateResult`: a stable partition, rows that stay first and rows that leave behind, each in their old
        order; all row-wise results are permuted together. ``running`` holds the sums of the rows that stay and, for
        rows that leave, the answers R_e = running' / weight_sum': one division of the stored sum in the accumulation
        dtype. ``count``, the number of rows that stay, remains on the device. The features of rows that leave are
        dropped (zeros stand behind). A row whose tested distribution is NaN leaves only at the last exit, casts no vote
        and resets its patience to (-1, 0). Always new memory, never a view of an input. Not differentiable.

    Raises:
        TypeError: a dtype breaks the rules above.
        ValueError: a shape, device, number or name does.

    Equivalent to (criterion "confidence", criterion_on "ensemble")::

        running = running + weight * exit_logits
        weight_sum = weight_sum + weight
        leaves = torch.softmax(running / (weight_sum * temperature), -1).amax(-1) >= threshold
        running[leaves] /= weight_sum
        order = torch.cat([(~leaves).nonzero()[:, 0], leaves.nonzero()[:, 0]])
        count = (~leaves).sum()
        features, running, indices, state = features[order], running[order], indices[order], state[order]
        features[count:] = 0
    """
    if use_native(exit_logits, features, running, indices, state):
        numbers: tuple[float | Tensor, ...] = (weight_sum, weight, threshold, temperature)
        tensors: tuple[Tensor | None, ...] = ()
        if not weight_sum.__class__ is weight.__class__ is threshold.__class__ is temperature.__class__ is float:
            numbers, tensors = _native.scalars(
                "gate", weight_sum=weight_sum, weight=weight, threshold=threshold, temperature=temperature
            )
        rows = (features, running, indices, state, exit_logits)
        rule = (criterion, criterion_on, enabled, last)
        if rule == _USUAL and not tensors:
            return _new(GateResult, _native.gate(*rows, *numbers))
        return _new(GateResult, _native.gate(*rows, *numbers, *rule, *tensors))
    n, classes, device = _check_logits("gate", exit_logits, "N", criterion, CRITERIA, criterion_on)
    _checks.tensor("gate", "features", features, (n, *getattr(features, "shape", ())[1:]), device=device)
    _checks.tensor("gate", "running", running, (n, classes), _running_dtypes(exit_logits), device)
    _checks.tensor("gate", "indices", indices, (n,), _checks.INT64, device)
    width = {"patience": 2, "vote": classes}.get(criterion, 0)
    _checks.tensor("gate", "state", state, (n, width), _checks.INT64, device)
    _check_numbers("gate", device, weight_sum, weight, threshold, temperature)
    return reference.gate(
        features,
        running,
        weight_sum,
        indices,
        state,
        exit_logits,
        weight=weight,
        threshold=threshold,
        temperature=temperature,
        criterion=criterion,
        criterion_on=criterion_on,
        enabled=enabled,
        last=last,
    )


def gate_one_(
    running: Tensor,
    stats: Tensor,
    leaves: Tensor,
    exit_logits: Tensor,
    weight_sum: float,
    weight: float,
    threshold: float,
    temperature: float = 1.0,
    criterion: str = "confidence",
    criterion_on: str = "ensemble",
    enabled: bool = True,
    last: bool = False,
) -> None:
    """Adds one exit to the running ensemble of one row and decides whether it leaves; allocates nothing.

    Sum, answer, statistics and decision are those of :func:`aep_ext.ops.gate` for the same row, bit for bit on the same
    path.

    Args:
        running: (1, K), contiguous: read and written. Takes the new sum where the row stays, and the answer R_e = sum /
            (weight_sum + weight) where it leaves. In the accumulation dtype of ``exit_logits`` (float64 for float64,
            else float32) or in the dtype of ``exit_logits``; zeros before the first exit.
        stats: (1, 3) float32, contiguous: written. Confidence, entropy in nats and margin of the tested distribution.
        leaves: (1,) bool: written. Whether the row leaves here.
        exit_logits: (1, K): this exit's logits; any strides.
        weight_sum, weight, threshold, temperature, criterion_on, enabled, last: as for :func:`aep_ext.ops.gate`,
            numbers only.
        criterion: "confidence", "entropy" or "margin". The others keep a state, which this operator does not.

    Native on the CPU only; the pure-torch reference runs elsewhere. Not differentiable: in grad mode no argument may
    require a gradient. The tensors must not share memory with each other.

    Raises:
        TypeError: a dtype breaks these rules. Nothing was written then; nor below.
        ValueError: a shape, device, stride, number or name does, or a gradient is required.

    Equivalent to (criterion "confidence", criterion_on "ensemble")::

        running += weight * exit_logits
        confidence = torch.softmax(running / ((weight_sum + weight) * temperature), -1).amax(-1)
        leaves.fill_(last or (enabled and confidence >= threshold))
        if leaves:
            running /= weight_sum + weight
    """
    if use_native(exit_logits) and (exit_logits.is_cpu or exit_logits.is_meta):
        rows, numbers = (running, stats, leaves, exit_logits), (weight_sum, weight, threshold, temperature)
        if last:
            return _native.gate_one_(*rows, *numbers, criterion, criterion_on, enabled, last)
        return _native.gate_one_(*rows, *numbers, criterion, criterion_on, enabled)
    _, classes, device = _check_logits("gate_one_", exit_logits, 1, criterion, STATELESS, criterion_on)
    _checks.tensor("gate_one_", "running", running, (1, classes), _running_dtypes(exit_logits), device)
    _checks.tensor("gate_one_", "stats", stats, (1, 3), (torch.float32,), device)
    _checks.tensor("gate_one_", "leaves", leaves, (1,), (torch.bool,), device)
    _check_numbers("gate_one_", device, weight_sum, weight, threshold, temperature)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (running, stats, exit_logits)):
        raise ValueError("aep::gate_one_: arguments must not require a gradient, got requires_grad=True")
    scalars = (weight_sum, weight, threshold, temperature)
    return reference.gate_one_(running, stats, leaves, exit_logits, *scalars, criterion, criterion_on, enabled, last)


def _check_logits(
    op: str, exit_logits: Tensor, rows: int | str, criterion: str, criteria: tuple[str, ...], criterion_on: str
) -> tuple[int, int, torch.device]:
    """One exit's logits and the names of its rule: rows, classes, device."""
    n, classes = _checks.tensor(op, "exit_logits", exit_logits, (rows, "K"))
    _checks.choice(op, "criterion", criterion, criteria)
    _checks.choice(op, "criterion_on", criterion_on, ("ensemble", "exit"))
    return n, classes, exit_logits.device


def _running_dtypes(exit_logits: Tensor) -> tuple[torch.dtype, ...]:
    return tuple({_checks.accumulate_dtype(exit_logits.dtype): 0, exit_logits.dtype: 0})


def _check_numbers(
    op: str,
    device: torch.device,
    weight_sum: float | Tensor,
    weight: float | Tensor,
    threshold: float | Tensor,
    temperature: float | Tensor,
) -> None:
    for name, value in (("weight_sum", weight_sum), ("weight", weight), ("threshold", threshold)):
        _checks.number(op, name, value, device)
    _checks.number(op, "temperature", temperature, device, positive=True)
