"""Scoring: how often every subset of the exits is right, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aep_ext import ops
from aep_ext._utils import eval_mode, inputs_and_labels
from aep_ext.pruning.cost import Latency, SubsetCosts, measure_latency, subset_costs
from aep_ext.pruning.extract import subset_view
from aep_ext.pruning.scores import SubsetScores
from aep_ext.pruning.subsets import MAX_EXITS, exits_of_mask
from aep_ext.surgery.multi_exit import MultiExitNet


def subset_correctness(exit_logits: Tensor, weights: Tensor | Sequence[float], target: Tensor) -> Tensor:
    """Whether every subset's ensemble is right at top-1 on each sample: (2^E - 1, N) bool, row m-1 for mask m.

    The rule is that of ``aep_ext.ops.subset_correct``, whose top-1 counts are the sums of these rows: the lowest
    class index wins a tie, and a row that holds a NaN is wrong.

    Args:
        exit_logits: (E, N, K), floating, E at most 16.
        weights: (E,).
        target: (N,), int64.
    """
    if exit_logits.dim() != 3 or not 1 <= exit_logits.shape[0] <= MAX_EXITS:
        raise ValueError(
            f"subset_correctness: exit_logits must have shape [E, N, K] with E in 1..{MAX_EXITS}, "
            f"got {list(exit_logits.shape)}"
        )
    exits, samples, _ = exit_logits.shape
    acc = torch.float64 if exit_logits.dtype == torch.float64 else torch.float32
    factors = torch.as_tensor(weights).to(device=exit_logits.device, dtype=acc)
    if tuple(factors.shape) != (exits,) or tuple(target.shape) != (samples,):
        raise ValueError(
            f"subset_correctness: weights must have shape [{exits}] and target [{samples}], "
            f"got {list(factors.shape)} and {list(target.shape)}"
        )
    terms = exit_logits.to(acc) * factors[:, None, None]
    right = torch.empty((1 << exits) - 1, samples, dtype=torch.bool, device=exit_logits.device)

    def visit(total: Tensor | None, mask: int, first: int) -> None:
        # Depth first, exits ascending: every sum is added in the order of a plain one, and at most E are held.
        for position in range(first, exits):
            score = terms[position] if total is None else total + terms[position]
            entered = mask | 1 << position
            right[entered - 1] = (score.argmax(dim=1) == target) & ~score.isnan().any(dim=1)
            visit(score, entered, position + 1)

    visit(None, 0, 0)
    return right


def score_logits(
    exit_logits: Tensor,
    weights: Tensor | Sequence[float],
    target: Tensor,
    *,
    costs: SubsetCosts | None = None,
    exit_ids: Sequence[int] | None = None,
    keep_correct: bool = False,
) -> SubsetScores:
    """Score every subset of the exits on cached exit logits.

    Args:
        exit_logits: (E, N, K), floating, E at most 16, N at least 1.
        weights: (E,) output weights; they are not renormalised inside a subset.
        target: (N,), int64.
        costs: of the subsets, from :func:`subset_costs`; without them ties go to the earlier last exit.
        exit_ids: original numbers of the exits, 0..E-1 by default.
        keep_correct: also keep the top-1 answers per sample.
    """
    if exit_logits.dim() != 3:
        raise ValueError(f"score_logits: exit_logits must have shape [E, N, K], got {list(exit_logits.shape)}")
    exits, samples, _ = exit_logits.shape
    if samples < 1:
        raise ValueError("score_logits: exit_logits must hold at least one sample, got none")
    ids = tuple(range(exits)) if exit_ids is None else tuple(exit_ids)
    if len(ids) != exits:
        raise ValueError(f"score_logits: exit_ids must have {exits} entries, got {len(ids)}")
    factors = torch.as_tensor(weights, device=exit_logits.device)
    logits = exit_logits.detach()
    counts = ops.subset_correct(logits, factors, target)
    return SubsetScores(
        counts.cpu(),
        samples,
        ids,
        parameters=None if costs is None else costs.parameters,
        macs=None if costs is None else costs.macs,
        correct=subset_correctness(logits, factors, target).cpu() if keep_correct else None,
    )


def _batch(batch: Any, device: torch.device, classes: int) -> tuple[Tensor, Tensor]:
    inputs, target = inputs_and_labels("score_subsets", batch)
    if target.device.type == "cpu":  # on a GPU nobody looks at labels, since looking means waiting for it
        wrong = target[(target < 0) | (target >= classes)]
        if len(wrong):
            raise IndexError(f"score_subsets: target must be within 0..{classes - 1}, got {int(wrong[0])}")
    return inputs.to(device, non_blocking=True), target.to(device=device, dtype=torch.int64, non_blocking=True)


def _latencies(net: MultiExitNet, example: Tensor | Sequence[int], options: dict[str, Any]) -> tuple[Latency, ...]:
    # On shared modules: a copy computes the same at the same speed, and 2^E - 1 copies would only cost memory.
    return tuple(
        measure_latency(subset_view(net, exits_of_mask(mask), share=True), example, **options)
        for mask in range(1, 1 << net.num_exits)
    )


def _of_all_ranks(
    total: Tensor, n: int, right: Tensor | None, example: Tensor | Sequence[int] | None
) -> tuple[Tensor, int, Tensor | None, Tensor | Sequence[int] | None]:
    """What :func:`score_subsets` has found, over all ranks in their order; an example's shape for who has none."""
    shape = tuple(example.shape[1:]) if isinstance(example, Tensor) else example
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (total, n, right, shape))
    totals, counts, rights, shapes = zip(*ranks, strict=True)
    found = [answers for answers in rights if answers is not None]
    together = torch.cat(found, dim=1) if found else None
    if example is None:
        example = next((other for other in shapes if other is not None), None)
    return torch.stack(totals).sum(0), sum(counts), together, example


