"""Named tuples returned by the operators."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EnsembleStats(NamedTuple):
    """Result of :func:`aep_ext.ops.ensemble_stats`."""

    logits: Tensor
    """(N, K), the dtype of the exit logits: the weighted sum, as :func:`aep_ext.ops.ensemble` returns it."""
    stats: Tensor
    """(N, 3) float32: confidence (largest probability), entropy in nats, margin (largest minus second probability)."""
    argmax: Tensor
    """(N,) int64: class of the largest logit, the lowest index on a tie."""


class JointLoss(NamedTuple):
    """Result of :func:`aep_ext.ops.joint_cross_entropy` and :func:`aep_ext.ops.linear_joint_cross_entropy`."""

    loss: Tensor
    """0-d, or (N,) with ``reduction="none"``: the sum of the exits' losses, each times its exit weight."""
    exit_losses: Tensor
    """(E,), or (E, N) with ``reduction="none"``: the cross entropy of every exit, without its exit weight."""


class MultiExitLoss(NamedTuple):
    """Result of :func:`aep_ext.ops.multi_exit_loss`. The last three are (E,), or (E, N) with ``reduction="none"``."""

    loss: Tensor
    """0-d, or (N,) with ``reduction="none"``: the weighted sum of the following."""
    exit_losses: Tensor
    """The cross entropy of every exit's logits."""
    prefix_losses: Tensor
    """The cross entropy of every prefix ensemble; zeros without ``prefix_weights``."""
    distillation_losses: Tensor
    """The divergence of every exit from the whole ensemble, in nats; zeros without ``distillation``."""


class GateResult(NamedTuple):
    """Result of :func:`aep_ext.ops.gate`: rows that stay come first, then rows that leave, each in their old order."""

    features: Tensor
    """(n, ...): the features of the rows that stay, in front; the other rows are zero."""
    running: Tensor
    """(n, K): rows that stay: the sum of weight * logits after this exit; rows that leave: their answer, that sum over
    ``weight_sum``."""
    indices: Tensor
    """(n,) int64: the caller's row numbers."""
    state: Tensor
    """(n, S) int64: the criterion's state after this exit."""
    stats: Tensor
    """(n, 3) float32: confidence, entropy in nats and margin of the tested distribution."""
    argmax: Tensor
    """(n,) int64: class of the largest entry of the sum, the answer of a row that leaves here."""
    weight_sum: Tensor
    """0-d: the sum of the exit weights so far, this exit's included."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    """0-d int64, on the device: how many rows stay."""
