"""The joint loss: weighted sum of the exits' cross entropies."""

from __future__ import annotations

import torch
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
    memory: str = "recompute",
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
        memory: what is held for the backward, and where its gradient comes from.

            - "recompute": nothing of size E*N*K but the logits themselves; the backward recomputes the softmax.
            - "in_forward": the forward forms the gradient and holds it (one more tensor of the logits' size), not the
              logits; the backward scales it where it lies, and frees it.
            - "in_place": the forward overwrites ``exit_logits`` with their gradient: no further memory. Read whatever
              you need of the logits first; a later differentiable use of them raises in its backward, as does one
              before it whose backward needs their values.

            The last two want reduction "mean" or "sum" and differentiate through ``loss`` only (``exit_losses`` do not
            require a gradient). Where no gradient of the logits is recorded, all three do the same, and nothing is
            overwritten.

    Returns:
        :class:`JointLoss` in float32 (float64 for float64 logits). ``loss``: 0-d, or (N,) for "none";
        ``exit_losses``: (E,), or (E, N) for "none", without the exit weights.

    Differentiable, once, in ``exit_logits`` and ``exit_weights``, through both results. Under autocast the arithmetic
    is float32, as for ``cross_entropy``, without a copy of the logits in float32.

    Raises:
        TypeError: a dtype breaks the rules above.
        ValueError: a shape, device, ``label_smoothing``, ``reduction`` or ``memory`` does.
        IndexError: on the CPU, a label is out of range. Elsewhere, where looking would wait for the device, the loss is
            NaN and the row's gradient zero, unless :class:`check_labels` is on.
        RuntimeError: double backward (the reference has one for "recompute"); with "in_place": logits that are a leaf
            (or a view of one), that share memory among their elements or with another argument, or ``torch.compile``.
            Nothing has been overwritten then.

    Source: the joint loss of arXiv 2301.12168, section 3.2; cross entropy as in ``torch.nn.functional.cross_entropy``.

    Equivalent to::

        exit_losses = torch.stack([F.cross_entropy(x.float(), target, class_weight, ...) for x in exit_logits])
        loss = (exit_weights[:, None] * exit_losses).sum(0)  # without [:, None] unless reduction is "none"
    """
    if memory != "recompute":
        _checks.memory_mode(memory)
        if not isinstance(exit_logits, Tensor) or not (torch.is_grad_enabled() and exit_logits.requires_grad):
            # No gradient to form; what is wrong with the arguments is still said in this mode's words.
            if reduction == "none":
                raise ValueError(_checks.NEEDS_ONE_LOSS.format(memory))
            memory = "recompute"
        elif memory == "in_place" and torch.compiler.is_compiling():
            raise RuntimeError(
                "aep::joint_cross_entropy: memory must be 'recompute' or 'in_forward' under torch.compile, "
                "got 'in_place'"
            )
    arguments = (exit_logits, target, exit_weights, class_weight, label_smoothing, ignore_index, reduction)
    if use_native(exit_logits, target, exit_weights, exit_logits if class_weight is None else class_weight):
        if memory == "recompute":
            loss, exit_losses, _ = _native.joint_cross_entropy(*arguments)
        elif memory == "in_forward":
            loss, exit_losses, _ = _native.joint_cross_entropy_with_grad(*arguments)
        else:
            loss, exit_losses = _native.joint_cross_entropy_(*arguments)
        return JointLoss(loss, exit_losses)
    _checks.joint_cross_entropy(*arguments, memory)
    _checks.labels("joint_cross_entropy", target, exit_logits.shape[2], ignore_index)
    if memory == "in_place":
        _checks.replaceable(exit_logits, target, exit_weights, class_weight)
    return reference.joint_cross_entropy(*arguments, memory)
