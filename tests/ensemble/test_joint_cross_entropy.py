from __future__ import annotations

import copy
import io
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aep_ext import ExitWeights, JointCrossEntropy, MultiExitNet
from aep_ext.surgery.heads import PooledLinearHead


@pytest.fixture
def case():
    return torch.randn(3, 8, 5), torch.tensor([0, 4, 2, -100, 1, 1, 3, 2])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"class_weight": [1.0, 2.0, 0.5, 1.0, 3.0]},
        {"label_smoothing": 0.2, "class_weight": torch.tensor([1.0, 2, 1, 4, 1])},
        {"ignore_index": 1},
    ],
)
def test_equals_the_weighted_sum_of_cross_entropies(case, reduction, options):
    logits, target = case
    if "ignore_index" in options:
        target = target.clamp(min=0)
    weights = ExitWeights.descending(3)
    criterion = JointCrossEntropy(weights, reduction=reduction, **options)
    expected_options = dict(options, reduction=reduction)
    if "class_weight" in options:
        expected_options["weight"] = torch.as_tensor(expected_options.pop("class_weight"))
    each = [F.cross_entropy(x, target, **expected_options) for x in logits]
    expected = sum(a * loss for a, loss in zip(weights.loss, each, strict=True))
    torch.testing.assert_close(criterion(logits, target), expected)
    torch.testing.assert_close(criterion.per_exit(logits, target), torch.stack(each))


def test_trains_through_the_loss(case):
    logits, target = case
    logits.requires_grad_()
    JointCrossEntropy([0.7, 0.2, 0.1])(logits, target).backward()
    again = logits.detach().clone().requires_grad_()
    sum(a * F.cross_entropy(x, target) for a, x in zip((0.7, 0.2, 0.1), again, strict=True)).backward()
    torch.testing.assert_close(logits.grad, again.grad)


@pytest.mark.parametrize("memory", ["recompute", "in_forward", "in_place"])
def test_memory_modes_train_alike(case, memory):
    logits, target = case
    leaf = logits.clone().requires_grad_()
    criterion = JointCrossEntropy([0.7, 0.2, 0.1], memory=memory)
    criterion(leaf * 1, target).backward()
    again = logits.clone().requires_grad_()
    JointCrossEntropy([0.7, 0.2, 0.1])(again, target).backward()
    torch.testing.assert_close(leaf.grad, again.grad)
    assert f"memory='{memory}'" in repr(criterion)


def test_weights_are_buffers(case):
    criterion = JointCrossEntropy(ExitWeights.mixed(3), class_weight=[1, 2, 3, 4, 5])
    assert set(criterion.state_dict()) == {"exit_weights", "class_weight"}
    assert not list(criterion.parameters())
    assert torch.equal(criterion.exit_weights, torch.tensor(ExitWeights.mixed(3).loss))
    stream = io.BytesIO()
    torch.save(criterion.state_dict(), stream)
    stream.seek(0)
    other = JointCrossEntropy([1.0, 1.0, 1.0], class_weight=[1.0] * 5)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert other(*case) == copy.deepcopy(criterion)(*case) == criterion(*case)
    assert "class_weight=True" in repr(criterion)
    assert JointCrossEntropy([1.0]).to("meta").exit_weights.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0, -1.0],), {}, "positive and finite"),
        (([1.0],), {"reduction": "max"}, "'mean', 'sum' or 'none', got 'max'"),
        (([1.0],), {"memory": "cheap"}, "'recompute', 'in_forward' or 'in_place', got 'cheap'"),
        (([1.0],), {"memory": "in_place", "reduction": "none"}, "needs reduction 'mean' or 'sum', got 'none'"),
        (([1.0],), {"label_smoothing": 1.5}, "within 0..1, got 1.5"),
        (([1.0],), {"class_weight": [[1.0]]}, r"one dimension, got shape \[1, 1\]"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        JointCrossEntropy(*arguments, **options)


def test_wrong_number_of_exits_is_refused(case):
    with pytest.raises((ValueError, RuntimeError), match=r"exit_weights must have shape \[3\], got \[2\]"):
        JointCrossEntropy([0.5, 0.5])(*case)


def test_can_be_shown_without_values():
    assert "exit_weights=[...]" in repr(JointCrossEntropy([0.5, 0.5]).to("meta"))


def _net(**kwargs):
    widths = [3, 4, 6]
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in pairwise(widths)]
    return MultiExitNet(stages, [PooledLinearHead(width, 5, **kwargs) for width in widths[1:]], num_classes=5)


@pytest.mark.parametrize("kind", ["linear exits", "unfused", "active dropout", "none"])
def test_loss_of_a_network(kind, monkeypatch):
    """Without the logits where every exit is linear, with them elsewhere; the same loss and gradients."""
    torch.manual_seed(0)
    net = _net(dropout=0.5 if kind == "active dropout" else 0.0)
    net.fused = kind != "unfused"
    criterion = JointCrossEntropy(
        [0.7, 0.3],
        label_smoothing=0.1,
        class_weight=[1.0, 2.0, 0.5, 1.0, 3.0],
        reduction="none" if kind == "none" else "mean",
    )
    images, target = torch.randn(6, 3, 16, 16), torch.tensor([0, 4, 2, -100, 1, 1])
    asked = []
    exit_logits = net.exit_logits
    monkeypatch.setattr(net, "exit_logits", lambda x: asked.append(x) or exit_logits(x))
    torch.manual_seed(1)
    result = criterion.of(net, images, target, chunk=4)
    assert bool(asked) == (kind != "linear exits")
    result.loss.sum().backward()
    grads = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    torch.manual_seed(1)
    expected = criterion.losses(exit_logits(images), target)
    expected.loss.sum().backward()
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.exit_losses.detach(), expected.exit_losses.detach())
    for grad, parameter in zip(grads, net.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_loss_of_a_network_prepares_the_maps():
    """What runs before the pooling (DenseNet's ReLU) runs here too."""
    net = _net(pre=nn.Tanh())
    images, target = torch.randn(6, 3, 16, 16), torch.randint(5, (6,))
    criterion = JointCrossEntropy([0.7, 0.3])
    assert net.pooled_exits(images) is not None
    torch.testing.assert_close(criterion.of(net, images, target).loss, criterion(net.exit_logits(images), target))
