"""The memory modes of ``joint_cross_entropy``: the same numbers, what each holds, and what each refuses."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from aep_ext import ops
from benchmarks.memory import peak

HELD = ["in_forward", "in_place"]
PATHS = ["as loaded", "reference"]


def make(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(shape, device=device).mul(3).to(dtype)
    target = torch.randint(shape[2], (shape[1],), device=device)
    return logits, target, torch.rand(shape[0], device=device) + 0.1


def step(x: Tensor, target: Tensor, exit_weights: Tensor, scale: float = 1.0, call=None, **kwargs) -> list[Tensor]:
    """Loss, exit losses, gradients of the leaf behind the logits (no leaf themselves) and of the exit weights."""
    leaf, a = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(), exit_weights.clone()
    a.requires_grad_()
    result = (call or direct)(ops.joint_cross_entropy, leaf * 1, target, a, **kwargs)
    (result.loss * scale).backward()
    return [result.loss.detach(), result.exit_losses.detach(), leaf.grad, a.grad]


def direct(function, *args, **kwargs):
    return function(*args, **kwargs)


@pytest.fixture(params=PATHS)
def call(request, on_reference):
    """Calls a public function on one of its two paths."""
    return on_reference if request.param == "reference" else direct


@pytest.mark.parametrize("scale", [1.0, -3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("memory", HELD)
@pytest.mark.parametrize("shape", [(1, 4, 5), (4, 0, 10), (3, 7, 1), (2, 5, 1001), (7, 9, 200), (3, 50, 33)], ids=str)
def test_every_mode_gives_the_same(shape, memory, reduction, scale, dtype, device, call, close):
    x, y, a = make(shape, dtype, device)
    y[1::4] = -100
    kwargs = {"class_weight": torch.rand(shape[2], device=device) + 0.1, "label_smoothing": 0.1, "reduction": reduction}
    expected = step(x, y, a, scale, call, **kwargs)
    for actual, wanted in zip(step(x, y, a, scale, call, memory=memory, **kwargs), expected, strict=True):
        assert actual.dtype == wanted.dtype
        close(actual, wanted, dtype)


@pytest.mark.parametrize("memory", HELD)
def test_plain_options(memory, device, dtype, call, close):
    x, y, a = make((3, 6, 37), dtype, device)
    for actual, wanted in zip(step(x, y, a, memory=memory, call=call), step(x, y, a, call=call), strict=True):
        close(actual, wanted, dtype)


@pytest.mark.parametrize("memory", HELD)
def test_layouts(memory, device, dtype, layouts, call, close):
    base, y, a = make((4, 6, 37), dtype, device)
    expected = step(base, y, a)
    for _, logits in layouts(base):
        x = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device=device).copy_(logits)
        leaf = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
        shifted = x.add_(leaf)  # in place: the strides stay, the history comes
        assert shifted.stride() == logits.stride() and not shifted.is_leaf
        hooked = []
        shifted.register_hook(hooked.append)
        result = call(ops.joint_cross_entropy, shifted, y, a, memory=memory)
        result.loss.backward()
        close(result.loss, expected[0])
        close(hooked[0], expected[2])


@pytest.mark.parametrize("memory", HELD)
def test_gradcheck(memory, device, call):
    x = torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    a = torch.rand(2, dtype=torch.float64, device=device, requires_grad=True)
    y, w = torch.tensor([1, -100, 3], device=device), torch.rand(4, dtype=torch.float64, device=device)
    for reduction in ("mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda x, a, r=reduction: call(ops.joint_cross_entropy, x * 1, y, a, w, 0.2, -100, r, memory).loss, (x, a)
        )


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(0, 5), st.integers(1, 40)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from(HELD),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.permutations(range(3)),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_any_logits(shape, dtype, memory, reduction, smoothing, order, seed, special):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).mul(4)
    if special and x.numel():
        values = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 1e-40])
        x.view(-1)[torch.randint(x.numel(), (5,), generator=generator)] = values
    back = [order.index(i) for i in range(3)]
    x = x.to(dtype).permute(order).contiguous().permute(back)
    y, a = torch.randint(shape[2], shape[1:2], generator=generator), torch.rand(shape[0], generator=generator)
    y[::3] = -100
    kwargs = {"reduction": reduction, "label_smoothing": smoothing}
    half = dtype in (torch.bfloat16, torch.float16)
    for actual, wanted in zip(step(x, y, a, memory=memory, **kwargs), step(x, y, a, **kwargs), strict=True):
        rtol, atol = (1.6e-2, 1e-3) if half else (3e-5, 3e-6)
        torch.testing.assert_close(actual, wanted, equal_nan=True, rtol=rtol, atol=atol)


@pytest.mark.parametrize("memory", HELD)
def test_everything_ignored(memory, device, call):
    x, _, a = make((2, 3, 4), torch.float32, device)
    y = torch.full((3,), -100, device=device)
    loss, exit_losses, grad, _ = step(x, y, a, call=call, memory=memory)
    assert loss.isnan() and exit_losses.isnan().all() and torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("memory", HELD)
def test_loss_scale_of_half_precision(memory, device, call, close):
    """A GradScaler's factor comes after the gradient was formed: what float16 cannot hold unscaled must survive."""
    x, y, a = make((2, 512, 100), torch.float16, device)
    expected = step(x, y, a, 65536.0, call)[2]
    assert (expected == 0).float().mean() < 0.1
    actual = step(x, y, a, 65536.0, call, memory=memory)[2]
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=expected.abs().max().item() * 1e-4)


