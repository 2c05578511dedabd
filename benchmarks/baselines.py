"""Baselines: what users have without the fused operators, in the form they write and in the best form of eager torch.

Naive: exit by exit, module by module. Best eager: everything in as few operators as torch allows. Statistics are taken
in at least float32, as the fused operators take them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stats = tuple[Tensor, Tensor, Tensor]


def ensemble_naive(logits: Tensor, weights: Tensor) -> Tensor:
    """One exit after the other."""
    return sum(w * x for w, x in zip(weights, logits, strict=True))


def ensemble_einsum(logits: Tensor, weights: Tensor) -> Tensor:
    """One contraction."""
    return torch.einsum("enk,e->nk", logits, weights)


def ensemble_product(logits: Tensor, weights: Tensor) -> Tensor:
    """One matrix-vector product."""
    return (weights @ logits.flatten(1)).view(logits.shape[1:])


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def stats_naive(logits: Tensor, weights: Tensor) -> Stats:
    """Softmax, maximum, entropy, margin and prediction, each on its own."""
    total = ensemble_naive(logits, weights)
    p = F.softmax(_wide(total), dim=1)
    confidence, answer = p.max(dim=1)
    entropy = -(p * torch.log(p + 1e-12)).sum(dim=1)
    top = p.topk(2, dim=1).values
    return total, torch.stack([confidence, entropy, top[:, 0] - top[:, 1]], 1), answer


def stats_eager(logits: Tensor, weights: Tensor) -> Stats:
    """One product, one log-softmax, one top-2."""
    total = ensemble_product(logits, weights)
    log_p = torch.log_softmax(_wide(total), -1)
    p = log_p.exp()
    top = p.topk(2, -1)
    confidence = top.values[:, 0]
    entropy = -(p * log_p).sum(-1)
    return total, torch.stack([confidence, entropy, confidence - top.values[:, 1]], -1), top.indices[:, 0]


def stats_fusable(logits: Tensor, weights: Tensor) -> Stats:
    """Reductions only, without top-k: what a compiler can fuse into few loops."""
    total = ensemble_naive(logits, weights)
    log_p = torch.log_softmax(_wide(total), -1)
    p = log_p.exp()
    answer = total.argmax(-1)
    confidence = p.amax(-1)
    others = p.masked_fill(torch.arange(p.shape[1], device=p.device) == answer[:, None], 0.0)
    return total, torch.stack([confidence, -(p * log_p).sum(-1), confidence - others.amax(-1)], -1), answer


def loss_summed(logits: Tensor, target: Tensor, weights: Sequence[float]) -> Tensor:
    """One cross entropy for each exit."""
    return sum(w * F.cross_entropy(x, target) for w, x in zip(weights, logits, strict=True))


def loss_flat(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """One cross entropy for all exits."""
    exits, rows, _ = logits.shape
    losses = F.cross_entropy(logits.flatten(0, 1), target.repeat(exits), reduction="none")
    return weights @ losses.view(exits, rows).mean(1)


def terms_naive(
    logits: Tensor, target: Tensor, weights: Tensor, distillation: float = 0.2, temperature: float = 3.0
) -> Tensor:
    """Exits, prefix ensembles and distillation, exit by exit; the weights serve as a, b and c."""
    prefixes, running = [], 0
    for e, (w, x) in enumerate(zip(weights, logits, strict=True)):
        running = running + w * x
        prefixes.append(running / weights[: e + 1].sum())
    teacher = F.softmax(_wide(prefixes[-1].detach()) / temperature, -1)
    loss = 0
    for w, x, prefix in zip(weights, map(_wide, logits), map(_wide, prefixes), strict=True):
        loss = loss + w * (F.cross_entropy(x, target) + F.cross_entropy(prefix, target))
        divergence = F.kl_div(F.log_softmax(x / temperature, -1), teacher, reduction="batchmean")
        loss = loss + distillation * temperature**2 * divergence
    return loss


def terms_flat(
    logits: Tensor, target: Tensor, weights: Tensor, distillation: float = 0.2, temperature: float = 3.0
) -> Tensor:
    """The same in few operators: prefixes by one product, one log-sum-exp for all exits."""
    exits, rows, _ = logits.shape
    shares = torch.tril(weights.expand(exits, exits))
    prefixes = ((shares / shares.sum(1, keepdim=True)) @ logits.flatten(1)).view_as(logits)
    loss = loss_flat(_wide(logits), target, _wide(weights)) + loss_flat(_wide(prefixes), target, _wide(weights))
    teacher = F.softmax(_wide(prefixes[-1].detach()) / temperature, -1)
    scaled = _wide(logits) / temperature
    own = torch.logsumexp(scaled, -1) - (scaled * teacher).sum(-1)
    divergence = own.sum() + exits * torch.special.xlogy(teacher, teacher).sum()
    return loss + distillation * temperature**2 * divergence / rows


def subsets_published(logits: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """The loop over the subsets: each one's ensemble is added up anew and its top-5 compared with the labels."""
    exits, _, classes = logits.shape
    counts = []
    for mask in range(1, 1 << exits):
        members = [e for e in range(exits) if mask >> e & 1]
        scores = torch.stack([weights[e] * logits[e] for e in members]).sum(0)
        hits = scores.topk(min(5, classes), dim=1).indices == target[:, None]
        counts.append(torch.stack([hits[:, 0].sum(), hits.sum()]))
    return torch.stack(counts)


