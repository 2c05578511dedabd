"""What a network costs: parameters, multiply-adds and latency, of a module or of every subset of the exits."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from aep_ext._utils import eval_mode
from aep_ext.pruning.subsets import MAX_EXITS, exits_of_mask
from aep_ext.surgery.measure import MacCounter
from aep_ext.surgery.multi_exit import MultiExitNet


def count_parameters(module: nn.Module, *, trainable_only: bool = True) -> int:
    """How many numbers ``module`` can train: the elements of its parameters, a shared one counted once.

    Args:
        module: any module.
        trainable_only: leave out parameters with ``requires_grad`` off (a frozen backbone, say).
    """
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def example_input(function: str, module: nn.Module, example: Tensor | Sequence[int]) -> Tensor:
    """``example`` as a batch of one on the module's device; a (C, H, W) shape becomes zeros in its dtype."""
    anchor = next(module.parameters(), None)
    if not isinstance(example, Tensor):
        shape = tuple(int(size) for size in example)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"{function}: example must be a tensor (N, C, H, W) or a shape (C, H, W), got {shape}")
        device, dtype = (anchor.device, anchor.dtype) if anchor is not None else (None, None)
        return torch.zeros((1, *shape), device=device, dtype=dtype)
    if example.dim() < 1 or example.shape[0] < 1:
        raise ValueError(f"{function}: example must hold at least one sample, got shape {list(example.shape)}")
    one = example.detach()[:1]
    return one if anchor is None else one.to(anchor.device)


def count_macs(module: nn.Module, example: Tensor | Sequence[int]) -> int:
    """Multiply-adds of one forward pass at batch 1 in eval mode: those of convolutions and matrix products.

    Bias, normalisation, activations, pooling and the weighted sum of the ensemble count nothing. The module is left
    as it was (modes, buffers, gradients); it may live on the meta device.

    Args:
        module: any module that takes one tensor.
        example: an input (N, C, H, W), of which the first sample is used, or a shape (C, H, W).
    """
    inputs = example_input("count_macs", module, example)
    # no_grad, not inference_mode: what the counter sees is then the same on every torch.
    with eval_mode(module), torch.no_grad(), MacCounter() as counter:
        module(inputs)
    return counter.macs


@dataclass(frozen=True)
class Latency:
    """Wall-clock times of one forward pass in milliseconds: median, percentiles, and how many were taken."""

    median: float
    p5: float
    p95: float
    p99: float
    mean: float
    repeats: int

    def to_dict(self) -> dict[str, float | int]:
        """As plain numbers, for JSON."""
        return asdict(self)


def _cuda_times(module: nn.Module, inputs: Tensor, repeats: int) -> list[float]:
    with torch.cuda.device(inputs.device):
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        times = []
        for start, stop in pairs:
            torch.cuda.synchronize()  # each pass starts on an idle device, as a single request would
            start.record()
            module(inputs)
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    return times


