"""The joint loss of all exits as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aep_ext import ops
from aep_ext.surgery.exit_weights import ExitWeights
from aep_ext.surgery.multi_exit import MultiExitNet


class JointCrossEntropy(nn.Module):
    """Weighted sum of the cross entropies of all exits: ``sum_e a_e * CE(O_e, y)`` (arXiv 2301.12168).

    Args:
        exit_weights: an :class:`ExitWeights` (its loss weights count), or E positive numbers.
        class_weight: K weights of the classes, as in ``torch.nn.functional.cross_entropy``, or None.
        label_smoothing: within 0..1.
        ignore_index: targets with this value do not count.
        reduction: "mean", "sum" or "none".
        memory: "recompute" (holds nothing but the logits for the backward), "in_forward" (holds the gradient instead)
            or "in_place" (the gradient replaces the logits); the last two want "mean" or "sum". See
            :func:`aep_ext.ops.joint_cross_entropy`.

    The weights are buffers (float32), so they move with ``.to()`` and are part of the state dict.

    Equivalent to::

        sum(a * F.cross_entropy(logits, target, class_weight, ignore_index=ignore_index, reduction=reduction,
                                label_smoothing=label_smoothing) for a, logits in zip(exit_weights, exit_logits))
    """

    exit_weights: Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        exit_weights: ExitWeights | Sequence[float] | Tensor,
        *,
        class_weight: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        memory: str = "recompute",
    ) -> None:
        super().__init__()
        if not isinstance(exit_weights, ExitWeights):
            exit_weights = ExitWeights(exit_weights)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"JointCrossEntropy: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if memory not in ("recompute", "in_forward", "in_place"):
            raise ValueError(
                f"JointCrossEntropy: memory must be 'recompute', 'in_forward' or 'in_place', got {memory!r}"
            )
        if memory != "recompute" and reduction == "none":
            raise ValueError(f"JointCrossEntropy: memory={memory!r} needs reduction 'mean' or 'sum', got 'none'")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"JointCrossEntropy: label_smoothing must be within 0..1, got {label_smoothing}")
        if class_weight is not None:
            class_weight = torch.as_tensor(class_weight, dtype=torch.float32).detach().clone()
            if class_weight.dim() != 1:
                raise ValueError(
                    f"JointCrossEntropy: class_weight must have one dimension, got shape {list(class_weight.shape)}"
                )
        self.register_buffer("exit_weights", exit_weights.loss_tensor())
        self.register_buffer("class_weight", class_weight)
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = int(ignore_index)
        self.reduction = reduction
        self.memory = memory

    def losses(self, exit_logits: Tensor, target: Tensor) -> ops.JointLoss:
        """The joint loss and the unweighted loss of every exit, from one pass.

        Args:
            exit_logits: (E, N, K), floating.
            target: (N,), int64.

        Returns:
            A named tuple (loss, exit_losses). With "mean" and "sum" the loss has no dimension and exit_losses has
            shape (E,); with "none" the shapes are (N,) and (E, N).
        """
        return ops.joint_cross_entropy(
            exit_logits,
            target,
            self.exit_weights,
            self.class_weight,
            self.label_smoothing,
            self.ignore_index,
            self.reduction,
            self.memory,
        )

    def of(self, net: MultiExitNet, x: Tensor, target: Tensor, chunk: int | None = None) -> ops.JointLoss:
        """The joint loss of ``net`` on the images ``x``, without the logits where they need not be: for many classes.

        Where every exit of ``net`` is global average pooling and a linear layer, this is
        :func:`aep_ext.ops.linear_joint_cross_entropy`, which never holds the (E, N, K) logits (``memory`` has no say);
        elsewhere, and with reduction "none", it is ``losses(net.exit_logits(x), target)``. Either way hooks on ``net``
        itself (and so those of a wrapper around it, DistributedDataParallel's for one) do not run.

        Args:
            net: a :class:`aep_ext.MultiExitNet`, in training or eval mode.
            x: (N, channels, H, W).
            target: (N,), int64.
            chunk: rows of which logits are formed at a time; None: see the operator.

        Returns:
            A named tuple (loss, exit_losses). Differentiate through ``loss``: ``exit_losses`` may be constants.
        """
        parts = None if self.reduction == "none" else net.pooled_exits(x)
        if parts is None:
            return self.losses(net.exit_logits(x), target)
        return ops.linear_joint_cross_entropy(
            *parts,
            target,
            self.exit_weights,
            self.class_weight,
            self.label_smoothing,
            self.ignore_index,
            self.reduction,
            chunk,
        )

    def per_exit(self, exit_logits: Tensor, target: Tensor) -> Tensor:
        """The unweighted loss of every exit: (E,), or (E, N) with reduction "none"."""
        return self.losses(exit_logits, target).exit_losses

    def forward(self, exit_logits: Tensor, target: Tensor) -> Tensor:
        """The joint loss of ``exit_logits`` (E, N, K) against ``target`` (N,): see :meth:`losses`."""
        return self.losses(exit_logits, target).loss

    def extra_repr(self) -> str:
        # A module on the meta device has no values to show.
        weights = "..." if self.exit_weights.is_meta else ", ".join(f"{v:.4g}" for v in self.exit_weights.tolist())
        return (
            f"exit_weights=[{weights}], class_weight={self.class_weight is not None}, "
            f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, memory={self.memory!r}"
        )
