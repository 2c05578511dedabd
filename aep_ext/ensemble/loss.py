"""The joint loss of all exits as modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aep_ext import ops
from aep_ext.surgery.exit_weights import ExitWeights
from aep_ext.surgery.multi_exit import MultiExitNet


class LearnedLossWeights(nn.Module):
    """Loss weights that are learned with the network, from uniform ones on.

    - ``"uncertainty"``: ``a_e = t / E exp(-s_e)`` and the penalty ``t mean_e s_e``: Kendall et al., CVPR 2018 (arXiv
      1705.07115), s the log variance, times t / E. Exits with a large loss come to weigh less.
    - ``"softmax"``: ``a_e = t (floor / E + (1 - floor) softmax(s)_e)``, no penalty. The loss is the smaller, the more
      the best exit weighs: only the floor keeps the others in the training.

    Hand it to :class:`JointCrossEntropy` in place of the exit weights, and its parameter to the optimizer. In a loop of
    one's own: ``loss = (weights() * losses).sum() + weights.penalty()``.

    Args:
        num_exits: E, at least 1.
        form: "uncertainty" or "softmax".
        floor: within 0..1; of "softmax".
        total: t, what the weights sum to at first; E beside gradient equilibrium, which divides by it.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, num_exits: int, form: str = "uncertainty", floor: float = 0.5, total: float = 1.0) -> None:
        super().__init__()
        if num_exits < 1:
            raise ValueError(f"LearnedLossWeights: num_exits must be at least 1, got {num_exits}")
        if form not in ("uncertainty", "softmax"):
            raise ValueError(f"LearnedLossWeights: form must be 'uncertainty' or 'softmax', got {form!r}")
        if not 0 <= floor <= 1:
            raise ValueError(f"LearnedLossWeights: floor must be within 0..1, got {floor}")
        if not 0 < total < math.inf:
            raise ValueError(f"LearnedLossWeights: total must be finite and greater than 0, got {total}")
        self.form, self.floor, self.total = form, float(floor), float(total)
        self.raw = nn.Parameter(torch.zeros(num_exits))

    def forward(self) -> Tensor:
        """The weights, (E,) float32."""
        raw, exits = self.raw.float(), len(self.raw)
        if self.form == "uncertainty":
            return self.total / exits * (-raw).exp()
        return self.total * (self.floor / exits + (1 - self.floor) * raw.softmax(0))

    def penalty(self) -> Tensor:
        """What is added to the loss, of no dimension."""
        return self.total * self.raw.float().mean() if self.form == "uncertainty" else self.raw.new_zeros(())

    def extra_repr(self) -> str:
        return f"{len(self.raw)}, form={self.form!r}" + (f", floor={self.floor}" if self.form == "softmax" else "")


