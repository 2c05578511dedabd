"""Units: one call per exit, from the features of the exit before to this exit's features and logits.

A :class:`MultiExitNet` is cut into units here; a prepared net of ``aep_ext.deploy`` brings units of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aep_ext import ops
from aep_ext.surgery.multi_exit import MultiExitNet

Unit = Callable[[Tensor], tuple[Tensor | None, Tensor]]
"""``unit(features)`` -> (features or None, logits)."""


class Run(Protocol):
    """The units, for one walk of one batch from exit to exit. Whoever began it closes it.

    Features are only handed back: tensors, or whatever stands for those that lie in the run's own memory. There they
    are good until the next call of the run, and so are the logits.
    """

    def __call__(self, e: int, features: Any) -> tuple[Any, Tensor]:
        """From the input (e = 0) or the features at exit e-1: the features and the logits (n, K) at exit e."""
        ...

    def take(self, features: Any, positions: Tensor) -> Any:
        """The features of fewer rows, at ``positions`` (m,) int64 among those at hand, m at least 1."""
        ...

    def tensor(self, features: Any) -> Tensor:
        """Features (n, ...) to look at."""
        ...

    def close(self) -> None:
        """The walk is over, wherever it ended."""
        ...


def take(features: Tensor, positions: Tensor) -> Tensor:
    """Copies rows, (n, ...) and (m,) int64 -> (m, ...), in the memory order of ``features``.

    Equivalent to ``features[positions]``, but channels_last stays so.
    """
    if not features.is_contiguous() and features.dim() in (4, 5):
        form = torch.channels_last if features.dim() == 4 else torch.channels_last_3d
        if features.is_contiguous(memory_format=form):
            return features.movedim(1, -1).index_select(0, positions).movedim(-1, 1)
    return features.index_select(0, positions)


class _TensorRun:
    """What runs share whose features are tensors of their own."""

    __slots__ = ()

    def take(self, features: Tensor, positions: Tensor) -> Tensor:
        return take(features, positions)

    def tensor(self, features: Tensor) -> Tensor:
        return features

    def close(self) -> None:
        pass


class KnownLogits(_TensorRun):
    """A walk on which nobody leaves, through a network that has run already: its exit logits (E, n, K)."""

    __slots__ = ("_logits",)

    def __init__(self, exit_logits: Tensor) -> None:
        self._logits = exit_logits

    def __call__(self, e: int, features: Tensor) -> tuple[Tensor, Tensor]:
        return features, self._logits[e]


class GivenUnits:
    """Units that a network brings: ``unit(features) -> (features or None, logits)``, one per exit.

    Where the network offers ``begin``, a :class:`Run` of its own making, batches walk by that.
    """

    def __init__(self, net: Any, units: Sequence[Unit]) -> None:
        self.net, self.units = net, tuple(units)
        self._begins = callable(getattr(net, "begin", None))

    def begin(self) -> Run:
        """A run for one forward pass."""
        return self.net.begin() if self._begins else _GivenRun(self.units)

    def begin_owning(self) -> Run:
        """A run whose features and logits stay good for as long as they are held."""
        return _GivenRun(self.units)


class _GivenRun(_TensorRun):
    __slots__ = ("units",)

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units

    def __call__(self, e: int, features: Tensor) -> tuple[Tensor | None, Tensor]:
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

    begin_owning = begin


class _NetRun(_TensorRun):
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
