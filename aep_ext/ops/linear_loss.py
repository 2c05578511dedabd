"""The joint loss of linear exits, without their logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aep_ext.ops import _checks, _native, reference
from aep_ext.ops._dispatch import use_native
from aep_ext.ops.types import JointLoss


def linear_joint_cross_entropy(
    pooled: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int | None = None,
) -> JointLoss:
    """Cross entropy of exits that end in a linear layer, and their weighted sum; for many classes.

    The logits, (E, N, K), are never held: one exit's are formed ``chunk`` rows at a time in one buffer of (chunk, K),
    turned into losses and, in their place, into their gradient, and that at once into the gradients of what they came
    from. Those are held for the backward, which only scales them. So the memory taken beyond the gradients, which any
    backward forms, is the buffer. For bfloat16 and float16 it is also a product the size of one exit's weights, and the
    gradients of weights and biases in float32 until the backward has rounded them.

    Args:
        pooled: E tensors (N, C_e) of one floating dtype and device, any strides; C at least 1, N may be 0.
        weights: E tensors (K, C_e), dtype and device as ``pooled``.
        biases: E entries, each a tensor (K,) or None; or None for no bias at all.
        target: (N,) int64, class indices 0..K-1 or ``ignore_index``.
        exit_weights: (E,), floating point: the loss weight a_e of every exit.
        class_weight: (K,), floating point, without gradient; None for ones.
        label_smoothing: within 0..1.
        ignore_index: rows with this label count nowhere and give no gradient.
        reduction: "mean" (divided by the class weights of the rows that count: NaN when there are none) or "sum". A
            loss for every row is not to be had: the gradient is formed before the incoming one is known.
        chunk: rows of the buffer. None: a buffer of a sixteenth of the logits, or of 4 MiB where that is more. It
            changes results by rounding only.

    Returns:
        :class:`JointLoss` in float32 (float64 for float64). ``loss``: 0-d; ``exit_losses``: (E,), without the exit
        weights, and without a gradient.

    Differentiable, once, through ``loss``, in ``pooled``, ``weights``, ``biases`` and ``exit_weights``. Gradients that
    nothing requires are not formed, and without any (under ``torch.no_grad()``, say) only the losses are. Those of
    weights and biases are summed over the chunks in float32 for bfloat16 and float16, and rounded at the end.
    Under autocast ``pooled``, ``weights`` and ``biases`` are cast to the autocast dtype, as torch does for ``linear``;
    the loss is float32. Multiply-adds: N * C_e * K per exit, and as many again for each of the gradients of ``pooled``
    and ``weights``, counted in the forward. On the reference path (see :func:`aep_ext.build_info`) the logits are held.

    Raises:
        TypeError: a dtype breaks the rules above.
        ValueError: a shape, a device, the number of tensors, ``label_smoothing``, ``reduction`` or ``chunk`` does.
        IndexError: on the CPU, a label is out of range. Elsewhere, where looking would wait for the device, the loss is
            NaN and the row's part of the gradients zero, unless :class:`check_labels` is on.
        RuntimeError: double backward (the reference has one).

    Source: the joint loss of arXiv 2301.12168, section 3.2, over its linear exits; the gradient formed in the forward,
    chunk by chunk, as in arXiv 2410.10989 (section 3.2) and, for the idea, arXiv 2411.09009.

    Equivalent to::

        logits = torch.stack([F.linear(x, w, b) for x, w, b in zip(pooled, weights, biases)])
        joint_cross_entropy(logits, target, exit_weights, class_weight, label_smoothing, ignore_index, reduction)
    """
    options = (class_weight, label_smoothing, ignore_index, reduction)
    if len(pooled) > 0:
        first = pooled[0]
        if use_native(first, target, exit_weights, first if class_weight is None else class_weight):
            if biases is None:
                biases = [None] * len(pooled)
            arguments = (pooled, weights, biases, target, exit_weights, *options, chunk)
            return JointLoss(*_native.linear_joint_cross_entropy(*arguments))
    _checks.linear_joint_cross_entropy(pooled, weights, biases, target, exit_weights, *options, chunk)
    _checks.labels("linear_joint_cross_entropy", target, weights[0].shape[0], ignore_index)
    return reference.linear_joint_cross_entropy(pooled, weights, biases, target, exit_weights, *options)
