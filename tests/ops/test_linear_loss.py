"""The joint loss of linear exits without their logits: the numbers of the logits' loss, whatever the chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from aep_ext import ops
from aep_ext.ops import reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# rows, classes, channels of the exits
SHAPES = [
    (4, 5, (3,)),
    (0, 10, (4, 8)),
    (1, 10, (1, 1, 1)),
    (7, 1, (3, 5)),
    (5, 2, (6, 2, 3)),
    (9, 33, (16, 1, 7, 8, 5, 3, 2)),
    (64, 100, (16, 32, 8, 24)),
    (3, 1001, (12, 20)),
]
OPTIONS = {
    "plain": {},
    "class weights": {"class_weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"class_weight": True, "label_smoothing": 0.3},
    "full smoothing": {"class_weight": True, "label_smoothing": 1.0},
    "ignore a class": {"ignore_index": 0, "class_weight": True, "label_smoothing": 0.1},
}


class Exits(NamedTuple):
    """The loss's tensors."""

    pooled: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor | None]
    target: Tensor
    exit_weights: Tensor

    def leaves(self) -> Exits:
        """Copies (of the same strides) that require a gradient."""

        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().clone().requires_grad_()

        lists = [[leaf(t) for t in tensors] for tensors in self[:3]]
        return Exits(*lists, self.target, leaf(self.exit_weights))

    def floating(self) -> list[Tensor]:
        """All that can have a gradient."""
        return [t for t in (*self.pooled, *self.weights, *self.biases, self.exit_weights) if t is not None]


def make(
    rows: int,
    classes: int,
    channels: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = True,
) -> Exits:
    kind = {"dtype": dtype, "device": device}
    return Exits(
        [torch.randn(rows, c).to(**kind) for c in channels],
        [torch.randn(classes, c).mul(2 / c**0.5).to(**kind) for c in channels],
        [torch.randn(classes).to(**kind) if bias and e != 1 else None for e in range(len(channels))],
        torch.randint(classes, (rows,), device=device),
        torch.rand(len(channels), device=device) + 0.1,
    )


def options(name: str, classes: int, device: str) -> dict:
    kwargs = dict(OPTIONS[name])
    if kwargs.get("class_weight"):
        kwargs["class_weight"] = torch.rand(classes, device=device) + 0.1
    return kwargs


def stacked(pooled, weights, biases, target, exit_weights, *args, **kwargs) -> ops.JointLoss:
    """The same by way of all logits."""
    logits = torch.stack([F.linear(x, w, b) for x, w, b in zip(pooled, weights, biases, strict=True)])
    return ops.joint_cross_entropy(logits, target, exit_weights, *args, **kwargs)


def step(function, exits: Exits, scale: float = 1.0, **kwargs) -> list[Tensor]:
    """Loss, exit losses and every gradient."""
    leaves = exits.leaves()
    result = function(*leaves, **kwargs)
    (result.loss * scale).backward()
    return [result.loss.detach(), result.exit_losses.detach(), *(t.grad for t in leaves.floating())]


