"""Every operator against the best that eager torch offers and against the pure-torch reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference

QUICK = pytest.mark.quick


def case(*values: object, quick: bool = True) -> object:
    return pytest.param(*values, marks=QUICK if quick else (), id="-".join(str(v) for v in values))


def make(exits: int, rows: int, classes: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Exit logits as a trained network gives them, weights, labels."""
    logits, target = torch.randn(exits, rows, classes), torch.randint(classes, (rows,))
    logits[:, torch.arange(rows), target] += 3.0
    weights = torch.arange(1.0, exits + 1) / sum(range(1, exits + 1))
    return logits.to(device), weights.to(device), target.to(device)


@pytest.mark.parametrize(
    "exits, rows, classes", [case(4, 1, 10), case(4, 64, 100), case(4, 256, 1000), case(4, 1024, 21841, quick=False)]
)
def test_ensemble(race, device, exits, rows, classes):
    logits, weights, _ = make(exits, rows, classes, device)
    race(
        lambda: ops.ensemble(logits, weights),
        {
            "einsum": lambda: torch.einsum("enk,e->nk", logits, weights),
            "product": lambda: (weights @ logits.flatten(1)).view(logits.shape[1:]),
        },
    )


@pytest.mark.parametrize(
    "exits, rows, classes", [case(4, 1, 10), case(4, 64, 100), case(4, 256, 1000), case(7, 256, 200)]
)
def test_ensemble_stats(race, device, exits, rows, classes):
    logits, weights, _ = make(exits, rows, classes, device)

    def eager() -> tuple[Tensor, ...]:
        out = (weights @ logits.flatten(1)).view(logits.shape[1:])
        log_p = torch.log_softmax(out, -1)
        p = log_p.exp()
        top = p.topk(2, -1)
        confidence = top.values[:, 0]
        entropy = -(p * log_p).sum(-1)
        return out, torch.stack([confidence, entropy, confidence - top.values[:, 1]], -1), top.indices[:, 0]

    race(
        lambda: tuple(ops.ensemble_stats(logits, weights)),
        {"eager": eager, "reference": lambda: tuple(reference.ensemble_stats(logits, weights))},
    )


@pytest.mark.parametrize(
    "exits, rows, classes", [case(4, 64, 10), case(4, 64, 100), case(4, 256, 1000), case(7, 256, 200)]
)
def test_joint_cross_entropy(race, device, exits, rows, classes):
    """Forward and backward."""
    logits, weights, target = make(exits, rows, classes, device)
    logits.requires_grad_()

    def step(loss: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = torch.autograd.grad(loss, logits)
        return loss.detach(), grad

    def summed() -> tuple[Tensor, Tensor]:
        return step(sum(w * F.cross_entropy(x, target) for w, x in zip(weights.tolist(), logits, strict=True)))

    def flat() -> tuple[Tensor, Tensor]:
        rows_loss = F.cross_entropy(logits.flatten(0, 1), target.repeat(exits), reduction="none")
        return step(weights @ rows_loss.view(exits, rows).mean(1))

    race(
        lambda: step(ops.joint_cross_entropy(logits, target, weights).loss),
        {"summed": summed, "flat": flat},
    )


@pytest.mark.parametrize("exits, rows, classes", [case(4, 2000, 10), case(7, 500, 200), case(10, 500, 100)])
def test_subset_correct(race, device, exits, rows, classes):
    logits, weights, target = make(exits, rows, classes, device)
    race(
        lambda: ops.subset_correct(logits, weights, target),
        {"reference": lambda: reference.subset_correct(logits, weights, target)},
    )


# Channels and sizes of ResNet-50's four exits at 64 pixels.
RESNET50_64 = [(256, 16), (512, 8), (1024, 4), (2048, 2)]


@pytest.mark.parametrize("rows, layout", [case(1, "contiguous"), case(16, "contiguous"), case(16, "channels_last")])
def test_multi_exit_linear_head(race, device, rows, layout):
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    features = [torch.randn(rows, c, s, s, device=device).contiguous(memory_format=form) for c, s in RESNET50_64]
    weights = [torch.randn(10, c, device=device) / c**0.5 for c, _ in RESNET50_64]
    biases = [torch.randn(10, device=device) for _ in RESNET50_64]

    def eager() -> Tensor:
        pooled = [F.adaptive_avg_pool2d(x, 1).flatten(1) for x in features]
        return torch.stack([F.linear(x, w, b) for x, w, b in zip(pooled, weights, biases, strict=True)])

    race(
        lambda: ops.multi_exit_linear_head(features, weights, biases),
        {"eager": eager, "reference": lambda: reference.multi_exit_linear_head(features, weights, biases)},
    )


@pytest.mark.parametrize("rows", [case(1), case(8), case(64)])
def test_gate(race, device, rows):
    """Features of 512 x 8 x 8, about half of the rows leave."""
    logits, _, _ = make(1, rows, 10, device)
    features, running = torch.randn(rows, 512, 8, 8, device=device), torch.randn(rows, 10, device=device)
    indices, state = torch.arange(rows, device=device), torch.zeros(rows, 0, dtype=torch.int64, device=device)
    seen = (
        ops.gate(features, running, 0.3, indices, state, logits[0], weight=0.7, threshold=2.0).stats[:, 0].sort().values
    )
    threshold = (
        seen[rows // 2 - 1 : rows // 2 + 1].mean().item() if rows > 1 else 2.0
    )  # between two rows: no rounding decides

    def fused() -> tuple[Tensor, ...]:
        r = ops.gate(features, running, 0.3, indices, state, logits[0], weight=0.7, threshold=threshold)
        count = int(r.count)
        return r.features[:count], r.running[:count], r.indices, r.stats

    def eager() -> tuple[Tensor, ...]:
        total = running + 0.7 * logits[0]
        log_p = torch.log_softmax(total, -1)
        p = log_p.exp()
        top = p.topk(2, -1).values
        stats = torch.stack([top[:, 0], -(p * log_p).sum(-1), top[:, 0] - top[:, 1]], -1)
        leaves = top[:, 0] >= threshold
        stay, leave = (~leaves).nonzero()[:, 0], leaves.nonzero()[:, 0]
        order = torch.cat([stay, leave])
        return features[stay], total[stay], indices[order], stats[order]

    race(fused, {"eager": eager})
