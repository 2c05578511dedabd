"""Runs CNNs to see what they do: shapes and multiply-adds of a traced one node by node, inputs of modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from aep_ext._utils import eval_mode

__all__ = ["MacCounter", "Measured", "before_forward", "input_channels", "measure", "pattern", "shadow"]


class MacCounter(FlopCounterMode):
    """Counts the multiply-adds of convolutions and matrix products that run in its block: half of torch's operations.

    Bias, normalisation, activations, pooling and weighted sums count nothing.
    """

    def __init__(self) -> None:
        super().__init__(display=False)

    @property
    def macs(self) -> int:
        """Multiply-adds so far."""
        return self.get_total_flops() // 2


@dataclass
class Measured:
    """Per node: the shape of its result where that is a tensor, and its multiply-adds."""

    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    macs: dict[fx.Node, int] = field(default_factory=dict)


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, counter: MacCounter) -> None:
        super().__init__(module)
        self.counter = counter
        self.measured = Measured()

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.macs
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.measured.shapes[n] = tuple(result.shape)
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
    with eval_mode(model), torch.no_grad(), MacCounter() as counter:
        recorder = _Recorder(fx.GraphModule(model, graph), counter)
        # Modules of the GraphModule are the model's own, except the container itself.
        recorder.module.eval()
        recorder.run(example)
    return recorder.measured


def input_channels(model: nn.Module) -> int:
    """Channels of the images: those of the first convolution."""
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        raise ValueError(f"anticipate: {type(model).__name__} holds no Conv2d; only CNN classifiers can be given exits")
    return conv.in_channels
