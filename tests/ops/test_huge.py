"""Offsets past 2^31: views with huge strides into memory that is hardly touched, and, on a GPU, dense tensors of more
than 2^31 elements, of which slices are compared with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aep_ext import _load, ops
from aep_ext.ops import reference

BORDER = 1 << 31
GIB = 1 << 30
FAR = (1 << 30) + 13  # three steps of it lie past the border; no power of two, not aligned

Memory = Callable[[int], None]


@pytest.fixture
def gpu_memory() -> Iterator[Memory]:
    """``gpu_memory(bytes)`` skips where the GPU has less. What a test took is given back."""

    def needs(size: int) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < size * 1.05 + GIB:
            pytest.skip(f"needs {size / GIB:.0f} GiB of GPU memory, {free / GIB:.0f} are free")

    yield needs
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def far(device: str, tmp_path: Path, gpu_memory: Memory) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """``far(values, strides)``: the same values, their elements as far apart as the strides say."""

    def place(values: Tensor, strides: Sequence[int]) -> Tensor:
        reach = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
        assert reach > BORDER
        if device == "cuda":
            gpu_memory(reach * values.itemsize)
            memory = torch.empty(reach, dtype=values.dtype, device=device)
        else:  # a file without blocks: pages exist where something is written
            path = tmp_path / "memory"
            with path.open("wb") as file:
                file.truncate(reach * values.itemsize)
            memory = torch.from_file(str(path), shared=False, size=reach, dtype=values.dtype)
            path.unlink()
        view = memory.as_strided(values.shape, strides)
        return view.copy_(values)

    return place


STRIDES = {"exits": (FAR, 8, 1), "rows": (7, FAR, 1), "classes": (50, 9, FAR)}


def make(device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (4, 5, 6), of which four steps along any axis reach past the border, weights and labels."""
    logits = torch.randn(4, 5, 6, device=device).mul(3).to(dtype)
    return logits, torch.rand(4, device=device) + 0.1, torch.randint(6, (5,), device=device)


@pytest.mark.parametrize("axis", STRIDES)
def test_combination_of_far_logits(axis, device, far, close):
    logits, weights, target = make(device)
    view = far(logits, STRIDES[axis])
    close(ops.ensemble(view, weights), ops.ensemble(logits, weights))
    for actual, expected in zip(ops.ensemble_stats(view, weights), ops.ensemble_stats(logits, weights), strict=True):
        close(actual, expected, logits.dtype)
    counts = ops.subset_correct(view, weights, target)
    assert torch.equal(counts, reference.subset_correct(logits, weights, target))


@pytest.mark.parametrize("memory", ["recompute", "in_forward", "in_place"])
@pytest.mark.parametrize("axis", STRIDES)
def test_loss_of_far_logits(axis, memory, device, far, close):
    logits, weights, target = make(device)
    dense = logits.clone().requires_grad_()
    expected = reference.joint_cross_entropy(dense, target, weights).loss
    (wanted,) = torch.autograd.grad(expected, dense)
    view = far(logits, STRIDES[axis]).requires_grad_()
    # In place wants logits that something has computed: here an operation that leaves them where they lie.
    x = _Same.apply(view) if memory == "in_place" else view
    loss = ops.joint_cross_entropy(x, target, weights, memory=memory).loss
    close(loss.detach(), expected.detach(), torch.float32)
    (grad,) = torch.autograd.grad(loss, view)
    close(grad, wanted)
    if memory == "in_place":
        assert _load.extension is None or grad.data_ptr() == view.data_ptr()  # the reference writes elsewhere


