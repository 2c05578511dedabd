"""The joint loss: weighted sum of the exits' cross entropies, from logits or from what linear exits see."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aep_ext.ops import _checks, _native, label_checks, reference
from aep_ext.ops._dispatch import use_native
from aep_ext.ops.types import JointLoss, MultiExitLoss

MEMORY_MODES = ("recompute", "in_forward", "in_place")


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
            require a gradient). Where no gradient of the logits is recorded, and on the reference path (see
            :func:`aep_ext.build_info`), all three do the same, and nothing is overwritten.

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
    options = (
        class_weight,
        label_smoothing,
        ignore_index,
        reduction,
        None,
        None,
        0.0,
        1.0,
        False,
        "joint_cross_entropy",
    )
    return JointLoss(*_loss(memory, exit_logits, target, exit_weights, *options)[:2])


def multi_exit_loss(
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    prefix_weights: Tensor | None = None,
    output_weights: Tensor | None = None,
    *,
    distillation: float = 0.0,
    temperature: float = 3.0,
    detach_prefix: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    memory: str = "recompute",
) -> MultiExitLoss:
    """Cross entropies of every exit and of every prefix ensemble, and distillation from the whole ensemble.

    With O_e the logits of exit e, R_e = sum_{j<=e} b_j O_j / sum_{j<=e} b_j the ensemble up to it, and y the target::

        loss = sum_e a_e CE(O_e, y) + sum_e c_e CE(R_e, y)
               + d T^2 sum_e KL(softmax(R_last / T) || softmax(O_e / T))

    No gradient flows through the first argument of KL.

    Args:
        exit_logits: (E, N, K), E and K at least 1, float32, float64, bfloat16 or float16, any strides.
        target: (N,) int64, class indices 0..K-1 or ``ignore_index``; or (N, K) floating point, probabilities of the
            classes (mixup, soft labels), without gradient, which ``ignore_index`` does not apply to.
        exit_weights: (E,), floating point: a, the weights of the exits' cross entropies.
        prefix_weights: (E,), floating point: c, those of the prefix ensembles'; None for none.
        output_weights: (E,), floating point, positive, without gradient: b, the weights of the ensemble; None for ones.
        distillation: d, at least 0.
        temperature: T, greater than 0.
        detach_prefix: no gradient flows through the terms j < e of R_e: exit e alone learns from CE(R_e).
        class_weight: (K,), floating point, without gradient; None for ones. For both cross entropies, not for KL.
        label_smoothing: within 0..1, for both cross entropies.
        ignore_index: rows with this label count nowhere and get a zero gradient.
        reduction: "mean", "sum" or "none". "mean" divides the cross entropies as ``F.cross_entropy`` does (by the class
            weights of the rows that count, by N for probabilities), and KL by the number of rows that count.
        memory: as in :func:`joint_cross_entropy`.

    Returns:
        :class:`MultiExitLoss` in float32 (float64 for float64 logits): ``loss``, and without their weights (d and T^2
        too) ``exit_losses``, ``prefix_losses`` and ``distillation_losses``.

    Differentiable, once, in ``exit_logits``, ``exit_weights`` and ``prefix_weights``, through all results. Under
    autocast the arithmetic is float32, without a copy of the logits in float32.

    Raises:
        TypeError: a dtype breaks the rules above.
        ValueError: a shape, a device or an option does.
        IndexError, RuntimeError: as :func:`joint_cross_entropy`, which is this loss without prefixes and distillation.

    Source: joint loss: arXiv 2301.12168, section 3.2. Prefix ensembles trained for what they answer: the idea of
    BoostNet (arXiv 2211.16726). Distillation: KL with T^2 as in arXiv 1503.02531, from the ensemble of exits.
    """
    ensemble = (prefix_weights, output_weights, distillation, temperature, detach_prefix)
    options = (class_weight, label_smoothing, ignore_index, reduction, *ensemble, "multi_exit_loss")
    result = _loss(memory, exit_logits, target, exit_weights, *options)
    exit_losses = result[1]
    # What was not asked for is empty.
    found = (term if term.shape == exit_losses.shape else torch.zeros_like(exit_losses) for term in result[2:4])
    return MultiExitLoss(*result[:2], *found)


def _loss(
    memory: str,
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    prefix_weights: Tensor | None,
    output_weights: Tensor | None,
    distillation: float,
    temperature: float,
    detach_prefix: bool,
    op: str,
) -> Sequence[Tensor]:
    """Loss, exit losses, prefix losses and distillation losses of ``op``; those not asked for may be empty."""
    if memory != "recompute":
        _checks.choice(op, "memory", memory, MEMORY_MODES)
        if reduction == "none":
            raise ValueError(f"aep::{op}: memory='{memory}' needs reduction 'mean' or 'sum', got 'none'")
        if not (isinstance(exit_logits, Tensor) and torch.is_grad_enabled() and exit_logits.requires_grad):
            memory = "recompute"  # no gradient to form
        elif memory == "in_place" and torch.compiler.is_compiling():
            raise RuntimeError(
                f"aep::{op}: memory must be 'recompute' or 'in_forward' under torch.compile, got 'in_place'"
            )
    options = (class_weight, label_smoothing, ignore_index, reduction)
    ensemble = (prefix_weights, output_weights, distillation, temperature, detach_prefix)
    given = [t for t in (class_weight, prefix_weights, output_weights) if t is not None]
    if use_native(exit_logits, target, exit_weights, *given):
        if memory == "recompute":
            return _native.multi_exit_loss(exit_logits, target, exit_weights, *options, *ensemble, op)
        if memory == "in_forward":
            return _native.multi_exit_loss_with_grad(exit_logits, target, exit_weights, *options, *ensemble, op)
        return _native.multi_exit_loss_(exit_logits, target, exit_weights, *options, *ensemble, op)
    _, rows, classes = _checks.weighted_exits(op, exit_logits, "exit_weights", exit_weights)
    for name, weights in (("prefix_weights", prefix_weights), ("output_weights", output_weights)):
        if weights is not None:
            _checks.weighted_exits(op, exit_logits, name, weights)
    _without_gradient(op, "output_weights", output_weights)
    _checks.number(op, "distillation", distillation, exit_logits.device)
    if not 0.0 <= distillation < math.inf:
        raise ValueError(f"aep::{op}: distillation must be finite and at least 0, got {distillation:g}")
    _checks.number(op, "temperature", temperature, exit_logits.device, positive=True)
    _checks.choice(op, "reduction", reduction, ("none", "mean", "sum"))
    _check_options(op, target, (rows, classes), exit_logits.device, class_weight, label_smoothing, ignore_index)
    result = reference.multi_exit_loss(
        exit_logits,
        target,
        exit_weights,
        prefix_weights,
        output_weights,
        distillation=distillation,
        temperature=temperature,
        detach_prefix=detach_prefix,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return result if memory == "recompute" else (result.loss, *(term.detach() for term in result[1:]))


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
    gradients of weights and biases in float32 until the backward has rounded them; for float16 a copy of the chunk's
    features, scaled so that no sum overflows.

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
        TypeError: an argument is no list or tuple, holds something that is no tensor, or a dtype breaks the rules.
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
    op = "linear_joint_cross_entropy"
    _checks.sequences(op, pooled=pooled, weights=weights, biases=pooled if biases is None else biases)
    if biases is None:
        biases = [None] * len(pooled)
    options = (class_weight, label_smoothing, ignore_index, reduction)
    given = (target, exit_weights) if class_weight is None else (target, exit_weights, class_weight)
    if len(pooled) > 0 and use_native(*pooled, *weights, *[bias for bias in biases if bias is not None], *given):
        return JointLoss(
            *_native.linear_joint_cross_entropy(pooled, weights, biases, target, exit_weights, *options, chunk)
        )
    pooled, weights, biases = reference.autocast(pooled, weights, biases)
    shape = _checks.linears(op, "pooled", pooled, "NC", weights, biases)
    device = pooled[0].device
    _checks.tensor(op, "exit_weights", exit_weights, (len(pooled),), device=device)
    _checks.choice(op, "reduction", reduction, ("mean", "sum"))
    if chunk is not None and chunk < 1:
        raise ValueError(f"aep::{op}: chunk must be at least 1, got {chunk}")
    _check_options(op, target, shape, device, class_weight, label_smoothing, ignore_index)
    return reference.linear_joint_cross_entropy(pooled, weights, biases, target, exit_weights, *options)


def _check_options(
    op: str,
    target: Tensor,
    shape: tuple[int, int],
    device: torch.device,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> None:
    """What the losses of logits (..., N, K) have in common, the labels themselves last."""
    rows, classes = shape
    probabilities = op == "multi_exit_loss" and isinstance(target, Tensor) and target.dim() == 2
    if probabilities:
        _checks.tensor(op, "target", target, (rows, classes), device=device)
        _without_gradient(op, "target", target)
    else:
        _checks.tensor(op, "target", target, (rows,), _checks.INT64, device)
    if class_weight is not None:
        _checks.tensor(op, "class_weight", class_weight, (classes,), device=device)
        _without_gradient(op, "class_weight", class_weight)
    _checks.number(op, "label_smoothing", label_smoothing, device)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"aep::{op}: label_smoothing must be within 0..1, got {label_smoothing:g}")
    if not probabilities:
        label_checks.labels(op, target, classes, ignore_index)


def _without_gradient(op: str, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"aep::{op}: {name} must not require a gradient, got requires_grad=True")
