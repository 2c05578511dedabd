from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aep_ext import ops

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
