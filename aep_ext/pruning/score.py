"""Scoring: how often every subset of the exits is right, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aep_ext import ops
from aep_ext._utils import eval_mode, inputs_and_labels
from aep_ext.pruning.beam import BEAM, beam_search
from aep_ext.pruning.cost import Latency, SubsetCosts, measure_latency, subset_costs
from aep_ext.pruning.extract import subset_view
from aep_ext.pruning.scores import SubsetScores
from aep_ext.pruning.subsets import MAX_EXITS, exits_of_mask
from aep_ext.surgery.multi_exit import MultiExitNet

NLL_EXITS = 8
"""Up to so many exits the NLL is taken unasked: of more, it would take longer than the network."""
CostsOf = Callable[[Sequence[int]], SubsetCosts]
"""Gives the costs of some masks."""


_CHUNK = 1 << 22  # numbers held at once by what looks at every subset of every sample


def _terms(function: str, exit_logits: Tensor, weights: Tensor | Sequence[float], target: Tensor) -> Tensor:
    """The checked logits times their weights, in the dtype that ensembles are summed in."""
    if exit_logits.dim() != 3 or not 1 <= exit_logits.shape[0] <= MAX_EXITS:
        raise ValueError(
            f"{function}: exit_logits must have shape [E, N, K] with E in 1..{MAX_EXITS}, got {list(exit_logits.shape)}"
        )
    exits, samples, _ = exit_logits.shape
    acc = torch.float64 if exit_logits.dtype == torch.float64 else torch.float32
    factors = torch.as_tensor(weights).to(device=exit_logits.device, dtype=acc)
    if tuple(factors.shape) != (exits,) or tuple(target.shape) != (samples,):
        raise ValueError(
            f"{function}: weights must have shape [{exits}] and target [{samples}], "
            f"got {list(factors.shape)} and {list(target.shape)}"
        )
    return exit_logits.to(acc) * factors[:, None, None]


def _subset_sums(terms: Tensor) -> Tensor:
    """Sums of E rows over every subset, (2^E - 1, ...), row m-1 for mask m; each is added in the order of its exits."""
    sums = terms.new_empty((1 << len(terms)) - 1, *terms.shape[1:])
    for e, term in enumerate(terms):
        first = (1 << e) - 1
        sums[first] = term
        torch.add(sums[:first], term, out=sums[first + 1 : 2 * first + 1])
    return sums


def _sums_of_samples(terms: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The sums of every subset for some samples at a time: which, and (2^E - 1, n, K)."""
    exits, samples, classes = terms.shape
    step = max(1, _CHUNK // (classes << exits))
    for first in range(0, samples, step):
        some = slice(first, first + step)
        yield some, _subset_sums(terms[:, some])


def subset_correctness(exit_logits: Tensor, weights: Tensor | Sequence[float], target: Tensor) -> Tensor:
    """Whether every subset's ensemble is right at top-1 on each sample: (2^E - 1, N) bool, row m-1 for mask m.

    The rule is that of ``aep_ext.ops.subset_correct``, whose top-1 counts are the sums of these rows: the lowest
    class index wins a tie, and a row that holds a NaN is wrong.

    Args:
        exit_logits: (E, N, K), floating, E at most 16.
        weights: (E,).
        target: (N,), int64.
    """
    terms = _terms("subset_correctness", exit_logits, weights, target)
    right = torch.empty((1 << len(terms)) - 1, len(target), dtype=torch.bool, device=terms.device)
    for some, sums in _sums_of_samples(terms):
        right[:, some] = (sums.argmax(dim=2) == target[some]) & ~sums.isnan().any(dim=2)
    return right


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of each sample in float64, (..., N) from (..., N, K); NaN where a label is no class."""
    picked = target.clamp(0, logits.shape[-1] - 1).expand(logits.shape[:-1])
    found = -logits.log_softmax(-1).gather(-1, picked[..., None])[..., 0].double()
    return found.where(picked == target, torch.nan)


def subset_nll(exit_logits: Tensor, weights: Tensor | Sequence[float], target: Tensor) -> Tensor:
    """Summed negative log-likelihood of every subset's ensemble in nats: (2^E - 1,) float64, row m-1 for mask m.

    The ensemble's weights are divided by their sum inside the subset, as :func:`prune` divides them: its softmax is
    that of the pruned network.

    Args:
        exit_logits: (E, N, K), floating, E at most 16.
        weights: (E,).
        target: (N,), int64.
    """
    terms = _terms("subset_nll", exit_logits, weights, target)
    shares = _subset_sums(torch.as_tensor(weights).to(terms))[:, None, None]
    total = torch.zeros(len(shares), dtype=torch.float64, device=terms.device)
    for some, sums in _sums_of_samples(terms):
        total += _losses(sums / shares, target[some]).sum(1)
    return total


def _possible(exit_logits: Tensor, target: Tensor) -> int:
    """On how many samples some subset may be right: on the others one wrong class beats the label at every exit, and so
    in every sum with positive weights. What rounding might turn round is not counted as beaten."""
    label = exit_logits.gather(
        2, target.clamp(0, exit_logits.shape[2] - 1)[None, :, None].expand(len(exit_logits), -1, 1)
    )
    slack = 1e-4 * exit_logits.abs().amax((0, 2)).nan_to_num()[None, :, None]
    return len(target) - int((exit_logits > label + slack).all(0).any(1).sum())


def _all_ranks(value: Any) -> list[Any]:
    """The values of all ranks in their order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, value)
    return ranks


