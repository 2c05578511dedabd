"""The pure-torch oracle of every operator: the specification, the test oracle and the fallback without the extension.

The functions take the same arguments as the public ones in :mod:`aep_ext.ops` and expect them to have been checked.
They run on any device and are differentiated by torch. Three rules hold throughout:

- sums are formed in the *accumulation dtype*: float64 for float64, float32 for float32, bfloat16 and float16;
- a weighted sum over exits is rounded product by product and added in ascending order of the exits, so that every
  implementation returns the same bits;
- nothing reads a value back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from aep_ext.ops._checks import accumulate_dtype
from aep_ext.ops.types import EnsembleStats, GateResult, JointLoss, MultiExitLoss

# Subset scores are tabulated for at most this many numbers at a time: 4 MiB of float32, which a cache still holds.
_SUBSET_TABLE = 1 << 20

# Asked at import: torch 2.11's compiler cannot trace the question.
_AUTOCASTING = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def autocast(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None
) -> tuple[list[Any], list[Any], list[Any]]:
    """Casts to the autocast dtype where autocast is on, as torch does for ``linear``; float64 stays. Biases are filled
    up with None."""
    given = (list(inputs), list(weights), [None] * len(inputs) if biases is None else list(biases))
    kind = next((x.device.type for x in inputs if isinstance(x, Tensor)), "")
    if kind not in _AUTOCASTING or not torch.is_autocast_enabled(kind):
        return given
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    return [cast(x) for x in given[0]], [cast(x) for x in given[1]], [cast(x) for x in given[2]]


def global_avg_pool(features: Tensor) -> Tensor:
    """Mean over the spatial positions: (N, C). torch sums bfloat16 and float16 in float32 too."""
    return features.mean((2, 3))


def multi_exit_linear_head(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> Tensor:
    """Global average pool and linear layer of every exit, stacked: (E, N, K)."""
    features, weights, biases = autocast(features, weights, biases)
    layers = zip(features, weights, biases, strict=True)
    return torch.stack([F.linear(x.mean((2, 3)), weight, bias) for x, weight, bias in layers])


def _weighted(exit_logits: Tensor, weights: Tensor) -> Tensor:
    """Sum over exits in the accumulation dtype: rounded products added in ascending order."""
    dtype = accumulate_dtype(exit_logits.dtype)
    total: Tensor | None = None
    for own, weight in zip(exit_logits.unbind(), weights.to(dtype).unbind(), strict=True):
        product = own.to(dtype) * weight
        total = product if total is None else total + product
    assert total is not None  # E >= 1
    return total


def ensemble(exit_logits: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the exits' logits: (N, K)."""
    return _weighted(exit_logits, weights).to(exit_logits.dtype)


def _statistics(scaled: Tensor) -> Tensor:
    """(N, 3) in the dtype of ``scaled``: confidence, entropy in nats and margin of ``softmax(scaled)``."""
    probabilities = torch.softmax(scaled, -1)
    # entr(p) = -p ln p, with entr(0) = 0 and entr(NaN) = NaN.
    entropy = torch.special.entr(probabilities).sum(-1)
    top = probabilities.topk(min(2, probabilities.shape[-1]), -1).values
    confidence = top[:, 0]
    margin = confidence - top[:, 1] if top.shape[-1] == 2 else confidence
    # topk ranks NaN first, but a softmax row is NaN as a whole or not at all.
    return torch.stack([confidence, entropy, margin], -1)


def ensemble_stats(
    exit_logits: Tensor,
    weights: Tensor,
    *,
    normalizer: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
) -> EnsembleStats:
    """Weighted sum with the statistics of its softmax."""
    logits = ensemble(exit_logits, weights)
    with torch.no_grad():
        dtype = accumulate_dtype(logits.dtype)
        scaled = logits.to(dtype)
        if not (_is_one(normalizer) and _is_one(temperature)):
            scaled = scaled / (_scalar(normalizer, logits, dtype) * _scalar(temperature, logits, dtype))
        stats = _statistics(scaled)
        return EnsembleStats(logits, stats.float(), logits.argmax(-1))