def subset_weights(weights: Tensor) -> Tensor:
    """(2^E - 1, E): the weights of every subset, zero for exits outside."""
    exits = weights.shape[0]
    masks = torch.arange(1, 1 << exits, device=weights.device)
    return weights * (masks[:, None] >> torch.arange(exits, device=weights.device) & 1).to(weights.dtype)


def subset_ranks(logits: Tensor, chosen: Tensor, target: Tensor) -> Tensor:
    """Counts of the subsets ``chosen`` (M, E) over a few rows: one matrix product, and ranks by counting."""
    classes = logits.shape[-1]
    scores = (chosen @ logits.flatten(1)).view(-1, *logits.shape[1:])
    own = scores.gather(-1, target[:, None].expand(scores.shape[0], -1, 1))
    rank = (scores > own).sum(-1)
    return torch.stack([(rank < 1).sum(-1), (rank < min(5, classes)).sum(-1)], -1)


# Scores at a time for subsets_product: of 2^16 to 2^22 the quickest, or close to it, at every size of these benchmarks.
_TABLE = 1 << 19


def subsets_product(
    logits: Tensor,
    weights: Tensor,
    target: Tensor,
    ranks: Callable[..., Tensor] = subset_ranks,
    table: int = _TABLE,
) -> Tensor:
    """All subsets, as many rows at a time as ``table`` scores allow: on a CPU, what a cache holds."""
    exits, rows, classes = logits.shape
    chosen = subset_weights(weights)
    counts = torch.zeros(chosen.shape[0], 2, dtype=torch.int64, device=logits.device)
    step = max(1, table // (classes * chosen.shape[0]))
    for start in range(0, rows, step):
        counts += ranks(logits[:, start : start + step], chosen, target[start : start + step])
    return counts


class ExitHead(nn.Sequential):
    """Pool, flatten, linear, as torchvision's ResNet ends."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


def head_naive(features: Sequence[Tensor], heads: Sequence[nn.Module]) -> Tensor:
    """Module by module."""
    return torch.stack([head(x) for x, head in zip(features, heads, strict=True)])


def head_mean(features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """``mean`` instead of the pooling module: a reduction that runs at the memory's pace in more layouts."""
    return torch.stack([F.linear(x.mean((2, 3)), w, b) for x, w, b in zip(features, weights, biases, strict=True)])


def gate_naive(
    features: Tensor, running: Tensor, indices: Tensor, logits: Tensor, weight: float, threshold: float
) -> tuple[Tensor, ...]:
    """Softmax, a mask, and everything indexed by it."""
    total = running + weight * logits
    p = F.softmax(total, dim=1)
    top = p.topk(2, dim=1).values
    entropy = -(p * torch.log(p + 1e-12)).sum(dim=1)
    stats = torch.stack([top[:, 0], entropy, top[:, 0] - top[:, 1]], 1)
    stay = top[:, 0] < threshold
    leave = ~stay
    return (
        features[stay],
        total[stay],
        torch.cat([indices[stay], indices[leave]]),
        torch.cat([stats[stay], stats[leave]]),
    )


def gate_eager(
    features: Tensor, running: Tensor, indices: Tensor, logits: Tensor, weight: float, threshold: float
) -> tuple[Tensor, ...]:
    """Indices computed once, rows moved by ``index_select``."""
    total = torch.add(running, logits, alpha=weight)
    log_p = torch.log_softmax(total, -1)
    p = log_p.exp()
    top = p.topk(2, -1).values
    stats = torch.stack([top[:, 0], -(p * log_p).sum(-1), top[:, 0] - top[:, 1]], -1)
    leaves = top[:, 0] >= threshold
    order = torch.argsort(leaves, stable=True)
    stay = order[: order.shape[0] - int(leaves.sum())]
    return features.index_select(0, stay), total.index_select(0, stay), indices[order], stats[order]


def with_gradient(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``loss(logits, ...)`` with its gradient in the logits."""

    def step(logits: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        value = loss(logits, *rest)
        (grad,) = torch.autograd.grad(value, logits)
        return value.detach(), grad

    return step
