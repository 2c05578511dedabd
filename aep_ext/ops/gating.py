"""The gate: one exit's decision for every row still under way."""

from __future__ import annotations

import torch
from torch import Tensor

from aep_ext.ops import _checks, _native, reference
from aep_ext.ops._dispatch import has_native
from aep_ext.ops.types import GateResult

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
    policy: str = "confidence",
    on: str = "ensemble",
    enabled: bool = True,
    last: bool = False,
    out: GateResult | tuple[Tensor, ...] | None = None,
) -> GateResult:
    """Adds one exit to the running ensemble, decides which rows leave, and puts the rows that stay in front.

    Args:
        features: (n, ...) floating point: what the next stage reads.
        running: (n, K): the sum of weight * logits so far, in the accumulation dtype of ``exit_logits`` (float64 for
            float64, else float32) or in the dtype of ``exit_logits``; zeros before the first exit.
        weight_sum: the sum of the exit weights so far; 0 before the first exit.
        indices: (n,) int64: the caller's row numbers.
        state: (n, S) int64, the policy's memory. S = 2 for "patience" (last judged class or -1, length of its run), K
            for "vote" (votes per class), else 0. Start with -1, 0 and with zeros.
        exit_logits: (n, K): this exit's logits.
        weight: this exit's output weight.
        threshold: a row leaves where the policy's quantity reaches it; see below.
        temperature: divides the judged logits; above 0.
        policy: "confidence" and "margin" leave at >= threshold, "entropy" (nats) at <=; "patience" when the run of
            equal judged classes is >= threshold exits long, "vote" when a class has >= threshold votes.
        on: "ensemble" judges ``softmax(running' / (weight_sum' * temperature))``, "exit" judges
            ``softmax(exit_logits / temperature)``.
        enabled: False: nobody leaves, everything else (the state too) advances as usual.
        last: True: this is the last exit, where every row leaves, whatever the threshold, ``enabled`` and NaN say.
        out: the eight tensors of a :class:`GateResult`, for loops that must not allocate: they take the results (shapes
            and dtypes as there; contiguous, ``features`` in the memory format of the argument) and are returned. Then
            the rows of ``out.features`` behind those that stay are left as they were. The tensors may share memory
            neither with an argument nor with each other, and nothing may require a gradient (in grad mode).

        ``weight_sum``, ``weight``, ``threshold`` and ``temperature`` are numbers, or 0-d floating tensors on the device
        of the features, whose values are not read back. They are converted to the accumulation dtype; statistics are
        compared in float32.

    Returns:
        :class:`GateResult`: a stable partition, rows that stay first and rows that leave behind, each in their old
        order; all row-wise results are permuted together. ``running`` holds the sums of the rows that stay and, for
        rows that leave, the answers R_e = running' / weight_sum': one division of the stored sum in the accumulation
        dtype. ``count``, the number of rows that stay, remains on the device. The features of rows that leave are
        dropped (zeros stand behind, unless ``out`` is given). A row whose judged distribution is NaN leaves only at the
        last exit, casts no vote and resets its patience to (-1, 0). Always new memory, never a view of an input. Not
        differentiable.

    Raises:
        TypeError: a dtype breaks the rules above.
        ValueError: a shape, device, number or name does, or ``out`` in another way.

    Equivalent to (policy "confidence", on "ensemble")::

        running = running + weight * exit_logits
        weight_sum = weight_sum + weight
        leaves = torch.softmax(running / (weight_sum * temperature), -1).amax(-1) >= threshold
        running[leaves] /= weight_sum
        order = torch.cat([(~leaves).nonzero()[:, 0], leaves.nonzero()[:, 0]])
        count = (~leaves).sum()
        features, running, indices, state = features[order], running[order], indices[order], state[order]
        features[count:] = 0
    """
    if out is not None:
        _checks.parts("gate", out, GateResult._fields)
    if (
        has_native(exit_logits)
        and isinstance(features, Tensor)
        and isinstance(running, Tensor)
        and isinstance(indices, Tensor)
        and isinstance(state, Tensor)
    ):
        numbers, tensors = (weight_sum, weight, threshold, temperature), ()
        if not all([number.__class__ is float for number in numbers]):
            numbers, tensors = _native.scalars(
                "gate", weight_sum=weight_sum, weight=weight, threshold=threshold, temperature=temperature
            )
        rows = (features, running, indices, state, exit_logits)
        if out is None:
            if policy == "confidence" and on == "ensemble" and enabled and not (last or tensors):
                return _new(GateResult, _native.gate(*rows, *numbers))  # a default costs less than a string
            return _new(GateResult, _native.gate(*rows, *numbers, policy, on, enabled, last, *tensors))
        out = GateResult(*out)
        written = {f"{name}_out": tensor for name, tensor in zip(GateResult._fields, out, strict=True)}
        _native.gate_out(*rows, *numbers, policy, on, enabled, last, *tensors, **written)
        return out
    _checks.gate(features, running, weight_sum, indices, state, exit_logits, weight, threshold, temperature, policy, on)
    if out is not None:
        out = GateResult(*out)
        scalars = {"weight_sum": weight_sum, "weight": weight, "threshold": threshold, "temperature": temperature}
        _checks.gate_out(features, running, indices, state, exit_logits, scalars, out)
        _checks.no_gradients(
            "gate", features, running, exit_logits, out.features, out.running, out.stats, out.weight_sum
        )
    result = reference.gate(
        features,
        running,
        weight_sum,
        indices,
        state,
        exit_logits,
        weight=weight,
        threshold=threshold,
        temperature=temperature,
        policy=policy,
        on=on,
        enabled=enabled,
        last=last,
    )
    if out is None:
        return result
    behind = torch.arange(features.shape[0], device=features.device) >= result.count
    behind = behind.view(-1, *[1] * (features.dim() - 1))
    out.features.copy_(torch.where(behind, out.features, result.features))
    for target, value in zip(out[1:], result[1:], strict=True):
        target.copy_(value)
    return out
