from __future__ import annotations

import math

import pytest
import torch

from aep_ext import ops
from aep_ext.ops import reference

SHAPES = [
    (1, 4, 5),
    (4, 0, 10),
    (4, 1, 10),
    (3, 7, 1),
    (3, 5, 2),
    (2, 3, 21841),
    (7, 9, 200),
    (4, 64, 100),
    (17, 2, 33),
    (5, 3, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_equals_reference_bit_for_bit(shape, dtype, device):
    logits = torch.randn(shape, dtype=dtype, device=device)
    weights = torch.rand(shape[0], device=device)
    result = ops.ensemble(logits, weights)
    assert result.dtype == dtype and result.is_contiguous()
    assert torch.equal(result, reference.ensemble(logits, weights))


def test_sum_is_the_weighted_sum(device, close):
    logits, weights = torch.randn(4, 6, 9, device=device), torch.rand(4, device=device)
    close(ops.ensemble(logits, weights), torch.einsum("enk,e->nk", logits, weights))


@pytest.mark.parametrize("function", ["ensemble", "stats"])
def test_layouts(function, device, dtype, layouts, close):
    base, weights = torch.randn(4, 6, 37, device=device).to(dtype), torch.rand(4, device=device)
    for name, logits in layouts(base):
        assert torch.equal(logits, base), name
        if function == "ensemble":
            assert torch.equal(ops.ensemble(logits, weights), reference.ensemble(base, weights)), name
        else:
            assert torch.equal(ops.ensemble_stats(logits, weights).logits, reference.ensemble(base, weights)), name
            close(ops.ensemble_stats(logits, weights).stats, reference.ensemble_stats(base, weights).stats)


def test_expanded_logits(device):
    logits, weights = torch.randn(1, 5, 8, device=device).expand(3, 5, 8), torch.rand(3, device=device)
    assert torch.equal(ops.ensemble(logits, weights), reference.ensemble(logits, weights))
    logits = torch.randn(3, 5, 1, device=device).expand(3, 5, 8)
    assert torch.equal(ops.ensemble(logits, weights), reference.ensemble(logits, weights))


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_of_another_dtype(weight_dtype, dtype, device):
    logits = torch.randn(3, 4, 5, device=device).to(dtype)
    weights = torch.rand(3, device=device).to(weight_dtype)
    assert torch.equal(ops.ensemble(logits, weights), reference.ensemble(logits, weights))
    strided = torch.rand(6, device=device).to(weight_dtype)[::2]
    assert torch.equal(ops.ensemble(logits, strided), reference.ensemble(logits, strided))


def test_half_sums_are_rounded_once(device):
    """1 + 256 * 2^-9 in bfloat16: a sum rounded at every step would stay at 1."""
    logits = torch.full((257, 1, 1), 2.0**-9, dtype=torch.bfloat16, device=device)
    logits[0] = 1.0
    assert ops.ensemble(logits, torch.ones(257, device=device)).item() == 1.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_equal_reference(shape, dtype, device, close):
    logits = torch.randn(shape, dtype=torch.float32, device=device).mul(3).to(dtype)
    weights = torch.rand(shape[0], device=device)
    result = ops.ensemble_stats(logits, weights, normalizer=0.7, temperature=1.3)
    expected = reference.ensemble_stats(logits, weights, normalizer=0.7, temperature=1.3)
    assert torch.equal(result.logits, expected.logits)
    assert result.stats.dtype == torch.float32 and result.argmax.dtype == torch.int64
    close(result.stats, expected.stats)
    assert torch.equal(result.argmax, expected.argmax)


def test_statistics_mean_what_they_say(device):
    """ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8."""
    logits = torch.tensor([1.0, 2.0, 5.0], device=device).log().expand(1, 1, 3)
    stats = ops.ensemble_stats(2 * logits, torch.tensor([3.0], device=device), normalizer=2.0, temperature=3.0).stats
    entropy = -(1 / 8 * math.log(1 / 8) + 2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8))
    torch.testing.assert_close(stats, torch.tensor([[5 / 8, entropy, 3 / 8]], device=device))


def test_scalars_as_tensors(device, close):
    logits, weights = torch.randn(3, 4, 5, device=device), torch.rand(3, device=device)
    expected = ops.ensemble_stats(logits, weights, normalizer=0.5, temperature=2)
    for dtype in (torch.float32, torch.float64, torch.float16):
        half, two = torch.tensor(0.5, dtype=dtype, device=device), torch.tensor(2.0, dtype=dtype, device=device)
        assert torch.equal(ops.ensemble_stats(logits, weights, normalizer=half, temperature=two).stats, expected.stats)
        assert torch.equal(ops.ensemble_stats(logits, weights, normalizer=half, temperature=2).stats, expected.stats)


SPECIAL = {
    "nan": [0.0, float("nan"), 3.0, float("nan"), 1.0],
    "+inf": [0.0, 1.0, float("inf"), -1.0, float("inf")],
    "all -inf": [-float("inf")] * 5,
    "some -inf": [-float("inf"), 2.0, -float("inf"), 1.0, 1.0],
    "one finite": [-float("inf")] * 4 + [0.5],
    "tie": [1.0, 4.0, 4.0, 4.0, 0.0],
    "all equal": [2.0] * 5,
    "nan and inf": [float("inf"), float("nan"), -float("inf"), 0.0, 0.0],
    "huge": [3.0e38, -3.0e38, 3.0e38, 0.0, 1.0],
    "denormal": [1e-40, -1e-40, 0.0, -0.0, 1e-45],
}


@pytest.mark.parametrize("padding", [0, 3, 32])
@pytest.mark.parametrize("case", SPECIAL)
def test_special_rows(case, padding, device, close):
    """NaN and +inf rows have NaN statistics; -inf has probability 0; argmax is torch's."""
    row = torch.tensor(SPECIAL[case] + [-5.0] * padding, device=device)
    logits, weights = row.view(1, 1, -1), torch.ones(1, device=device)
    result, expected = ops.ensemble_stats(logits, weights), reference.ensemble_stats(logits, weights)
    close(result.stats, expected.stats)
    assert result.argmax.item() == row.argmax().item() == expected.argmax.item()
    assert result.stats.isnan().all().item() == result.stats.isnan().any().item()
    assert result.stats.isnan().any().item() == torch.softmax(row, 0).isnan().any().item()


@pytest.mark.parametrize(
    "value, expected", [(3.0, (1.0, 0.0, 1.0)), (-2.0, (1.0, 0.0, 1.0)), (float("nan"), (math.nan,) * 3)]
)
def test_one_class(value, expected, device):
    stats = ops.ensemble_stats(torch.full((2, 1, 1), value, device=device), torch.ones(2, device=device)).stats
    torch.testing.assert_close(stats.cpu(), torch.tensor([expected]), equal_nan=True)


def test_a_special_row_leaves_its_neighbours_alone(device):
    logits, weights = torch.randn(3, 9, 40, device=device), torch.rand(3, device=device)
    expected = ops.ensemble_stats(logits, weights)
    logits[1, 4, 7] = float("nan")
    result = ops.ensemble_stats(logits, weights)
    rows = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(result.stats[rows], expected.stats[rows]) and result.stats[4].isnan().all()


@pytest.mark.parametrize("function", ["ensemble", "stats"])
def test_gradcheck(function, device):
    logits = torch.randn(3, 2, 4, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(3, dtype=torch.float64, device=device, requires_grad=True)
    call = ops.ensemble if function == "ensemble" else lambda x, w: ops.ensemble_stats(x, w).logits
    assert torch.autograd.gradcheck(call, (logits, weights))
    assert torch.autograd.gradgradcheck(call, (logits, weights))


@pytest.mark.parametrize("shape", [(4, 70, 10), (1, 1, 1), (3, 0, 5), (2, 200, 3)], ids=str)
def test_gradients_equal_reference(shape, dtype, device, close):
    grads = []
    base, weights = torch.randn(shape, device=device).to(dtype), torch.rand(shape[0], device=device)
    out = torch.randn(shape[1:], device=device).to(dtype)
    for function in (ops.ensemble, reference.ensemble):
        x, w = base.clone().requires_grad_(), weights.clone().requires_grad_()
        function(x, w).backward(out)
        grads.append((x.grad, w.grad))
    close(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-4)


def test_gradient_of_a_sum_is_taken_from_an_expanded_tensor(device):
    logits, weights = torch.randn(2, 3, 4, device=device, requires_grad=True), torch.tensor([0.25, 0.75], device=device)
    ops.ensemble(logits, weights).sum().backward()
    assert torch.equal(logits.grad, weights[:, None, None].expand(2, 3, 4))


def test_only_the_logits_of_stats_are_differentiable(device):
    logits = torch.randn(2, 3, 4, device=device, requires_grad=True)
    result = ops.ensemble_stats(logits, torch.ones(2, device=device))
    assert result.logits.requires_grad and not result.stats.requires_grad and not result.argmax.requires_grad


def test_fixed_weights_keep_no_logits(native):
    logits = torch.randn(2, 3, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ops.ensemble(logits, torch.ones(2))
    assert saved == [(2,)]


@pytest.mark.parametrize("path", ["as loaded", "reference"])
def test_logits_that_overflow_are_as_infinite_ones(path, device, on_reference):
    logits = torch.tensor([[[3e38, 1.0, 0.0], [3.0, 1.0, 0.0]]], device=device)
    args, options = (logits, torch.ones(1, device=device)), {"temperature": 0.5}
    result = (
        ops.ensemble_stats(*args, **options)
        if path == "as loaded"
        else on_reference(ops.ensemble_stats, *args, **options)
    )
    assert result.stats[0].isnan().all() and result.stats[1].isfinite().all()
    assert result.argmax.tolist() == [0, 0] and torch.equal(result.logits, logits[0])
