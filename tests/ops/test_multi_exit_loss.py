from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference

SHAPES = [(1, 4, 5), (4, 0, 10), (4, 1, 10), (3, 7, 1), (3, 5, 2), (2, 3, 2184), (7, 9, 200), (4, 64, 100), (3, 50, 33)]
REDUCTIONS = ["mean", "sum", "none"]
OPTIONS = {
    "plain": {},
    "class weights": {"class_weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"class_weight": True, "label_smoothing": 0.3},
    "full smoothing": {"class_weight": True, "label_smoothing": 1.0},
    "ignore a class": {"ignore_index": 0, "class_weight": True, "label_smoothing": 0.1},
}
TERMS = {
    "exits": {},
    "prefixes": {"c": True},
    "weighted prefixes": {"b": True, "c": True},
    "detached prefixes": {"b": True, "c": True, "detach_prefix": True},
    "distillation": {"b": True, "distillation": 0.4, "temperature": 2.5},
    "all": {"b": True, "c": True, "distillation": 0.7, "temperature": 3.0},
    "all detached": {"c": True, "distillation": 0.7, "temperature": 1.0, "detach_prefix": True},
}


def make(shape: tuple[int, int, int], dtype: torch.dtype, device: str, soft: bool = False) -> tuple[Tensor, ...]:
    """Logits, target, a, b, c."""
    logits = torch.randn(shape, device=device).mul(3).to(dtype)
    target = torch.randint(shape[2], (shape[1],), device=device)
    if soft:
        target = torch.rand(shape[1:], device=device).softmax(-1)
    return logits, target, *(torch.rand(3, shape[0], device=device) + 0.1)


def keywords(terms: str, options: str, b: Tensor, c: Tensor, classes: int) -> dict:
    kwargs = TERMS[terms] | OPTIONS[options]
    if kwargs.pop("b", False):
        kwargs["output_weights"] = b
    if kwargs.pop("c", False):
        kwargs["prefix_weights"] = c
    if kwargs.get("class_weight"):
        kwargs["class_weight"] = torch.rand(classes, device=b.device) + 0.1
    return kwargs


def plain(
    x: Tensor,
    target: Tensor,
    a: Tensor,
    prefix_weights: Tensor | None = None,
    output_weights: Tensor | None = None,
    distillation: float = 0.0,
    temperature: float = 3.0,
    detach_prefix: bool = False,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    **kwargs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formula with torch's own losses."""
    x = x if x.dtype == torch.float64 else x.float()
    weight = None if class_weight is None else class_weight.to(x.dtype)
    hard = not target.is_floating_point()
    if not hard:  # which torch refuses with probabilities
        kwargs.pop("ignore_index", None)

    def losses(scores: list[Tensor]) -> Tensor:
        options = {"weight": weight, "reduction": reduction, **kwargs}
        return torch.stack([F.cross_entropy(s, target if hard else target.to(x.dtype), **options) for s in scores])

    b = torch.ones(len(x), device=x.device) if output_weights is None else output_weights
    b = b.to(x.dtype)
    prefixes = []
    for e in range(len(x)):
        earlier = sum((b[j] * x[j] for j in range(e)), torch.zeros_like(x[0]))
        prefixes.append(((earlier.detach() if detach_prefix else earlier) + b[e] * x[e]) / b[: e + 1].sum())
    exit_losses = losses(list(x))
    prefix_losses, kl = torch.zeros_like(exit_losses), torch.zeros_like(exit_losses)
    loss = torch.tensordot(a.to(x.dtype), exit_losses, 1)
    if prefix_weights is not None:
        prefix_losses = losses(prefixes)
        loss = loss + torch.tensordot(prefix_weights.to(x.dtype), prefix_losses, 1)
    if distillation:
        teacher = (prefixes[-1].detach() / temperature).softmax(-1)
        kl = torch.stack([F.kl_div((s / temperature).log_softmax(-1), teacher, reduction="none").sum(-1) for s in x])
        used = target != kwargs.get("ignore_index", -100) if hard else torch.ones_like(kl[0], dtype=torch.bool)
        kl = kl.masked_fill(~used, 0.0)
        kl = kl if reduction == "none" else kl.sum(-1) / (used.sum() if reduction == "mean" else 1)
        loss = loss + distillation * temperature**2 * kl.sum(0)
    return loss, exit_losses, prefix_losses, kl


def check(logits: Tensor, target: Tensor, a: Tensor, kwargs: dict, close, call=ops.multi_exit_loss) -> None:
    """Results and gradients against the formula."""
    found, expected = [], []
    for function, into in ((call, found), (plain, expected)):
        x, a_, c_ = (
            None if t is None else t.clone().requires_grad_() for t in (logits, a, kwargs.get("prefix_weights"))
        )
        result = function(x, target, a_, **kwargs | ({} if c_ is None else {"prefix_weights": c_}))
        wanted = [x, a_] if c_ is None else [x, a_, c_]
        uneven = sum((t * torch.linspace(0.1, 1, t.numel()).view_as(t)).sum() for t in result if t.requires_grad)
        into += [t.detach() for t in result] + list(torch.autograd.grad(result[0].sum(), wanted, retain_graph=True))
        into += list(torch.autograd.grad(uneven, wanted[:1]))
    for f, g in zip(found, expected, strict=True):
        close(f, g.to(f.dtype))


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("terms", TERMS)
def test_equals_the_formula(terms, options, reduction, soft, device, close):
    logits, target, a, b, c = make((3, 40, 11), torch.float32, device, soft)
    if not soft:
        target[::7] = OPTIONS[options].get("ignore_index", -100)
    check(logits, target, a, keywords(terms, options, b, c, 11) | {"reduction": reduction}, close)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape, reduction, soft, dtype, device, close):
    logits, target, a, b, c = make(shape, dtype, device, soft)
    kwargs = keywords("all", "both", b, c, shape[2])
    check(logits, target, a, kwargs | {"reduction": reduction}, close)


def test_layouts(device, dtype, layouts, close):
    base, target, a, b, c = make((4, 6, 37), dtype, device)
    for _, logits in layouts(base):
        check(logits.detach(), target, a, keywords("all", "smoothing", b, c, 37), close)
    wide = torch.rand(6, 2 * 37, device=device)[:, ::2].softmax(-1)
    for soft in (wide, wide.t().contiguous().t(), wide.double()):
        check(base, soft, a, keywords("all", "plain", b, c, 37), close)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 2.5, 0.5, 7.0])
