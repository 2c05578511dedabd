"""The operators' cases: inputs, contestants, and the bytes that one call moves at least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aep_ext import ops
from benchmarks import rivals
from benchmarks.gpu.clock import Contestant


@dataclass(frozen=True)
class Case:
    """One case: ``size`` as the operator's sizes are usually given."""

    operator: str
    size: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"

    @property
    def id(self) -> str:
        """``ensemble_stats-4x64x1000-bfloat16``; float32 and contiguous go without saying."""
        parts = [self.operator, "x".join(str(n) for n in self.size)]
        parts += [] if self.dtype == "float32" else [self.dtype]
        parts += [] if self.layout == "contiguous" else [self.layout]
        return "-".join(parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass
class Setup:
    """What a case runs.

    Attributes:
        make: makes one set of inputs, random data on the device.
        fused: ours.
        eager: what a user has in plain torch.
        compiled: the function that torch.compile gets.
        around: goes around the compiled function: a backward, say.
        liger: makes Liger-Kernel's form, where it has the operator; ImportError without the package.
        bytes_moved: read and written at least, by one call.
        comparable: maps a result to what is compared.
    """

    make: Callable[[], tuple[Any, ...]]
    fused: Contestant
    eager: dict[str, Contestant]
    compiled: Contestant
    bytes_moved: int
    liger: Callable[[], Contestant] | None = None
    comparable: Callable[[Any], Any] = lambda result: result
    around: Callable[[Contestant], Contestant] = lambda function: function


HEADS = ((256, 56), (512, 28), (1024, 14), (2048, 7))  # a ResNet-50's stages at 224 px
LINEAR_CHANNELS = (256, 512, 1024, 2048)
NARROW = 128  # channels of every exit in the layout "narrow", as in the CPU's benchmark
SUBSET_TABLE = 1 << 27  # scores at a time: half a gigabyte


def all_cases() -> Iterator[Case]:
    """All cases that this build has operators for."""
    for dtype in ("float32", "bfloat16"):
        for size in ((1, 2048, 7), (64, 2048, 7), (64, 256, 56), (256, 512, 28)):
            for layout in ("contiguous", "channels_last"):
                yield Case("global_avg_pool", size, dtype, layout)
        for rows in (1, 64):
            yield Case("multi_exit_linear_head", (rows,), dtype)
        for operator in ("ensemble", "ensemble_stats"):
            for size in ((4, 1, 10), (4, 64, 1000), (4, 4096, 1000), (4, 1024, 21841)):
                yield Case(operator, size, dtype)
        for size in ((4, 64, 100), (4, 256, 1000), (4, 4096, 1000), (4, 1024, 21841)):
            yield Case("joint_cross_entropy", size, dtype)
        if hasattr(ops, "linear_joint_cross_entropy"):
            for size in ((4, 256, 1000), (4, 1024, 21841)):
                yield Case("linear_joint_cross_entropy", size, dtype)
            yield Case("linear_joint_cross_entropy", (4, 1024, 21841), dtype, "narrow")
        for rows in (1, 64, 256):
            yield Case("gate", (rows,), dtype)
    for size in ((4, 10000, 100), (7, 10000, 200), (10, 10000, 100)):
        yield Case("subset_correct", size)


def bytes_of(value: Any) -> int:
    """Of all tensors among the inputs."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(bytes_of(entry) for entry in value) if isinstance(value, (list, tuple)) else 0


def setup(case: Case, device: str) -> Setup:
    """The contestants of a case."""
    return _SETUPS[case.operator](case, device)


def _pool(case: Case, device: str) -> Setup:
    rows, channels, height = case.size
    form = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format

    def make() -> tuple[Tensor]:
        x = torch.randn(rows, channels, height, height, device=device, dtype=case.torch_dtype)
        return (x.contiguous(memory_format=form),)

    moved = rows * channels * (height**2 + 1) * case.torch_dtype.itemsize
    eager = {"mean": lambda x: x.mean((2, 3)), "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)}
    return Setup(make, ops.global_avg_pool, eager, lambda x: x.mean((2, 3)), moved)


def _head(case: Case, device: str) -> Setup:
    (rows,), dtype, classes = case.size, case.torch_dtype, 1000
    weights = [torch.randn(classes, c, device=device, dtype=dtype) * c**-0.5 for c, _ in HEADS]
    biases = [torch.randn(classes, device=device, dtype=dtype) for _ in HEADS]
    heads = [rivals.ExitHead(w, b) for w, b in zip(weights, biases, strict=True)]

    def make() -> tuple[list[Tensor]]:
        return ([torch.randn(rows, c, h, h, device=device, dtype=dtype) for c, h in HEADS],)

    moved = sum(rows * c * h * h + classes * c for c, h in HEADS) + len(HEADS) * rows * classes
    return Setup(
        make,
        lambda x: ops.multi_exit_linear_head(x, weights, biases),
        {
            "naive": lambda x: rivals.head_naive(x, heads),
            "mean": lambda x: rivals.head_mean(x, weights, biases),
        },
        lambda x: rivals.head_mean(x, weights, biases),
        moved * dtype.itemsize,
    )


def _logits(case: Case, device: str) -> Callable[[], tuple[Tensor, Tensor]]:
    exits, rows, classes = case.size
    weights = torch.arange(1.0, exits + 1, device=device).to(case.torch_dtype) / exits

    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(exits, rows, classes, device=device, dtype=case.torch_dtype), weights

    return make


def _ensemble(case: Case, device: str) -> Setup:
    exits, rows, classes = case.size
    eager = {"naive": rivals.ensemble_naive, "einsum": rivals.ensemble_einsum, "product": rivals.ensemble_product}
    moved = (exits + 1) * rows * classes * case.torch_dtype.itemsize
    return Setup(_logits(case, device), ops.ensemble, eager, rivals.ensemble_naive, moved)


def _stats(case: Case, device: str) -> Setup:
    exits, rows, classes = case.size
    eager = {"naive": rivals.stats_naive, "eager": rivals.stats_eager}
    moved = (exits + 1) * rows * classes * case.torch_dtype.itemsize

    def comparable(result: Any) -> tuple[Tensor, Tensor]:
        return result[0], result[1]  # equal logits may have another argmax in a rival of lower precision

    return Setup(
        _logits(case, device),
        ops.ensemble_stats,
        eager,
        rivals.stats_fusable,
        moved,
        comparable=comparable,
    )


def _loss(case: Case, device: str) -> Setup:
    exits, rows, classes = case.size
    weights = [float(e + 1) for e in range(exits)]
    as_tensor = torch.tensor(weights, device=device)

    def make() -> tuple[Tensor, Tensor]:
        logits = torch.randn(exits, rows, classes, device=device, dtype=case.torch_dtype).requires_grad_()
        return logits, torch.randint(classes, (rows,), device=device)

    def liger() -> Contestant:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        plain = LigerCrossEntropyLoss()

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            # A clone: Liger's kernel writes the gradient over what it is given.
            return sum(w * plain(x.clone(), target) for w, x in zip(weights, logits, strict=True))

        return rivals.graded(loss)

    moved = 3 * exits * rows * classes * case.torch_dtype.itemsize  # read for the loss, read again, gradient written
    return Setup(
        make,
        rivals.graded(lambda x, y: ops.joint_cross_entropy(x, y, as_tensor).loss),
        {
            "summed": rivals.graded(lambda x, y: rivals.loss_summed(x, y, weights)),
            "flat": rivals.graded(lambda x, y: rivals.loss_flat(x, y, as_tensor.to(x.dtype))),
        },
        lambda x, y: rivals.loss_summed(x, y, weights),
        moved,
        liger=liger,
        around=rivals.graded,
    )


def _linear_loss(case: Case, device: str) -> Setup:
    (exits, rows, classes), dtype = case.size, case.torch_dtype
    channels = (NARROW,) * exits if case.layout == "narrow" else LINEAR_CHANNELS[:exits]
    weights = [(torch.randn(classes, c, device=device) * c**-0.5).to(dtype).requires_grad_() for c in channels]
    biases = [torch.zeros(classes, device=device, dtype=dtype, requires_grad=True) for _ in channels]
    numbers = [float(e + 1) for e in range(exits)]
    as_tensor = torch.tensor(numbers, device=device)

    def make() -> tuple[list[Tensor], Tensor]:
        pooled = [torch.randn(rows, c, device=device).to(dtype).requires_grad_() for c in channels]
        return pooled, torch.randint(classes, (rows,), device=device)

    def graded(loss: Callable[..., Tensor]) -> Contestant:
        def step(pooled: list[Tensor], target: Tensor) -> tuple[Tensor, ...]:
            value = loss(pooled, target)
            return value.detach(), *torch.autograd.grad(value, [*pooled, *weights, *biases])

        return step

    def plain(pooled: list[Tensor], target: Tensor) -> Tensor:
        logits = [F.linear(x, w, b) for x, w, b in zip(pooled, weights, biases, strict=True)]
        return rivals.loss_summed(logits, target, numbers)

    def liger() -> Contestant:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        return graded(
            lambda pooled, target: sum(
                a * fused(w, x, target, b) for a, x, w, b in zip(numbers, pooled, weights, biases, strict=True)
            )
        )

    # Every weight is read for the logits and for the features' gradient, and its gradient written.
    moved = sum(3 * classes * c + 2 * rows * c for c in channels) * dtype.itemsize
    return Setup(
        make,
        graded(lambda x, y: ops.linear_joint_cross_entropy(x, weights, biases, y, as_tensor).loss),
        {"summed": graded(plain)},
        plain,
        moved,
        liger=liger,
        around=graded,
    )


def _subsets(case: Case, device: str) -> Setup:
    exits, rows, classes = case.size
    logits = _logits(case, device)

    def make() -> tuple[Tensor, Tensor, Tensor]:
        x, weights = logits()
        target = torch.randint(classes, (rows,), device=device)
        x[:, torch.arange(rows, device=device), target] += 3.0  # as a trained network gives them
        return x, weights, target

    def product(*arguments: Any) -> Tensor:
        return rivals.subsets_product(*arguments, table=SUBSET_TABLE)

    def around(ranks: Contestant) -> Contestant:  # the loop around it would be unrolled
        return lambda *arguments: rivals.subsets_product(*arguments, ranks, SUBSET_TABLE)

    moved = exits * rows * classes * case.torch_dtype.itemsize

    def near_enough(counts: Tensor) -> Tensor:
        return counts.double() / rows  # a product may round a near tie the other way

    return Setup(
        make,
        ops.subset_correct,
        {"product": product},
        rivals.subset_ranks,
        moved,
        comparable=near_enough,
        around=around,
    )


def _gate(case: Case, device: str) -> Setup:
    (rows,), dtype, classes, channels, height = case.size, case.torch_dtype, 1000, 512, 8
    acc = torch.float32
    indices, state = torch.arange(rows, device=device), torch.zeros(rows, 0, dtype=torch.int64, device=device)
    sums, scores = (torch.randn(rows, classes, device=device, dtype=acc) for _ in range(2))
    scores = (scores * 16).round() / 16  # the same in every dtype
    confidence = torch.softmax((sums + 0.7 * scores).double(), -1).amax(-1).sort().values
    # One threshold for all sets of inputs, whose rows differ in order: a compiler makes code for each number.
    limit = 2.0 if rows == 1 else confidence[rows // 2 - 1 : rows // 2 + 1].mean().item()

    def make() -> tuple[Any, ...]:
        features = torch.randn(rows, channels, height, height, device=device, dtype=dtype)
        order = torch.randperm(rows, device=device)
        return features, sums[order], scores[order].to(dtype), limit

    def fused(features: Tensor, running: Tensor, logits: Tensor, limit: float) -> tuple[Tensor, ...]:
        r = ops.gate(features, running, 0.3, indices, state, logits, weight=0.7, threshold=limit)
        return r.features, r.running, r.indices, r.stats, r.count

    def rival(gate: Contestant) -> Contestant:
        return lambda features, running, logits, limit: gate(features, running, indices, logits, 0.7, limit)

    def comparable(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stay = int(result[4]) if len(result) == 5 else len(result[0])
        return result[0][:stay], result[1][:stay], result[2], result[3]

    staying = rows if rows == 1 else rows - rows // 2
    moved = staying * channels * height**2 * 2 * dtype.itemsize + rows * classes * (2 * 4 + dtype.itemsize)
    return Setup(
        make,
        fused,
        {"naive": rival(rivals.gate_naive), "eager": rival(rivals.gate_eager)},
        rival(rivals.gate_eager),
        moved,
        comparable=comparable,
    )


_SETUPS: dict[str, Callable[[Case, str], Setup]] = {
    "global_avg_pool": _pool,
    "multi_exit_linear_head": _head,
    "ensemble": _ensemble,
    "ensemble_stats": _stats,
    "joint_cross_entropy": _loss,
    "linear_joint_cross_entropy": _linear_loss,
    "subset_correct": _subsets,
    "gate": _gate,
}
