"""CompiledNet: a multi-exit network whose stages run on an inference engine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext._utils import inputs_of
from aep_ext.inference.backends.engine import Chain, Engine
from aep_ext.inference.stages import take_rows
from aep_ext.surgery.multi_exit import MultiExitNet


class Verification(NamedTuple):
    """How a compiled network and the original agree on n samples."""

    n: int
    same_predictions: int
    """Samples for which the ensemble's argmax is the same."""
    max_logit_difference: float
    """Over all exits and samples; a value that is finite on one side only counts as infinite."""


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; equal infinities and two NaN count 0, finite against not finite infinity."""
    if ours.numel() == 0:
        return 0.0
    ours, theirs = ours.double(), theirs.double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    gap = (ours - theirs).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(torch.where(same, 0.0, gap).max())


class CompiledNet:
    """What :func:`aep_ext.compile` makes of a network: inference only, for images of the example's shape, any batch.

    ``compiled(x)`` is the ensemble (N, K), ``compiled.exit_logits(x)`` every exit's logits (E, N, K), as with
    :class:`~aep_ext.MultiExitNet` in eval mode; ``GatedNet(compiled, policy)`` lets samples leave early. ``x`` has the
    example's channels, height, width, dtype and device, and any strides. No gradient flows. All results are memory of
    their own. An empty batch never reaches the engine.

    One call runs at a time: a lock makes other threads wait. It cannot be pickled or copied; compile the network again
    where it is needed.

    Attributes:
        backend: the engine that runs the stages.
        timings: backend -> median milliseconds of all exits' logits on the example, where ``auto`` measured.
        notices: what was decided, left out or failed, in words.
        max_logit_difference: largest absolute difference between the engine's logits and the network's on the example.
        num_exits, num_classes, exit_ids, output_weights, classes, preprocessing: the network's; ``output_weights`` (E,)
            float32.
        threads: threads of the engine; for "eager" and "inductor" torch's own number decides.
    """

    training = False

    def __init__(
        self,
        reference: MultiExitNet,
        engine: Engine,
        example: Tensor,
        *,
        backend: str,
        threads: int,
        timings: Mapping[str, float],
        notices: Sequence[str],
        max_logit_difference: float,
    ) -> None:
        self.backend = backend
        self.num_exits, self.num_classes = reference.num_exits, reference.num_classes
        self.classes, self.preprocessing = reference.classes, reference.preprocessing
        self.exit_ids = reference.exit_ids
        self.output_weights = reference.output_weights.detach().clone()
        self.threads = threads
        self.timings, self.notices = dict(timings), tuple(notices)
        self.max_logit_difference = max_logit_difference
        self._reference, self._engine = reference, engine
        self._shape, self._dtype, self._device = tuple(example.shape[1:]), example.dtype, example.device
        self._lock = threading.Lock()
        self._holder: int | None = None  # the thread that is at work

    def __repr__(self) -> str:
        return f"CompiledNet(backend={self.backend!r}, exits={self.exit_ids}, input={self._shape})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "CompiledNet: compiled stages cannot be pickled or copied; save the network (aep_ext.save) and compile it "
            "where it is loaded"
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The ensemble's logits (N, K): ``sum_e output_weights[e] * exit_logits[e]``."""
        with torch.no_grad():
            return self._on_all(x, lambda logits: ops.ensemble(logits, self.output_weights))

    def exit_logits(self, x: Tensor) -> Tensor:
        """Logits of every exit, (E, N, K)."""
        return self._on_all(x, Tensor.clone)

    def _on_all(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of all exits' logits; a tensor of its own, since they may lie in the engine's memory."""
        x = self._checked(x)
        if len(x) == 0:
            return function(x.new_empty(self.num_exits, 0, self.num_classes))
        with contextlib.closing(self.begin()):
            return function(self._engine.exit_logits(x, self.num_exits))

    def begin(self, owning: bool = False) -> CompiledRun:
        """The stages for one pass of a batch, as executors take them: without copies between them.

        Other calls wait until the run is closed; of the same thread they are errors.

        Args:
            owning: features and logits are copied, and stay good for as long as they are held.
        """
        return CompiledRun(self, owning)

    def verify(self, loader: Iterable[Any]) -> Verification:
        """Compares all exits with the network as it was when it was compiled (an eager copy is kept for this).

        Args:
            loader: batches of images: tensors (n, C, H, W), tuples that begin with one, or dicts.

        Raises:
            TypeError: the loader gives something else.
        """
        n, same, gap = 0, 0, 0.0
        for item in loader:
            x = self._checked(inputs_of("CompiledNet.verify", item))
            ours = self.exit_logits(x)
            with torch.no_grad():
                theirs = self._reference.exit_logits(x)
            n += len(x)
            ensembles = [ops.ensemble(logits, self.output_weights).argmax(-1) for logits in (ours, theirs)]
            same += int((ensembles[0] == ensembles[1]).sum())
            gap = max(gap, difference(ours, theirs))
        return Verification(n, same, gap)

    def _checked(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"CompiledNet: x must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            raise TypeError(f"CompiledNet: x must be a dense (strided) tensor, got {x.layout}")
        if x.dim() != 1 + len(self._shape) or x.shape[1:] != self._shape:
            raise ValueError(
                f"CompiledNet: x must have shape [N, {', '.join(map(str, self._shape))}] like the example "
                f"it was compiled with, got {list(x.shape)}"
            )
        if x.dtype != self._dtype or x.device != self._device:
            raise ValueError(
                f"CompiledNet: x must be {self._dtype} on {self._device} like the example, got {x.dtype} on {x.device}"
            )
        return x.detach().resolve_neg().contiguous()


class CompiledRun:
    """The stages for one pass (:class:`aep_ext.inference.stages.StageRun`); the network is its own until it is closed.

    Nothing is copied between stages: features stay where the engine has them, and the run itself stands for them. An
    owning run gives tensors of their own.
    """

    __slots__ = ("_chain", "_e", "_net", "_owning")

    def __init__(self, net: CompiledNet, owning: bool) -> None:
        self._net, self._owning, self._e = net, owning, 0
        if net._holder == threading.get_ident():  # it would wait for itself, for ever
            raise RuntimeError(
                "CompiledNet: must not be called while it is at work on a batch of the same thread (by a user's "
                "criterion); compile the network a second time for that"
            )
        net._lock.acquire()
        net._holder = threading.get_ident()

    def __call__(self, e: int, features: Any) -> tuple[Any, Tensor]:
        net = self._net
        if e == 0 or self._owning:
            x = net._checked(features) if e == 0 else features
            if len(x) == 0:
                return features, x.new_empty(0, net.num_classes)
            self._chain: Chain = net._engine.chain(len(x))
            self._chain.load(e, x)
        self._e = e
        logits = self._chain.run(e)
        if not self._owning:
            return self, logits
        return (None if e == net.num_exits - 1 else self._chain.features(e).clone()), logits.clone()

    def take(self, features: Any, positions: Tensor) -> Any:
        """Goes on with the rows at ``positions`` only, on the stages that are fastest for so many."""
        chain = self._net._engine.chain(len(positions))
        chain.load(self._e + 1, take_rows(self._chain.features(self._e), positions))
        self._chain = chain
        return self

    def close(self) -> None:
        """Lets other threads have the network."""
        self._net._holder = None
        self._net._lock.release()
