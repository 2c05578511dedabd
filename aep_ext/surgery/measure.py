"""Runs CNNs to see what they do: shapes and multiply-adds of a traced one node by node, inputs of modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker
from torch.utils.weak import WeakIdKeyDictionary

from aep_ext._utils import eval_mode

__all__ = [
    "MacCounter",
    "Measured",
    "before_forward",
    "first_line",
    "input_channels",
    "map_size",
    "measure",
    "pattern",
    "shadow",
]


class _NoModules(ModuleTracker):
    """Counts per module are not asked for, and its hooks refuse a parameter that is a module's input."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *args: object) -> None:
        pass


class MacCounter(FlopCounterMode):
    """Counts the multiply-adds of convolutions and matrix products that run in its block: half of torch's operations.

    Bias, normalisation, activations, pooling and weighted sums count nothing.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoModules()

    @property
    def macs(self) -> int:
        """Multiply-adds so far."""
        return self.get_total_flops() // 2


@dataclass
class Measured:
    """Per node: the shape of its result where that is a tensor, which of its axes the layers around it take for the
    channels (left out where they do not agree, or none is near), and its multiply-adds."""

    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    channel_axes: dict[fx.Node, int] = field(default_factory=dict)
    macs: dict[fx.Node, int] = field(default_factory=dict)


class _Axis:
    """An axis of some tensors that were computed from each other, and whether a layer takes it for the channels."""

    def __init__(self) -> None:
        self.merged: _Axis | None = None
        self.is_channels = False

    def root(self) -> _Axis:
        axis = self
        while axis.merged is not None:
            axis = axis.merged
        return axis

    def merge(self, other: _Axis) -> None:
        ours, theirs = self.root(), other.root()
        if ours is not theirs:
            theirs.merged = ours
            ours.is_channels |= theirs.is_channels


_CHANNELS_SECOND = {
    *(torch.conv2d, torch.conv_transpose2d, F.batch_norm, F.group_norm, F.instance_norm, F.pixel_shuffle),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate, torch.max_pool2d),
}
_PERMUTED = {torch.permute, Tensor.permute}
_TRANSPOSED = {torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes}
_RESHAPED = {torch.reshape, Tensor.reshape, Tensor.view, torch.flatten, Tensor.flatten, Tensor.unflatten}
_MOVED = {torch.movedim, Tensor.movedim, torch.einsum, torch.rot90, Tensor.mT.__get__, Tensor.T.__get__}  # type: ignore


class _ChannelAxes(TorchFunctionMode):
    """Watches which axes the functions of a forward take for the channels, and follows these axes from tensor to
    tensor: through functions that keep the shape, permutations and reshapings."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        x = args[0] if args else kwargs.get("input")
        if isinstance(out, Tensor) and isinstance(x, Tensor) and out.dim() and x.dim():
            before, after = self.axes(x), self.axes(out)
            norm = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ()) if func is F.layer_norm else ()
            if (func in _CHANNELS_SECOND and x.dim() == 4) or func is F.linear or len(norm) == 1:
                channels = 1 if func in _CHANNELS_SECOND else -1
                before[channels].root().is_channels = after[channels].root().is_channels = True
            for one, other in self._same(func, args, kwargs, x, out):
                one.merge(other)
        return out

    def axes(self, x: Tensor) -> list[_Axis]:
        found = self.seen.get(x, [])
        if len(found) != x.dim():  # an operation in place may have reshaped it
            found = self.seen[x] = [_Axis() for _ in range(x.dim())]
        return found

    def _same(self, func: Any, args: Any, kwargs: Any, x: Tensor, out: Tensor) -> list[tuple[_Axis, _Axis]]:
        """Axes of the function's tensors that are axes of its result."""
        before, after = list(self.axes(x)), self.axes(out)
        given = [*args[1:], *(value for key, value in kwargs.items() if key != "input")]
        if func in _PERMUTED:
            order = given[0] if isinstance(given[0], (tuple, list)) else given
            return list(zip((before[axis] for axis in order), after, strict=True))
        if func in _TRANSPOSED:
            a, b = given
            before[a], before[b] = before[b], before[a]
            return list(zip(before, after, strict=True))
        if func in _RESHAPED:  # leading axes of the same sizes are the same axes, and so are trailing ones
            pairs = []
            for way in (1, -1):
                for i, (a, b) in enumerate(zip(x.shape[::way], out.shape[::way], strict=False)):
                    if a != b:
                        break
                    pairs.append((before[::way][i], after[::way][i]))
            return pairs
        if func in _MOVED:
            return []
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.shape == out.shape]
        return [pair for t in tensors for pair in zip(self.axes(t), after, strict=True)]


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, counter: MacCounter, watch: _ChannelAxes) -> None:
        super().__init__(module)
        self.counter = counter
        self.watch = watch
        self.measured = Measured()
        self.axes: dict[fx.Node, list[_Axis]] = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Lists that the graph holds are torch.fx's immutable ones; a module may well write into its own."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(list(a) if isinstance(a, list) else a for a in args), kwargs

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.macs
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.measured.shapes[n] = tuple(result.shape)
            self.axes[n] = self.watch.axes(result)
        self.measured.macs[n] = self.counter.macs - before
        return result


def pattern(shape: Sequence[int], like: nn.Module) -> Tensor:
    """A fixed pseudo-random image batch on the model's device and in its dtype; the global generator is left alone."""
    generator = torch.Generator().manual_seed(0)
    anchor = next((p for p in like.parameters() if p.is_floating_point()), torch.empty(0))
    values = torch.randn(tuple(shape), generator=generator)
    return values.to(anchor.device, anchor.dtype)


def shadow(model: nn.Module) -> nn.Module:
    """A copy without data (meta device) to run shapes through, at next to no cost."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)  # the memo stands in for the tensors, so that none is copied


@contextmanager
def before_forward(
    modules: Mapping[str, nn.Module], call: Callable[[str, nn.Module, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Inside the block, ``call(name, module, args)`` runs before each forward of these modules."""
    handles = [module.register_forward_pre_hook(partial(call, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(model: nn.Module, graph: fx.Graph, example: Tensor) -> Measured:
    """Runs ``graph`` over ``model`` in eval mode on ``example``."""
    with eval_mode(model), torch.no_grad(), MacCounter() as counter, _ChannelAxes() as watch:
        recorder = _Recorder(fx.GraphModule(model, graph), counter, watch)
        # Modules of the GraphModule are the model's own, except the container itself.
        recorder.module.eval()
        recorder.run(example)
    for node, axes in recorder.axes.items():
        channels = [i for i, axis in enumerate(axes) if axis.root().is_channels]
        if len(channels) == 1:
            recorder.measured.channel_axes[node] = channels[0]
    return recorder.measured


def input_channels(model: nn.Module) -> int:
    """Channels of the images: those of the first convolution."""
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        raise ValueError(f"anticipate: {type(model).__name__} holds no Conv2d; only CNN classifiers can be given exits")
    return conv.in_channels


def map_size(shape: Sequence[int], channel_axis: int) -> tuple[int, int]:
    """(H, W) of a feature map's shape."""
    height, width = (size for axis, size in enumerate(shape) if axis not in (0, channel_axis))
    return height, width


def first_line(error: BaseException) -> str:
    """An error in one line: its class and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