def _host_times(module: nn.Module, inputs: Tensor, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        module(inputs)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def measure_latency(
    module: nn.Module, example: Tensor | Sequence[int], *, warmup: int = 10, repeats: int = 50, batch_size: int = 1
) -> Latency:
    """Time forward passes in eval mode, in milliseconds, after a warm-up.

    On CUDA by events on the current stream, the device idle before each pass; elsewhere by ``time.perf_counter``.

    Args:
        module: any module that takes one tensor; left as it was.
        example: an input (N, C, H, W), of which the first sample is used, or a shape (C, H, W).
        warmup: passes that are not counted.
        repeats: passes that are.
        batch_size: how often the sample is repeated to make the batch.

    Raises:
        ValueError: ``warmup`` is negative, or ``repeats`` or ``batch_size`` is below 1.
    """
    if warmup < 0 or repeats < 1 or batch_size < 1:
        raise ValueError(
            "measure_latency: warmup must be >= 0 and repeats and batch_size >= 1, "
            f"got {warmup}, {repeats} and {batch_size}"
        )
    inputs = example_input("measure_latency", module, example)
    if inputs.device.type == "meta":
        raise ValueError("measure_latency: the module must be on a real device, got meta")
    if batch_size > 1:
        inputs = inputs.expand(batch_size, *inputs.shape[1:]).contiguous()
    with eval_mode(module), torch.inference_mode():
        for _ in range(warmup):
            module(inputs)
        times = (_cuda_times if inputs.is_cuda else _host_times)(module, inputs, repeats)
    median, p5, p95, p99 = np.percentile(times, (50, 5, 95, 99)).tolist()
    return Latency(median, p5, p95, p99, mean=statistics.fmean(times), repeats=repeats)


@dataclass(frozen=True)
class SubsetCosts:
    """Costs of some subsets, or of every one: entry m-1 is then the one whose bit ``1 << e`` is set for exit e.

    Attributes:
        parameters: trainable numbers of the extracted network.
        macs: its multiply-adds at batch 1, as :func:`count_macs` counts them.
    """

    parameters: tuple[int, ...]
    macs: tuple[int, ...]


def _parameter_groups(net: MultiExitNet) -> Counter[tuple[int, int]]:
    """Trainable numbers by the first stage that holds them (or a number past the end) and the mask of such exits."""
    first: dict[nn.Parameter, int] = {}
    holders: Counter[nn.Parameter] = Counter()
    for stage, module in enumerate(net.stages):
        for parameter in module.parameters():
            first.setdefault(parameter, stage)
    for position, head in enumerate(net.exits):
        for parameter in head.parameters():
            first.setdefault(parameter, len(net.stages))
            holders[parameter] |= 1 << position
    groups: Counter[tuple[int, int]] = Counter()
    for parameter, stage in first.items():
        groups[stage, holders[parameter]] += parameter.numel() if parameter.requires_grad else 0
    return groups


def subset_costs(
    net: MultiExitNet, example: Tensor | Sequence[int], subsets: Sequence[int] | None = None
) -> SubsetCosts:
    """Parameters and multiply-adds of subsets' extracted networks, from the parts, without extracting any.

    Args:
        net: the network; left as it was.
        example: an input (N, C, H, W), of which the first sample is used, or a shape (C, H, W).
        subsets: masks. None: every subset, of at most 16 exits.
    """
    if subsets is None and net.num_exits > MAX_EXITS:
        raise ValueError(
            f"subset_costs: net must have at most {MAX_EXITS} exits where no subsets are given, got {net.num_exits}"
        )
    features = example_input("subset_costs", net, example)
    exit_macs = [0] * net.num_exits
    prefix_macs: list[int] = []  # of the backbone up to and with each stage
    with eval_mode(net), torch.no_grad():
        for stage, module in enumerate(net.stages):
            with MacCounter() as counter:
                features = module(features)
            prefix_macs.append(counter.macs + sum(prefix_macs[-1:]))
            if stage in net.exit_stages:
                position = net.exit_stages.index(stage)
                with MacCounter() as counter:
                    net.exits[position](features)
                exit_macs[position] = counter.macs
    groups, parameters, macs = _parameter_groups(net), [], []
    for mask in range(1, 1 << net.num_exits) if subsets is None else subsets:
        exits = exits_of_mask(mask)
        last = max(net.exit_stages[e] for e in exits)
        parameters.append(sum(n for (stage, holders), n in groups.items() if stage <= last or holders & mask))
        macs.append(prefix_macs[last] + sum(exit_macs[e] for e in exits))
    return SubsetCosts(tuple(parameters), tuple(macs))


def exit_costs(net: MultiExitNet, example: Tensor | Sequence[int]) -> tuple[int, ...]:
    """Multiply-adds of a sample that is answered at each exit: E numbers, ascending.

    Those of the backbone up to that exit, and of the heads of this exit and of all before it: the running ensemble is
    over all of them. What :func:`aep_ext.inference.simulate` takes as costs.

    Args:
        net: a full or pruned network.
        example: an input (N, C, H, W), of which the first sample is used, or a shape (C, H, W).
    """
    return subset_costs(net, example, [(2 << e) - 1 for e in range(net.num_exits)]).macs