def test_temperatures(temperature, device, close):
    logits, target, a, b, c = make((4, 9, 50), torch.float32, device)
    check(logits, target, a, {"prefix_weights": c, "distillation": 0.3, "temperature": temperature}, close)


@pytest.mark.parametrize("memory", ["in_forward", "in_place"])
@pytest.mark.parametrize("terms", TERMS)
def test_memory_modes(terms, memory, dtype, device, close):
    logits, target, a, b, c = make((3, 7, 20), dtype, device)
    kwargs, found = keywords(terms, "both", b, c, 20), []
    for mode in ("recompute", memory):
        x, a_, c_ = (t.clone().requires_grad_() for t in (logits, a, c))
        prefix = {"prefix_weights": c_} if "prefix_weights" in kwargs else {}
        result = ops.multi_exit_loss(x * 1, target, a_, **kwargs | prefix, memory=mode)
        wanted = [x, a_, c_] if prefix else [x, a_]
        found.append([t.detach() for t in result] + list(torch.autograd.grad(3 * result.loss, wanted)))
    for one, other in zip(*found, strict=True):
        close(one, other)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, detach, soft, device):
    kind = {"dtype": torch.float64, "device": device}
    logits = torch.randn(3, 3, 4, **kind, requires_grad=True)
    a, c = torch.rand(2, 3, **kind).unbind()
    target = torch.rand(3, 4, **kind) if soft else torch.tensor([1, -100, 3], device=device)
    options = {"class_weight": torch.rand(4, **kind), "label_smoothing": 0.2, "reduction": reduction}
    # What is detached is a constant for autograd, but not for finite differences: those see it held in place.
    fixed = logits.detach().clone()

    def of(x, a, c):
        terms = {"output_weights": torch.tensor([0.5, 0.2, 0.3], **kind), "distillation": 0.0 if detach else 0.4}
        return ops.multi_exit_loss(x, target, a, c, detach_prefix=detach, **terms, **options)

    def without_teacher(x, a, c):
        result = of(x, a, c)
        return result.loss - 0.4 * 9 * result.distillation_losses.sum(0), result.exit_losses, result.prefix_losses

    def last_exit(x, a, c):  # detached: the gradient of the last exit alone, the others in place
        return of(torch.cat([fixed[:-1], x[-1:]]), a, c)[:3]

    weights = [t.clone().requires_grad_() for t in (a, c)]
    assert torch.autograd.gradcheck(last_exit if detach else without_teacher, (logits, *weights))