def multi_exit_loss(
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    prefix_weights: Tensor | None = None,
    output_weights: Tensor | None = None,
    *,
    distillation: float = 0.0,
    temperature: float = 3.0,
    detach_prefix: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> MultiExitLoss:
    """Cross entropies of exits and prefix ensembles, distillation, and their weighted sum. A label out of range gives
    a NaN loss and no gradient."""
    dtype, (exits, rows, classes) = accumulate_dtype(exit_logits.dtype), exit_logits.shape
    if target.is_floating_point():  # probabilities: every row counts
        used = known = torch.ones(rows, dtype=torch.bool, device=target.device)
    else:
        used, known = target != ignore_index, (target >= 0) & (target < classes)
    # Rows that give no gradient are cleared first: NaN * 0 in the softmax's backward would be NaN.
    scores = exit_logits.to(dtype).masked_fill(~(used & known)[:, None], 0.0)

    def counted(losses: Tensor) -> Tensor:
        return losses.masked_fill(used & ~known, float("nan")).masked_fill(~used, 0.0)

    def cross_entropies(scores: Tensor) -> Tensor:
        losses, total = _cross_entropies(scores, target, used, known, class_weight, label_smoothing)
        losses = counted(losses)
        if reduction != "none":
            losses = losses.sum(-1)
        return losses / total if reduction == "mean" else losses

    exit_losses = cross_entropies(scores)
    prefix_losses = distillation_losses = exit_losses.new_zeros(exit_losses.shape)
    if prefix_weights is not None or distillation > 0:
        shares = (torch.ones(exits, device=scores.device) if output_weights is None else output_weights).to(dtype)
        sums: list[Tensor] = []
        for product in scores * shares[:, None, None]:
            sums.append(product if not sums else (sums[-1].detach() if detach_prefix else sums[-1]) + product)
        prefixes = torch.stack(sums) / shares.cumsum(0)[:, None, None]
    if prefix_weights is not None:
        prefix_losses = cross_entropies(prefixes)
    if distillation > 0:
        teacher = torch.log_softmax(prefixes[-1].detach() / temperature, -1)
        # A class without any probability counts nothing, also where an exit gives it none (-inf - -inf).
        ratio = (teacher - torch.log_softmax(scores / temperature, -1)).masked_fill(teacher == -math.inf, 0.0)
        distillation_losses = counted((teacher.exp() * ratio).sum(-1))
        if reduction != "none":
            distillation_losses = distillation_losses.sum(-1)
        if reduction == "mean":
            distillation_losses = distillation_losses / used.sum()
    loss = _sum_of_products(exit_losses, exit_weights)
    if prefix_weights is not None:
        loss = loss + _sum_of_products(prefix_losses, prefix_weights)
    if distillation > 0:
        loss = loss + distillation * temperature**2 * distillation_losses.sum(0)
    return MultiExitLoss(loss, exit_losses, prefix_losses, distillation_losses)


def _cross_entropies(
    scores: Tensor,
    target: Tensor,
    used: Tensor,
    known: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Those of ``scores`` (E, N, K), as (E, N), and the 0-d divisor of their mean, NaN where that has none."""
    dtype, classes = scores.dtype, scores.shape[-1]
    log_p = torch.log_softmax(scores, -1)
    if target.is_floating_point():
        wanted = (1 - label_smoothing) * target.to(dtype) + label_smoothing / classes
        wanted = wanted if class_weight is None else wanted * class_weight.to(dtype)
        total = used.sum().to(dtype)
        return -(wanted * log_p).sum(-1), total.masked_fill(total == 0, float("nan"))
    label = torch.where(known, target, 0)
    own_weight = torch.ones_like(label, dtype=dtype) if class_weight is None else class_weight.to(dtype)[label]
    losses = -log_p.gather(-1, label.expand(log_p.shape[:-1]).unsqueeze(-1)).squeeze(-1) * own_weight
    if label_smoothing > 0:
        smooth = -(log_p if class_weight is None else log_p * class_weight.to(dtype)).sum(-1)
        losses = (1 - label_smoothing) * losses + (label_smoothing / classes) * smooth
    # As F.cross_entropy: NaN without any weight, even where smoothing leaves a loss.
    total = own_weight.masked_fill(~used, 0.0).sum()
    return losses, total.masked_fill(total == 0, float("nan"))


def _sum_of_products(losses: Tensor, weights: Tensor) -> Tensor:
    """Rounded products, added in ascending order of the exits."""
    total: Tensor | None = None
    for own, weight in zip(losses.unbind(), weights.to(losses.dtype).unbind(), strict=True):
        total = own * weight if total is None else total + own * weight
    assert total is not None  # E >= 1
    return total


def joint_cross_entropy(
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> JointLoss:
    """:func:`multi_exit_loss` without prefixes and distillation."""
    result = multi_exit_loss(
        exit_logits,
        target,
        exit_weights,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return JointLoss(result.loss, result.exit_losses)


def linear_joint_cross_entropy(
    pooled: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> JointLoss:
    """The joint loss of linear exits. The specification: it forms all logits at once."""
    layers = zip(*autocast(pooled, weights, biases), strict=True)
    logits = torch.stack([F.linear(x, weight, bias) for x, weight, bias in layers])
    result = joint_cross_entropy(logits, target, exit_weights, class_weight, label_smoothing, ignore_index, reduction)
    return JointLoss(result.loss, result.exit_losses.detach())


def subset_correct(exit_logits: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Top-1 and top-5 counts of every subset: (2^E - 1, 2) int64. A label out of range is never correct."""
    with torch.no_grad():
        exits, rows, classes = exit_logits.shape
        dtype = accumulate_dtype(exit_logits.dtype)
        products = exit_logits.to(dtype) * weights.to(dtype)[:, None, None]
        low = max(0, min(exits, (_SUBSET_TABLE // max(1, classes)).bit_length() - 1))  # exits in one table
        step = max(1, _SUBSET_TABLE // (classes << low))
        counts = torch.zeros(1 << exits, 2, dtype=torch.int64, device=exit_logits.device)
        for start in range(0, rows, step):
            part, label = products[:, start : start + step], target[start : start + step]
            table = torch.zeros_like(part[:1])  # row m: the sum over the subset m of the first `low` exits
            for e in range(low):
                table = torch.cat([table, table + part[e]])
            for high in range(1 << (exits - low)):
                scores = table
                for e in range(low, exits):
                    if high >> (e - low) & 1:
                        scores = scores + part[e]
                counts[high << low : (high + 1) << low] += _correct(scores, label)
        return counts[1:]


def _correct(scores: Tensor, target: Tensor) -> Tensor:
    """(M, 2): rows of ``scores`` (M, n, K) whose label has rank 0, and rank below min(5, K)."""
    classes = scores.shape[-1]
    label = target.clamp(0, classes - 1)[:, None]
    own = scores.gather(-1, label.expand(scores.shape[0], -1, 1))
    lower = torch.arange(classes, device=scores.device) < label
    ahead = (scores == own).logical_and_(lower).logical_or_(scores > own)
    rank = torch.count_nonzero(ahead, -1)
    # amax propagates NaN, in one pass less than isnan().any().
    wrong = scores.amax(-1).isnan() | (target < 0) | (target >= classes)
    rank = rank.masked_fill(wrong, classes)
    return torch.stack([(rank < 1).sum(-1), (rank < min(5, classes)).sum(-1)], -1)


def _is_one(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 1


def _scalar(value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A 0-d tensor of ``dtype`` beside ``like``."""
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=like.device)


def gate(
    features: Tensor,
    running: Tensor,
    weight_sum: float | Tensor,
    indices: Tensor,
    state: Tensor,
    exit_logits: Tensor,
    *,
    weight: float | Tensor,
    threshold: float | Tensor,
    temperature: float | Tensor = 1.0,
    criterion: str = "confidence",
    criterion_on: str = "ensemble",
    enabled: bool = True,
    last: bool = False,
) -> GateResult:
    """Adds one exit to the running ensemble, decides which rows leave, and puts those that stay in front."""
    with torch.no_grad():
        dtype = accumulate_dtype(exit_logits.dtype)
        weight, weight_sum = _scalar(weight, running, dtype), _scalar(weight_sum, running, dtype)
        threshold, temperature = _scalar(threshold, running, dtype), _scalar(temperature, running, dtype)
        own = exit_logits.to(dtype)
        running = (running.to(dtype) + own * weight).to(running.dtype)
        weight_sum = weight_sum + weight
        answer = running.argmax(-1)
        if criterion_on == "ensemble":
            scaled, top_class = running.to(dtype) / (weight_sum * temperature), answer
        else:
            scaled, top_class = own / temperature, own.argmax(-1)
        stats = _statistics(scaled).float()
        leaves, state = _decide(criterion, stats, top_class, state, threshold)
        if last or not enabled:
            leaves = torch.full_like(leaves, last)
        answers = (running.to(dtype) / weight_sum).to(running.dtype)  # R_e
        running = torch.where(leaves[:, None], answers, running)
        order = torch.argsort(leaves.to(torch.uint8), stable=True)
        count = (~leaves).sum()
        # A row of zeros is what stands behind: read like the others, it costs half of clearing rows by a mask.
        rows = order.shape[0]
        place = torch.where(torch.arange(rows, device=order.device) < count, order, rows)
        padded = torch.cat([features, features.new_zeros(1, *features.shape[1:])])
        # Channels_last stays so, which indexing alone would not give.
        compacted = padded.index_select(0, place).contiguous(memory_format=suggest_memory_format(features))
        return GateResult(
            compacted, running[order], indices[order], state[order], stats[order], answer[order], weight_sum, count
        )


def gate_one_(
    running: Tensor,
    stats: Tensor,
    leaves: Tensor,
    exit_logits: Tensor,
    weight_sum: float,
    weight: float,
    threshold: float,
    temperature: float,
    criterion: str,
    criterion_on: str,
    enabled: bool,
    last: bool,
) -> None:
    """One row of :func:`gate`, in place."""
    row = exit_logits.new_zeros(1, dtype=torch.int64)
    result = gate(
        exit_logits.narrow(1, 0, 0),
        running,
        weight_sum,
        row,
        row[:, None].narrow(1, 0, 0),
        exit_logits,
        weight=weight,
        threshold=threshold,
        temperature=temperature,
        criterion=criterion,
        criterion_on=criterion_on,
        enabled=enabled,
        last=last,
    )
    with torch.no_grad():
        running.copy_(result.running)
        stats.copy_(result.stats)
        leaves.copy_(result.count == 0)


def _decide(
    criterion: str, stats: Tensor, top_class: Tensor, state: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """Which rows reach ``threshold`` (n,) bool, and the new state. A row without a distribution (NaN) never does.

    Statistics are compared in float32, the precision in which they are returned; counts in float64.
    """
    confidence, entropy, margin = stats.unbind(-1)
    valid = ~confidence.isnan()
    if criterion == "confidence":
        return confidence >= threshold.float(), state
    if criterion == "entropy":
        return entropy <= threshold.float(), state
    if criterion == "margin":
        return margin >= threshold.float(), state
    if criterion == "patience":
        last, length = state.unbind(-1)
        length = torch.where(top_class == last, length + 1, 1).masked_fill(~valid, 0)
        last = top_class.masked_fill(~valid, -1)
        return valid & (length.double() >= threshold.double()), torch.stack([last, length], -1)
    votes = state.scatter_add(-1, top_class[:, None], valid.to(torch.int64)[:, None])
    return valid & (votes.amax(-1).double() >= threshold.double()), votes
