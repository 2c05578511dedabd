"""Prefix loss, distillation, learned weights, gradient equilibrium and the mixed regime: against plain formulas, in a
hand-written loop, under torch.compile and under bfloat16 autocast. tests/training/test_fit.py has them in Lightning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aep_ext import ExitWeights, JointCrossEntropy, MultiExitNet
from aep_ext.ensemble import EnsembleDistillation, GradientEquilibrium, LearnedLossWeights, PrefixCrossEntropy
from aep_ext.surgery.heads import PooledLinearHead

A, B = (0.5, 0.3, 0.2), (0.2, 0.3, 0.9)


def small() -> MultiExitNet:
    """Three stages of 4, 6 and 8 channels, an exit after each; K = 5."""
    torch.manual_seed(0)
    widths = [3, 4, 6, 8]
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in zip(widths, widths[1:], strict=False)]
    return MultiExitNet(stages, [PooledLinearHead(width, 5) for width in widths[1:]], num_classes=5)


@pytest.fixture
def case() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 8, 5), torch.tensor([0, 4, 2, 0, 1, 1, 3, 2])


def prefixes(logits: Tensor, detached: bool = False) -> list[Tensor]:
    """R_e as the definition says, one exit after another."""
    found = []
    for e in range(len(logits)):
        before = sum((b * (x.detach() if detached else x) for b, x in zip(B[:e], logits[:e], strict=True)), start=0)
        found.append((before + B[e] * logits[e]) / sum(B[: e + 1]))
    return found


def cross_entropies(rows: Any, target: Tensor, **options: Any) -> Tensor:
    return sum(a * F.cross_entropy(x, target, **options) for a, x in zip(A, rows, strict=True))


def divergences(logits: Tensor, temperature: float) -> Tensor:
    teacher = F.softmax(prefixes(logits)[-1].detach() / temperature, -1)
    return temperature**2 * sum(
        F.kl_div(F.log_softmax(x / temperature, -1), teacher, reduction="batchmean") for x in logits
    )


def same_value_and_gradient(logits: Tensor, loss: Any, expected: Any) -> None:
    results = []
    for function in (loss, expected):
        leaf = logits.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"class_weight": [1.0, 2.0, 0.5, 1.0, 3.0]}])
def test_joint_loss_with_every_term(case: tuple[Tensor, Tensor], detached: bool, options: dict[str, Any]) -> None:
    logits, target = case
    plain = dict(options)
    if "class_weight" in options:
        plain["weight"] = torch.tensor(plain.pop("class_weight"))
    loss = JointCrossEntropy(
        ExitWeights(A, B), prefix_weight=0.25, detach_prefix=detached, distillation=0.4, temperature=2.0, **options
    )

    def expected(x: Tensor) -> Tensor:
        own = 0.75 * cross_entropies(x, target, **plain)
        return own + 0.25 * cross_entropies(prefixes(x, detached), target, **plain) + 0.4 * divergences(x, 2.0)

    same_value_and_gradient(logits, lambda x: loss(x, target), expected)
    parts = loss.losses(logits, target)
    torch.testing.assert_close(
        parts.prefix_losses, torch.stack([F.cross_entropy(x, target, **plain) for x in prefixes(logits)])
    )
    torch.testing.assert_close(4 * parts.distillation_losses.sum(), divergences(logits, 2.0))


def test_the_terms_alone(case: tuple[Tensor, Tensor]) -> None:
    logits, target = case
    prefix = PrefixCrossEntropy(A, output_weights=B, detach_prefix=True)
    same_value_and_gradient(logits, lambda x: prefix(x, target), lambda x: cross_entropies(prefixes(x, True), target))
    distillation = EnsembleDistillation(B, temperature=2.0)
    same_value_and_gradient(logits, distillation, lambda x: divergences(x, 2.0))


def test_probabilities_as_targets(case: tuple[Tensor, Tensor]) -> None:
    logits, target = case
    mixed = 0.3 * F.one_hot(target, 5) + 0.7 * F.one_hot(target.flip(0), 5)
    loss = JointCrossEntropy(ExitWeights(A, B), prefix_weight=0.25)
    same_value_and_gradient(
        logits,
        lambda x: loss(x, mixed),
        lambda x: 0.75 * cross_entropies(x, mixed) + 0.25 * cross_entropies(prefixes(x), mixed),
    )


def test_the_backbone_alone(case: tuple[Tensor, Tensor]) -> None:
    logits, target = case
    loss = JointCrossEntropy(LearnedLossWeights(3), prefix_weight=0.5, distillation=1.0)
    loss.backbone_only = True
    same_value_and_gradient(logits, lambda x: loss(x, target), lambda x: F.cross_entropy(x[-1], target))


@pytest.mark.parametrize("form", ["uncertainty", "softmax"])
def test_learned_weights(case: tuple[Tensor, Tensor], form: str) -> None:
    logits, target = case
    weights = LearnedLossWeights(3, form, floor=0.3, total=6.0)
    torch.testing.assert_close(weights(), torch.full((3,), 2.0))
    loss = JointCrossEntropy(weights, prefix_weight=0.5)
    with torch.no_grad():
        weights.raw.copy_(torch.tensor([0.5, -1.0, 0.2]))
    loss(logits, target).backward()
    raw = weights.raw.detach().clone().requires_grad_()
    parts = loss.losses(logits, target)
    each = 0.5 * (parts.exit_losses + parts.prefix_losses).detach()
    plain = 6 * (((-raw).exp() * each).mean() + raw.mean())
    if form == "softmax":
        plain = 6 * ((0.1 + 0.7 * raw.softmax(0)) * each).sum()
    torch.testing.assert_close(parts.loss, plain)
    plain.backward()
    torch.testing.assert_close(weights.raw.grad, raw.grad)


def test_uncertainty_finds_the_inverse_of_the_losses() -> None:
    weights, losses = LearnedLossWeights(3), torch.tensor([2.0, 0.5, 0.1])
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        ((weights() * losses).sum() + weights.penalty()).backward()
        optimizer.step()
    torch.testing.assert_close(3 * weights().detach(), 1 / losses, rtol=1e-3, atol=0)


def test_gradient_equilibrium_gives_every_exit_the_same_say() -> None:
    net, images = small(), torch.randn(4, 3, 16, 16)
    plain = net.exit_logits(images)
    net.gradient_equilibrium = True
    scaled = net.exit_logits(images)
    assert torch.equal(plain, scaled)
    for e in range(3):
        own, head = net.stages[0][0].weight, net.exits[e].linear.weight
        before = torch.autograd.grad(plain[e].square().sum(), (own, head), retain_graph=True)
        after = torch.autograd.grad(scaled[e].square().sum(), (own, head), retain_graph=True)
        torch.testing.assert_close(after[0], before[0] / 3)
        torch.testing.assert_close(after[1], before[1])
    # The last stage has one exit behind it: nothing is scaled there but what exits 1 and 2 left to it.
    own = net.stages[2][0].weight
    pair = [torch.autograd.grad(x[2].sum(), own, retain_graph=True)[0] for x in (plain, scaled)]
    torch.testing.assert_close(*pair)
    assert net.eval().exit_logits(images).requires_grad and torch.equal(net.exit_logits(images), plain)
    (left,) = torch.autograd.grad(net.exit_logits(images)[0].square().sum(), net.stages[0][0].weight)
    torch.testing.assert_close(left, torch.autograd.grad(plain[0].square().sum(), net.stages[0][0].weight)[0])


def test_gradient_equilibrium_is_not_saved_but_copied() -> None:
    net = small()
    keys = list(net.state_dict())
    net.gradient_equilibrium = True
    assert list(net.state_dict()) == keys and copy.deepcopy(net).gradient_equilibrium


def test_the_module_for_networks_of_one_s_own() -> None:
    equilibrium, x = GradientEquilibrium(4), torch.randn(3, requires_grad=True)
    for exit, (head, onward) in enumerate(((1 / 4, 3 / 4), (1 / 3, 2 / 3), (1 / 2, 1 / 2), (1, 1))):
        for part, scale in zip(equilibrium(x, exit), (head, onward), strict=True):
            assert torch.equal(part, x)
            torch.testing.assert_close(torch.autograd.grad(part.sum(), x)[0], torch.full((3,), float(scale)))


def everything(num_exits: int = 3) -> JointCrossEntropy:
    return JointCrossEntropy(LearnedLossWeights(num_exits), prefix_weight=0.5, distillation=0.2, output_weights=B)


def steps(net: MultiExitNet, loss: JointCrossEntropy, forward: Any, count: int = 12) -> list[float]:
    """A loop as a user writes it, the first third of it for the backbone alone: the last exit's loss at each step."""
    images, target = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.arange(16) % 5
    optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=0.1)
    found = []
    for step in range(count):
        loss.backbone_only = step < count // 3
        net.gradient_equilibrium = not loss.backbone_only
        optimizer.zero_grad()
        value = forward(images, target)
        value.backward()
        optimizer.step()
        with torch.no_grad():
            found.append(float(F.cross_entropy(net.exit_logits(images)[-1], target)))
    return found


