"""CudaGraphGatedNet: a gated network for one input shape, as one CUDA graph launch. Has not run on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aep_ext.inference.criteria import criterion_name, initial_state
from aep_ext.inference.cuda_graph_capture import CudaBackend, StaticPass
from aep_ext.inference.executor import GatedOutput
from aep_ext.inference.gated_net import GatedNet
from aep_ext.surgery.multi_exit import MultiExitNet

_WARM_UP = 3  # passes of every stage before it is captured


class CudaGraphGatedNet:
    """A :class:`GatedNet` on a CUDA device whose whole pass, gates included, the host launches at once and never reads.

    Stage, head and gate of an exit are followed by an IF node that holds the next stage, nested: stages run only while
    a row is under way. Rows keep their places: one that leaves has its answer written at once and is carried on
    undecided. Exits and answers are those of the gated net (where batch shape and kernels give the same low bits; see
    :meth:`GatedNet.near_threshold`). Experimental: it has not run on a GPU. ::

        graphed = CudaGraphGatedNet(gated, example)
        logits, exit, confidence = graphed(x)        # x like example; nothing has been waited for
        graphed.gated.thresholds.fill_(0.9)          # in place: the next call goes by it

    Thresholds, temperatures, flags, output weights and the network's parameters are read by the graph where they lie:
    change them in place. Their values are checked when the graph is made, and not afterwards, since that would wait for
    the device: a NaN threshold lets nobody go, a temperature that is not positive makes nonsense. Where one of the four
    was replaced by another tensor, a call raises; parameters that were replaced are not noticed: call
    :meth:`recapture`.

    Calls write on static buffers: let them follow one another on one stream, or order the streams.

    Args:
        gated: on a CUDA device, in eval mode, around a MultiExitNet, with a criterion by name. It is kept, not copied.
        example: (N, ...), N at least 1: fixes shape, dtype, device and memory format; its values are run for warming
            up.

    Attributes:
        gated: the gated net.
        input: the static input. Who writes it himself saves a copy: ``graphed(graphed.input)``.
        output: the static answers, :class:`GatedOutput`, which the next call overwrites.

    Raises:
        TypeError: ``gated`` is no GatedNet, or ``example`` no tensor.
        ValueError: a CPU network or example, a user's own criterion, an example of no rows; a network whose exits give
            different shapes, or which draws random numbers.
        RuntimeError: training mode; no CUDA in this build; a stage cannot be captured (one that reads a value back on
            the host, say), or holds what an IF node cannot.
    """

    def __init__(self, gated: GatedNet, example: Tensor, *, backend: CudaBackend | None = None) -> None:
        """``backend``: in place of CUDA's, for tests."""
        if not isinstance(gated, GatedNet):
            raise TypeError(f"CudaGraphGatedNet: gated must be a GatedNet, got {type(gated).__name__}")
        if not isinstance(example, Tensor):
            raise TypeError(f"CudaGraphGatedNet: example must be a torch.Tensor, got {type(example).__name__}")
        self.gated, self._backend = gated, CudaBackend() if backend is None else backend
        self._check_gated()
        kind, device = self._backend.device_type, gated.thresholds.device
        for name, found in (("gated", device), ("example", example.device)):
            if found.type != kind or found != device:
                raise ValueError(f"CudaGraphGatedNet: {name} must be on the {kind} device of gated, got {found}")
        if example.dim() < 1 or len(example) < 1:
            raise ValueError(f"CudaGraphGatedNet: example must have at least one row, got shape {list(example.shape)}")
        self._backend.check()
        with self._alone():
            self.input = torch.empty_like(example, requires_grad=False).copy_(example.detach())
        self._capture()

    def __call__(self, x: Tensor, *, copy: bool = True) -> GatedOutput:
        """Answers a batch without waiting for it.

        Args:
            x: of the example's shape, dtype and device.
            copy: False: the static answers themselves, which the next call overwrites.

        Raises:
            ValueError: x has another shape, dtype or device.
            RuntimeError: training mode, or a buffer was replaced since the graph was made.
        """
        own = self.input
        if x is not own:
            if x.shape != own.shape or x.dtype != own.dtype or x.device != own.device:
                raise ValueError(
                    f"CudaGraphGatedNet: x must be {_form(own)}, as the graph was made for, got {_form(x)}; "
                    "make another for another form"
                )
            own.copy_(x.detach() if x.requires_grad else x)
        if self.gated.training or self.gated.net.training:
            self._check_gated()
        for name, tensor in self._watched().items():
            if tensor.data_ptr() != self._addresses.get(name):
                raise RuntimeError(
                    f"CudaGraphGatedNet: {name} must be changed in place, but was replaced since the graph was made; "
                    "call recapture()"
                )
        self._launch()
        return GatedOutput(*(part.clone() for part in self.output)) if copy else self.output

    def recapture(self) -> None:
        """Makes the graph anew: after parameters, buffers or stages were replaced.

        ``input`` keeps its place and what it holds; ``output`` is another.
        """
        self._check_gated()
        self._capture()

    def _capture(self) -> None:
        gated = self.gated
        policy = gated.policy  # checks the values
        with self._alone():
            found = self._backend.warm_up(self._pass, _WARM_UP, self.input)
            tensors = self._make_tensors(found[0])
            run = gated._begin()
            self._launch = self._backend.build(
                StaticPass(run, self.input, policy.num_exits, tensors, str(policy.criterion), policy.criterion_on)
            )
        self._addresses = {name: tensor.data_ptr() for name, tensor in self._watched().items()}
        self.output = GatedOutput(tensors["logits"], tensors["exit"], tensors["confidence"])

    def _watched(self) -> dict[str, Tensor]:
        """What the graph reads where it lies."""
        weights = self.gated.net.output_weights
        here = {"output_weights": weights} if weights.device == self.input.device else {}
        return {name: self.gated._buffers[name] for name in ("thresholds", "temperatures", "enabled")} | here

    def _pass(self) -> list[Tensor]:
        """Every stage once; the exits' logits."""
        features, found = self.input, []
        with contextlib.closing(self.gated._begin()) as run:
            for e in range(self.gated.num_exits):
                features, logits = run(e, features)
                found.append(logits)
        return found

    def _make_tensors(self, like: Tensor) -> dict[str, Tensor]:
        """What the exits read and write, by the names that the native code knows."""
        gated, (n, classes), device = self.gated, like.shape, like.device
        acc = torch.float64 if like.dtype == torch.float64 else torch.float32
        exits = gated.num_exits
        return {
            "thresholds": gated.thresholds,
            "temperatures": gated.temperatures,
            "enabled": gated.enabled,
            "weights": gated.net.output_weights.detach().to(device).contiguous(),
            "running": torch.zeros((n, classes), dtype=acc, device=device),
            "state": initial_state(gated.policy.criterion, n, classes, device),
            "exit": torch.full((n,), -1, dtype=torch.int64, device=device),
            "logits": torch.zeros((n, classes), dtype=like.dtype, device=device),
            "confidence": torch.zeros(n, dtype=torch.float32, device=device),
            "tally": torch.zeros((exits, 2), dtype=torch.int32, device=device),
            "remaining": torch.zeros(exits, dtype=torch.int64, device=device),
        }

    def _check_gated(self) -> None:
        gated = self.gated
        if not isinstance(gated.net, MultiExitNet):
            raise ValueError(f"CudaGraphGatedNet: gated must be of a MultiExitNet, got {type(gated.net).__name__}")
        if gated.training or gated.net.training:
            raise RuntimeError("CudaGraphGatedNet: gated must be in eval mode, got training mode; call eval()")
        if not isinstance(gated.policy.criterion, str):
            name = criterion_name(gated.policy.criterion)
            raise ValueError(f"CudaGraphGatedNet: criterion must be a name, got {name}: a graph cannot call it")
        if gated.policy.last_alone:
            raise ValueError("CudaGraphGatedNet: the policy must not have last_alone, got True")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No gradients, ordinary tensors (inference mode's could not be written later), and no cached casts.

        Autocast would keep casts of the weights that a graph reads, and drop them behind its back.
        """
        device = self.gated.thresholds.device
        kind = device.type
        autocast = torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        with torch.inference_mode(False), torch.no_grad(), autocast, self._backend.on(device):
            yield


def _form(x: Any) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
