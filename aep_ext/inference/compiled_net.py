"""PreparedNet: a multi-exit network whose units run on an engine, with the interface of MultiExitNet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.inference._old_criteria import Judged, Policy
from aep_ext.inference.backends.chain import Engine
from aep_ext.inference.compiled_walk import PreparedRun, Turns
from aep_ext.inference.executor import First, answer
from aep_ext.inference.gates import Gated, Gates, make_gates
from aep_ext.inference.verify import Verification, compare
from aep_ext.surgery.multi_exit import MultiExitNet

__all__ = ["PreparedNet", "Unit"]


class PreparedNet:
    """What :func:`aep_ext.inference.compile` makes: inference only, for images of the example's shape, any batch.

    ``prepared(x)`` is the ensemble (N, K), ``prepared.exit_logits(x)`` every exit's logits (E, N, K), as with
    :class:`~aep_ext.MultiExitNet` in eval mode; :meth:`gated` lets samples leave early. ``x`` has the example's
    channels, height, width, dtype and device; any strides (it is made contiguous if it is not). No gradient flows:
    whether ``x`` requires one makes no difference. All results are memory of their own. An empty batch
    never reaches the engine.

    One call runs at a time: a lock makes other threads wait. It cannot be pickled or copied; prepare the network again
    where it is needed.

    Attributes:
        backend: the engine that runs the units.
        timings: backend -> median milliseconds of all exits' logits on the example, where ``auto`` measured.
        notices: what was decided, left out or failed, in words.
        max_logit_difference: largest absolute difference between the units' logits and the network's on the example.
        num_exits, num_classes, exit_ids, output_weights: the network's; ``output_weights`` (E,) float32 is a
            copy, read-only.
        stages: the E units, callable one by one; see :class:`Unit`.
        threads: threads of the engine; for "eager" and "inductor" torch's own number decides.
        batches: batch sizes that have units of their own shape.
    """

    def __init__(
        self,
        reference: MultiExitNet,
        engine: Engine,
        inputs: Sequence[Tensor],
        *,
        threads: int,
        batches: tuple[int, ...],
        timings: Mapping[str, float],
        notices: Sequence[str],
        max_logit_difference: float,
    ) -> None:
        self.backend = engine.name
        self.num_exits = reference.num_exits
        self.num_classes = reference.num_classes
        self.exit_ids = reference.exit_ids
        self._output_weights = reference.output_weights.detach().clone()
        self._weights = tuple(float(weight) for weight in self._output_weights.tolist())
        self.threads = threads
        self.batches = batches
        self.timings = dict(timings)
        self.notices = tuple(notices)
        self.max_logit_difference = max_logit_difference
        self.stages = tuple(Unit(self, position) for position in range(self.num_exits))
        self._reference = reference
        self._engine = engine
        self._input_shapes = [tuple(x.shape[1:]) for x in inputs]  # of every unit
        self._shape = self._input_shapes[0]
        self._dtype = inputs[0].dtype
        self._device = inputs[0].device
        self._turns = Turns()
        self._known: dict[Any, First] = {}

    @property
    def output_weights(self) -> Tensor:
        """(E,) float32, a copy: changing it changes nothing here."""
        return self._output_weights.clone()

    def __repr__(self) -> str:
        return (
            f"PreparedNet(backend={self.backend!r}, exits={self.num_exits}, exit_ids={self.exit_ids}, "
            f"num_classes={self.num_classes}, input={list(self._shape)}, threads={self.threads})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "PreparedNet: compiled units cannot be pickled or copied; save the network (aep_ext.deploy.save) and "
            "prepare it where it is loaded"
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The ensemble's logits (N, K): ``sum_e output_weights[e] * exit_logits[e]``, unnormalised."""
        x = self._checked(x)
        with self._turns, torch.no_grad():
            return ops.ensemble(self._run(x), self._output_weights)

    def exit_logits(self, x: Tensor) -> Tensor:
        """Logits of every exit, (E, N, K)."""
        x = self._checked(x)
        with self._turns:
            return self._run(x).clone()

    def features(self, x: Tensor) -> list[Tensor]:
        """The feature maps between the units: E - 1 tensors, the e-th (N, C_e, H_e, W_e). The last unit gives none."""
        maps: list[Tensor] = []
        for unit in self.stages[:-1]:
            x, _ = unit(x)
            maps.append(x)
        return maps

    def gates(
        self,
        policy: Policy | str | Callable[[Judged], Tensor],
        thresholds: Sequence[float] | Tensor | float,
        *,
        temperatures: Sequence[float] | Tensor | float | None = None,
        enabled: Sequence[bool] | Tensor | bool | None = None,
    ) -> Gates:
        """Checks a policy and its numbers once, for many calls of :meth:`gated`.

        Args:
            policy: a :class:`~aep_ext.termination.Policy`, its name, or (backend "eager" only) a callable.
            thresholds: E-1 numbers in the policy's unit, or one for all.
            temperatures: E positive numbers, or one for all; default 1.
            enabled: E-1 flags, or one for all; default True. The last exit always answers.

        Raises:
            TypeError: something else than numbers or flags.
            ValueError: a number out of its range, too few or too many, or a user's own rule on an engine.
        """
        return make_gates(self._weights, policy, thresholds, temperatures, enabled, self.backend)

    def gated(
        self,
        x: Tensor,
        policy: Gates | Policy | str | Callable[[Judged], Tensor],
        thresholds: Sequence[float] | Tensor | float | None = None,
        *,
        temperatures: Sequence[float] | Tensor | float | None = None,
        enabled: Sequence[bool] | Tensor | bool | None = None,
    ) -> Gated:
        """Runs unit after unit; after each, the samples whose gate opens leave, and the others go on without them.

        The arguments are those of :meth:`gates`, or its result alone. Exits, logits and confidences are those that
        :func:`aep_ext.inference.simulate` finds from the same exit logits. (An engine may sum in another order when
        the batch has shrunk, so logits after that can differ in their last digits from those of the whole batch.)

        A sample whose logits are NaN stays to the last exit. On "openvino" an input of NaN may give finite logits (its
        ReLU maps NaN to 0), and is then judged by these like any other; ``notices`` tell of it.

        Returns:
            :class:`Gated`: (logits (N, K), exit (N,) int64, confidence (N,) float32).
        """
        if isinstance(policy, Gates):
            if thresholds is not None or temperatures is not None or enabled is not None:
                raise ValueError("PreparedNet.gated: Gates hold all numbers already, got more beside them")
            gates = policy
            if gates.weights != self._weights or not (gates.policy.built_in or self.backend == "eager"):
                raise ValueError(
                    f"PreparedNet.gated: gates must be of this network (output weights {self._weights}, backend "
                    f"'{self.backend}'), got output weights {gates.weights} and policy '{gates.policy.name}'"
                )
        elif thresholds is None:
            raise ValueError("PreparedNet.gated: thresholds must be given with a policy, got None")
        else:
            gates = self.gates(policy, thresholds, temperatures=temperatures, enabled=enabled)
        with torch.no_grad():
            return answer(self.begin(), gates.policy, gates.settings, x, _always, self._known)

    def begin(self) -> PreparedRun:
        """For executors: the units for one walk of a batch, without copies between them.

        Other calls wait until the walk is closed (:meth:`PreparedRun.close`); of the same thread they are errors.
        """
        return PreparedRun(self)

    def verify(self, data: Tensor | Iterable[Any]) -> Verification:
        """Compares all exits with the network as it was when it was prepared (an eager copy is kept for this).

        Args:
            data: images (N, C, H, W), or batches: tensors, or tuples that begin with one (a DataLoader).

        Raises:
            TypeError: ``data`` or a batch is neither.
        """

        def theirs(x: Tensor) -> Tensor:
            with torch.no_grad():
                return self._reference.exit_logits(self._checked(x))

        return compare(self.exit_logits, theirs, lambda z: ops.ensemble(z, self._output_weights), self.num_exits, data)

    def _checked(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"PreparedNet: x must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            raise TypeError(f"PreparedNet: x must be a dense (strided) tensor, got {x.layout}")
        if x.dim() != 1 + len(self._shape) or x.shape[1:] != self._shape:
            raise ValueError(
                f"PreparedNet: x must have shape [N, {', '.join(map(str, self._shape))}] like the example "
                f"it was prepared with, got {list(x.shape)}"
            )
        if x.dtype != self._dtype:
            raise TypeError(f"PreparedNet: x must be {self._dtype} like the example, got {x.dtype}")
        if x.device != self._device:
            raise ValueError(f"PreparedNet: x must be on {self._device} like the example, got {x.device}")
        return x.detach().resolve_neg().contiguous()

    def _run(self, x: Tensor) -> Tensor:
        """(E, n, K), perhaps in the engine's memory."""
        if len(x) == 0:
            return x.new_empty(self.num_exits, 0, self.num_classes)
        chain = self._engine.chain(len(x))
        chain.load(0, x)
        return chain.run_all()


def _always(e: int, rows: int, stay: int) -> bool:
    """Whoever stays goes on without those that left."""
    return True


class Unit:
    """One compiled unit of a :class:`PreparedNet`: ``unit(features) -> (features, logits)``.

    ``features`` are what the unit before gave, (n, C, H, W) (images for the first); the new ones are (n, C', H', W'),
    None behind the last unit; ``logits`` are (n, K). Both are memory of their own, so this way costs a copy between
    units that the network's own methods do not make.
    """

    def __init__(self, prepared: PreparedNet, position: int) -> None:
        self._prepared = prepared
        self._position = position

    def __call__(self, features: Tensor) -> tuple[Tensor | None, Tensor]:
        net, position = self._prepared, self._position
        engine = net._engine
        expected = net._input_shapes[position]
        if not isinstance(features, Tensor):
            raise TypeError(f"PreparedNet: features must be a torch.Tensor, got {type(features).__name__}")
        if features.layout != torch.strided:
            raise TypeError(
                f"PreparedNet: features of unit {position} must be a dense (strided) tensor, got {features.layout}"
            )
        if features.dim() != 4 or tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"PreparedNet: features of unit {position} must have shape [n, {', '.join(map(str, expected))}], "
                f"got {list(features.shape)}"
            )
        if features.dtype != net._dtype or features.device != net._device:
            raise ValueError(
                f"PreparedNet: features of unit {position} must be {net._dtype} on {net._device}, got "
                f"{features.dtype} on {features.device}"
            )
        last = position == net.num_exits - 1
        n = len(features)
        if n == 0:
            empty = None if last else features.new_empty(0, *net._input_shapes[position + 1])
            return empty, features.new_empty(0, net.num_classes)
        features = features.detach().resolve_neg().contiguous()
        with net._turns:
            chain = engine.chain(n)
            chain.load(position, engine.to_engine(features) if position else features)
            logits = chain.run(position).clone()
            return (None if last else engine.from_engine(chain.features(position)).clone()), logits