def test_gradcheck_of_the_distillation(device):
    """The teacher is a constant: finite differences get it from logits that stay."""
    kind = {"dtype": torch.float64, "device": device}
    logits, target = torch.randn(3, 4, 5, **kind), torch.tensor([1, -100, 3, 0], device=device)
    teacher = (logits.mean(0) / 2).softmax(-1)
    student = logits.clone().requires_grad_()
    kl = ops.multi_exit_loss(student, target, torch.ones(3, **kind), distillation=0.3, temperature=2.0)
    (grad,) = torch.autograd.grad(kl.distillation_losses, student, torch.tensor([1.0, 2.0, 0.5], **kind))
    x = logits.clone().requires_grad_()
    rows = F.kl_div((x / 2).log_softmax(-1), teacher.expand_as(x), reduction="none").sum(-1)[:, [0, 2, 3]].mean(1)
    (wanted,) = torch.autograd.grad((rows * torch.tensor([1.0, 2.0, 0.5], **kind)).sum(), x)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("path", ["as loaded", "reference"])
def test_special_logits(value, path, device, on_reference, close):
    """A row of its own: NaN where torch has it, the others untouched; a class that no exit gives any chance is none."""
    logits, target, a, b, c = make((3, 6, 20), torch.float32, device)
    target[:] = torch.arange(6, device=device)
    logits[:, 2, 7] = value
    kwargs = keywords("all", "plain", b, c, 20) | {"reduction": "none"}

    def call(*args, **kwargs):
        return (
            ops.multi_exit_loss(*args, **kwargs)
            if path == "as loaded"
            else on_reference(ops.multi_exit_loss, *args, **kwargs)
        )

    check(
        logits,
        target,
        a,
        kwargs,
        lambda f, g: close(f[..., [0, 1, 3, 4, 5]], g[..., [0, 1, 3, 4, 5]]) if f.dim() == 2 else None,
        call,
    )
    result = call(logits, target, a, **kwargs)
    expected = result.loss[2].isfinite() if value == -float("inf") else result.loss[2].isnan()
    assert expected and result.loss[[0, 1, 3, 4, 5]].isfinite().all()
    target[2] = -100
    x = logits.clone().requires_grad_()
    call(x, target, a, **kwargs).loss.sum().backward()
    assert not x.grad[:, 2].any() and x.grad.isfinite().all()