def alike(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Losses and gradients within the dtype's rounding; gradients are sums, so relative to the largest."""
    loose = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        finite = wanted[wanted.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        torch.testing.assert_close(got, wanted, rtol=loose, atol=loose * largest + 1e-7, equal_nan=True)


@pytest.fixture(params=["as loaded", "reference"])
def call(request, on_reference):
    """Calls a public function on one of its two paths."""
    return on_reference if request.param == "reference" else lambda f, *args, **kwargs: f(*args, **kwargs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_loss_of_the_logits(name, reduction, device, call):
    exits = make(40, 11, (6, 3, 9), device=device)
    exits.target[::7] = OPTIONS[name].get("ignore_index", -100)
    kwargs = options(name, 11, device) | {"reduction": reduction}
    expected = step(stacked, exits, **kwargs)
    alike(step(lambda *a, **k: call(ops.linear_joint_cross_entropy, *a, **k), exits, **kwargs), expected, torch.float32)
    for chunk in (1, 7, 40, 1000):
        alike(step(ops.linear_joint_cross_entropy, exits, chunk=chunk, **kwargs), expected, torch.float32)


@pytest.mark.parametrize("scale", [1.0, -3.0])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, chunk, scale, dtype, device):
    exits = make(*shape, dtype, device)
    exits.target[2::4] = -100
    kwargs = {"class_weight": torch.rand(shape[1], device=device) + 0.1, "label_smoothing": 0.1}
    expected = step(reference.linear_joint_cross_entropy, exits, scale, **kwargs)
    actual = step(ops.linear_joint_cross_entropy, exits, scale, chunk=chunk, **kwargs)
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    alike(actual, expected, dtype)


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.integers(0, 6),
    st.integers(1, 40),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from(FLOATS),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([None, 1, 2, 3, 5, 100]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_exits(rows, classes, channels, dtype, reduction, smoothing, chunk, bias, seed):
    torch.manual_seed(seed)
    exits = make(rows, classes, channels, dtype, bias=bias)
    exits.target[::3] = -100
    kwargs = {"reduction": reduction, "label_smoothing": smoothing}
    expected = step(stacked, exits, **kwargs)
    alike(step(ops.linear_joint_cross_entropy, exits, chunk=chunk, **kwargs), expected, dtype)


def layouts(tensor: Tensor) -> Iterator[Tensor]:
    """The same values in other memory layouts."""
    yield tensor.t().contiguous().t()
    wide = torch.full(
        (tensor.shape[0], 2 * tensor.shape[1] + 3), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    wide[:, 1 : 2 * tensor.shape[1] : 2] = tensor
    yield wide[:, 1 : 2 * tensor.shape[1] : 2]
    yield torch.cat([tensor.new_full((1,), 7.0), tensor.flatten()])[1:].view(tensor.shape)


def test_layouts(dtype, device):
    base = make(6, 37, (5, 8), dtype, device)
    expected = step(stacked, base)
    for change in zip(*(layouts(t) for t in (*base.pooled, *base.weights)), strict=True):
        spread = torch.stack([base.target, base.target + 100], 1)[:, 0]
        parts = [t.detach().requires_grad_() for t in change]
        biases = [None if b is None else b.clone().requires_grad_() for b in base.biases]
        other = Exits(parts[:2], parts[2:], biases, spread, base.exit_weights.clone().requires_grad_())
        result = ops.linear_joint_cross_entropy(*other, chunk=4)
        result.loss.backward()
        actual = [result.loss.detach(), result.exit_losses, *(t.grad for t in other.floating())]
        alike(actual, expected, dtype)


def test_expanded_inputs(device):
    exits = make(1, 5, (4, 4), device=device)
    row = exits.pooled[0].requires_grad_()
    target = torch.arange(5, device=device)
    pooled, weight = [row.expand(5, 4)] * 2, exits.weights[0].requires_grad_()
    result = ops.linear_joint_cross_entropy(pooled, [weight] * 2, None, target, exits.exit_weights, chunk=2)
    grads = torch.autograd.grad(result.loss, (row, weight))
    expected = torch.autograd.grad(
        stacked(pooled, [weight] * 2, [None] * 2, target, exits.exit_weights).loss, (row, weight)
    )
    alike(list(grads), list(expected), torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_gradcheck(chunk, reduction, device, call):
    exits = make(3, 4, (2, 3), torch.float64, device)
    exits.target[1] = -100
    class_weight = torch.rand(4, dtype=torch.float64, device=device)
    leaves = exits.leaves()

    def loss(x: Tensor, y: Tensor, v: Tensor, w: Tensor, b: Tensor, a: Tensor) -> Tensor:
        options = (class_weight, 0.2, -100, reduction, chunk)
        return call(ops.linear_joint_cross_entropy, [x, y], [v, w], [b, None], exits.target, a, *options).loss

    a = leaves.exit_weights.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(loss, (*leaves.pooled, *leaves.weights, leaves.biases[0], a))


def test_chunks_change_no_more_than_rounding(device):
    """And the same chunks change nothing."""
    exits = make(100, 50, (8, 16), device=device)
    first = step(ops.linear_joint_cross_entropy, exits, chunk=100)
    for chunk in (1, 3, 33, 99):
        runs = [step(ops.linear_joint_cross_entropy, exits, chunk=chunk) for _ in range(2)]
        assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))
        alike(runs[0], first, torch.float32)


def test_everything_ignored(device, call):
    exits = make(3, 4, (2, 5), device=device)
    exits.target.fill_(-100)
    loss, exit_losses, *grads, exit_grad = step(lambda *a, **k: call(ops.linear_joint_cross_entropy, *a, **k), exits)
    assert loss.isnan() and exit_losses.isnan().all() and exit_grad.isnan().all()
    assert not any(g.any() for g in grads)
    result = call(ops.linear_joint_cross_entropy, *exits, reduction="sum")
    assert result.loss.item() == 0.0


def test_rows_without_any_class_weight_give_nan(device, call):
    exits = make(3, 4, (2, 5), device=device)
    exits.target.copy_(torch.tensor([1, 2, -100]))
    class_weight = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
    result = call(ops.linear_joint_cross_entropy, *exits, class_weight)
    assert result.loss.isnan() and result.exit_losses.isnan().all()


@pytest.mark.parametrize("bad", [5, -1, 2**40, -(2**63)])
def test_label_out_of_range_is_an_error_on_the_cpu(bad, call):
    exits = make(4, 5, (3,))
    exits.target[2] = bad
    message = rf"aep::linear_joint_cross_entropy: target must be within 0\.\.4 or ignore_index, got {bad} at position 2"
    with pytest.raises(IndexError, match=message):
        call(ops.linear_joint_cross_entropy, *exits)
    with pytest.raises(IndexError, match=message):
        call(ops.linear_joint_cross_entropy, *exits.leaves())


@pytest.mark.gpu
def test_label_out_of_range_is_nan_on_the_gpu(device):
    if device == "cpu":
        pytest.skip("the CPU raises")
    exits = make(4, 5, (3,), device=device)
    exits.target[2] = 5
    loss, _, pooled, *_ = step(ops.linear_joint_cross_entropy, exits)
    assert loss.isnan() and not pooled[2].any()


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(device):
    """Enqueued behind a long spin, the call returns while the device is still busy."""
    if device == "cpu":
        pytest.skip("there is nothing to wait for")
    exits = make(64, 1000, (16, 32), device=device).leaves()
    for _ in range(2):  # workspaces, memory, and kernels: loading one may wait, and only the second backward adds up
        ops.linear_joint_cross_entropy(*exits, chunk=16).loss.backward()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    ops.linear_joint_cross_entropy(*exits, chunk=16).loss.backward()
    busy = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert busy


def test_two_uses_add_up(device):
    """Of shared layers, and over two batches."""
    one, two = make(6, 9, (4, 4), device=device), make(5, 9, (4, 4), device=device)
    weight, bias = one.weights[0].requires_grad_(), one.biases[0].requires_grad_()
    totals = []
    for function in (ops.linear_joint_cross_entropy, stacked):
        weight.grad = bias.grad = None
        shared = ([weight, weight], [bias, bias])
        first = function(one.pooled, *shared, one.target, one.exit_weights)
        second = function(two.pooled, *shared, two.target, two.exit_weights)
        (first.loss + 2 * second.loss).backward()
        function(one.pooled, *shared, one.target, one.exit_weights).loss.backward()
        totals.append([weight.grad, bias.grad])
    alike(*totals, torch.float32)


def test_second_backward(device, call):
    exits = make(4, 5, (3, 2), device=device).leaves()
    inputs = exits.floating()
    loss = call(ops.linear_joint_cross_entropy, *exits).loss
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [g.clone() for g in first]
    twice = torch.autograd.grad(loss, inputs, torch.tensor(2.0, device=device), retain_graph=True)
    for a, b in zip(twice, first, strict=True):
        torch.testing.assert_close(a, 2 * b)
    last = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(last, kept, first, strict=True):
        assert torch.equal(a, b) and torch.equal(c, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_double_backward_says_so(native, device):
    exits = make(4, 5, (3, 2), device=device).leaves()
    loss = ops.linear_joint_cross_entropy(*exits).loss
    for grad in torch.autograd.grad(loss, exits.floating(), create_graph=True):
        with pytest.raises(RuntimeError, match="aep::linear_joint_cross_entropy: double backward is not supported"):
            grad.square().sum().backward(retain_graph=True)


def test_exit_losses_are_constants(device, call):
    result = call(ops.linear_joint_cross_entropy, *make(4, 5, (3, 2), device=device).leaves())
    assert result.loss.requires_grad and not result.exit_losses.requires_grad


PARTS = {"pooled": 0, "weights": 1, "biases": 2, "exit weights": 4}


@pytest.mark.parametrize("part", PARTS)
def test_frozen_parts(part, native, device):
    """What needs no gradient gets none, and no work is done for it."""
    exits = make(6, 7, (4, 3, 5), device=device)
    expected = dict(zip(map(id, exits.floating()), step(stacked, exits)[2:], strict=True))
    wanted = exits[PARTS[part]]
    wanted = [wanted] if isinstance(wanted, Tensor) else [wanted[0], wanted[2]]  # one exit is frozen as a whole
    for tensor in wanted:
        tensor.requires_grad_()
    product = 2 * 6 * 7
    with FlopCounterMode(display=False) as counter:
        loss = ops.linear_joint_cross_entropy(*exits, chunk=2).loss
        loss.backward()
    more = {"pooled": 4 + 5, "weights": 4 + 5}.get(part, 0)
    assert counter.get_total_flops() == product * (4 + 3 + 5 + more)
    alike([t.grad for t in wanted], [expected[id(t)] for t in wanted], torch.float32)
    assert all(t.grad is None for t in exits.floating() if not any(t is w for w in wanted))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear_joint_cross_entropy(*exits)
    assert sum(t.numel() for t in saved) == sum(t.numel() for t in wanted)


def test_without_gradients_only_the_losses_are_formed(native, device):
    exits = make(6, 7, (4, 3), device=device)
    leaves = exits.leaves()
    expected = stacked(*exits)
    for arguments, context in (
        (exits, torch.enable_grad()),
        (leaves, torch.no_grad()),
        (leaves, torch.inference_mode()),
    ):
        with FlopCounterMode(display=False) as counter, context:
            result = ops.linear_joint_cross_entropy(*arguments)
        assert counter.get_total_flops() == 2 * 6 * 7 * (4 + 3)
        assert not result.loss.requires_grad
        torch.testing.assert_close(result, expected)


def test_flops_are_those_of_the_products(device, on_reference):
    exits = make(6, 7, (4, 3), device=device)

    def count(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    expected = 3 * 2 * 6 * 7 * (4 + 3)
    assert count(lambda: step(ops.linear_joint_cross_entropy, exits)) == expected
    assert count(lambda: on_reference(step, ops.linear_joint_cross_entropy, exits)) == expected


@pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16])
def test_autocast(dtype16, device, call):
    exits = make(12, 9, (4, 3), device=device)
    run = lambda *a, **k: call(ops.linear_joint_cross_entropy, *a, **k)  # noqa: E731
    with torch.autocast(device, dtype=dtype16):
        actual, expected = step(run, exits, chunk=5), step(stacked, exits)
    assert actual[0].dtype == torch.float32 and actual[2].dtype == torch.float32
    alike([t.to(dtype16) for t in actual], [t.to(dtype16) for t in expected], dtype16)
    assert torch.equal(actual[3], actual[3].to(dtype16).float())  # rounded as the cast of the parameters says
    double = make(12, 9, (4, 3), torch.float64, device)
    with torch.autocast(device, dtype=dtype16):
        assert call(ops.linear_joint_cross_entropy, *double).loss.dtype == torch.float64


def test_loss_scale_of_half_precision(device):
    """A GradScaler's factor comes after the gradients were formed: what float16 cannot hold unscaled must survive."""
    exits = make(512, 100, (16, 8), torch.float16, device)
    expected = step(stacked, exits, 1024.0)[2:]
    actual = step(ops.linear_joint_cross_entropy, exits, 1024.0, chunk=100)[2:]
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=wanted.abs().max().item() * 4e-3)
    assert (expected[0] == 0).float().mean() < 0.1 and (actual[0] == 0).float().mean() < 0.1


def test_large_features_in_half_precision_stay_finite(device):
    """All rows wrong in the same way, with features near what float16 holds when a thousand are added up."""
    x = torch.full((1024, 2), 1000.0, dtype=torch.float16, device=device)
    weight = torch.tensor([[0.0, 0.0], [0.01, 0.01]], dtype=torch.float16, device=device)
    exits = Exits([x], [weight], [None], torch.zeros(1024, dtype=torch.int64, device=device), x.new_ones(1).float())
    grads = step(ops.linear_joint_cross_entropy, exits, chunk=1024)[3]
    alike([grads], [step(stacked, exits)[3]], torch.float16)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("largest", [1.0, 1e4, 6e4])
def test_weight_gradients_in_float16_are_finite_where_the_exact_ones_are(largest, reduction, device):
    """What a chunk's rows add up to may be beyond float16 on the way, scaled up as the gradients are held."""
    rows = 1024 if reduction == "mean" else 6
    x = torch.full((rows, 8), largest, dtype=torch.float16, device=device)
    x[:, 0] = 1e-3  # small ones beside them keep their digits
    target = torch.zeros(rows, dtype=torch.int64, device=device)
    weight = torch.zeros(7, 8, dtype=torch.float16, device=device)
    weight[0] = -1 / largest  # all rows wrong
    exits = Exits([x], [weight], [None], target, x.new_ones(1).float())
    wide = Exits([x.double()], [weight.double()], [None], target, x.new_ones(1).double())
    for chunk in (rows, 100):
        grad = step(ops.linear_joint_cross_entropy, exits, chunk=chunk, reduction=reduction)[3].double()
        exact = step(stacked, wide, reduction=reduction)[3]
        fits = exact.half().isfinite()
        assert fits[:, 0].all() and fits.any(1).all()
        torch.testing.assert_close(grad[fits], exact[fits], rtol=4e-3, atol=1e-6)


def test_class_weight_with_gradient_is_refused(device, call):
    exits = make(4, 5, (3,), device=device)
    weight = torch.ones(5, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="class_weight must not require a gradient"):
        call(ops.linear_joint_cross_entropy, *exits, weight)
    with torch.no_grad():
        call(ops.linear_joint_cross_entropy, *exits, weight)


def changed(**changes: object) -> ops.JointLoss:
    arguments = make(5, 4, (3, 6))._asdict() | changes
    return ops.linear_joint_cross_entropy(**arguments)


BAD = {
    "no exits": ({"pooled": [], "weights": [], "biases": []}, ValueError, "pooled"),
    "weights too few": ({"weights": []}, ValueError, ".*weights"),
    "biases too many": ({"biases": [None] * 3}, ValueError, ".*biases"),
    "maps": ({"pooled": [torch.zeros(5, 3, 1, 1)] * 2}, ValueError, r"pooled\[0\]"),
    "no channels": ({"pooled": [torch.zeros(5, 0)] * 2}, ValueError, r"pooled\[0\]"),
    "integers": ({"pooled": [torch.zeros(5, 3).int()] * 2}, TypeError, r"pooled\[0\]"),
    "rows": ({"pooled": [torch.zeros(5, 3), torch.zeros(4, 6)]}, ValueError, r"pooled\[1\]"),
    "mixed": ({"pooled": [torch.zeros(5, 3), torch.zeros(5, 6).double()]}, TypeError, r"pooled\[1\]"),
    "weight shape": ({"weights": [torch.zeros(4, 3)] * 2}, ValueError, r"weights\[1\]"),
    "no classes": ({"weights": [torch.zeros(0, 3)] * 2}, ValueError, r"weights\[0\]"),
    "bias shape": ({"biases": [torch.zeros(5), None]}, ValueError, r"biases\[0\]"),
    "bias device": ({"biases": [None, torch.zeros(4, device="meta")]}, ValueError, ".*device"),
    "target dtype": ({"target": torch.zeros(5)}, TypeError, "target"),
    "target shape": ({"target": torch.zeros(4).long()}, ValueError, "target"),
    "no target": ({"target": [0] * 5}, TypeError, "target"),
    "exit weights": ({"exit_weights": torch.ones(3)}, ValueError, "exit_weights"),
    "class weights": ({"class_weight": torch.ones(5)}, ValueError, "class_weight"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
    "reduction": ({"reduction": "none"}, ValueError, "reduction"),
    "chunk": ({"chunk": 0}, ValueError, "chunk"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_names_operator_and_argument(case, call):
    changes, error, name = BAD[case]
    with pytest.raises(error, match=f"^aep::linear_joint_cross_entropy: {name}.*, got "):
        call(lambda: changed(**changes))


def opcheck_samples(device: str, grad: bool) -> Iterator[tuple]:
    target = torch.tensor([0, 3, -100, 2, 1], device=device)
    exits = make(5, 4, (3, 6), device=device)
    exits = exits.leaves() if grad else exits
    yield *exits[:3], target, exits.exit_weights
    yield *exits[:3], target, exits.exit_weights, torch.rand(4, device=device), 0.1, -100, "sum", 2
    frozen = make(5, 4, (3, 6), torch.bfloat16, device)
    if grad:
        frozen.weights[1].requires_grad_()
    yield *frozen[:3], target, frozen.exit_weights


CHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_opcheck(grad, device, native):
    for args in opcheck_samples(device, grad):
        torch.library.opcheck(torch.ops.aep.linear_joint_cross_entropy.default, args, test_utils=CHECKS)


def test_opcheck_of_the_part_with_gradients(device, native):
    operator = torch.ops.aep.linear_joint_cross_entropy_with_grad.default
    for dtype in (torch.float32, torch.float16):
        exits = make(5, 4, (3, 6), dtype, device)
        for wanted in ([True] * 6, [False, True, True, False, True, False]):
            args = (*exits, None, 0.1, -100, "mean", None, wanted)
            torch.library.opcheck(operator, args, test_utils=CHECKS)
    with pytest.raises(RuntimeError, match="aep::linear_joint_cross_entropy_with_grad: not differentiable"):
        operator(*exits.leaves(), None, 0.1, -100, "mean", None, wanted)
    with pytest.raises(ValueError, match="wanted must hold 6 entries, got 5"):
        operator(*exits, None, 0.1, -100, "mean", None, [True] * 5)


def flat(
    pooled: Tensor, other: Tensor, first: Tensor, second: Tensor, bias: Tensor, a: Tensor, target: Tensor
) -> Tensor:
    return ops.linear_joint_cross_entropy([pooled, other], [first, second], [bias, None], target, a, None, 0.1).loss


def flat_arguments(rows: int, device: str) -> list[Tensor]:
    exits = make(rows, 4, (3, 6), device=device).leaves()
    return [*exits.pooled, *exits.weights, exits.biases[0], exits.exit_weights, exits.target]


@pytest.mark.parametrize("path", ["as loaded", "reference"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(dynamic, path, device, request):
    if path == "reference":
        request.getfixturevalue("reference_path")
    torch._dynamo.reset()
    compiled = torch.compile(flat, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (6, 9) if dynamic else (6,):
        args = flat_arguments(rows, device)
        results = []
        for function in (compiled, flat):
            loss = function(*args)
            results.append([loss.detach(), *torch.autograd.grad(loss * 3, args[:-1])])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_compiles_with_inductor(device):
    torch._dynamo.reset()
    args = flat_arguments(6, device)
    losses = [function(*args) for function in (torch.compile(flat, fullgraph=True), flat)]
    grads = [torch.autograd.grad(loss, args[:-1]) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("path", ["as loaded", "reference"])
def test_meta_and_fake_tensors_give_shapes(path, call):
    for exits in (make(6, 7, (4, 3), torch.bfloat16, "meta"), make(6, 7, (4, 3), torch.bfloat16, "meta").leaves()):
        result = call(ops.linear_joint_cross_entropy, *exits)
        assert result.loss.shape == () and result.exit_losses.shape == (2,)
        assert result.loss.is_meta and result.loss.dtype == torch.float32
    with FakeTensorMode():
        result = call(ops.linear_joint_cross_entropy, *make(6, 7, (4, 3)).leaves())
        result.loss.backward()
    assert result.exit_losses.shape == (2,)


def test_forward_mode_and_functional_transforms_are_refused(native):
    import torch.autograd.forward_ad as forward_ad

    *args, target = [t.detach() for t in flat_arguments(4, "cpu")]
    for place, value in enumerate(args):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(value, torch.ones_like(value))
            with pytest.raises(RuntimeError, match="aep::linear_joint_cross_entropy: forward-mode differentiation"):
                flat(*args[:place], dual, *args[place + 1 :], target)
    with pytest.raises(RuntimeError, match="C\\+\\+ autograd function|functorch transform|torch::autograd::Function"):
        torch.func.grad(lambda x: flat(x, *args[1:], target))(args[0])


def test_threads_change_no_more_than_rounding(native):
    exits = make(300, 101, (16, 8))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(step(ops.linear_joint_cross_entropy, exits, 3.0, chunk=64))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        alike(other, results[0], torch.float32)
