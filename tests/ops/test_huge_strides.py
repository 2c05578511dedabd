"""Tensors whose elements lie more than 2^31 and 2^32 elements apart: views of memory that is mapped, but not held."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from aep_ext import ops

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or sys.maxsize < 2**32, reason="memory is mapped as Linux does on 64 bits"
)

_FAR = 2**31 + 8  # elements; a multiple of 16 bytes, so that packs are taken where they can be
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE


@pytest.fixture
def apart() -> Iterator[Callable[..., Tensor]]:
    """The values of a tensor in a view with the strides given. Pages that nobody touches take no memory."""
    held: list[mmap.mmap] = []

    def lay(values: Tensor, *strides: int) -> Tensor:
        size = 1 + sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
        try:
            held.append(mmap.mmap(-1, size * values.element_size(), flags=_FLAGS))
        except OSError as error:
            pytest.skip(f"this machine maps no {size * values.element_size():,} bytes: {error}")
        view = torch.frombuffer(held[-1], dtype=values.dtype).as_strided(values.shape, strides)
        view.copy_(values)
        return view

    yield lay
    # The maps go with the last tensor that holds them.


_LOGITS = {"exits": (_FAR, 12, 1), "rows": (12, 2 * _FAR, 1), "classes": (1, 3, _FAR), "odd": (_FAR + 1, 12, 1)}


def _logits(shape: tuple[int, int, int] = (3, 2, 12), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("where", _LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_statistics_and_counts(apart, close, where, dtype):
    x, weights, target = _logits(dtype=dtype), torch.tensor([0.5, 0.3, 0.2]), torch.tensor([11, 3])
    far = apart(x, *_LOGITS[where])
    assert torch.equal(ops.ensemble(far, weights), ops.ensemble(x, weights))
    for result, expected in zip(ops.ensemble_stats(far, weights), ops.ensemble_stats(x, weights), strict=True):
        close(result, expected, torch.float32)
    assert torch.equal(ops.subset_correct(far, weights, target), ops.subset_correct(x, weights, target))
    for smoothing in (0.0, 0.1):
        loss = ops.joint_cross_entropy(far, target, weights, label_smoothing=smoothing)
        expected = ops.joint_cross_entropy(x, target, weights, label_smoothing=smoothing)
        close(loss.loss, expected.loss)
        close(loss.exit_losses, expected.exit_losses)


@pytest.mark.parametrize("where", _LOGITS)
def test_gradients_of_the_loss(apart, close, where, native):
    x, weights, target = _logits(), torch.tensor([0.5, 0.3, 0.2]), torch.tensor([11, 3])
    leaf = x.clone().requires_grad_()
    ops.joint_cross_entropy(leaf, target, weights).loss.backward()
    far = apart(x, *_LOGITS[where])
    (grad,) = torch.autograd.grad(ops.joint_cross_entropy(far.requires_grad_(), target, weights).loss, far)
    close(grad, leaf.grad)
    far.requires_grad_(False)
    held = torch.ops.aep.multi_exit_loss_with_grad(far, target, weights)[4]
    close(held, leaf.grad)
    torch.ops.aep.multi_exit_loss_(far, target, weights)  # over the logits, where they lie
    close(far, leaf.grad)
    torch.ops.aep.multi_exit_loss_scale_(far, torch.tensor(3.0))
    close(far, 3 * leaf.grad)


@pytest.mark.parametrize("where", _LOGITS)
def test_gradients_of_the_sum(apart, close, where, native):
    x, weights, grad = _logits(), torch.tensor([0.5, 0.3, 0.2]), torch.randn(2, 12)
    far_grad = apart(grad, *_LOGITS[where][1:])
    backward = torch.ops.aep
    close(backward.ensemble_backward_logits(far_grad, weights), backward.ensemble_backward_logits(grad, weights))
    far = apart(x, *_LOGITS[where])
    close(backward.ensemble_backward_weights(far_grad, far), backward.ensemble_backward_weights(grad, x))


def test_labels_and_their_gradients_far_apart(apart, close):
    x, weights = _logits(), torch.tensor([0.5, 0.3, 0.2])
    target, grad = torch.tensor([11, 3]), torch.randn(2)
    far = apart(target, 2 * _FAR)
    assert torch.equal(ops.subset_correct(x, weights, far), ops.subset_correct(x, weights, target))
    gradients = []
    for labels, incoming in ((target, grad), (far, apart(grad, 2 * _FAR))):
        leaf = x.clone().requires_grad_()
        loss = ops.joint_cross_entropy(leaf, labels, weights, reduction="none").loss
        loss.backward(incoming)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


_MAPS = {
    "samples": (2 * _FAR, 16, 4, 1),
    "channels": (16, _FAR, 4, 1),
    "rows": (128, 16, _FAR, 1),
    "columns": (128, 16, 4, _FAR),
    "samples, channels last": (2 * _FAR, 1, 32, 8),
    "rows, channels last": (64, 1, _FAR, 8),
}


@pytest.mark.parametrize("where", _MAPS)
def test_feature_maps(apart, close, where):
    x = torch.randn(2, 8, 4, 4)
    far = apart(x, *_MAPS[where])
    close(ops.global_avg_pool(far), x.mean((2, 3)))
    weights = [torch.randn(5, 8)] * 2
    close(ops.multi_exit_linear_head([x, far], weights, None)[1], x.mean((2, 3)) @ weights[0].T)


@pytest.mark.parametrize("criterion", ["confidence", "vote"])
@pytest.mark.parametrize("rows", [3, 130])
def test_gate(apart, rows, criterion):
    """Few rows in one launch, more in several (130 rows of 40 classes)."""
    features, running, logits = torch.randn(rows, 6), torch.randn(rows, 40), torch.randn(rows, 40)
    indices = torch.arange(rows)
    state = torch.zeros(rows, 40 if criterion == "vote" else 0, dtype=torch.int64)
    step = 2 * _FAR // (rows - 1) if rows > 3 else _FAR
    strides = (step, 1)
    scalars = {"weight": 0.25, "threshold": 0.09 if criterion == "confidence" else 1.0, "criterion": criterion}
    near = ops.gate(features, running, 0.5, indices, state, logits, **scalars)
    views = apart(indices, step), state, apart(logits, *strides)
    far = ops.gate(apart(features, *strides), apart(running, *strides), 0.5, *views, **scalars)
    assert all(torch.equal(*pair) for pair in zip(near, far, strict=True))


def test_linear_losses(apart, close):
    """Rows of pooled features and labels far apart; the products are ATen's."""
    pooled, weight, target = torch.randn(3, 6), torch.randn(7, 6), torch.tensor([1, 6, 0])
    expected = ops.linear_joint_cross_entropy([pooled], [weight], None, target, torch.ones(1), chunk=2)
    far = ops.linear_joint_cross_entropy([pooled], [weight], None, apart(target, _FAR), torch.ones(1), chunk=2)
    close(far.loss, expected.loss)


def test_the_strides_are_what_they_claim():
    """Offsets beyond 2^31 for every view, and beyond 2^32 for some."""
    reach = [sum((n - 1) * s for n, s in zip((3, 2, 12), strides, strict=True)) for strides in _LOGITS.values()]
    reach += [sum((n - 1) * s for n, s in zip((2, 8, 4, 4), strides, strict=True)) for strides in _MAPS.values()]
    assert min(reach) > 2**31 and math.prod(r > 2**32 for r in reach) == 1