def test_all_in_a_loop_of_one_s_own() -> None:
    net, loss = small(), everything()
    heads = [parameter.detach().clone() for parameter in net.exits[0].parameters()]
    found = steps(net, loss, lambda x, y: loss(net(x), y), count=3)
    assert not any(map(torch.equal, heads, net.exits[0].parameters())) and found[-1] < found[0]
    assert not torch.equal(loss.learned.raw, torch.zeros(3))


def test_all_under_compile() -> None:
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        net, loss = small(), everything()
        results.append(steps(net, loss, wrap(lambda x, y, net=net, loss=loss: loss(net(x), y)), count=4))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_all_under_bfloat16_autocast() -> None:
    results = []
    for enabled in (False, True):
        net, loss = small(), everything()

        def forward(x: Tensor, y: Tensor, net: Any = net, loss: Any = loss, enabled: bool = enabled) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = net(x)
                assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
                value = loss(logits, y)
            assert value.dtype == torch.float32
            return value

        results.append(steps(net, loss, forward, count=4))
    assert results[0] == pytest.approx(results[1], rel=2e-2)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (
            lambda: JointCrossEntropy(A, prefix_weight=1.5),
            "JointCrossEntropy: prefix_weight must be within 0..1, got 1.5",
        ),
        (lambda: JointCrossEntropy(A, distillation=-1.0), "distillation must be finite and at least 0, got -1.0"),
        (lambda: PrefixCrossEntropy(A, temperature=0.0), "PrefixCrossEntropy: temperature must be finite and greater"),
        (lambda: JointCrossEntropy(A, output_weights=[1.0]), "output must have 3 entries"),
        (lambda: EnsembleDistillation(temperature=0.0), "EnsembleDistillation: temperature must be finite and greater"),
        (lambda: LearnedLossWeights(3, "luck"), "form must be 'uncertainty' or 'softmax', got 'luck'"),
        (lambda: LearnedLossWeights(3, floor=2.0), "floor must be within 0..1, got 2.0"),
        (lambda: LearnedLossWeights(3, total=0.0), "total must be finite and greater than 0, got 0.0"),
        (lambda: LearnedLossWeights(0), "num_exits must be at least 1, got 0"),
        (lambda: GradientEquilibrium(0), "num_exits must be at least 1, got 0"),
        (lambda: GradientEquilibrium(3)(torch.ones(1), 3), r"exit must be within 0..2, got 3"),
    ],
)
def test_what_is_refused(make: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()