class JointCrossEntropy(nn.Module):
    """The joint loss of all exits: weighted cross entropies of the exits (arXiv 2301.12168) and, where asked, of the
    prefix ensembles, and distillation from the ensemble of all exits.

    With O_e the logits of exit e, R_e = sum_{j<=e} b_j O_j / sum_{j<=e} b_j the ensemble up to it, p the prefix weight
    and d the distillation::

        (1 - p) sum_e a_e CE(O_e, y) + p sum_e a_e CE(R_e, y) + d T^2 sum_e KL(softmax(R_last / T) || softmax(O_e / T))

    R_e is what a gated network answers at exit e (BoostNet's idea, Yu et al., AAAI 2023, on this ensemble). No gradient
    flows into the ensemble that is distilled (Hinton et al., arXiv 1503.02531; among exits: Phuong & Lampert, ICCV
    2019). All terms come from one read of the logits, :func:`aep_ext.ops.multi_exit_loss`.

    Args:
        exit_weights: a: an :class:`ExitWeights` (its loss weights are a, its output weights b), E positive numbers, or
            a :class:`LearnedLossWeights`, whose penalty is then added.
        prefix_weight: p, within 0..1.
        output_weights: b, E positive numbers; None: those of an ExitWeights, else uniform.
        detach_prefix: no gradient flows through the terms j < e of R_e.
        distillation: d, at least 0.
        temperature: T, greater than 0.
        class_weight: K weights of the classes, as in ``torch.nn.functional.cross_entropy``, or None.
        label_smoothing: within 0..1.
        ignore_index: targets with this value do not count.
        reduction: "mean", "sum" or "none".
        memory: "recompute" (holds nothing but the logits for the backward), "in_forward" (holds the gradient instead)
            or "in_place" (the gradient replaces the logits); the last two want "mean" or "sum". See
            :func:`aep_ext.ops.multi_exit_loss`.

    Attributes:
        backbone_only: if set to True, the loss is ``CE(O_last, y)`` alone: the first part of a mixed training (arXiv
            2407.14320).

    The weights are buffers (float32), so they move with ``.to()`` and are part of the state dict.

    With the defaults equivalent to::

        sum(a * F.cross_entropy(logits, target, class_weight, ignore_index=ignore_index, reduction=reduction,
                                label_smoothing=label_smoothing) for a, logits in zip(exit_weights, exit_logits))

    Raises:
        ValueError: an argument breaks these rules.
    """

    exit_weights: Tensor
    output_weights: Tensor
    class_weight: Tensor | None
    backbone_only: bool = False

    def __init__(
        self,
        exit_weights: ExitWeights | Sequence[float] | Tensor | LearnedLossWeights,
        *,
        prefix_weight: float = 0.0,
        output_weights: Sequence[float] | Tensor | None = None,
        detach_prefix: bool = False,
        distillation: float = 0.0,
        temperature: float = 3.0,
        class_weight: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        memory: str = "recompute",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.learned = exit_weights if isinstance(exit_weights, LearnedLossWeights) else None
        if self.learned is not None:
            exit_weights = ExitWeights.uniform(len(self.learned.raw))
        elif not isinstance(exit_weights, ExitWeights):
            exit_weights = ExitWeights(exit_weights, 1.0)  # type: ignore[arg-type]
        if output_weights is not None:
            exit_weights = ExitWeights(exit_weights.loss, output_weights)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if memory not in ("recompute", "in_forward", "in_place"):
            raise ValueError(f"{name}: memory must be 'recompute', 'in_forward' or 'in_place', got {memory!r}")
        if memory != "recompute" and reduction == "none":
            raise ValueError(f"{name}: memory={memory!r} needs reduction 'mean' or 'sum', got 'none'")
        for what, value in (("label_smoothing", label_smoothing), ("prefix_weight", prefix_weight)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: {what} must be within 0..1, got {value}")
        if not 0.0 <= distillation < math.inf:
            raise ValueError(f"{name}: distillation must be finite and at least 0, got {distillation}")
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"{name}: temperature must be finite and greater than 0, got {temperature}")
        if class_weight is not None:
            class_weight = torch.as_tensor(class_weight, dtype=torch.float32).detach().clone()
            if class_weight.dim() != 1:
                raise ValueError(f"{name}: class_weight must have one dimension, got shape {list(class_weight.shape)}")
        self.register_buffer("exit_weights", exit_weights.loss_tensor())
        # Not saved: old files have none, and a network's own say it already.
        self.register_buffer("output_weights", torch.tensor(exit_weights.output), persistent=False)
        self.register_buffer("class_weight", class_weight)
        self.prefix_weight, self.detach_prefix = float(prefix_weight), bool(detach_prefix)
        self.distillation, self.temperature = float(distillation), float(temperature)
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = int(ignore_index)
        self.reduction = reduction
        self.memory = memory

    def losses(self, exit_logits: Tensor, target: Tensor) -> ops.MultiExitLoss:
        """The joint loss and its parts, without their weights, from one pass.

        Args:
            exit_logits: (E, N, K), floating.
            target: (N,) int64, or (N, K) floating, probabilities.

        Returns:
            A named tuple (loss, exit_losses, prefix_losses, distillation_losses). With "mean" and "sum" the loss has no
            dimension and the others have shape (E,); with "none" the shapes are (N,) and (E, N). What was not asked for
            is zero.
        """
        weights = self.exit_weights if self.learned is None else self.learned()
        share, distillation = self.prefix_weight, self.distillation
        if self.backbone_only:
            weights = torch.cat([torch.zeros_like(weights[1:]), torch.ones_like(weights[:1])])
            share = distillation = 0.0
        found = ops.multi_exit_loss(
            exit_logits,
            target,
            (1 - share) * weights if share else weights,
            share * weights if share else None,
            self.output_weights,
            distillation=distillation,
            temperature=self.temperature,
            detach_prefix=self.detach_prefix,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            memory=self.memory,
        )
        if self.learned is None or self.backbone_only:
            return found
        return found._replace(loss=found.loss + self.learned.penalty())

    def of(self, net: MultiExitNet, x: Tensor, target: Tensor, chunk: int | None = None) -> ops.MultiExitLoss:
        """The joint loss of ``net`` on the images ``x``, without the logits where they need not be: for many classes.

        Where every exit of ``net`` is global average pooling and a linear layer, and neither prefixes nor distillation
        are asked, this is :func:`aep_ext.ops.linear_joint_cross_entropy`, which never holds the (E, N, K) logits
        (``memory`` has no say); elsewhere, and with reduction "none", it is ``losses(net.exit_logits(x), target)``.
        Either way hooks on ``net`` itself (and so those of a wrapper around it, DistributedDataParallel's for one) do
        not run.

        Args:
            net: a :class:`aep_ext.MultiExitNet`, in training or eval mode.
            x: (N, channels, H, W).
            target: as for :meth:`losses`.
            chunk: rows of which logits are formed at a time; None: see the operator.

        Returns:
            As :meth:`losses`. Differentiate through ``loss``: the others may be constants.
        """
        plain = not (self.prefix_weight or self.distillation or self.learned or self.backbone_only)
        parts = net.pooled_exits(x) if plain and self.reduction != "none" and target.dim() == 1 else None
        if parts is None:
            return self.losses(net.exit_logits(x), target)
        loss, exit_losses = ops.linear_joint_cross_entropy(
            *parts,
            target,
            self.exit_weights,
            self.class_weight,
            self.label_smoothing,
            self.ignore_index,
            self.reduction,
            chunk,
        )
        zeros = torch.zeros_like(exit_losses)
        return ops.MultiExitLoss(loss, exit_losses, zeros, zeros)

    def per_exit(self, exit_logits: Tensor, target: Tensor) -> Tensor:
        """The unweighted loss of every exit: (E,), or (E, N) with reduction "none"."""
        return self.losses(exit_logits, target).exit_losses

    def forward(self, exit_logits: Tensor, target: Tensor) -> Tensor:
        """The joint loss of ``exit_logits`` (E, N, K) against ``target``: see :meth:`losses`."""
        return self.losses(exit_logits, target).loss

    def extra_repr(self) -> str:
        # A module on the meta device has no values to show.
        weights = "..." if self.exit_weights.is_meta else ", ".join(f"{v:.4g}" for v in self.exit_weights.tolist())
        return (
            f"exit_weights=[{weights}], prefix_weight={self.prefix_weight}, distillation={self.distillation}, "
            f"class_weight={self.class_weight is not None}, "
            f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, memory={self.memory!r}"
        )


class PrefixCrossEntropy(JointCrossEntropy):
    """The cross entropies of the prefix ensembles alone, ``sum_e a_e CE(R_e, y)``: :class:`JointCrossEntropy` with
    ``prefix_weight=1``. Its other arguments are the same."""

    def __init__(
        self, exit_weights: ExitWeights | Sequence[float] | Tensor | LearnedLossWeights, **options: Any
    ) -> None:
        super().__init__(exit_weights, prefix_weight=1.0, **options)


class EnsembleDistillation(nn.Module):
    """Distillation from the ensemble of all exits into each: ``T^2 sum_e KL(softmax(R_last / T) || softmax(O_e / T))``,
    a mean over the rows, R_last the weighted mean of the exits' logits, through which no gradient flows.

    The distillation term of :class:`JointCrossEntropy`, for losses of one's own, and for images without labels.

    Args:
        output_weights: of the ensemble, E positive numbers; None: uniform.
        temperature: T, greater than 0.

    Raises:
        ValueError: an argument breaks these rules.
    """

    output_weights: Tensor | None

    def __init__(self, output_weights: Sequence[float] | Tensor | None = None, *, temperature: float = 3.0) -> None:
        super().__init__()
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"EnsembleDistillation: temperature must be finite and greater than 0, got {temperature}")
        given = None if output_weights is None else torch.tensor(ExitWeights(output_weights).output)
        self.register_buffer("output_weights", given)
        self.temperature = float(temperature)

    def forward(self, exit_logits: Tensor) -> Tensor:
        """The loss of ``exit_logits`` (E, N, K), floating."""
        exits, rows, _ = exit_logits.shape
        target = torch.zeros(rows, dtype=torch.int64, device=exit_logits.device)  # weighs nothing
        weights = torch.zeros(exits, device=exit_logits.device)
        return ops.multi_exit_loss(
            exit_logits, target, weights, None, self.output_weights, distillation=1.0, temperature=self.temperature
        ).loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
