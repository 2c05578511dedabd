"""GraphedGatedNet: a gated network for one input shape, as one CUDA graph launch. Has not run on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aep_ext.inference._old_criteria import Custom
from aep_ext.inference.cuda_graph_backend import PATHS, Backend, Built, ExitPlan, Walk
from aep_ext.inference.executor import GatedOutput
from aep_ext.inference.gated_net import GatedNet


class GraphedGatedNet:
    """A :class:`GatedNet` on a CUDA device whose whole pass, gates included, the host launches at once and never reads.

    Stage, head and gate of an exit are followed by an IF node that holds the next stage, nested: stages run only while
    a row is under way. Rows keep their places: one that leaves has its answer written at once and is carried on
    undecided, so answers are those of the gated net with mode "mask" (the same samples leave where batch shape and
    kernels give the same low bits; see :meth:`GatedNet.near_threshold`). ::

        graphed = GraphedGatedNet(gated, example)
        logits, exit, confidence = graphed(x)        # x like example; nothing has been waited for
        graphed.gated.thresholds.fill_(0.9)          # in place: the next call goes by it

    Thresholds, temperatures, flags, output weights and the network's parameters are read by the graph where they lie:
    change them in place. Their values are checked when the graph is made, and not afterwards, since that would wait for
    the device: a NaN threshold lets nobody go, a temperature that is not positive makes nonsense. Where one of the four
    was replaced by another tensor, a call raises; parameters that were replaced are not noticed: call
    :meth:`recapture`. The gated net's modes and costs are read when the graph is made.

    Calls write on static buffers: let them follow one another on one stream, or order the streams.

    Args:
        gated: on a CUDA device, in eval mode, with a built-in policy. It is kept, not copied.
        example: (N, ...), N at least 1: fixes shape, dtype, device and memory format; its values are run for warming
            up.
        path: "one graph"; or "graph per stage": a graph for each stage, and between two of them the host reads how many
            rows are under way; or "auto": one graph, and a graph per stage where the network holds what an IF node
            cannot (see ``reason``).
        warmup: passes of every stage before it is captured, at least 1.

    Attributes:
        gated: the gated net.
        path: the path taken.
        reason: why it is not one graph; empty otherwise.
        input: the static input. Who writes it himself saves a copy: ``graphed(graphed.input)``.
        output: the static answers, :class:`GatedOutput`, which the next replay overwrites.

    Raises:
        TypeError: ``gated`` is no GatedNet, or ``example`` no tensor.
        ValueError: a CPU network or example, a user's own policy, an example of no rows, a bad path or warmup; a
            network whose exits give different shapes, or which draws random numbers.
        RuntimeError: training mode; no CUDA in this build; a stage cannot be captured (one that reads a value back on
            the host, say); path "one graph" cannot be taken, with the reason.
    """

    def __init__(
        self,
        gated: GatedNet,
        example: Tensor,
        *,
        path: str = "auto",
        warmup: int = 3,
        backend: Backend | None = None,
    ) -> None:
        """``backend``: in place of CUDA's, for tests."""
        if not isinstance(gated, GatedNet):
            raise TypeError(f"GraphedGatedNet: gated must be a GatedNet, got {type(gated).__name__}")
        if not isinstance(example, Tensor):
            raise TypeError(f"GraphedGatedNet: example must be a torch.Tensor, got {type(example).__name__}")
        if path not in PATHS:
            raise ValueError(f"GraphedGatedNet: path must be one of {', '.join(PATHS)}, got {path!r}")
        if warmup < 1:
            raise ValueError(f"GraphedGatedNet: warmup must be at least 1, got {warmup}")
        if backend is None:
            from aep_ext.inference.cuda_graph_driver import CudaBackend

            backend = CudaBackend()
        self.gated, self._backend, self._wish, self._warmup = gated, backend, path, warmup
        self._check_gated()
        kind = backend.device_type
        for name, device in (("gated", gated.thresholds.device), ("example", example.device)):
            if device.type != kind:
                raise ValueError(f"GraphedGatedNet: {name} must be on a {kind} device, got {device}")
        if example.device != gated.thresholds.device:
            raise ValueError(
                f"GraphedGatedNet: example must be on the device of gated, {gated.thresholds.device}, "
                f"got {example.device}"
            )
        if example.dim() < 1 or len(example) < 1:
            raise ValueError(f"GraphedGatedNet: example must have at least one row, got shape {list(example.shape)}")
        backend.check()
        with self._alone():
            self.input = torch.empty_like(example, requires_grad=False).copy_(example.detach())
        self._capture()

    @property
    def path(self) -> str:
        return self._built.path

    @property
    def reason(self) -> str:
        return self._built.reason

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
                    f"GraphedGatedNet: x must be {_form(own)}, as the graph was made for, got {_form(x)}; "
                    "make another for another form"
                )
            own.copy_(x.detach() if x.requires_grad else x)
        self.replay()
        return GatedOutput(*(part.clone() for part in self.output)) if copy else self.output

    def replay(self) -> None:
        """Runs the graph on what ``input`` holds; the answers are in ``output``.

        Raises:
            RuntimeError: training mode, or a buffer was replaced since the graph was made.
        """
        if self.gated.training or getattr(self.gated.net, "training", False):
            self._check_gated()
        for name, address in self._addresses.items():
            if self._watched(name).data_ptr() != address:
                raise RuntimeError(
                    f"GraphedGatedNet: {name} must be changed in place, but was replaced since the graph was made; "
                    "call recapture()"
                )
        self._built.launch()

    def recapture(self) -> None:
        """Makes the graph anew: after parameters, buffers or stages were replaced, or modes were changed.

        ``input`` keeps its place and what it holds; ``output`` is another.
        """
        self._check_gated()
        self._capture()

    def _capture(self) -> None:
        gated, backend = self.gated, self._backend
        gated.settings()  # checks the values
        with self._alone():
            found = backend.warm_up(self._pass, self._warmup, self.input)
            tensors = self._make_tensors(found[0])
            walk = Walk(gated._units.begin(), self.input, self._plan(), tensors, gated.policy.name, gated.policy.on)
            self._built: Built = backend.build(walk, self._wish)
        self._addresses = {name: self._watched(name).data_ptr() for name in ("thresholds", "temperatures", "enabled")}
        if gated._weights().device == self.input.device:
            self._addresses["output_weights"] = gated._weights().data_ptr()
        self.output = GatedOutput(tensors["logits"], tensors["exit"], tensors["confidence"])

    def _watched(self, name: str) -> Tensor:
        return self.gated._weights() if name == "output_weights" else self.gated._buffers[name]

    def _plan(self) -> tuple[ExitPlan, ...]:
        """Where rows may leave by mode and costs, whatever the flags say, since these may change between replays."""
        gated = self.gated
        enabled = gated.enabled.tolist()
        may = [
            live if flag else mode != "off" for live, flag, mode in zip(gated.live, enabled, gated.mode, strict=True)
        ]
        return tuple(ExitPlan(e, flag) for e, flag in enumerate([*may, False]))

    def _pass(self) -> list[Tensor]:
        """Every stage once; the exits' logits, which must agree in form."""
        features, found = self.input, []
        with contextlib.closing(self.gated._units.begin()) as run:
            for e in range(self.gated.num_exits):
                features, logits = run(e, features)
                form = _form(logits) if isinstance(logits, Tensor) else type(logits).__name__
                if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(self.input):
                    raise ValueError(
                        f"GraphedGatedNet: exit {e} must give logits of shape [{len(self.input)}, K], got {form}"
                    )
                if found and form != _form(found[0]):
                    raise ValueError(
                        f"GraphedGatedNet: exit {e} must give logits like exit 0, {_form(found[0])}, got {form}"
                    )
                found.append(logits)
        if found[0].device != self.input.device or not found[0].is_floating_point():
            raise ValueError(
                f"GraphedGatedNet: logits must be floating point on {self.input.device}, got {_form(found[0])}"
            )
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
            "weights": gated._weights().detach().to(device).contiguous(),
            "running": torch.zeros((n, classes), dtype=acc, device=device),
            "state": gated.policy.initial_state(n, classes, device),
            "exit": torch.full((n,), -1, dtype=torch.int64, device=device),
            "logits": torch.zeros((n, classes), dtype=like.dtype, device=device),
            "confidence": torch.zeros(n, dtype=torch.float32, device=device),
            "tally": torch.zeros((exits, 2), dtype=torch.int32, device=device),
            "remaining": torch.zeros(exits, dtype=torch.int64, device=device),
        }

    def _check_gated(self) -> None:
        gated = self.gated
        if gated.training or getattr(gated.net, "training", False):
            raise RuntimeError("GraphedGatedNet: gated must be in eval mode, got training mode; call eval()")
        if not gated.policy.built_in:
            rule = gated.policy.rule if isinstance(gated.policy, Custom) else gated.policy
            name = getattr(rule, "__qualname__", type(rule).__name__)
            raise ValueError(
                f"GraphedGatedNet: policy must be built in, got {gated.policy.name!r} ({name}): a graph cannot call it"
            )

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

    def __repr__(self) -> str:
        return f"GraphedGatedNet({_form(self.input)}, path={self.path!r}, policy={self.gated.policy})"


def _form(x: Any) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