class _Same(torch.autograd.Function):
    """The same memory as the result of an operation."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ANN001
        return x.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ANN001
        return grad


def test_far_labels(device, far):
    logits, weights, target = make(device)
    logits, target = logits[:, :3], target[:3]
    view = far(target, (FAR,))
    expected = reference.joint_cross_entropy(logits, target, weights).loss
    torch.testing.assert_close(ops.joint_cross_entropy(logits, view, weights).loss, expected)
    assert torch.equal(ops.subset_correct(logits, weights, view), reference.subset_correct(logits, weights, target))
    view[2] = 6
    with ops.check_labels(), pytest.raises(IndexError, match="got 6 at position 2"):
        ops.joint_cross_entropy(logits, view, weights)


@pytest.mark.parametrize("strides", [(FAR, 12, 3, 1), (60, FAR, 3, 1), (60, 12, FAR, 1), (1, 5, 20, FAR)], ids=str)
def test_pool_of_far_maps(strides, device, far, close):
    maps = torch.randn(5, 4, 4, 3, device=device).to(torch.bfloat16)
    view = far(maps, strides)
    close(ops.global_avg_pool(view), reference.global_avg_pool(maps))
    weight = torch.randn(7, 4, device=device).to(torch.bfloat16)
    close(ops.multi_exit_linear_head([view], [weight]), reference.multi_exit_linear_head([maps], [weight]))


@pytest.mark.parametrize("part", ["features", "running", "exit_logits"])
def test_gate_of_far_rows(part, device, far, close):
    logits = torch.tensor([[0.0, 8, 0, 0], [0, 0, 1, 0], [0, 2, 0, 0]], device=device).to(torch.bfloat16)
    tensors = {"features": torch.randn(3, 2, 2, 2, device=device), "running": logits * 0.5, "exit_logits": logits}
    indices, state = torch.arange(3, device=device), torch.zeros(3, 0, dtype=torch.int64, device=device)

    def run(features: Tensor, running: Tensor, exit_logits: Tensor) -> ops.GateResult:
        return ops.gate(features, running, 0.5, indices, state, exit_logits, weight=0.5, threshold=0.9)

    expected = run(**tensors)
    assert expected.count.item() == 2
    view = far(tensors[part], (FAR, *tensors[part].stride()[1:]))
    for actual, wanted in zip(run(**(tensors | {part: view})), expected, strict=True):
        close(actual, wanted, torch.float32)


def test_linear_loss_of_far_rows(device, far):
    pooled = torch.randn(3, 4, device=device).to(torch.bfloat16)
    weight, target = torch.randn(5, 4, device=device).to(torch.bfloat16), torch.tensor([0, 4, 2], device=device)
    a = torch.ones(1, device=device)
    expected = ops.linear_joint_cross_entropy([pooled], [weight], None, target, a)
    actual = ops.linear_joint_cross_entropy([far(pooled, (FAR, 1))], [weight], None, target, a)
    torch.testing.assert_close(actual, expected)


# Dense tensors; only a GPU has the memory and the speed.

gpu = pytest.mark.gpu
KIND = {"device": "cuda", "dtype": torch.bfloat16}


def around(exits: int, rows: int, row: int, length: int = 3) -> list[slice]:
    """Pieces of ``length`` rows of ``row`` elements: the first, the last, and where offsets pass 2^31: as bytes (of
    elements of two), and as elements, which is 2^32 bytes."""
    found = {0, rows - length}
    for border in (BORDER // 2, BORDER):
        found |= {max(0, min(rows - length, border // row - e * rows - 1)) for e in range(exits)}
    return [slice(start, start + length) for start in sorted(found)]


def log_sum_exp(row: Tensor) -> Tensor:
    """In float64, piece by piece: a copy of the row would be four times its size."""
    return torch.stack([part.double().logsumexp(0) for part in row.detach().split(1 << 27)]).logsumexp(0)


# Exits * rows * classes are a little more than 2^31: many rows; a few long ones; a single one.
LAST = 21.0
SHAPES = [(3, 7_200_001, 100), (2, 50_001, 21_841), (1, 1, BORDER + 1001)]


def huge(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights, labels; the largest logit of the last row is its last, and its label too. In the row of 2^31 it
    is as likely as a billion others."""
    logits = torch.randn(shape, **KIND)
    target = torch.randint(shape[2], shape[1:2], device="cuda")
    logits[:, -1, -1] = LAST
    target[-1] = shape[2] - 1
    return logits, torch.arange(1.0, shape[0] + 1, device="cuda"), target


@gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ensemble_of_huge_logits(shape, gpu_memory, close):
    exits, rows, classes = shape
    gpu_memory(2 * exits * rows * classes + 4 * rows * classes)
    logits, weights, _ = huge(shape)
    result = ops.ensemble_stats(logits, weights)
    assert torch.equal(ops.ensemble(logits, weights), result.logits)
    assert result.argmax[-1].item() == classes - 1
    if rows == 1:  # the reference would need ten times the memory
        assert torch.equal(result.logits, logits[0])
        expected = (LAST - log_sum_exp(logits[0, 0])).exp()
        torch.testing.assert_close(result.stats[0, 0].double(), expected, rtol=5e-2, atol=0)
        return
    for part in around(*shape):
        expected = reference.ensemble_stats(logits[:, part], weights)
        assert torch.equal(result.argmax[part], expected.argmax)
        close(result.logits[part], expected.logits)
        close(result.stats[part], expected.stats, torch.bfloat16)


@gpu
@pytest.mark.parametrize("memory", ["recompute", "in_forward", "in_place"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_loss_of_huge_logits(shape, memory, gpu_memory, close):
    exits, rows, classes = shape
    gpu_memory(2 * exits * rows * classes * (1 if memory == "in_place" else 2) + 16 * exits * rows)
    logits, weights, target = huge(shape)
    parts = around(*shape)
    before = [logits[:, part].clone().requires_grad_() for part in parts]
    with torch.no_grad():
        each = ops.joint_cross_entropy(logits, target, weights, reduction="none").loss
    leaf = logits.requires_grad_()
    x = _Same.apply(leaf) if memory == "in_place" else leaf
    loss = ops.joint_cross_entropy(x, target, weights, memory=memory, reduction="sum").loss
    torch.testing.assert_close(loss.detach().double(), each.double().sum(), rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(loss, leaf)
    for part, y in zip(parts, before, strict=True):
        expected = reference.joint_cross_entropy(y, target[part], weights, reduction="none").loss
        close(each[part], expected.detach(), torch.float32)
        close(grad[:, part], torch.autograd.grad(expected.sum(), y)[0])


@gpu
def test_loss_of_a_huge_row(gpu_memory):
    shape = SHAPES[2]
    gpu_memory(4 * shape[2] + (4 << 30))
    logits, weights, target = huge(shape)
    expected = log_sum_exp(logits[0, 0]) - LAST
    loss = ops.joint_cross_entropy(logits.requires_grad_(), target, weights).loss
    torch.testing.assert_close(loss.detach().double(), expected, rtol=5e-2, atol=0)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad[0, 0, -1].double(), (-expected).exp() - 1, rtol=5e-2, atol=0)


@gpu
def test_subsets_of_huge_logits(gpu_memory):
    shape = SHAPES[0]
    gpu_memory(2 * shape[0] * shape[1] * shape[2])
    logits, weights, target = huge(shape)
    step = shape[1] // 8 + 1
    pieces = [
        ops.subset_correct(logits[:, start : start + step].contiguous(), weights, target[start : start + step])
        for start in range(0, shape[1], step)
    ]
    assert torch.equal(ops.subset_correct(logits, weights, target), sum(pieces))
    for part in around(*shape):
        own = (logits[:, part], weights, target[part])
        assert torch.equal(ops.subset_correct(*own), reference.subset_correct(*own))


@gpu
def test_bad_label_behind_the_border_is_found(gpu_memory):
    """More labels than 2^31, of one class; the last is no class."""
    gpu_memory(8 * BORDER)
    rows = BORDER + 3
    target = torch.zeros(rows, dtype=torch.int64, device="cuda")
    target[-2] = 1
    logits = torch.zeros(1, 1, 1, **KIND).expand(1, rows, 1)
    with ops.check_labels(), pytest.raises(IndexError, match=f"got 1 at position {rows - 2}"):
        ops.subset_correct(logits, torch.ones(1, device="cuda"), target)


@gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_pool_of_huge_maps(layout, gpu_memory, close):
    rows, channels, side = 2050, 1024, 32
    gpu_memory(3 * 2 * rows * channels * side**2)
    maps = torch.empty(rows, channels, side, side, **KIND, memory_format=layout)
    maps.normal_().requires_grad_()
    pooled = ops.global_avg_pool(maps)
    weight = torch.randn(10, channels, **KIND)
    with torch.no_grad():
        head = ops.multi_exit_linear_head([maps], [weight])
    factors = torch.randn_like(pooled)
    (grad,) = torch.autograd.grad(pooled, maps, factors)
    for part in around(1, rows, channels * side**2):
        close(pooled[part].detach(), reference.global_avg_pool(maps[part].detach()))
        close(head[:, part], reference.multi_exit_linear_head([maps[part].detach()], [weight]))
        expected = (factors[part].float() / side**2).to(torch.bfloat16)[:, :, None, None]
        close(grad[part], expected.expand_as(grad[part]))


@gpu
def test_gate_of_huge_features(gpu_memory):
    rows, width = 33_001, 65_536
    gpu_memory(2 * 2 * rows * width)
    features = torch.randn(rows, width, **KIND)
    logits = torch.zeros(rows, 10, device="cuda")
    logits[::3, 4] = 20.0  # a third leaves
    indices, state = torch.arange(rows, device="cuda"), torch.zeros(rows, 0, dtype=torch.int64, device="cuda")
    running = torch.zeros_like(logits)
    result = ops.gate(features, running, 0.0, indices, state, logits, weight=1.0, threshold=0.9)
    leaves = indices % 3 == 0
    count = int((~leaves).sum())
    assert result.count.item() == count
    assert torch.equal(result.indices, torch.cat([indices[~leaves], indices[leaves]]))
    step = rows // 8 + 1
    for start in range(0, count, step):
        stop = min(start + step, count)
        assert torch.equal(result.features[start:stop], features[result.indices[start:stop]])
    assert not result.features[count:].any()


@gpu
def test_gate_of_huge_logits(gpu_memory, close):
    rows, classes = 131_072, 16_391
    gpu_memory(2 * 3 * rows * classes)
    logits, running = torch.randn(rows, classes, **KIND), torch.randn(rows, classes, **KIND)
    logits[::5, 7] = 40.0
    indices, state = torch.arange(rows, device="cuda"), torch.zeros(rows, 0, dtype=torch.int64, device="cuda")
    features = torch.zeros(rows, 1, device="cuda")
    result = ops.gate(features, running, 1.0, indices, state, logits, weight=1.0, threshold=0.9)
    leaves = indices % 5 == 0
    assert torch.equal(result.indices, torch.cat([indices[~leaves], indices[leaves]]))
    for part in around(1, rows, classes, 4):
        own = result.indices[part]
        state = torch.zeros(4, 0, dtype=torch.int64, device="cuda")
        one = (features[:4], running[own], 1.0, own, state, logits[own])
        expected = reference.gate(*one, weight=1.0, threshold=2.0)  # nobody leaves: the order stays
        close(result.running[part], expected.running)
        torch.testing.assert_close(result.stats[part], expected.stats, rtol=1e-3, atol=1e-5)
        assert torch.equal(result.argmax[part], expected.argmax)


@gpu
def test_linear_loss_with_a_huge_buffer(gpu_memory):
    """One chunk whose logits have more than 2^31 elements, against many."""
    rows, classes, channels = 100_000, 21_841, 8
    gpu_memory(2 * rows * classes)
    pooled = torch.randn(rows, channels, **KIND).requires_grad_()
    weight = torch.randn(classes, channels, **KIND).requires_grad_()
    target, a = torch.randint(classes, (rows,), device="cuda"), torch.ones(1, device="cuda")
    results = []
    for chunk in (rows, 4096):
        loss = ops.linear_joint_cross_entropy([pooled], [weight], None, target, a, chunk=chunk).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, (pooled, weight))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