def score_subsets(
    net: MultiExitNet | nn.parallel.DistributedDataParallel,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    latency: bool | dict[str, Any] = False,
    example: Tensor | Sequence[int] | None = None,
    keep_correct: bool = False,
    progress: Callable[[int], None] | None = None,
) -> SubsetScores:
    """Score every subset of the exits of ``net`` on the validation set, and count what each costs.

    One pass in eval mode and inference mode; nothing larger than a batch is held. The network's modes (and its
    device) are restored afterwards, also on an error.

    Where ``torch.distributed`` is initialised, every rank must call it, each with its own share of the samples (a
    ``DistributedSampler`` repeats some so that the shares are equal); every rank gets the scores on all of them.

    Args:
        net: a network of at most 16 exits, also inside DistributedDataParallel.
        loader: any iterable of (x, y) batches, x (N, C, H, W), y (N,) integers; further entries are ignored. Or of
            dicts with "pixel_values" or "image", and "labels" or "label".
        device: where to run; by default where the network is.
        latency: also measure every subset's latency at batch 1, on every rank for itself; a dict holds options of
            :func:`measure_latency`.
        example: an input, or its shape (C, H, W), for the costs; by default the first sample of the loader.
        keep_correct: also keep the top-1 answers per sample, (2^E - 1, N) bool, for :func:`smallest_non_inferior`.
        progress: called after every batch with the number of samples scored so far.

    Raises:
        TypeError: ``net`` is no MultiExitNet, or the loader yields something else.
        ValueError: more than 16 exits, no sample, or labels of another shape.
        IndexError: a label out of range (labels that the loader gives on a GPU are not looked at; such a one is never
            counted as right, or see :class:`aep_ext.ops.check_labels`).
    """
    if isinstance(net, nn.parallel.DistributedDataParallel):
        net = net.module
    if not isinstance(net, MultiExitNet):
        raise TypeError(f"score_subsets: net must be a MultiExitNet, got {type(net).__name__}")
    if net.num_exits > MAX_EXITS:
        raise ValueError(f"score_subsets: net must have at most {MAX_EXITS} exits, got {net.num_exits}")
    home = net.output_weights.device
    where = home if device is None else torch.device(device)
    total = torch.zeros((1 << net.num_exits) - 1, 2, dtype=torch.int64, device=where)
    n, correct = 0, []
    try:
        net.to(where)
        with eval_mode(net), torch.inference_mode():
            for batch in loader:
                inputs, target = _batch(batch, where, net.num_classes)
                if example is None and len(inputs):
                    example = inputs[:1].clone()
                exit_logits = net.exit_logits(inputs)
                total = total + ops.subset_correct(exit_logits, net.output_weights, target)
                n += len(inputs)
                if keep_correct:
                    correct.append(subset_correctness(exit_logits, net.output_weights, target).cpu())
                if progress is not None:
                    progress(n)
        total = total.cpu().clone()  # created in inference mode; a clone can be used like any other tensor
        right = torch.cat(correct, dim=1) if correct else None
        if dist.is_available() and dist.is_initialized():
            total, n, right, example = _of_all_ranks(total, n, right, example)
        if example is None or n == 0:
            raise ValueError("score_subsets: loader must yield at least one sample, got none")
        example = example.clone() if isinstance(example, Tensor) else example
        costs = subset_costs(net, example)
        timed = _latencies(net, example, latency if isinstance(latency, dict) else {}) if latency else None
    finally:
        net.to(home)
    return SubsetScores(
        total,
        n,
        tuple(net.exit_ids),
        parameters=costs.parameters,
        macs=costs.macs,
        latency=timed,
        correct=right,
    )
