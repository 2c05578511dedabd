"""The joint loss: weighted sum of the exits' cross entropies."""

from __future__ import annotations

from torch import Tensor

from aep_ext.ops import _checks, _native, reference
from aep_ext.ops._dispatch import use_native
from aep_ext.ops.types import JointLoss


def joint_cross_entropy(
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> JointLoss:
    """Cross entropy of every exit and their weighted sum.

    Args:
        exit_logits: (E, N, K), E and K at least 1, float32, float64, bfloat16 or float16, any strides.
        target: (N,) int64, class indices 0..K-1 or ``ignore_index``.
        exit_weights: (E,), floating point: the loss weight a_e of every exit.
        class_weight: (K,), floating point, without gradient; None for ones.
        label_smoothing: within 0..1.
        ignore_index: rows with this label count nowhere and get a zero gradient.
        reduction: "mean" (divided by the class weights of the rows that count: NaN when there are none), "sum" or
            "none".

    Returns:
        :class:`JointLoss` in float32 (float64 for float64 logits). ``loss``: 0-d, or (N,) for "none";
        ``exit_losses``: (E,), or (E, N) for "none", without the exit weights.

    Differentiable, once, in ``exit_logits`` and ``exit_weights``, through both results. The backward recomputes the
    softmax from the logits: nothing of size E*N*K but the logits is kept. Under autocast the arithmetic is float32, as
    for ``cross_entropy``, without a copy of the logits in float32.

    Raises:
        TypeError: a dtype breaks the rules above.
        ValueError: a shape, device, ``label_smoothing`` or ``reduction`` does.
        IndexError: on the CPU, a label is out of range. Elsewhere, where looking would wait for the device, the loss is
            NaN and the row's gradient zero.
        RuntimeError: double backward through the native operator.

    Source: the joint loss of arXiv 2301.12168, section 3.2; cross entropy as in ``torch.nn.functional.cross_entropy``.

    Equivalent to::

        exit_losses = torch.stack([F.cross_entropy(x.float(), target, class_weight, ...) for x in exit_logits])
        loss = (exit_weights[:, None] * exit_losses).sum(0)  # without [:, None] unless reduction is "none"
    """
    if use_native(exit_logits, target, exit_weights, exit_logits if class_weight is None else class_weight):
        loss, exit_losses, _, _ = _native.joint_cross_entropy(
            exit_logits, target, exit_weights, class_weight, label_smoothing, ignore_index, reduction
        )
        return JointLoss(loss, exit_losses)
    arguments = (exit_logits, target, exit_weights, class_weight, label_smoothing, ignore_index, reduction)
    _checks.joint_cross_entropy(*arguments)
    _checks.labels("joint_cross_entropy", target, exit_logits.shape[2], ignore_index)
    return reference.joint_cross_entropy(*arguments)