@pytest.mark.parametrize("memory", HELD)
def test_second_backward(memory, device, call):
    x, y, a = make((2, 4, 5), torch.float32, device)
    leaf = x.requires_grad_()
    loss = call(ops.joint_cross_entropy, leaf * 1, y, a, memory=memory).loss
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0, device=device), retain_graph=True)
    torch.testing.assert_close(second, 2 * first)
    loss.backward()
    assert torch.equal(leaf.grad, kept) and torch.equal(first, kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("memory", HELD)
def test_double_backward_says_so(memory, device, native):
    x, y, a = make((2, 4, 5), torch.float32, device)
    leaf, a = x.requires_grad_(), a.requires_grad_()
    loss = ops.joint_cross_entropy(leaf * 1, y, a, memory=memory).loss
    for grad in torch.autograd.grad(loss, (leaf, a), create_graph=True):
        with pytest.raises(RuntimeError, match="aep::joint_cross_entropy: double backward is not supported"):
            grad.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("memory", HELD)
def test_exit_losses_are_constants(memory, device, call):
    x, y, a = make((2, 4, 5), torch.float32, device)
    result = call(ops.joint_cross_entropy, x.requires_grad_() * 1, y, a, memory=memory)
    assert result.loss.requires_grad and not result.exit_losses.requires_grad


@pytest.mark.parametrize("memory", HELD)
def test_without_a_gradient_nothing_is_overwritten(memory, device, call):
    x, y, a = make((2, 4, 5), torch.float32, device)
    kept, expected = x.clone(), ops.joint_cross_entropy(x, y, a)
    for logits, weights in ((x, a), (x, a.clone().requires_grad_())):
        result = call(ops.joint_cross_entropy, logits, y, weights, memory=memory)
        torch.testing.assert_close(result.loss.detach(), expected.loss)
    with torch.no_grad():
        call(ops.joint_cross_entropy, (x * 1).requires_grad_(), y, a, memory=memory)
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
        call(ops.joint_cross_entropy, x, y, a, memory=memory, reduction="none")
    assert torch.equal(x, kept)


def test_in_place_replaces_the_logits_by_their_gradient(device, native):
    x, y, a = make((2, 4, 5), torch.float32, device)
    (expected,) = torch.autograd.grad(ops.joint_cross_entropy(x.requires_grad_(), y, a).loss, x)
    logits = x * 1
    version = logits._version
    loss = ops.joint_cross_entropy(logits, y, a, memory="in_place").loss
    assert logits._version > version
    torch.testing.assert_close(logits.detach(), expected)
    with pytest.raises(RuntimeError, match="has overwritten exit_logits with their gradient"):
        (loss + logits.sum()).backward()


def test_in_place_is_seen_by_who_saved_the_logits(device, native):
    x, y, a = make((2, 4, 5), torch.float32, device)
    logits = x.requires_grad_().exp()  # its backward needs its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ops.joint_cross_entropy(logits, y, a, memory="in_place").loss.backward()
    logits = x * 1
    loss = ops.joint_cross_entropy(logits, y, a, memory="in_place").loss
    with torch.no_grad():
        logits.zero_()  # the held gradient
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_on_a_view(device, call, close):
    """Logits of a head that gives (N, E * K), say."""
    x, y, a = make((2, 4, 5), torch.float32, device)
    flat = x.movedim(0, 1).reshape(4, 10).clone().requires_grad_()
    close(step(x, y, a)[0], call(ops.joint_cross_entropy, (flat * 1).view(4, 2, 5).movedim(1, 0), y, a).loss)
    base = flat * 1
    loss = call(ops.joint_cross_entropy, base.view(4, 2, 5).movedim(1, 0), y, a, memory="in_place").loss
    loss.backward()
    close(flat.grad.view(4, 2, 5).movedim(1, 0), step(x, y, a)[2])


def refused(x: Tensor, y: Tensor, a: Tensor, call, message: str, error: type = RuntimeError, **kwargs) -> None:
    values = x.detach().clone()
    with pytest.raises(error, match=message):
        call(ops.joint_cross_entropy, x, y, a, memory="in_place", **kwargs)
    assert torch.equal(x.detach(), values)


def test_what_in_place_refuses(device, native):
    x, y, a = make((2, 4, 5), torch.float32, device)
    x.requires_grad_()
    refused(x, y, a, direct, "a leaf Variable that requires grad")
    refused(x[:], y, a, direct, "a view of a leaf Variable that requires grad")
    refused((x * 1)[:1].expand(2, 4, 5), y, a, direct, "whose elements do not share memory")
    refused((x * 1).as_strided((2, 4, 5), (4, 2, 1)), y, a, direct, "whose elements do not share memory")
    refused((x * 1).unbind(0)[0][None], y, a[:1], direct, "modified inplace|modified in-place|multiple views")
    shared = torch.randn(45, device=device).add_(x.sum())
    refused(shared[:40].view(2, 4, 5), y, shared[40:42].detach(), direct, "no other argument may share their memory")


def test_in_place_finds_bad_labels_first(call):
    x, y, a = make((2, 4, 5), torch.float32, "cpu")
    logits = x.requires_grad_() * 1
    y[3] = 5
    refused(logits, y, a, call, "target must be within 0..4 or ignore_index, got 5 at position 3", IndexError)
    y[3] = 4
    call(ops.joint_cross_entropy, logits, y, a).loss.backward()  # its history is what it was
    assert x.grad.abs().sum() > 0


def test_reference_overwrites_nothing(device, on_reference):
    x, y, a = make((2, 4, 5), torch.float32, device)
    logits = x.requires_grad_() * 1
    loss = on_reference(ops.joint_cross_entropy, logits, y, a, memory="in_place").loss
    assert torch.equal(logits, x)
    (expected,) = torch.autograd.grad(ops.joint_cross_entropy(x, y, a).loss, x)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("memory", ["inplace", None, 3])
def test_unknown_mode(memory, call):
    x, y, a = make((2, 4, 5), torch.float32, "cpu")
    with pytest.raises(ValueError, match="memory must be one of recompute, in_forward, in_place, got"):
        call(ops.joint_cross_entropy, x, y, a, memory=memory)


def test_in_place_is_refused_under_compile(device):
    x, y, a = make((2, 4, 5), torch.float32, device)
    function = lambda x: ops.joint_cross_entropy(x * 1, y, a, memory="in_place").loss  # noqa: E731
    torch._dynamo.reset()
    with pytest.raises(Exception, match="under torch.compile, got 'in_place'"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(x.requires_grad_())


@pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", HELD)
def test_autocast(memory, dtype16, device, close):
    x, y, a = make((2, 4, 5), dtype16, device)
    with torch.autocast(device, dtype=dtype16):
        actual = step(x, y, a, memory=memory)
    for got, wanted in zip(actual, step(x, y, a), strict=True):
        close(got, wanted, dtype16)


def peaks(memory: str, leaf: Tensor, y: Tensor, a: Tensor) -> tuple[int, int, int]:
    """Bytes of torch's CPU allocator above those before: the highest point of the forward, what is held after it, the
    highest point of the backward."""
    logits = leaf * 1
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        loss = ops.joint_cross_entropy(logits, y, a, memory=memory).loss
    grads = []
    logits_node = loss.grad_fn.next_functions[0][0]
    hook = logits_node.register_prehook(lambda g: grads.append(g[0].data_ptr()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        torch.autograd.backward(loss, inputs=[leaf])
    hook.remove()

    def rises(run: profile) -> list[int]:
        events = run.profiler.kineto_results.events()
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
        total, course = 0, [0]
        for size in sizes:
            total += size
            course.append(total)
        return course

    before, after = rises(forward), rises(backward)
    return max(before), before[-1], max(after)


@pytest.mark.parametrize("memory", ["recompute", *HELD])
def test_memory_counted_by_the_allocator(memory, native):
    """In units of the logits: recompute holds nothing after the forward and makes one gradient in the backward;
    in_forward holds one gradient, and makes none later; in_place makes none at all. (The product behind the logits
    adds its own gradient to each backward.)"""
    x, y, a = make((4, 64, 1000), torch.float32, "cpu")
    leaf = x.requires_grad_()
    size = x.numel() * x.element_size()
    peak, held, later = (b / size for b in peaks(memory, leaf, y, a))
    small = 0.02
    assert peak <= {"recompute": 0, "in_forward": 1, "in_place": 0}[memory] + small
    assert held <= {"recompute": 0, "in_forward": 1, "in_place": 0}[memory] + small
    assert later <= {"recompute": 2, "in_forward": 1, "in_place": 1}[memory] + small


def test_in_forward_scales_where_the_gradient_lies(native):
    """The backward takes no memory: nobody else has the gradient, and no hook of the caller's."""
    x, y, a = make((4, 64, 1000), torch.float32, "cpu")
    losses = [ops.joint_cross_entropy(x.requires_grad_(), y, a, memory="in_forward").loss for _ in range(2)]
    backward = peak(lambda: torch.autograd.grad(losses.pop(), x, torch.tensor(3.0)))
    assert backward.peak < 1024


def test_in_forward_does_not_hold_the_logits(native):
    x, y, a = make((4, 64, 100), torch.float32, "cpu")
    logits, saved = x.requires_grad_() * 1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.joint_cross_entropy(logits, y, a, memory="in_forward")
    assert all(t.data_ptr() != logits.data_ptr() for t in saved)
    assert sum(t.numel() for t in saved) <= x.numel() + 8


@pytest.mark.parametrize("memory", HELD)
def test_threads_do_not_change_a_bit(memory, native):
    x, y, a = make((4, 1037, 101), torch.float32, "cpu")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(step(x, y, a, 3.0, memory=memory))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize("memory", ["recompute", *HELD])
@pytest.mark.parametrize("offset", [1e4, 1e6, 1e8, -1e8])
def test_large_logits_keep_their_gradient(memory, offset, device, call):
    """Where max + log(sum) would be rounded to the maximum; at 1e8 all classes are equal."""
    x = (torch.tensor([[[0.0, 8.0, 16.0, 0.0], [3.0, 3.0, 3.0, 3.0]]], device=device) + offset).requires_grad_()
    y, one = torch.tensor([0, 2], device=device), torch.ones(1, device=device)
    (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x[0], y), x)
    (found,) = torch.autograd.grad(call(ops.joint_cross_entropy, x * 1, y, one, memory=memory).loss, x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", HELD)
def test_a_heavy_exit_in_half_precision_stays_finite(memory, device, call):
    x, y = torch.zeros(1, 1, 4, dtype=torch.float16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    grad = step(x, y, torch.tensor([100.0], device=device), memory=memory, call=call)[2]
    assert grad.flatten().tolist() == [-75.0, 25.0, 25.0, 25.0]


def test_who_saved_the_overwritten_logits_learns_of_the_scaling(native, device):
    """The backward scales in place: another graph that holds the same memory must not use what is there now."""
    x, y, a = make((1, 2, 3), torch.float32, device)
    logits = x.requires_grad_() * 1
    result = ops.joint_cross_entropy(logits, y, a, memory="in_place")
    v = torch.ones(3, device=device, requires_grad=True)
    other = (logits.detach() * v).sum()  # saves the held gradient
    (result.loss * 3).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_what_a_hook_holds_is_not_scaled_in_place(native, device):
    x, y, a = make((1, 2, 3), torch.float32, device)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), t)[1], lambda t: t):
        loss = ops.joint_cross_entropy(x.requires_grad_() * 1, y, a, memory="in_forward").loss
    before = [t.clone() for t in held]
    (loss * 2).backward()
    assert all(torch.equal(now, then) for now, then in zip(held, before, strict=True))
