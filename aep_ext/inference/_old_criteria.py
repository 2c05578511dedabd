"""Policies: the rule by which a sample leaves at an exit. One interface for the simulator and the executors.

A policy keeps an int64 state per sample, (n, S), and takes one step per exit: :meth:`Policy.gate`, which is
``aep_ext.ops.gate`` for the built-in policies and eager Python for a user's own rule. Engines and CUDA graphs take
built-in policies only: they know them by ``name``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import GateResult


@dataclass(frozen=True)
class Policy:
    """What all policies share.

    Args:
        on: what is judged: "ensemble", the normalised running ensemble R_e, or "exit", this exit alone.
    """

    on: str = "ensemble"

    name: ClassVar[str] = ""
    """The name in ``aep_ext.ops.gate``; "custom" for a user's own rule."""

    def __post_init__(self) -> None:
        if self.on not in ("ensemble", "exit"):
            raise ValueError(f"{type(self).__name__}: on must be 'ensemble' or 'exit', got {self.on!r}")

    @property
    def built_in(self) -> bool:
        """Whether ``aep_ext.ops.gate`` knows the policy by name."""
        return True

    def state_size(self, num_classes: int) -> int:
        """S, the entries of state per sample."""
        return 0

    def initial_state(self, n: int, num_classes: int, device: torch.device | str | None = None) -> Tensor:
        """The state before the first exit: (n, S) int64."""
        return torch.zeros(n, self.state_size(num_classes), dtype=torch.int64, device=device)

    def gate(
        self,
        features: Tensor,
        running: Tensor,
        weight_sum: float | Tensor,
        indices: Tensor,
        state: Tensor,
        exit_logits: Tensor,
        *,
        exit_index: int,
        weight: float | Tensor,
        threshold: float | Tensor,
        temperature: float | Tensor = 1.0,
        enabled: bool = True,
    ) -> GateResult:
        """One exit: arguments and result are those of ``aep_ext.ops.gate``; ``exit_index`` is its number, from 0."""
        return ops.gate(
            features,
            running,
            weight_sum,
            indices,
            state,
            exit_logits,
            weight=weight,
            threshold=threshold,
            temperature=temperature,
            policy=self.name,
            on=self.on,
            enabled=enabled,
        )


class Confidence(Policy):
    """Leave when the largest probability is at least the threshold."""

    name = "confidence"


class Entropy(Policy):
    """Leave when the entropy in nats is at most the threshold."""

    name = "entropy"


class Margin(Policy):
    """Leave when the largest probability exceeds the second by at least the threshold."""

    name = "margin"


class Patience(Policy):
    """Leave when as many exits in a row as the threshold says have judged for the same class.

    State: the class last judged for (-1 before the first exit and after a NaN) and the length of the run.
    """

    name = "patience"

    def state_size(self, num_classes: int) -> int:
        return 2

    def initial_state(self, n: int, num_classes: int, device: torch.device | str | None = None) -> Tensor:
        state = super().initial_state(n, num_classes, device)
        state[:, 0] = -1
        return state


class Vote(Policy):
    """Leave when one class has at least as many votes as the threshold says; every exit casts one. State: the votes."""

    name = "vote"

    def state_size(self, num_classes: int) -> int:
        return num_classes


class Judged(NamedTuple):
    """What a user's own rule sees at one exit: the n samples that are still there, in their order."""

    exit_index: int
    """Number of the exit in the network at hand, from 0."""
    indices: Tensor
    """(n,) int64: the samples' numbers in the batch."""
    logits: Tensor
    """(n, K), float32 or float64: the softmax of these logits is judged (normalised and divided by the temperature)."""
    stats: Tensor
    """(n, 3) float32: confidence, entropy in nats and margin of that softmax."""
    prediction: Tensor
    """(n,) int64: the answer of a sample that leaves here."""
    threshold: float | Tensor
    """This exit's threshold."""


@dataclass(frozen=True)
class Custom(Policy):
    """A user's own rule, for the simulator and the eager executor.

    Args:
        on: as for every policy; settles what ``Judged.logits`` and ``Judged.stats`` describe.
        rule: called at every exit but the last with a :class:`Judged`; returns (n,) bool, True for those that leave.
            A sample whose judged distribution holds a NaN stays whatever the rule says.
    """

    rule: Callable[[Judged], Tensor] | None = None

    name: ClassVar[str] = "custom"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.rule):
            raise TypeError(f"Custom: rule must be callable, got {type(self.rule).__name__}")

    @property
    def built_in(self) -> bool:
        return False

    def gate(
        self,
        features: Tensor,
        running: Tensor,
        weight_sum: float | Tensor,
        indices: Tensor,
        state: Tensor,
        exit_logits: Tensor,
        *,
        exit_index: int,
        weight: float | Tensor,
        threshold: float | Tensor,
        temperature: float | Tensor = 1.0,
        enabled: bool = True,
    ) -> GateResult:
        # With the gate disabled nobody leaves, so the operator returns every row in its place: sums and statistics
        # are its own, only the decision and the partition are made here.
        kept = ops.gate(
            features,
            running,
            weight_sum,
            indices,
            state,
            exit_logits,
            weight=weight,
            threshold=0.0,
            temperature=temperature,
            policy="confidence",
            on=self.on,
            enabled=False,
        )
        if not enabled:
            return kept
        if self.on == "ensemble":
            judged = kept.running / (kept.weight_sum * temperature)
        else:
            judged = exit_logits.to(kept.running.dtype) / temperature
        leaves = self.rule(Judged(exit_index, indices, judged, kept.stats, kept.argmax, threshold))
        if not isinstance(leaves, Tensor) or leaves.dtype != torch.bool or leaves.shape != indices.shape:
            found = (
                f"{leaves.dtype} of shape {list(leaves.shape)}" if isinstance(leaves, Tensor) else type(leaves).__name__
            )
            raise ValueError(f"Custom: rule must return a bool tensor of shape {list(indices.shape)}, got {found}")
        leaves = leaves & ~kept.stats[:, 0].isnan()
        order = torch.argsort(leaves.to(torch.uint8), stable=True)
        count = leaves.numel() - leaves.sum()
        gone = leaves[order].view(-1, *[1] * (features.dim() - 1))
        compacted = torch.empty_like(features).copy_(features[order]).masked_fill_(gone, 0)
        return GateResult(
            compacted,
            kept.running[order],
            kept.indices[order],
            kept.state[order],
            kept.stats[order],
            kept.argmax[order],
            kept.weight_sum,
            count,
        )


POLICIES: dict[str, type[Policy]] = {kind.name: kind for kind in (Confidence, Entropy, Margin, Patience, Vote)}
"""The built-in policies by the names that ``aep_ext.ops.gate`` knows."""


def as_policy(policy: Policy | str | Callable[[Judged], Tensor], on: str | None = None) -> Policy:
    """A policy from an instance, a built-in name, or a user's callable.

    Args:
        policy: what to make it from.
        on: "ensemble" or "exit"; by default the instance's own, otherwise "ensemble".

    Raises:
        ValueError: no built-in policy has that name, or ``on`` contradicts the instance.
        TypeError: neither a policy, a name nor callable.
    """
    if isinstance(policy, Policy):
        if on is not None and on != policy.on:
            raise ValueError(f"as_policy: on must agree with the policy's own, {policy.on!r}, got {on!r}")
        return policy
    subject = "ensemble" if on is None else on
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"as_policy: policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        return POLICIES[policy](subject)
    if callable(policy):
        return Custom(subject, policy)
    raise TypeError(f"as_policy: policy must be a Policy, a name or a callable, got {type(policy).__name__}")
