"""GatedNet: a network with its gates, ready to answer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aep_ext.inference.batching import ContinuousBatcher, batched, images_of
from aep_ext.inference.compiled_net import CompiledNet
from aep_ext.inference.criteria import criterion_name
from aep_ext.inference.executor import Executor, GatedOutput
from aep_ext.inference.exit_policy import ExitPolicy
from aep_ext.inference.simulate import Simulation, near_threshold, simulate
from aep_ext.inference.stage_profile import StageProfile, faster_without, measure_stages
from aep_ext.inference.stages import NetRun, StageRun
from aep_ext.pruning.extract import prune
from aep_ext.surgery.multi_exit import MultiExitNet

MODES = ("auto", "compact", "mask", "off")
_NUMBERS = ("thresholds", "temperatures")


class _Current(NamedTuple):
    """What the buffers say, and where they were when they were read."""

    seen: tuple[tuple[Tensor, int, int], ...]
    policy: ExitPolicy
    gates: Executor
    """With the gates that the modes leave."""
    without_auto: Executor
    """With those of mode "auto" shut."""


class GatedNet(nn.Module):
    """Samples leave at the first enabled exit where the policy's criterion says that their answer is good enough.

    ``gated(x)`` gives a :class:`GatedOutput`: logits (N, K), exit (N,), confidence (N,). The logits are R_e, the
    running ensemble of the exits up to the one taken, divided by the sum of their output weights. Exits and answers are
    those of :func:`simulate` on the exits' logits; :meth:`simulate` runs it with this net's own numbers.

    A gated net answers, it does not train: in training mode calling it is an error (its ``net`` can be trained).
    Gradients are not recorded.

    Args:
        net: a :class:`MultiExitNet` or a :class:`CompiledNet`, with the policy's exits. It is not copied.
        policy: when a sample leaves. Its output weights must be the network's (to 1e-6, since the network holds
            float32), its ``exits`` 0..E-1 or the network's ``exit_ids``. See :meth:`from_policy` for a full network.
        mode: what happens, where some leave, to the features of the rest: "compact" copies theirs together; "mask"
            carries all rows on, decided or not; "off" does not gate at that exit, as if it were disabled; "auto" takes
            what costs least by :meth:`measure`, and "compact" before anything was measured. One, or E-1.

    Attributes:
        net: the network.
        thresholds, temperatures, enabled: persistent buffers, (E-1,) float64, (E,) float64, (E-1,) bool. They may be
            changed in place or replaced at any time. The numbers stay float64 under ``.to(dtype)`` (float32 on MPS).
        profile: the measured :class:`StageProfile`, or None. Not saved: it belongs to a machine.
        calibration: what found the policy, an :class:`aep_ext.calibration.Calibration` (after loading: its dict), or
            None.

    Raises:
        TypeError: ``net`` or ``policy`` is of another type.
        ValueError: the policy is for other exits or weights, or a mode is unknown.
    """

    thresholds: Tensor
    temperatures: Tensor
    enabled: Tensor

    def __init__(self, net: MultiExitNet | CompiledNet, policy: ExitPolicy, mode: str | Sequence[str] = "auto") -> None:
        super().__init__()
        if hasattr(net, "_orig_mod"):
            raise TypeError(
                "GatedNet: net must not be compiled as a whole, since its gates sit between its stages: compile these "
                "(net.stages[i] = torch.compile(net.stages[i])), or use aep_ext.compile"
            )
        if not isinstance(net, MultiExitNet | CompiledNet):
            raise TypeError(f"GatedNet: net must be a MultiExitNet or a CompiledNet, got {type(net).__name__}")
        _check_policy(net, policy)
        self.net = net
        self._criterion, self._criterion_on = policy.criterion, policy.criterion_on
        device = net.output_weights.device
        number = torch.float32 if device.type == "mps" else torch.float64  # MPS has no double precision
        for name in _NUMBERS:
            self.register_buffer(name, torch.tensor(getattr(policy, name), dtype=number, device=device))
        self.register_buffer("enabled", torch.tensor(policy.enabled, dtype=torch.bool, device=device))
        self._mode = _modes(mode, policy.num_exits - 1)
        self.profile: StageProfile | None = None
        self.calibration: Any = None
        self._faster_without: tuple[tuple[int, bool], ...] = ()  # by batch size, as measured
        self._read: _Current | None = None
        self._writers: dict[int, Any] = {}
        self.training = getattr(net, "training", False)

    @classmethod
    def from_policy(cls, full_net: MultiExitNet, policy: ExitPolicy, mode: str | Sequence[str] = "auto") -> GatedNet:
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
            raise ValueError(
                f"GatedNet.from_policy: full_net must have the exits {list(policy.exits)}, "
                f"got {list(full_net.exit_ids)}"
            )
        net = prune(full_net, [full_net.exit_ids.index(number) for number in policy.exits])
        net.output_weights.copy_(torch.tensor(policy.output_weights))
        return cls(net, policy, mode).eval()

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

    @property
    def mode(self) -> tuple[str, ...]:
        """E-1 modes. May be set to one mode or to E-1."""
        return self._mode

    @mode.setter
    def mode(self, mode: str | Sequence[str]) -> None:
        self._mode, self._read = _modes(mode, self.num_exits - 1), None

    @property
    def live(self) -> tuple[bool, ...]:
        """E-1 flags: where samples can leave early, by flags and modes."""
        return self._current().gates.policy.enabled

    def gates_at(self, rows: int) -> bool:
        """Whether the exits of mode "auto" are gated in a batch of so many rows: False where :meth:`measure` found the
        network faster without; of the sizes measured, the largest one up to ``rows`` decides."""
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
            output_weights=weights.tolist(),
            thresholds=tensors[0],
            criterion=self._criterion,
            criterion_on=self._criterion_on,
            temperatures=tensors[1],
            enabled=tensors[2],
            exits=self._net().exit_ids,
        )
        live = [flag and mode != "off" for flag, mode in zip(policy.enabled, self._mode, strict=True)]
        by_hand = [flag and mode != "auto" for flag, mode in zip(live, self._mode, strict=True)]
        gates, without_auto = (Executor(replace(policy, enabled=flags)) for flags in (live, by_hand))
        if any(tensor.is_inference() for tensor in tensors):  # tensors of inference mode count no versions
            self._read = None
            return _Current((), policy, gates, without_auto)
        self._read = _Current(tuple((t, t._version, t.data_ptr()) for t in tensors), policy, gates, without_auto)
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
        executor = current.gates if not self._faster_without or self.gates_at(len(x)) else current.without_auto
        if torch.is_grad_enabled():
            with torch.no_grad():
                return executor(self._begin(), x, self._compacts)
        return executor(self._begin(), x, self._compacts)

    def batcher(self, capacity: int | None = None, max_delay: int | None = 64) -> ContinuousBatcher:
        """A pooled executor to feed by hand, with the policy as it is now; arguments: :class:`ContinuousBatcher`."""
        self._check_eval()
        return ContinuousBatcher(
            partial(self._begin, owning=True), self._current().gates.policy, capacity=capacity, max_delay=max_delay
        )

    def predict(
        self, loader: Iterable[Any], continuous: bool = True, capacity: int | None = None, max_delay: int | None = 64
    ) -> Iterator[GatedOutput]:
        """Answers a data set or an endless stream, batch by batch, in order.

        Args:
            loader: gives inputs (n, ...), or tuples and lists whose first entry they are. They are moved to this
                net's device.
            continuous: survivors of several batches are put together, so that late stages run on full batches: outputs
                then come with a delay. False: every batch on its own.
            capacity: the size of a full batch; by default that of the first one.
            max_delay: the most batches that may be unanswered before more are read; see :class:`ContinuousBatcher` for
                what is held in memory.

        Returns:
            An iterator of one :class:`GatedOutput` per batch.

        Raises:
            RuntimeError: the net is in training mode.
            TypeError: the loader gives something else.
        """
        self._check_eval()
        device = self.thresholds.device
        if continuous:
            return batched(loader, device, self.batcher(capacity, max_delay))
        return (self(images_of("GatedNet.predict", item).to(device, non_blocking=True)) for item in loader)

    def predict_all(self, loader: Iterable[Any], continuous: bool = True, capacity: int | None = None) -> GatedOutput:
        """All answers of :meth:`predict` in one, for a finite loader.

        Raises:
            ValueError: the loader gives no batch, so the number of classes is not known.
        """
        outputs = list(self.predict(loader, continuous, capacity))
        if not outputs:
            raise ValueError("GatedNet.predict_all: the loader must give at least one batch, got none")
        return GatedOutput(*(torch.cat(column) for column in zip(*outputs, strict=True)))

    def measure(self, example: Tensor, sizes: Sequence[int] | None = None, *, repeats: int = 5) -> StageProfile:
        """Times stages, gates and copies on this machine, as the choices of mode "auto" need them.

        From then on, at an exit whose mode is "auto", rows are cut down where that is the cheapest way to the end, and
        carried on where it is not. At last whole calls are timed, with the gates of mode "auto" and without: at batch
        sizes where the network is faster without, :meth:`gates_at` is False, and all samples go to the end (or to an
        exit of another mode).

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

        def call(executor: Executor, x: Tensor) -> GatedOutput:
            return executor(self._begin(), x, self._compacts)

        with torch.no_grad():
            self.use_profile(measure_stages(self._begin, current.gates, example, sorted(wanted), repeats))
            if "auto" in self._mode and any(self.live):
                with_and_without = partial(call, current.gates), partial(call, current.without_auto)
                found = faster_without(*with_and_without, example, self.profile.sizes, repeats)
                self._faster_without = tuple((size, size in found) for size in self.profile.sizes)
        return self.profile

    def use_profile(self, profile: StageProfile | None) -> None:
        """Goes by a profile measured before; None: by none. Gates are open at every batch size then."""
        if profile is not None and len(profile.stages) != self.num_exits:
            raise ValueError(f"GatedNet: profile must be of {self.num_exits} exits, got {len(profile.stages)}")
        self.profile, self._faster_without = profile, ()

    def simulate(
        self, exit_logits: Tensor, *, target: Tensor | None = None, costs: Sequence[float] | Tensor | None = None
    ) -> Simulation:
        """:func:`simulate` on cached logits (E, N, K), with this net's policy; a mode "off" counts as disabled."""
        return simulate(exit_logits, self._current().gates.policy, target=target, costs=costs)

    def near_threshold(self, exit_logits: Tensor, tolerance: float = 1e-5) -> Tensor:
        """:func:`near_threshold` on cached logits (E, N, K), with this net's policy."""
        return near_threshold(exit_logits, self._current().gates.policy, tolerance)

    def _compacts(self, e: int, rows: int, stay: int) -> bool:
        mode = self._mode[e]
        if mode == "auto":
            return self.profile is None or self.profile.compacts(e, rows, stay)
        return mode == "compact"

    def _check_eval(self) -> None:
        if self.training or getattr(self._net(), "training", False):
            raise RuntimeError("GatedNet: must be in eval mode, got training mode; call eval(), or train its net")

    def _apply(self, fn: Any, recurse: bool = True) -> GatedNet:
        """Moves the net, but keeps the numbers in double precision, where the device has it."""
        target = fn(torch.empty(0)).device
        if target.type == "mps":
            for name in _NUMBERS:
                self._buffers[name] = self._buffers[name].float()
        kept = {name: self._buffers[name] for name in _NUMBERS}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(target)
        return self

    def extra_repr(self) -> str:
        return (
            f"criterion={criterion_name(self._criterion)} of the {self._criterion_on}, "
            f"thresholds={self.thresholds.tolist()}, temperatures={self.temperatures.tolist()}, "
            f"enabled={self.enabled.tolist()}, mode={self._mode}"
        )


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


def _modes(mode: str | Sequence[str], count: int) -> tuple[str, ...]:
    """One mode for every exit but the last."""
    modes = (mode,) * count if isinstance(mode, str) else tuple(mode)
    strange = next((m for m in ((mode,) if isinstance(mode, str) else modes) if m not in MODES), None)
    if strange is not None:
        raise ValueError(f"GatedNet: mode must be one of {', '.join(MODES)}, got {strange!r}")
    if len(modes) != count:
        raise ValueError(f"GatedNet: mode must have {count} entries, got {len(modes)}")
    return modes
