"""GatedNet: a pruned network with its gates, ready to answer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aep_ext.inference._old_criteria import Policy, as_policy
from aep_ext.inference.agreement import near_threshold
from aep_ext.inference.batching import Refill, images_of, predicted
from aep_ext.inference.end_to_end_timing import sizes_without_gates
from aep_ext.inference.executor import First, GatedOutput, all_at_the_end, answer, only_adds
from aep_ext.inference.settings import GateSettings, check_modes, flags_buffer, numbers_buffer, settings_of
from aep_ext.inference.simulate import Simulation, simulate
from aep_ext.inference.stage_profile import StageCosts, measure_costs
from aep_ext.inference.stages import GivenUnits, KnownLogits, NetUnits, units_of

_KEPT = ("thresholds", "temperatures")


class Calibrated(Protocol):
    """What a calibration finds: see :meth:`GatedNet.from_calibration`."""

    policy: Policy
    thresholds: Sequence[float] | Tensor
    temperatures: Sequence[float] | Tensor
    enabled: Sequence[bool] | Tensor


class GatedNet(nn.Module):
    """Samples leave at the first enabled exit where the policy says that their answer is good enough.

    ``gated(x)`` gives a :class:`GatedOutput`: logits (N, K), exit (N,), confidence (N,). The decisions are those of
    :func:`simulate` on the exits' logits; :meth:`simulate` runs it with this net's own numbers. With every gate off the
    logits are the network's own ensemble, bit for bit where it runs on the same batch shape.

    A gated net answers, it does not train: in training mode calling it is an error (its ``net`` can be trained).
    Gradients are not recorded.

    Args:
        pruned: a :class:`MultiExitNet`; or an object with ``stages``, E units that map features to (features or None,
            logits), and ``output_weights``, E numbers (a prepared net). It is not copied.
        policy: a :class:`Policy`, a built-in name, or a user's callable (see :class:`Custom`).
        thresholds: E-1 numbers in the policy's unit, or one for all; none NaN.
        temperatures: E positive numbers, or one for all; 1 by default.
        enabled: E-1 flags; all by default. A disabled exit lets nobody go, but patience and votes count it.
        mode: what happens, where some leave, to the features of the rest: "compact" copies theirs together; "mask"
            carries all rows on, decided or not; "off" does not gate at that exit, as if it were disabled; "auto" takes
            what costs least by :meth:`measure`, and "compact" before anything was measured. One, or E-1.

    Attributes:
        net: ``pruned``.
        policy: the policy.
        thresholds, temperatures, enabled: persistent buffers, (E-1,) float64, (E,) float64, (E-1,) bool. They may be
            changed in place or replaced at any time. The numbers stay float64 under ``.to(dtype)`` (float32 on MPS).
        costs: the measured :class:`StageCosts`, or None. Not saved: they belong to a machine.

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names the rule and the value.
    """

    thresholds: Tensor
    temperatures: Tensor
    enabled: Tensor

    def __init__(
        self,
        pruned: Any,
        policy: Policy | str | Any,
        thresholds: Sequence[float] | Tensor | float,
        temperatures: Sequence[float] | Tensor | float | None = None,
        enabled: Sequence[bool] | Tensor | bool | None = None,
        mode: str | Sequence[str] = "auto",
    ) -> None:
        super().__init__()
        self._exits = 0  # not known yet
        self.net = pruned
        self.policy = as_policy(policy)
        self._modes = check_modes(mode, self._exits - 1)
        device = self._weights().device
        gate_limits = numbers_buffer("thresholds", thresholds, self._exits - 1, positive=False)
        scales = numbers_buffer(
            "temperatures", 1.0 if temperatures is None else temperatures, self._exits, positive=True
        )
        if device is not None and device.type == "mps":  # has no double precision
            gate_limits, scales = gate_limits.float(), scales.float()
        self.register_buffer("thresholds", gate_limits.to(device))
        self.register_buffer("temperatures", scales.to(device))
        self.register_buffer("enabled", flags_buffer(enabled, self._exits - 1).to(device))
        self.costs: StageCosts | None = None
        self._pays = (True,) * (self._exits - 1)
        self._closed_at: tuple[tuple[int, bool], ...] = ()  # by batch size: whether gates of mode "auto" stay shut
        self._cache: tuple[tuple[tuple[Tensor, int, int], ...], tuple[GateSettings, GateSettings]] | None = None
        self._known: dict[Any, First] = {}
        self.training = getattr(pruned, "training", False)
        self.settings()

    @classmethod
    def from_calibration(cls, net: Any, result: Calibrated, mode: str | Sequence[str] = "auto") -> GatedNet:
        """A gated net with the policy, thresholds, temperatures and flags that a calibration found for ``net``.

        Raises:
            ValueError: the calibration was made for other output weights (its ``weights``, where it has them).
        """
        weights = getattr(result, "weights", None)
        if weights is not None:
            own, theirs = (torch.as_tensor(w).detach().double().cpu() for w in (net.output_weights, weights))
            if own.shape != theirs.shape or not torch.allclose(own, theirs, rtol=1e-6, atol=0):
                raise ValueError(
                    "GatedNet.from_calibration: net must have the output weights that were calibrated, "
                    f"{theirs.tolist()}, got {own.tolist()}"
                )
        return cls(net, result.policy, result.thresholds, result.temperatures, result.enabled, mode)

    @property
    def num_exits(self) -> int:
        """E."""
        return self._exits

    @property
    def mode(self) -> tuple[str, ...]:
        """E-1 modes. May be set to one mode or to E-1."""
        return self._modes

    @mode.setter
    def mode(self, mode: str | Sequence[str]) -> None:
        self._modes, self._cache = check_modes(mode, self._exits - 1), None

    @property
    def live(self) -> tuple[bool, ...]:
        """E-1 flags: where samples can leave early, by flags, modes and measured costs; ``simulate``'s ``enabled``."""
        return self.settings().live[:-1]

    def gates_at(self, rows: int) -> bool:
        """Whether the exits of mode "auto" are gated in a batch of so many rows: False where :meth:`measure` found the
        network faster without; of the sizes measured, the largest one up to ``rows`` decides."""
        place = bisect_right(self._closed_at, rows, key=lambda entry: entry[0])
        return not (self._closed_at and self._closed_at[max(place - 1, 0)][1])

    def settings(self) -> GateSettings:
        """The buffers as numbers, read again only where one has changed.

        Raises:
            ValueError: a value is out of its range.
        """
        return self._both_settings()[0]

    def _both_settings(self) -> tuple[GateSettings, GateSettings]:
        """With the gates of mode "auto", and with them shut."""
        buffers = self._buffers
        tensors = (buffers["thresholds"], buffers["temperatures"], buffers["enabled"], self._weights())
        if self._cache is not None:
            for tensor, (seen, version, storage) in zip(tensors, self._cache[0], strict=True):
                # A storage that was exchanged (`tensor.data = ...`) counts no version.
                if tensor is not seen or tensor._version != version or tensor.data_ptr() != storage:
                    break
            else:
                return self._cache[1]
        gated = [mode != "off" and (mode != "auto" or pays) for mode, pays in zip(self._modes, self._pays, strict=True)]
        shut = [gate and mode != "auto" for gate, mode in zip(gated, self._modes, strict=True)]
        settings = settings_of(tensors[3], *tensors[:3], gated), settings_of(tensors[3], *tensors[:3], shut)
        self._cache = None
        if not any(tensor.is_inference() for tensor in tensors):  # tensors of inference mode count no versions
            self._cache = tuple((t, t._version, t.data_ptr()) for t in tensors), settings
        return settings

    def _weights(self) -> Tensor:
        """The network's output weights, as they are now."""
        return self._units.net.output_weights if self._given is None else self._given

    def forward(self, x: Tensor) -> GatedOutput:
        """Answers a batch.

        Args:
            x: (N, ...), what the network takes; N may be 0.

        Raises:
            RuntimeError: the net is in training mode.
            ValueError: a buffer holds a value out of its range.
        """
        self._check_mode()
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._answer(x)
        return self._answer(x)

    def _answer(self, x: Tensor) -> GatedOutput:
        opened, shut = self._both_settings()
        settings = shut if self._closed_at and not self.gates_at(len(x)) else opened
        return self._walk(settings, x)

    def _walk(self, settings: GateSettings, x: Tensor) -> GatedOutput:
        exit_logits = getattr(self._units.net, "exit_logits", None)
        if len(x) > 1 and exit_logits is not None and not any(settings.live[:-1]):
            # Nobody leaves: the network runs as one piece, and its heads in one operator.
            logits = exit_logits(x)
            whole = only_adds(self.policy) and self.policy.on == "ensemble"
            if whole and type(logits) is Tensor and logits.dtype in (torch.float32, torch.float64):
                return all_at_the_end(settings, logits)
            run = KnownLogits(logits)
        else:
            run = self._units.begin()
        return answer(run, self.policy, settings, x, self._compacts, self._known)

    def refill(self, capacity: int | None = None, max_delay: int | None = 64) -> Refill:
        """A pooled executor to feed by hand, with the numbers as they are now; arguments as for :class:`Refill`."""
        self._check_mode()
        return Refill(self._units.begin_owning, self.policy, self.settings(), capacity=capacity, max_delay=max_delay)

    def predict(
        self, loader: Iterable[Any], refill: bool = True, capacity: int | None = None, max_delay: int | None = 64
    ) -> Iterator[GatedOutput]:
        """Answers a data set or an endless stream, batch by batch, in order.

        Args:
            loader: gives inputs (n, ...), or tuples and lists whose first entry they are. They are moved to this
                net's device.
            refill: survivors of several batches are put together, so that late stages run on full batches: outputs then
                come with a delay. False: every batch on its own.
            capacity: the size of a full batch; by default that of the first one.
            max_delay: the most batches that may be unanswered before more are read; see :class:`Refill` for what is
                held in memory.

        Returns:
            An iterator of one :class:`GatedOutput` per batch.

        Raises:
            RuntimeError: the net is in training mode.
            TypeError: the loader gives something else.
        """
        self._check_mode()
        device = self.thresholds.device
        if refill:
            return predicted(loader, device, self.refill(capacity, max_delay))
        return (self(images_of(item).to(device, non_blocking=True)) for item in loader)

    def predict_all(self, loader: Iterable[Any], refill: bool = True, capacity: int | None = None) -> GatedOutput:
        """All answers of :meth:`predict` in one, for a finite loader.

        Raises:
            ValueError: the loader gives no batch, so the number of classes is not known.
        """
        outputs = list(self.predict(loader, refill, capacity))
        if not outputs:
            raise ValueError("GatedNet.predict_all: the loader must give at least one batch, got none")
        return GatedOutput(*(torch.cat(column) for column in zip(*outputs, strict=True)))

    def measure(
        self,
        example: Tensor,
        sizes: Sequence[int] | None = None,
        *,
        repeats: int = 5,
        leaving: float | Sequence[float] = 1.0,
    ) -> StageCosts:
        """Times stages, gates and copies on this machine, as the choices of mode "auto" need them.

        From then on, at an exit whose mode is "auto", rows are cut down where that is the cheapest way to the end, and
        carried on where it is not. An exit whose gate costs more than it can save, if the fraction ``leaving`` of those
        present goes, is not gated at all: :attr:`live` says so, and then samples go further than thresholds alone ask.
        At last whole calls are timed, with the gates of mode "auto" and without: at batch sizes where the network is
        faster without, :meth:`gates_at` is False, and all samples go to the end (or to an exit of another mode).

        Args:
            example: (N, ...), N at least 1: images as they will come, since what gates save depends on who leaves.
            sizes: the numbers of rows to time, up to N; by default 1, 2, 4, ... and N.
            repeats: timed calls for each part, of which the shortest counts.
            leaving: E-1 expected fractions, or one for all. With 1 an exit is given up only where it cannot pay.

        Returns:
            The costs, also kept as ``costs``. For another machine or thread count, measure again.

        Raises:
            RuntimeError: the net is in training mode.
            ValueError: sizes outside 1..N, repeats below 1, or fractions outside 0..1.
        """
        self._check_mode()
        n = len(example)
        wanted = {1 << k for k in range(n.bit_length())} | {n} if sizes is None else set(sizes)
        if not wanted or min(wanted) < 1 or max(wanted) > n:
            raise ValueError(f"GatedNet.measure: sizes must be within 1..{n}, got {sorted(wanted)}")
        if repeats < 1:
            raise ValueError(f"GatedNet.measure: repeats must be at least 1, got {repeats}")
        with torch.no_grad():
            costs = measure_costs(self._units.begin, self.policy, self.settings(), example, sorted(wanted), repeats)
            self.use_costs(costs, leaving)
            if "auto" in self._modes and any(self.live):
                opened, shut = (partial(self._walk, settings) for settings in self._both_settings())
                slower = sizes_without_gates(opened, shut, example, costs.sizes, repeats)
                self._closed_at = tuple((size, size in slower) for size in costs.sizes)
        return costs

    def use_costs(self, costs: StageCosts | None, leaving: float | Sequence[float] = 1.0) -> None:
        """Goes by costs measured before; None: by none. ``leaving`` as for :meth:`measure`, whose timing of whole
        calls is forgotten: gates are open at every batch size."""
        fractions = [leaving] * (self._exits - 1) if isinstance(leaving, int | float) else list(leaving)
        if len(fractions) != self._exits - 1 or any(not 0 <= f <= 1 for f in fractions):
            raise ValueError(f"GatedNet: leaving must be {self._exits - 1} fractions in 0..1, got {fractions}")
        if costs is not None and len(costs.stages) != self._exits:
            raise ValueError(f"GatedNet: costs must be of {self._exits} exits, got {len(costs.stages)}")
        self._pays = tuple(costs is None or costs.pays(e, share) for e, share in enumerate(fractions))
        self.costs, self._cache, self._closed_at = costs, None, ()

    def simulate(
        self, exit_logits: Tensor, *, target: Tensor | None = None, costs: Sequence[float] | Tensor | None = None
    ) -> Simulation:
        """:func:`aep_ext.inference.simulate` on cached logits (E, N, K), with this net's policy and numbers."""
        own = self.settings()
        return simulate(
            exit_logits,
            own.weights,
            self.policy,
            own.thresholds[:-1],
            temperatures=own.temperatures,
            enabled=list(self.live),
            target=target,
            costs=costs,
        )

    def near_threshold(self, exit_logits: Tensor, tolerance: float = 1e-5) -> Tensor:
        """:func:`aep_ext.termination.near_threshold` on cached logits (E, N, K), with this net's policy and numbers."""
        own = self.settings()
        return near_threshold(
            exit_logits,
            own.weights,
            self.policy,
            own.thresholds[:-1],
            temperatures=own.temperatures,
            enabled=list(self.live),
            tolerance=tolerance,
        )

    def _compacts(self, e: int, rows: int, stay: int) -> bool:
        mode = self._modes[e]
        if mode == "auto":
            return self.costs is None or self.costs.compacts(e, rows, stay)
        return mode == "compact"

    def _check_mode(self) -> None:
        if self.training or getattr(self._units.net, "training", False):
            raise RuntimeError("GatedNet: must be in eval mode, got training mode; call eval(), or train its net")

    def _apply(self, fn: Any, recurse: bool = True) -> GatedNet:
        """Moves the net, but keeps the numbers in double precision, where the device has it."""
        target = fn(torch.empty(0)).device
        if target.type == "mps":
            for name in _KEPT:
                self._buffers[name] = self._buffers[name].float()
        kept = {name: self._buffers[name] for name in _KEPT}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(target)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "net":  # at first, and where it is replaced
            units, given, exits = _parts(value)
            if self._exits not in (0, exits):
                raise ValueError(f"GatedNet: net must have {self._exits} exits as before, got {exits}")
            self._units, self._given, self._exits = units, given, exits
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return (
            f"policy={self.policy}, thresholds={self.thresholds.tolist()}, "
            f"temperatures={self.temperatures.tolist()}, enabled={self.enabled.tolist()}, mode={self._modes}"
        )


def _parts(pruned: Any) -> tuple[NetUnits | GivenUnits, Tensor | None, int]:
    """The units of a network, its output weights where they are no tensor that may change, and E."""
    units = units_of(pruned)
    weights = getattr(pruned, "output_weights", None)
    if weights is None:
        raise TypeError(f"GatedNet: pruned must have output_weights, got {type(pruned).__name__} without")
    if isinstance(units, GivenUnits) and len(units.units) != len(weights):
        raise ValueError(
            f"GatedNet: pruned must have one stage for each of its {len(weights)} output_weights, "
            f"got {len(units.units)}"
        )
    # A tensor that is another one each time it is asked for is a copy of what does not change.
    own = isinstance(weights, Tensor) and weights is pruned.output_weights
    given = None if own else weights if isinstance(weights, Tensor) else torch.tensor(weights, dtype=torch.float64)
    return units, given, len(weights)
