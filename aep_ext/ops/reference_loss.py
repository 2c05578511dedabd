"""The reference of ``joint_cross_entropy``: the parts of its row losses, and the memory modes that hold a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aep_ext.ops._checks import accumulate_dtype


class Rows(NamedTuple):
    """What the labels say about the N rows."""

    used: Tensor  # (N,) bool: not ignored
    known: Tensor  # (N,) bool: a class
    label: Tensor  # (N,) int64: the class, 0 where it is none
    weight: Tensor  # (N,): the class weight


def rows_of(target: Tensor, classes: int, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Rows:
    """Sorts out the labels."""
    known = (target >= 0) & (target < classes)
    label = torch.where(known, target, 0)
    weight = torch.ones_like(label, dtype=dtype) if class_weight is None else class_weight.to(dtype)[label]
    return Rows(target != ignore_index, known, label, weight)


def log_probabilities(exit_logits: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """(..., N, K). Rows that give no gradient are cleared first: NaN * 0 in the softmax's backward would be NaN."""
    return torch.log_softmax(exit_logits.to(dtype).masked_fill(~(rows.used & rows.known)[:, None], 0.0), -1)


def row_losses(log_p: Tensor, rows: Rows, class_weight: Tensor | None, label_smoothing: float) -> Tensor:
    """(..., N): the cross entropy of every row; NaN for a label out of range, 0 where it is ignored."""
    losses = -log_p.gather(-1, rows.label.expand(log_p.shape[:-1]).unsqueeze(-1)).squeeze(-1) * rows.weight
    if label_smoothing > 0:
        smooth = -(log_p if class_weight is None else log_p * class_weight.to(log_p.dtype)).sum(-1)
        losses = (1 - label_smoothing) * losses + (label_smoothing / log_p.shape[-1]) * smooth
    return losses.masked_fill(rows.used & ~rows.known, float("nan")).masked_fill(~rows.used, 0.0)


def divisor(rows: Rows) -> Tensor:
    """What the mean divides by. As F.cross_entropy: NaN without any weight, even where smoothing leaves a loss."""
    total = rows.weight.masked_fill(~rows.used, 0.0).sum()
    return total.masked_fill(total == 0, float("nan"))


def joint(exit_losses: Tensor, exit_weights: Tensor) -> Tensor:
    """The weighted sum over exits, in ascending order."""
    loss = exit_losses[0] * exit_weights[0]
    for e in range(1, exit_losses.shape[0]):
        loss = loss + exit_losses[e] * exit_weights[e]
    return loss


def held_factor(exit_logits: Tensor, reduction: str) -> float:
    """What the gradient is multiplied by while it is held: in float16 the mean's would be lost below its smallest
    number before a GradScaler's factor reaches it. The division by the number of rows is taken back, up to 1024, by a
    power of two, which rounds nothing."""
    if exit_logits.dtype != torch.float16 or reduction != "mean":
        return 1.0
    return float(min(1024, 1 << max(0, int(exit_logits.shape[1]).bit_length() - 1)))


def _gradient(
    log_p: Tensor, rows: Rows, class_weight: Tensor | None, label_smoothing: float, coefficient: Tensor
) -> Tensor:
    """(N, K): the gradient of ``coefficient`` times the sum of one exit's row losses."""
    classes = log_p.shape[-1]
    share = label_smoothing / classes
    own = (1 - label_smoothing) * rows.weight
    if label_smoothing == 0:
        grad = log_p.exp() * own[:, None]
    else:
        weight = log_p.new_ones(classes) if class_weight is None else class_weight.to(log_p.dtype)
        grad = log_p.exp() * (own + share * weight.sum())[:, None] - share * weight
    grad = grad.scatter_add(-1, rows.label[:, None], -own[:, None]) * coefficient
    return grad.masked_fill(~(rows.used & rows.known)[:, None], 0.0)


