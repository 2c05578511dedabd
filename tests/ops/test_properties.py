"""Random shapes, layouts, values and ties: native equals reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference

# Few distinct values make ties; the special ones meet every rule about NaN and infinities.
ORDINARY = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -3.0, 30.0]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 3.0e38, -3.0e38, 1e-40]
SETTINGS = settings(max_examples=80, deadline=None, database=None)


@st.composite
def logits(draw: st.DrawFn, max_exits: int = 5, special: bool = True) -> Tensor:
    shape = (draw(st.integers(1, max_exits)), draw(st.integers(0, 6)), draw(st.integers(1, 40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.tensor(ORDINARY + (SPECIAL if special and draw(st.booleans()) else []), dtype=torch.float64)
    x = values[torch.randint(len(values), shape, generator=generator)]
    if draw(st.booleans()):
        x = x + torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])))
    order = draw(st.permutations(range(3)))
    back = [order.index(i) for i in range(3)]
    x = x.permute(order).contiguous().permute(back)
    step = draw(st.sampled_from([1, 2]))
    return x.repeat_interleave(step, 2)[..., ::step]


def weights_for(x: Tensor, seed: int = 0) -> Tensor:
    return torch.rand(x.shape[0], generator=torch.Generator().manual_seed(seed))


def labels_for(x: Tensor, seed: int = 0) -> Tensor:
    return torch.randint(x.shape[2], (x.shape[1],), generator=torch.Generator().manual_seed(seed))


def same(actual: Tensor, expected: Tensor, exact: bool) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 3e-5, "atol": 3e-6}
    torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)


@SETTINGS
@given(logits(), st.sampled_from([0.5, 1.0, 3.0]))
def test_ensemble_stats(x, temperature):
    w = weights_for(x)
    same(ops.ensemble(x, w), reference.ensemble(x, w), exact=True)
    actual = ops.ensemble_stats(x, w, temperature=temperature)
    expected = reference.ensemble_stats(x, w, temperature=temperature)
    same(actual.logits, expected.logits, exact=True)
    same(actual.argmax, expected.argmax, exact=True)
    same(actual.stats, expected.stats, exact=False)


@SETTINGS
@given(logits())
def test_subset_correct(x):
    w, y = weights_for(x), labels_for(x)
    same(ops.subset_correct(x, w, y), reference.subset_correct(x, w, y), exact=True)


@SETTINGS
@given(
    logits(special=False),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_joint_cross_entropy(x, reduction, smoothing, weighted, ignored):
    a, y = weights_for(x), labels_for(x)
    if ignored:
        y[::2] = -100
    class_weight = torch.rand(x.shape[2], generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    grads = []
    for function in (ops.joint_cross_entropy, reference.joint_cross_entropy):
        leaf, scale = x.clone().requires_grad_(), a.clone().requires_grad_()
        result = function(leaf, y, scale, class_weight, smoothing, reduction=reduction)
        (result.loss.sum() + result.exit_losses.sum()).backward()
        grads.append((result.loss.detach(), result.exit_losses.detach(), scale.grad, leaf.grad))
    for actual, expected in zip(*grads, strict=True):
        if expected.dtype in (torch.bfloat16, torch.float16):
            torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1.6e-2, atol=1e-3)
        else:
            same(actual, expected, exact=False)


@SETTINGS
@given(
    logits(special=False),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
    st.sampled_from([1.0, 2.0, 2.5, 4.0]),
    st.booleans(),
)
def test_multi_exit_loss(x, reduction, smoothing, soft, temperature, detach):
    a, b, y = weights_for(x), weights_for(x, 1) + 0.1, labels_for(x)
    if soft:
        y = torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(2)).softmax(-1)
    grads = []
    for function in (ops.multi_exit_loss, reference.multi_exit_loss):
        leaf, scale, prefix = (t.clone().requires_grad_() for t in (x, a, a + 0.3))
        options = {"distillation": 0.4, "temperature": temperature, "detach_prefix": detach, "reduction": reduction}
        result = function(leaf, y, scale, prefix, b, label_smoothing=smoothing, **options)
        sum(term.sum() for term in result).backward()
        grads.append((*(term.detach() for term in result), scale.grad, prefix.grad, leaf.grad))
    for actual, expected in zip(*grads, strict=True):
        if expected.dtype in (torch.bfloat16, torch.float16):
            torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1.6e-2, atol=1e-3)
        else:
            same(actual, expected, exact=False)


@SETTINGS
@given(logits(max_exits=2), st.sampled_from(["confidence", "entropy", "margin", "patience", "vote"]), st.booleans())
def test_gate(x, criterion, on_exit):
    x = x[0]
    n, classes = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(3)
    state = torch.randint(0, 3, (n, {"patience": 2, "vote": classes}.get(criterion, 0)), generator=generator)
    # Thresholds that no statistic of these rows meets exactly.
    threshold = {"confidence": 0.41234, "entropy": 1.1234, "margin": 0.21234, "patience": 2, "vote": 2}[criterion]
    args = {
        "features": torch.randn(n, 3, generator=generator),
        "running": torch.randn(n, classes, generator=generator).to(wide),
        "weight_sum": 0.3,
        "indices": torch.arange(n),
        "state": state,
        "exit_logits": x,
        "weight": 0.7,
        "threshold": threshold,
        "criterion": criterion,
        "criterion_on": "exit" if on_exit else "ensemble",
    }
    actual, expected = ops.gate(**args), reference.gate(**args)
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        same(a, b, exact=name != "stats")


@SETTINGS
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 4),
    st.integers(1, 12),
    st.sampled_from([torch.float32, torch.float64]),
    st.permutations(range(4)),
)
def test_multi_exit_linear_head(maps, rows, classes, dtype, order):
    generator = torch.Generator().manual_seed(0)
    back = [order.index(i) for i in range(4)]
    features = [
        torch.randn(rows, *m, dtype=dtype, generator=generator).permute(order).contiguous().permute(back) for m in maps
    ]
    weights = [torch.randn(classes, m[0], dtype=dtype, generator=generator) for m in maps]
    same(
        ops.multi_exit_linear_head(features, weights), reference.multi_exit_linear_head(features, weights), exact=False
    )


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_empty_draws_are_part_of_the_space(rows):
    """The strategies above include N = 0; this states it."""
    x = torch.zeros(2, rows, 3)
    assert ops.ensemble(x, torch.ones(2)).shape == (rows, 3)
