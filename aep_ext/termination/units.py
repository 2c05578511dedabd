"""Units: one call per exit, from the features of the exit before to this exit's features and logits.

A :class:`MultiExitNet` is cut into units here; a prepared net of ``aep_ext.deploy`` brings units of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..surgery.multi_exit import MultiExitNet

Run = Callable[[int, Tensor], tuple[Tensor | None, Tensor]]
"""``run(e, features)`` -> (features at exit e, or None after the last; logits of exit e)."""


class GivenUnits:
    """Units that a network brings: ``unit(features) -> (features or None, logits)``, one per exit."""

    def __init__(self, net: Any, units: Sequence[Callable[[Tensor], tuple[Tensor | None, Tensor]]]) -> None:
        self.net, self.units = net, tuple(units)

    def begin(self) -> Run:
        """A run for one forward pass."""
        return self._run

    def _run(self, e: int, features: Tensor) -> tuple[Tensor | None, Tensor]:
        return self.units[e](features)


class NetUnits:
    """A network's stages up to each exit, and that exit's head, by the path that the network itself would take.

    Stages and heads are looked up at every forward pass, so one that was replaced is used from then on
    (``net.stages[i] = torch.compile(...)``).

    The network runs its heads after all stages, a gated net between them: a head that writes on its input (an in-place
    activation first of all) would spoil what the next stage reads. Such heads are found out the first time they run,
    and get a copy.
    """

    def __init__(self, net: MultiExitNet) -> None:
        self.net = net
        self.writers: dict[int, tuple[nn.Module, bool]] = {}

    def begin(self) -> Run:
        """A run for one forward pass."""
        return _NetRun(self)


class _NetRun:
    __slots__ = ("bounds", "heads", "last", "linears", "plans", "stages", "writers")

    def __init__(self, units: NetUnits) -> None:
        net = units.net
        self.stages, self.heads, self.bounds = list(net.stages), list(net.exits), net.exit_stages
        self.linears, self.plans, self.writers = net._fusable_linears(), net._fused_plans, units.writers
        self.last = len(self.bounds) - 1

    def __call__(self, e: int, features: Tensor) -> tuple[Tensor | None, Tensor]:
        for index in range(self.bounds[e - 1] + 1 if e else 0, self.bounds[e] + 1):
            features = self.stages[index](features)
        head, pooled = self.heads[e], features
        if self.linears is None:
            logits, features = self._guarded(e, head, features)
        else:
            plan = self.plans[e]
            if plan is not None and plan.prepare is not None:
                pooled, features = self._guarded(e, head.get_submodule(plan.prepare), features)
            linear = self.linears[e]
            logits = ops.multi_exit_linear_head([pooled], [linear.weight], [linear.bias])[0]
        return (None if e == self.last else features), logits

    def _guarded(self, e: int, module: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
        """The module's result, and features that it did not write on."""
        if e == self.last:
            return module(features), features
        known = self.writers.get(e)
        if known is not None and known[0] is module:
            return module(features.clone() if known[1] else features), features
        kept = features.clone()
        result, writes = _writes(module, features, kept)
        self.writers[e] = (module, writes)
        return result, kept


def _writes(module: nn.Module, features: Tensor, kept: Tensor) -> tuple[Tensor, bool]:
    """The module's result, and whether it changed ``features``, of which ``kept`` is a copy."""
    tracked = not features.is_inference()  # tensors of inference mode count no versions
    before = features._version if tracked else 0
    result = module(features)
    return result, features._version != before if tracked else not features.equal(kept)


def units_of(pruned: Any) -> NetUnits | GivenUnits:
    """The units of a network.

    Args:
        pruned: a :class:`MultiExitNet`, or any object with ``stages``, a sequence of E units.

    Raises:
        TypeError: neither.
    """
    if isinstance(pruned, MultiExitNet):
        return NetUnits(pruned)
    if hasattr(pruned, "_orig_mod"):
        raise TypeError(
            "GatedNet: pruned must not be compiled as a whole, since its gates sit between its stages: "
            "compile these (net.stages[i] = torch.compile(net.stages[i]))"
        )
    stages = getattr(pruned, "stages", None)
    if stages is None or not all(callable(stage) for stage in stages):
        raise TypeError(
            "GatedNet: pruned must be a MultiExitNet or have stages, one callable unit for each exit, "
            f"got {type(pruned).__name__}"
        )
    return GivenUnits(pruned, stages)