def _beam_scores(
    logits: Tensor,
    weights: Tensor,
    target: Tensor,
    beam: int,
    ids: tuple[int, ...],
    costs: CostsOf | None,
    keep_correct: bool,
    nll: bool,
    split: str | None,
) -> SubsetScores:
    """The scores of what a beam search sees; every rank with its own samples."""
    if beam < 1:
        raise ValueError(f"score_subsets: beam must be at least 1, got {beam}")
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    weights = weights.to(logits)
    one = torch.ones(1).to(weights)
    found: dict[int, Tensor] = {}

    def answer(mask: int) -> tuple[Tensor, Tensor]:
        rows = list(exits_of_mask(mask))
        return ops.ensemble(logits[rows], weights[rows]), weights[rows].sum()

    def evaluate(masks: Sequence[int]) -> list[tuple[int, ...]]:
        counts = torch.zeros(len(masks), 2, dtype=torch.int64)
        for row, mask in enumerate(masks):
            counts[row] = ops.subset_correct(answer(mask)[0][None], one, target)[0].cpu()
        found.update(zip(masks, torch.stack(_all_ranks(counts)).sum(0), strict=True))
        return [(-int(found[mask][0]), -int(found[mask][1]), mask.bit_count()) for mask in masks]

    masks = beam_search(len(ids), beam, evaluate)
    right = torch.empty(len(masks), len(target), dtype=torch.bool) if keep_correct else None
    losses = torch.zeros(len(masks), dtype=torch.float64)
    for row, mask in enumerate(masks if keep_correct or nll else ()):
        total, share = answer(mask)
        if right is not None:
            right[row] = subset_correctness(total[None], one, target)[0].cpu()
        if nll:
            losses[row] = _losses(total / share, target).sum().cpu()
    parts = _all_ranks((len(target), right, losses, _possible(logits, target)))
    n = sum(part[0] for part in parts)
    counted = None if costs is None else costs(masks)
    return SubsetScores(
        torch.stack([found[mask] for mask in masks]),
        n,
        ids,
        parameters=None if counted is None else counted.parameters,
        macs=None if counted is None else counted.macs,
        correct=torch.cat([part[1] for part in parts], dim=1) if keep_correct else None,
        nll=torch.stack([part[2] for part in parts]).sum(0) / n if nll else None,
        subsets=masks,
        beam=beam,
        upper_bound=sum(part[3] for part in parts),
        split=split,
    )


