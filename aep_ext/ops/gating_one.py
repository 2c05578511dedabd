"""The gate for one row, in place: what a walk of one image needs, and no tensor more."""

from __future__ import annotations

from torch import Tensor

from aep_ext.ops import _checks, _native, reference
from aep_ext.ops._dispatch import has_native


def gate_one_(
    running: Tensor,
    stats: Tensor,
    leaves: Tensor,
    exit_logits: Tensor,
    weight_sum: float,
    weight: float,
    threshold: float,
    temperature: float = 1.0,
    policy: str = "confidence",
    on: str = "ensemble",
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
        stats: (1, 3) float32, contiguous: written. Confidence, entropy in nats and margin of the judged distribution.
        leaves: (1,) bool: written. Whether the row leaves here.
        exit_logits: (1, K): this exit's logits; any strides.
        weight_sum, weight, threshold, temperature, on, enabled, last: as for :func:`aep_ext.ops.gate`, numbers only.
        policy: "confidence", "entropy" or "margin". The others keep a state, which this operator does not.

    Native on the CPU only; the pure-torch reference runs elsewhere. Not differentiable: in grad mode no argument may
    require a gradient. The tensors must not share memory with each other.

    Raises:
        TypeError: a dtype breaks these rules. Nothing was written then; nor below.
        ValueError: a shape, device, stride, number or name does, or a gradient is required.

    Equivalent to (policy "confidence", on "ensemble")::

        running += weight * exit_logits
        confidence = torch.softmax(running / ((weight_sum + weight) * temperature), -1).amax(-1)
        leaves.fill_(last or (enabled and confidence >= threshold))
        if leaves:
            running /= weight_sum + weight
    """
    if has_native(exit_logits) and (exit_logits.is_cpu or exit_logits.is_meta):
        return _native.gate_one_(
            running, stats, leaves, exit_logits, weight_sum, weight, threshold, temperature, policy, on, enabled, last
        )
    scalars = (weight_sum, weight, threshold, temperature)
    _checks.gate_one_(running, stats, leaves, exit_logits, *scalars, policy, on)
    if _checks.needs_gradient(running, stats, exit_logits):
        raise ValueError("aep::gate_one_: arguments must not require a gradient, got requires_grad=True")
    return reference.gate_one_(running, stats, leaves, exit_logits, *scalars, policy, on, enabled, last)