@pytest.mark.parametrize("offset", [60.0, 1e4, -1e4])
def test_labels_far_below_and_large_logits(offset, device, close):
    logits, target, a, b, c = make((3, 6, 20), torch.float32, device)
    logits = logits.round()
    if offset == 60.0:
        logits[1, torch.arange(6, device=device), target] -= 40
    else:
        logits += offset
    exact, found = (t.clone().requires_grad_() for t in (logits.double(), logits))
    kwargs = {"prefix_weights": c, "distillation": 0.3, "temperature": 0.5 if offset == 60.0 else 3.0}
    wanted = plain(exact, target, a, **kwargs)
    result = ops.multi_exit_loss(found, target, a, **kwargs)
    torch.testing.assert_close(result.loss, wanted[0].float(), rtol=2e-4, atol=2e-4)
    (grad,) = torch.autograd.grad(result.loss, found)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted[0], exact)[0].float(), rtol=2e-3, atol=1e-5)


def test_joint_cross_entropy_is_its_special_case(device):
    logits, target, a, _, _ = make((4, 9, 33), torch.float32, device)
    joint, whole = ops.joint_cross_entropy(logits, target, a), ops.multi_exit_loss(logits, target, a)
    assert torch.equal(joint.loss, whole.loss) and torch.equal(joint.exit_losses, whole.exit_losses)
    assert not whole.prefix_losses.any() and not whole.distillation_losses.any()
    one_hot = F.one_hot(target, 33).float()
    torch.testing.assert_close(ops.multi_exit_loss(logits, one_hot, a).loss, joint.loss)


def test_the_forward_holds_nothing_of_the_logits_size(native):
    logits, target, a, b, c = make((4, 64, 100), torch.float32, "cpu")
    x, saved = logits.requires_grad_() * 1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.multi_exit_loss(x, target, a, c, b, distillation=0.5)
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1
    assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) < 4 * 64 * 6 + 64 + 30


def test_learned_weights(device):
    """Gradients for the weights alone, and none for what must not have one."""
    logits, target, a, b, c = make((3, 4, 5), torch.float32, device)
    a.requires_grad_(), c.requires_grad_()
    result = ops.multi_exit_loss(logits, target, a, c, b, distillation=0.2)
    result.loss.backward()
    torch.testing.assert_close(a.grad, result.exit_losses.detach())
    torch.testing.assert_close(c.grad, result.prefix_losses.detach())


@pytest.mark.parametrize("name", ["output_weights", "class_weight", "target"])
@pytest.mark.parametrize("path", ["as loaded", "reference"])
def test_constants_with_a_gradient_are_refused(name, path, device, on_reference):
    logits, target, a, b, c = make((3, 4, 5), torch.float32, device, soft=True)
    kwargs = {"target": target, "output_weights": b, "class_weight": torch.ones(5, device=device)}
    kwargs[name] = kwargs[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"aep::multi_exit_loss: {name} must not require a gradient"):
        if path == "as loaded":
            ops.multi_exit_loss(logits, exit_weights=a, **kwargs)
        else:
            on_reference(ops.multi_exit_loss, logits, exit_weights=a, **kwargs)


@pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype16, device, close):
    logits, target, a, b, c = make((2, 4, 5), dtype16, device)
    with torch.autocast(device, dtype=dtype16):
        result = ops.multi_exit_loss(logits, target, a, c, b, distillation=0.5)
    assert result.loss.dtype == torch.float32
    close(result.loss, reference.multi_exit_loss(logits.float(), target, a, c, b, distillation=0.5).loss)


def test_threads_do_not_change_a_bit(native):
    logits, target, a, b, c = make((4, 1037, 101), torch.float32, "cpu")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            x = logits.clone().requires_grad_()
            result = ops.multi_exit_loss(x, target, a, c, b, distillation=0.5)
            results.append([*(t.detach() for t in result), *torch.autograd.grad(result.loss, x)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_double_backward_says_so(native, device):
    logits, target, a, b, c = make((2, 4, 5), torch.float32, device)
    logits.requires_grad_()
    loss = ops.multi_exit_loss(logits, target, a, c).loss
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="aep::multi_exit_loss: double backward is not supported"):
        grad.square().sum().backward()
