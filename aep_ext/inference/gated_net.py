"""GatedNet: a network with its gates, ready to answer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aep_ext.inference.batching import ContinuousBatcher, batched
from aep_ext.inference.compiled_net import CompiledNet
from aep_ext.inference.criteria import criterion_name
from aep_ext.inference.executor import Executor, GatedOutput
from aep_ext.inference.exit_policy import ExitPolicy
from aep_ext.inference.simulate import Simulation, near_threshold, simulate
from aep_ext.inference.stage_profile import StageProfile, faster_without, measure_stages
from aep_ext.inference.stages import NetRun, StageRun
from aep_ext.pruning.extract import prune
from aep_ext.surgery.multi_exit import MultiExitNet

_NUMBERS = ("thresholds", "temperatures")


class _Current(NamedTuple):
    """What the buffers say, and where they were when they were read."""

    seen: tuple[tuple[Tensor, int, int], ...]
    policy: ExitPolicy
    gated: Executor
    ungated: Executor
    """With every gate disabled."""


class GatedNet(nn.Module):
    """Samples leave at the first enabled exit where the policy's criterion says that their answer is good enough.

    ``gated(x)`` gives a :class:`GatedOutput`: logits (N, K), exit (N,), confidence (N,). The logits are R_e, the
    running ensemble of the exits up to the one taken, divided by the sum of their output weights. Exits and answers are
    those of :func:`simulate` on the exits' logits; :meth:`simulate` runs it with this net's own numbers.

    A gated net answers, it does not train: in training mode calling it is an error (its ``net`` can be trained).
    Gradients are not recorded.

    Args:
        net: a :class:`MultiExitNet` or a :class:`CompiledNet`, with the policy's exits. It is not copied.
            ``torch.compile`` goes on its stages, between which the gates sit: ``net.stages[i] = torch.compile(...)``.
        policy: when a sample leaves. Its output weights must be the network's (to 1e-6, since the network holds
            float32), its ``exits`` 0..E-1 or the network's ``exit_ids``. See :meth:`from_policy` for a full network.

    Attributes:
        net: the network.
        thresholds, temperatures, enabled: persistent buffers, (E-1,) float64, (E,) float64, (E-1,) bool. They may be
            changed in place or replaced at any time. The numbers stay float64 under ``.to(dtype)`` (float32 on MPS).
        profile: the measured :class:`StageProfile`, or None. Not saved: it belongs to a machine.
        calibration: what found the policy, an :class:`aep_ext.calibration.Calibration` (after loading: its dict), or
            None.
        classes, preprocessing: as the network has them when it is gated, see :class:`MultiExitNet`.

    Raises:
        TypeError: ``net`` or ``policy`` is of another type.
        ValueError: the policy is for other exits or weights.
    """

    thresholds: Tensor
    temperatures: Tensor
    enabled: Tensor
    _buffers: dict[str, Any]  # never None between calls
    _modules: dict[str, Any]

    def __init__(self, net: MultiExitNet | CompiledNet, policy: ExitPolicy) -> None:
        super().__init__()
        if not isinstance(net, MultiExitNet | CompiledNet):
            raise TypeError(f"GatedNet: net must be a MultiExitNet or a CompiledNet, got {type(net).__name__}")
        _check_policy(net, policy)
        self.net = net
        self._criterion, self._criterion_on, self._last_alone = policy.criterion, policy.criterion_on, policy.last_alone
        device = net.output_weights.device
        for name in _NUMBERS:
            self.register_buffer(name, torch.tensor(getattr(policy, name), dtype=_number_type(device), device=device))
        self.register_buffer("enabled", torch.tensor(policy.enabled, dtype=torch.bool, device=device))
        self.profile: StageProfile | None = None
        self.calibration: Any = None
        self.classes, self.preprocessing = net.classes, net.preprocessing
        self._faster_without: tuple[tuple[int, bool], ...] = ()  # by batch size, as measured
        self._read: _Current | None = None
        self._writers: dict[int, Any] = {}
        self.training = net.training

    @classmethod
    def from_policy(cls, full_net: MultiExitNet, policy: ExitPolicy) -> GatedNet:
        """Prunes ``full_net`` to ``policy.exits``, gives the copy the policy's output weights, and gates it.

        Args:
            full_net: has all of ``policy.exits`` among its ``exit_ids``; left as it is.

        Raises:
            TypeError: ``full_net`` is no MultiExitNet.
            ValueError: it lacks one of the exits.
        """
        if not isinstance(full_net, MultiExitNet):
            raise TypeError(f"GatedNet.from_policy: full_net must be a MultiExitNet, got {type(full_net).__name__}")
        missing = [number for number in policy.exits if number not in full_net.exit_ids]
        if missing:
            wanted, found = list(policy.exits), list(full_net.exit_ids)
            raise ValueError(f"GatedNet.from_policy: full_net must have the exits {wanted}, got {found}")
        net = prune(full_net, [full_net.exit_ids.index(number) for number in policy.exits])
        net.output_weights.copy_(torch.tensor(policy.output_weights))
        return cls(net, policy).eval()

    @property
    def policy(self) -> ExitPolicy:
        """The buffers, the criterion and the network's output weights as an :class:`ExitPolicy`.

        Raises:
            ValueError: a buffer holds a value out of its range.
        """
        return self._current().policy

    @property
    def num_exits(self) -> int:
        """E."""
        return len(self.temperatures)

    def gates_at(self, rows: int) -> bool:
        """Whether a batch of so many rows is gated: False where :meth:`measure` found the network faster without gates;
        of the sizes measured, the largest one up to ``rows`` decides."""
        if not self._faster_without:
            return True
        place = bisect_right(self._faster_without, rows, key=lambda entry: entry[0])
        return not self._faster_without[max(place - 1, 0)][1]

    def _current(self) -> _Current:
        """Read again only where a tensor has changed."""
        buffers, weights = self._buffers, self._net().output_weights
        tensors = (buffers["thresholds"], buffers["temperatures"], buffers["enabled"], weights)
        if self._read is not None:
            for tensor, (seen, version, storage) in zip(tensors, self._read.seen, strict=True):
                # A storage that was exchanged (`tensor.data = ...`) counts no version.
                if tensor is not seen or tensor._version != version or tensor.data_ptr() != storage:
                    break
            else:
                return self._read
        policy = ExitPolicy(
            output_weights=tuple(weights.tolist()),
            thresholds=tensors[0],
            criterion=self._criterion,
            criterion_on=self._criterion_on,
            temperatures=tensors[1],
            enabled=tensors[2],
            exits=self._net().exit_ids,
            last_alone=self._last_alone,
        )
        gated, ungated = Executor(policy), Executor(replace(policy, enabled=(False,) * (policy.num_exits - 1)))
        if any(tensor.is_inference() for tensor in tensors):  # tensors of inference mode count no versions
            self._read = None
            return _Current((), policy, gated, ungated)
        self._read = _Current(tuple((t, t._version, t.data_ptr()) for t in tensors), policy, gated, ungated)
        return self._read

    def _net(self) -> MultiExitNet | CompiledNet:
        # Not self.net: for a module that is a call of __getattr__, which one image would notice.
        return self._modules.get("net") or self.__dict__["net"]

    def _begin(self, owning: bool = False) -> StageRun:
        """The stages for one pass; ``owning``: features and logits stay good for as long as they are held."""
        net = self._net()
        return net.begin(owning) if isinstance(net, CompiledNet) else NetRun(net, self._writers)

    def forward(self, x: Tensor) -> GatedOutput:
        """Answers a batch.

        Args:
            x: (N, ...), what the network takes; N may be 0.

        Raises:
            RuntimeError: the net is in training mode.
            ValueError: a buffer holds a value out of its range.
        """
        self._check_eval()
        current = self._current()
        executor = current.gated if not self._faster_without or self.gates_at(len(x)) else current.ungated
        if torch.is_grad_enabled():
            with torch.no_grad():
                return executor(self._begin(), x)
        return executor(self._begin(), x)

    def batcher(self, capacity: int | None = None, max_delay: int | None = 64) -> ContinuousBatcher:
        """A pooled executor to feed by hand, with the policy as it is now; arguments: :class:`ContinuousBatcher`."""
        self._check_eval()
        return ContinuousBatcher(partial(self._begin, owning=True), self.policy, capacity=capacity, max_delay=max_delay)

    def predict(
        self, loader: Iterable[Any], capacity: int | None = None, max_delay: int | None = 64
    ) -> Iterator[GatedOutput]:
        """Answers a data set or an endless stream, batch by batch, in order, by continuous batching.

        Survivors of several batches are put together, so that late stages run on full batches: outputs come with a
        delay.

        Args:
            loader: gives inputs (n, ...), tuples and lists whose first entry they are, or dicts with them as
                "pixel_values" or "image". They are moved to this net's device.
            capacity: the size of a full batch; by default that of the first one.
            max_delay: the most batches that may be unanswered before more are read; see :class:`ContinuousBatcher` for
                what is held in memory.

        Returns:
            An iterator of one :class:`GatedOutput` per batch.

        Raises:
            RuntimeError: the net is in training mode.
            TypeError: the loader gives something else.
        """
        return batched(loader, self.thresholds.device, self.batcher(capacity, max_delay))

    def predict_all(self, loader: Iterable[Any], capacity: int | None = None) -> GatedOutput:
        """All answers of :meth:`predict` in one, for a finite loader.

        Raises:
            ValueError: the loader gives no batch, so the number of classes is not known.
        """
        outputs = list(self.predict(loader, capacity))
        if not outputs:
            raise ValueError("GatedNet.predict_all: the loader must give at least one batch, got none")
        return GatedOutput(*(torch.cat(column) for column in zip(*outputs, strict=True)))

    def measure(self, example: Tensor, sizes: Sequence[int] | None = None, *, repeats: int = 5) -> StageProfile:
        """Times stages and whole calls on this machine.

        From then on, at batch sizes where the network is faster without its gates, :meth:`gates_at` is False, and all
        samples go to the end.

        Args:
            example: (N, ...), N at least 1: images as they will come, since what gates save depends on who leaves.
            sizes: the numbers of rows to time, up to N; by default 1, 2, 4, ... and N.
            repeats: timed calls for each part, of which the shortest counts.

        Returns:
            The profile, also kept as ``profile``. For another machine or thread count, measure again.

        Raises:
            RuntimeError: the net is in training mode.
            ValueError: sizes outside 1..N, or repeats below 1.
        """
        self._check_eval()
        n = len(example)
        wanted = {1 << k for k in range(n.bit_length())} | {n} if sizes is None else set(sizes)
        if not wanted or min(wanted) < 1 or max(wanted) > n:
            raise ValueError(f"GatedNet.measure: sizes must be within 1..{n}, got {sorted(wanted)}")
        if repeats < 1:
            raise ValueError(f"GatedNet.measure: repeats must be at least 1, got {repeats}")
        current = self._current()

        def calls(executor: Executor) -> Callable[[Tensor], GatedOutput]:
            return lambda x: executor(self._begin(), x)

        with torch.no_grad():
            profile = measure_stages(self._begin, self.num_exits, example, sorted(wanted), repeats)
            found: frozenset[int] = frozenset()
            if any(current.policy.enabled):
                found = faster_without(calls(current.gated), calls(current.ungated), example, profile.sizes, repeats)
        self.profile, self._faster_without = profile, tuple((size, size in found) for size in profile.sizes)
        return profile

    def simulate(
        self, exit_logits: Tensor, *, target: Tensor | None = None, costs: Sequence[float] | Tensor | None = None
    ) -> Simulation:
        """:func:`simulate` on cached logits (E, N, K), with this net's policy."""
        return simulate(exit_logits, self.policy, target=target, costs=costs)

    def near_threshold(self, exit_logits: Tensor, tolerance: float = 1e-5) -> Tensor:
        """:func:`near_threshold` on cached logits (E, N, K), with this net's policy."""
        return near_threshold(exit_logits, self.policy, tolerance)

    def _check_eval(self) -> None:
        if self.training or self._net().training:
            raise RuntimeError("GatedNet: must be in eval mode, got training mode; call eval(), or train its net")

    def _apply(self, fn: Any, recurse: bool = True) -> GatedNet:
        """Moves the net, but keeps the numbers in double precision, where the device has it."""
        numbers = {name: self._buffers[name] for name in _NUMBERS}
        for name in numbers:
            self._buffers[name] = None
        super()._apply(fn, recurse)
        for name, tensor in numbers.items():
            self._buffers[name] = tensor.to(self.enabled.device, _number_type(self.enabled.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"criterion={criterion_name(self._criterion)} of the {self._criterion_on}, "
            f"thresholds={self.thresholds.tolist()}, temperatures={self.temperatures.tolist()}, "
            f"enabled={self.enabled.tolist()}"
        )

    def _repr_html_(self) -> str:
        return self.policy._repr_html_(f"GatedNet, {self._net().num_classes} classes")


def _number_type(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no double precision


def _check_policy(net: MultiExitNet | CompiledNet, policy: Any) -> None:
    if not isinstance(policy, ExitPolicy):
        raise TypeError(f"GatedNet: policy must be an ExitPolicy, got {type(policy).__name__}")
    weights = net.output_weights.detach().double().cpu()
    if policy.num_exits != len(weights) or policy.exits not in (tuple(range(len(weights))), tuple(net.exit_ids)):
        raise ValueError(
            f"GatedNet: policy must be for the network's exits {list(net.exit_ids)}, got exits {list(policy.exits)}; "
            "GatedNet.from_policy prunes a full network"
        )
    theirs = torch.tensor(policy.output_weights, dtype=torch.float64)
    if not torch.allclose(weights, theirs, rtol=1e-6, atol=0):
        raise ValueError(
            f"GatedNet: policy must have the network's output weights {weights.tolist()}, got {theirs.tolist()}; "
            "GatedNet.from_policy sets them"
        )