def score_logits(
    exit_logits: Tensor,
    weights: Tensor | Sequence[float],
    target: Tensor,
    *,
    costs: SubsetCosts | CostsOf | None = None,
    exit_ids: Sequence[int] | None = None,
    keep_correct: bool = False,
    nll: bool | None = None,
    beam: int | None = None,
    split: str | None = None,
) -> SubsetScores:
    """Score the subsets of the exits on cached exit logits.

    Args:
        exit_logits: (E, N, K), floating, N at least 1.
        weights: (E,) output weights; they are not renormalised inside a subset.
        target: (N,), int64.
        costs: of the subsets, from :func:`subset_costs`, or a function that gives those of some masks, as a beam search
            needs it; without them ties go to the earlier last exit.
        exit_ids: original numbers of the exits, 0..E-1 by default.
        keep_correct, nll, beam, split: as for :func:`score_subsets`.
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
    if beam is not None or exits > MAX_EXITS:
        if isinstance(costs, SubsetCosts):
            raise TypeError("score_logits: costs must be a function of masks for a beam search, got SubsetCosts")
        return _beam_scores(logits, factors, target, beam or BEAM, ids, costs, keep_correct, nll is not False, split)
    counts = ops.subset_correct(logits, factors, target)
    counted = costs(range(1, 1 << exits)) if callable(costs) else costs
    likely = exits <= NLL_EXITS if nll is None else nll
    return SubsetScores(
        counts.cpu(),
        samples,
        ids,
        parameters=None if counted is None else counted.parameters,
        macs=None if counted is None else counted.macs,
        correct=subset_correctness(logits, factors, target).cpu() if keep_correct else None,
        nll=subset_nll(logits, factors, target).cpu() / samples if likely else None,
        split=split,
    )


def _batch(batch: Any, device: torch.device, classes: int) -> tuple[Tensor, Tensor]:
    inputs, target = inputs_and_labels("score_subsets", batch)
    if target.device.type == "cpu":  # on a GPU nobody looks at labels, since looking means waiting for it
        wrong = target[(target < 0) | (target >= classes)]
        if len(wrong):
            raise IndexError(f"score_subsets: target must be within 0..{classes - 1}, got {int(wrong[0])}")
    return inputs.to(device, non_blocking=True), target.to(device=device, dtype=torch.int64, non_blocking=True)


def _latencies(
    net: MultiExitNet, example: Tensor | Sequence[int], masks: Sequence[int], options: dict[str, Any]
) -> tuple[Latency, ...]:
    # On shared modules: a copy computes the same at the same speed, and 2^E - 1 copies would only cost memory.
    return tuple(
        measure_latency(subset_view(net, exits_of_mask(mask), share=True), example, **options) for mask in masks
    )


def score_subsets(
    net: MultiExitNet | nn.parallel.DistributedDataParallel,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    latency: bool | dict[str, Any] = False,
    example: Tensor | Sequence[int] | None = None,
    keep_correct: bool = False,
    nll: bool | None = None,
    beam: int | None = None,
    split: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> SubsetScores:
    """Score every subset of the exits of ``net`` on the validation set, and count what each costs.

    One pass in eval mode and inference mode; nothing larger than a batch is held. The network's modes (and its
    device) are restored afterwards, also on an error.

    Of more than 16 exits a beam search scores the promising subsets, on logits that are held in memory (E * N * K
    numbers). The result says how many it left out, and which top-1 none of them can exceed.

    Where ``torch.distributed`` is initialised, every rank must call it, each with its own share of the samples (a
    ``DistributedSampler`` repeats some so that the shares are equal); every rank gets the scores on all of them.

    Args:
        net: the network, also inside DistributedDataParallel.
        loader: any iterable of (x, y) batches, x (N, C, H, W), y (N,) integers; further entries are ignored. Or of
            dicts with "pixel_values" or "image", and "labels" or "label".
        device: where to run; by default where the network is.
        latency: also measure every scored subset's latency at batch 1, on every rank for itself; a dict holds options
            of :func:`measure_latency`.
        example: an input, or its shape (C, H, W), for the costs; by default the first sample of the loader.
        keep_correct: also keep the top-1 answers per sample, (rows, N) bool, for ``best(confidence=...)`` and
            :func:`smallest_non_inferior`.
        nll: also the mean negative log-likelihood of every ensemble; by default up to 8 exits, and with a beam search.
        beam: the width of a beam search: how many subsets it keeps for each last exit. None: every subset is scored, up
            to 16 exits; of more, a beam search of width 16.
        split: the name of the images ("val"), for the record.
        progress: called after every batch with the number of samples seen so far.

    Raises:
        TypeError: ``net`` is no MultiExitNet, or the loader yields something else.
        ValueError: no sample, labels of another shape, or a beam below 1.
        IndexError: a label out of range (labels that the loader gives on a GPU are not looked at; such a one is never
            counted as right, or see :class:`aep_ext.ops.check_labels`).
    """
    if isinstance(net, nn.parallel.DistributedDataParallel):
        net = net.module
    if not isinstance(net, MultiExitNet):
        raise TypeError(f"score_subsets: net must be a MultiExitNet, got {type(net).__name__}")
    if beam is None and net.num_exits > MAX_EXITS:
        beam = BEAM
    if nll is None:
        nll = beam is not None or net.num_exits <= NLL_EXITS
    home = net.output_weights.device
    where = home if device is None else torch.device(device)
    weights = net.output_weights.detach().to(where)
    rows = (1 << net.num_exits) - 1 if beam is None else 0
    total = torch.zeros(rows, 2, dtype=torch.int64, device=where)
    losses = torch.zeros(rows, dtype=torch.float64, device=where)
    n, correct, held = 0, [], []
    try:
        net.to(where)
        with eval_mode(net), torch.inference_mode():
            for batch in loader:
                inputs, target = _batch(batch, where, net.num_classes)
                if example is None and len(inputs):
                    example = inputs[:1].clone()
                exit_logits = net.exit_logits(inputs)
                n += len(inputs)
                if beam is not None:
                    held.append((exit_logits, target))
                else:
                    total += ops.subset_correct(exit_logits, weights, target)
                    if nll:
                        losses += subset_nll(exit_logits, weights, target)
                    if keep_correct:
                        correct.append(subset_correctness(exit_logits, weights, target).cpu())
                if progress is not None:
                    progress(n)
        shape = tuple(example.shape[1:]) if isinstance(example, Tensor) else example
        shares = _all_ranks((n, shape))
        if example is None:  # this rank has no sample
            example = next((other for _, other in shares if other is not None), None)
        if example is None or not any(count for count, _ in shares):
            raise ValueError("score_subsets: loader must yield at least one sample, got none")
        example = example.clone() if isinstance(example, Tensor) else example
        if beam is not None:
            empty = torch.empty(net.num_exits, 0, net.num_classes, device=where)
            parts = [*held, (empty, torch.empty(0, dtype=torch.int64, device=where))]
            # Outside inference mode; a clone can be used like any other tensor.
            logits, target = torch.cat([part[0] for part in parts], 1).clone(), torch.cat([part[1] for part in parts])
            ids, counted = tuple(net.exit_ids), partial(subset_costs, net, example)
            scores = _beam_scores(logits, weights, target.clone(), beam, ids, counted, keep_correct, nll, split)
        else:
            right = torch.cat(correct, dim=1) if correct else None
            ranks = _all_ranks((total.cpu().clone(), losses.cpu().clone(), right))
            answers = [one for _, _, one in ranks if one is not None]
            costs, n = subset_costs(net, example), sum(count for count, _ in shares)
            scores = SubsetScores(
                torch.stack([one for one, _, _ in ranks]).sum(0),
                n,
                tuple(net.exit_ids),
                parameters=costs.parameters,
                macs=costs.macs,
                correct=torch.cat(answers, dim=1) if answers else None,
                nll=torch.stack([one for _, one, _ in ranks]).sum(0) / n if nll else None,
                split=split,
            )
        if latency:
            options = latency if isinstance(latency, dict) else {}
            scores = replace(scores, latency=_latencies(net, example, scores.masks, options))
    finally:
        net.to(home)
    return scores
