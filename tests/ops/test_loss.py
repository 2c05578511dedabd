from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
    (3, 50, 33),
]
OPTIONS = {
    "plain": {},
    "class weights": {"class_weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"class_weight": True, "label_smoothing": 0.3},
    "full smoothing": {"class_weight": True, "label_smoothing": 1.0},
    "ignore a class": {"ignore_index": 0, "class_weight": True, "label_smoothing": 0.1},
}
REDUCTIONS = ["mean", "sum", "none"]


def make(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(shape, device=device).mul(3).to(dtype)
    target = torch.randint(shape[2], (shape[1],), device=device)
    return logits, target, torch.rand(shape[0], device=device) + 0.1


def options(name: str, classes: int, device: str) -> dict:
    kwargs = dict(OPTIONS[name])
    if kwargs.get("class_weight"):
        kwargs["class_weight"] = torch.rand(classes, device=device) + 0.1
    return kwargs


def plain(logits: Tensor, target: Tensor, exit_weights: Tensor, class_weight=None, **kwargs) -> tuple[Tensor, Tensor]:
    """E calls of torch's own cross entropy."""
    x = logits.float() if logits.dtype != torch.float64 else logits
    weight = None if class_weight is None else class_weight.to(x.dtype)
    losses = torch.stack([F.cross_entropy(x_e, target, weight, **kwargs) for x_e in x])
    return torch.tensordot(exit_weights.to(x.dtype), losses, 1), losses


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_torch(name, reduction, device, close):
    logits, target, exit_weights = make((3, 40, 11), torch.float32, device)
    target[::7] = OPTIONS[name].get("ignore_index", -100)
    kwargs = options(name, 11, device) | {"reduction": reduction}
    x, y, a = (t.clone().requires_grad_() for t in (logits, logits, exit_weights))
    result = ops.joint_cross_entropy(x, target, a, **kwargs)
    b = exit_weights.clone().requires_grad_()
    loss, losses = plain(y, target, b, **kwargs)
    close(result.loss, loss)
    close(result.exit_losses, losses)
    result.loss.sum().backward()
    loss.sum().backward()
    close(x.grad, y.grad)
    close(a.grad, b.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, reduction, dtype, device, close):
    logits, target, exit_weights = make(shape, dtype, device)
    kwargs = {"class_weight": torch.rand(shape[2], device=device) + 0.1, "label_smoothing": 0.1, "reduction": reduction}
    results, grads = [], []
    for function in (ops.joint_cross_entropy, reference.joint_cross_entropy):
        x = logits.clone().requires_grad_()
        results.append(function(x, target, exit_weights, **kwargs))
        (results[-1].loss.sum() + 0.5 * results[-1].exit_losses.square().sum()).backward()
        grads.append(x.grad)
    storage = torch.float64 if dtype == torch.float64 else torch.float32
    close(results[0].loss, results[1].loss, storage)
    close(results[0].exit_losses, results[1].exit_losses, storage)
    assert results[0].loss.dtype == storage
    assert grads[0].dtype == dtype
    close(grads[0], grads[1])


def test_layouts(device, dtype, layouts, close):
    base, target, exit_weights = make((4, 6, 37), dtype, device)
    expected = reference.joint_cross_entropy(base, target, exit_weights)
    for name, logits in layouts(base):
        x = logits.detach().requires_grad_()
        result = ops.joint_cross_entropy(x, target, exit_weights)
        close(result.exit_losses, expected.exit_losses), name
        (grad,) = torch.autograd.grad(result.loss, x)
        y = base.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(reference.joint_cross_entropy(y, target, exit_weights).loss, y)
        close(grad, wanted)


def test_strided_target(device):
    logits, target, exit_weights = make((2, 6, 5), torch.float32, device)
    spread = torch.stack([target, target + 100], 1)[:, 0]
    expected = ops.joint_cross_entropy(logits, target, exit_weights)
    assert torch.equal(ops.joint_cross_entropy(logits, spread, exit_weights).loss, expected.loss)
    logits.requires_grad_()
    ops.joint_cross_entropy(logits, spread, exit_weights).loss.backward()
    assert logits.grad.isfinite().all()


def test_expanded_logits(device, close):
    logits, target, exit_weights = make((1, 6, 5), torch.float32, device)
    wide = logits.expand(3, 6, 5)
    a = torch.ones(3, device=device)
    close(ops.joint_cross_entropy(wide, target, a).loss, reference.joint_cross_entropy(wide, target, a).loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, device):
    logits = torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(2, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([1, -100, 3], device=device)
    class_weight = torch.rand(4, dtype=torch.float64, device=device)

    def both(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(ops.joint_cross_entropy(x, target, a, class_weight, 0.2, reduction=reduction))

    assert torch.autograd.gradcheck(both, (logits, weights))


def test_everything_ignored(device):
    logits, _, exit_weights = make((2, 3, 4), torch.float32, device)
    target = torch.full((3,), -100, device=device)
    logits.requires_grad_()
    mean = ops.joint_cross_entropy(logits, target, exit_weights)
    assert mean.loss.isnan() and mean.exit_losses.isnan().all()
    mean.loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert ops.joint_cross_entropy(logits, target, exit_weights, reduction="sum").loss.item() == 0.0


def test_no_rows(device):
    logits = torch.zeros(2, 0, 4, device=device, requires_grad=True)
    target, weights = torch.zeros(0, dtype=torch.int64, device=device), torch.ones(2, device=device)
    assert ops.joint_cross_entropy(logits, target, weights).loss.isnan()
    result = ops.joint_cross_entropy(logits, target, weights, reduction="sum")
    assert result.loss.item() == 0.0
    result.loss.backward()
    assert logits.grad.shape == (2, 0, 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("path", ["as loaded", "reference"])
def test_rows_without_any_class_weight_give_nan(path, smoothing, device, on_reference):
    """As F.cross_entropy, which divides the target's part by 0, also where smoothing leaves a loss."""
    logits, _, exit_weights = make((2, 3, 4), torch.float32, device)
    target = torch.tensor([1, 2, -100], device=device)
    class_weight = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
    logits.requires_grad_()
    args = (logits, target, exit_weights, class_weight, smoothing)
    result = ops.joint_cross_entropy(*args) if path == "as loaded" else on_reference(ops.joint_cross_entropy, *args)
    expected = torch.stack([F.cross_entropy(x, target, class_weight, label_smoothing=smoothing) for x in logits])
    assert expected.isnan().all() and result.exit_losses.isnan().all() and result.loss.isnan()
    (grad,) = torch.autograd.grad(result.loss, logits)
    (wanted,) = torch.autograd.grad((exit_weights * expected).sum(), logits)
    assert torch.equal(grad.isnan(), wanted.isnan()) and not grad[:, 2].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("path", ["as loaded", "reference"])
def test_ignored_rows_have_no_gradient_even_when_they_are_nan(path, value, device, on_reference):
    logits, target, exit_weights = make((2, 4, 5), torch.float32, device)
    logits[:, 2] = value
    target[2] = -100
    logits.requires_grad_()
    args = (logits, target, exit_weights)
    result = ops.joint_cross_entropy(*args) if path == "as loaded" else on_reference(ops.joint_cross_entropy, *args)
    result.loss.backward()
    assert result.loss.isfinite() and logits.grad.isfinite().all() and not logits.grad[:, 2].any()


@pytest.mark.parametrize("ignore_index", [-100, 3, -1, 255])
def test_ignore_index_inside_and_outside_the_classes(ignore_index, device, close):
    logits, target, exit_weights = make((2, 30, 5), torch.float32, device)
    target[::3] = ignore_index
    expected, losses = plain(logits, target, exit_weights, ignore_index=ignore_index)
    close(ops.joint_cross_entropy(logits, target, exit_weights, ignore_index=ignore_index).loss, expected)


@pytest.mark.parametrize("case", ["+inf", "-inf elsewhere", "-inf at the label", "nan", "all -inf", "huge offset"])
def test_special_logits_follow_torch(case, device, close):
    logits, target, exit_weights = make((2, 4, 40), torch.float32, device)
    target[1] = 3
    changes = {
        "+inf": (7, math.inf),
        "-inf elsewhere": (7, -math.inf),
        "-inf at the label": (3, -math.inf),
        "nan": (7, math.nan),
    }
    if case == "all -inf":
        logits[:, 1] = -math.inf
    elif case == "huge offset":
        logits += 1e4
    else:
        logits[:, 1, changes[case][0]] = changes[case][1]
    result = ops.joint_cross_entropy(logits, target, exit_weights, reduction="none")
    expected, losses = plain(logits, target, exit_weights, reduction="none")
    close(result.exit_losses, losses)
    if case == "huge offset":
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        ops.joint_cross_entropy(x, target, exit_weights).loss.backward()
        plain(y, target, exit_weights)[0].backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [5, -1, 2**40, -(2**63)])
def test_label_out_of_range_is_an_error_on_the_cpu(bad, on_reference):
    logits, target, exit_weights = make((2, 4, 5), torch.float32, "cpu")
    target[2] = bad
    message = rf"aep::joint_cross_entropy: target must be within 0\.\.4 or ignore_index, got {bad} at position 2"
    with pytest.raises(IndexError, match=message):
        ops.joint_cross_entropy(logits, target, exit_weights)
    with pytest.raises(IndexError, match=message):
        on_reference(ops.joint_cross_entropy, logits, target, exit_weights)


@pytest.mark.gpu
def test_label_out_of_range_is_nan_on_the_gpu(device):
    if device == "cpu":
        pytest.skip("the CPU raises")
    logits, target, exit_weights = make((2, 4, 5), torch.float32, device)
    target[2] = 5
    logits.requires_grad_()
    result = ops.joint_cross_entropy(logits, target, exit_weights, reduction="none")
    assert result.loss.isnan().tolist() == [False, False, True, False]
    result.loss[:2].sum().backward()
    assert not logits.grad[:, 2].any()


def test_reference_gives_nan_for_a_label_out_of_range():
    """As the kernels do on a GPU; on the CPU the checks come first."""
    logits, target, exit_weights = make((2, 4, 5), torch.float32, "cpu")
    target[2] = 9
    logits.requires_grad_()
    result = reference.joint_cross_entropy(logits, target, exit_weights, reduction="none")
    assert result.loss.isnan().tolist() == [False, False, True, False]
    result.loss[[0, 1, 3]].sum().backward()
    assert not logits.grad[:, 2].any()


def test_double_backward_says_so(native, device):
    logits, target, exit_weights = make((2, 4, 5), torch.float32, device)
    logits.requires_grad_()
    loss = ops.joint_cross_entropy(logits, target, exit_weights).loss
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="aep::joint_cross_entropy: double backward is not supported"):
        grad.square().sum().backward()


def test_create_graph_alone_is_fine(device, close):
    logits, target, exit_weights = make((2, 4, 5), torch.float32, device)
    logits.requires_grad_()
    grads = []
    for create_graph in (False, True):
        loss = ops.joint_cross_entropy(logits, target, exit_weights).loss
        grads.append(torch.autograd.grad(loss, logits, create_graph=create_graph)[0].detach())
    assert torch.equal(*grads)


def test_nothing_but_the_logits_is_kept(native):
    """No softmax, no copy: all other saved tensors together are far smaller than the logits."""
    logits, target, exit_weights = make((4, 64, 100), torch.float32, "cpu")
    logits.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.joint_cross_entropy(logits, target, exit_weights)
    assert sum(t.data_ptr() == logits.data_ptr() for t in saved) == 1
    assert sum(t.numel() for t in saved if t.data_ptr() != logits.data_ptr()) < 4 * 64 * 3


@pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype16, device, close):
    logits, target, exit_weights = make((2, 4, 5), dtype16, device)
    with torch.autocast(device, dtype=dtype16):
        result = ops.joint_cross_entropy(logits, target, exit_weights)
        expected = plain(logits, target, exit_weights)[0]
    assert result.loss.dtype == torch.float32
    close(result.loss, expected)


def test_learned_exit_weights(device):
    """A gradient for the exit weights alone."""
    logits, target, exit_weights = make((3, 4, 5), torch.float32, device)
    exit_weights.requires_grad_()
    result = ops.joint_cross_entropy(logits, target, exit_weights)
    result.loss.backward()
    torch.testing.assert_close(exit_weights.grad, result.exit_losses.detach())


def test_class_weight_with_gradient_is_refused(device, on_reference):
    logits, target, exit_weights = make((2, 4, 5), torch.float32, device)
    weight = torch.ones(5, device=device, requires_grad=True)
    for call in (ops.joint_cross_entropy, lambda *a: on_reference(ops.joint_cross_entropy, *a)):
        with pytest.raises(ValueError, match="class_weight must not require a gradient"):
            call(logits, target, exit_weights, weight)
        with torch.no_grad():
            call(logits, target, exit_weights, weight)