class _Handle(torch.autograd.Function):
    """No numbers, but a place in the graph, so that a second derivative is refused rather than taken for 0."""

    @staticmethod
    def forward(ctx, exit_logits: Tensor) -> Tensor:  # noqa: ANN001
        ctx.set_materialize_grads(False)
        return exit_logits.new_empty(0)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> None:  # noqa: ANN001
        if grad is None:  # an ordinary backward passes by
            return
        raise RuntimeError("aep::joint_cross_entropy: double backward is not supported")


class _Same(torch.autograd.Function):
    """The same memory with the old history, for what :class:`_Overwritten` replaces."""

    @staticmethod
    def forward(ctx, exit_logits: Tensor) -> Tensor:  # noqa: ANN001
        return exit_logits.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ANN001
        return grad


class _Overwritten(torch.autograd.Function):
    """Overwritten logits are no function of what they came from: their part of the graph ends in an error."""

    @staticmethod
    def forward(ctx, exit_logits: Tensor) -> Tensor:  # noqa: ANN001
        ctx.mark_dirty(exit_logits)
        return exit_logits

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ANN001
        raise RuntimeError(
            "aep::joint_cross_entropy: memory='in_place' has overwritten exit_logits with their gradient, "
            "got a use of them after the loss"
        )


class _Held(torch.autograd.Function):
    """Loss and gradient in the forward, exit by exit; the backward scales."""

    @staticmethod
    def forward(  # noqa: ANN205
        ctx,  # noqa: ANN001
        exit_logits: Tensor,
        exit_weights: Tensor,
        handle: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
        reduction: str,
        in_place: bool,
    ):
        dtype = accumulate_dtype(exit_logits.dtype)
        weights = exit_weights.to(dtype)
        rows = rows_of(target, exit_logits.shape[-1], class_weight, ignore_index, dtype)
        total = divisor(rows) if reduction == "mean" else weights.new_ones(())
        factor = held_factor(exit_logits, reduction)
        losses, grads = [], []
        for e in range(exit_logits.shape[0]):
            log_p = log_probabilities(exit_logits[e], rows, dtype)
            losses.append(row_losses(log_p, rows, class_weight, label_smoothing).sum(-1) / total)
            grad = _gradient(log_p, rows, class_weight, label_smoothing, weights[e] / total * factor)
            if in_place:
                exit_logits.detach()[e].copy_(grad)
            else:
                grads.append(grad.to(exit_logits.dtype))
        exit_losses = torch.stack(losses)
        ctx.save_for_backward(exit_logits.detach() if in_place else torch.stack(grads), exit_losses, handle)
        ctx.factor = factor
        ctx.weights_dtype = exit_weights.dtype
        ctx.mark_non_differentiable(exit_losses)
        return joint(exit_losses, weights), exit_losses

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor):  # noqa: ANN001, ANN205
        held, exit_losses, handle = ctx.saved_tensors
        logits_grad = weights_grad = None
        if ctx.needs_input_grad[0]:
            logits_grad = (held.to(grad_loss.dtype) * (grad_loss / ctx.factor)).to(held.dtype)
            if torch.is_grad_enabled():
                logits_grad = logits_grad + handle.sum().to(held.dtype)
        if ctx.needs_input_grad[1]:
            weights_grad = (exit_losses * grad_loss).to(ctx.weights_dtype)
            if torch.is_grad_enabled():
                weights_grad = weights_grad + handle.sum().to(ctx.weights_dtype)
        return logits_grad, weights_grad, None, None, None, None, None, None, None


def held(
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """Joint loss and exit losses; the gradient is formed now and, if ``in_place``, written over ``exit_logits``."""
    # A compiled backward cannot be differentiated again, and says so by itself.
    handle = exit_logits.new_empty(0) if torch.compiler.is_compiling() else _Handle.apply(exit_logits)
    if in_place:
        logits = _Same.apply(exit_logits)
        _Overwritten.apply(exit_logits)  # raises torch's own errors, for a leaf say, before anything is written
    else:
        logits = exit_logits
    return _Held.apply(
        logits, exit_weights, handle, target, class_weight, label_smoothing, ignore_index, reduction, in_place
    )
