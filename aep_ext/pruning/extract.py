"""Extraction: a subset of the exits, and the backbone that they need, as a network of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from aep_ext._utils import per_exit
from aep_ext.pruning.scores import SubsetScore, SubsetScores
from aep_ext.pruning.subsets import checked_exits
from aep_ext.surgery.heads import fused_plan
from aep_ext.surgery.multi_exit import MultiExitNet


def _check_net(function: str, net: Any) -> None:
    if not isinstance(net, MultiExitNet):
        raise TypeError(f"{function}: net must be a MultiExitNet, got {type(net).__name__}")


def subset_view(net: MultiExitNet, exits: tuple[int, ...], *, share: bool) -> MultiExitNet:
    """The sub-network of ``exits`` (sorted, checked), on shared modules or on copies of the kept ones alone."""
    stages: list[nn.Module] = list(net.stages[: max(net.exit_stages[e] for e in exits) + 1])
    heads: list[nn.Module] = [net.exits[e] for e in exits]
    if not share:
        memo: dict[int, Any] = {}  # one memo, so that parameters shared between kept parts stay shared
        stages = [copy.deepcopy(stage, memo) for stage in stages]
        heads = [copy.deepcopy(head, memo) for head in heads]
    # One head that only its own forward can run sends all of them there. The kept ones stay on that path, whose bits
    # differ from the fused operator's.
    fused = net.fused and all(fused_plan(head) is not None for head in net.exits)
    modes = [(module, module.training) for part in (*stages, *heads) for module in part.modules()]
    result = MultiExitNet(
        stages,
        heads,
        exit_stages=[net.exit_stages[e] for e in exits],
        exit_ids=[net.exit_ids[e] for e in exits],
        num_classes=net.num_classes,
        origin=copy.deepcopy(net.origin),
        fused=fused,
    )
    result.classes, result.preprocessing = net.classes, net.preprocessing
    if len(exits) == net.num_exits:  # else these are no longer the exits that were chosen
        result.selection = net.selection
    result.train(net.training)
    for module, training in modes:  # a module that was frozen in eval mode stays so
        module.training = training
    for name in ("output_weights", "loss_weights"):
        kept = getattr(net, name).detach()[torch.tensor(exits, device=net.output_weights.device)]
        if not kept.is_meta:
            per_exit("prune", name, kept, len(exits), positive=True)  # someone may have written into the buffer
        setattr(result, name, kept)
    return result


def prune(
    net: MultiExitNet,
    exits: Iterable[int] | SubsetScore | SubsetScores,
    *,
    normalize: bool = True,
    objective: str = "published",
    constraints: Mapping[str, float | str] | Iterable[str] | None = None,
    reference: SubsetScore | SubsetScores | None = None,
    confidence: float | None = None,
) -> MultiExitNet:
    """Take the sub-network of some exits out of ``net``: the backbone up to the last of them, and their heads.

    The result is a new, physically smaller :class:`~aep_ext.MultiExitNet` on copies of the kept parts; ``net`` is left
    as it is. Its output weights are those of the kept exits, divided by their sum: with one exit left it answers with
    that exit's own logits, bit for bit. ``exit_ids`` keeps the original numbers, so the result can be pruned again.

    Args:
        net: the network.
        exits: indices of the exits to keep, from 0, in ``net`` as it stands; or a :class:`SubsetScore`; or a
            :class:`SubsetScores`, of which the best is kept.
        normalize: False keeps the output weights as they are. The output is then ``sum_{e in exits} b_e * O_e``, as
            published (arXiv 2301.12168), and equals the ensemble of these exits in ``net`` exactly.
        objective, constraints, reference, confidence: of a :class:`SubsetScores`, what is best: see
            :meth:`SubsetScores.best`. ``selection`` of the result, which ``aep_ext.save`` writes too, says how it was
            chosen.

    Raises:
        TypeError: ``net`` is no MultiExitNet, or ``exits`` no indices.
        ValueError: no exit, one twice, one out of range, scores of another network, output weights that are not
            positive and finite, an objective for what is chosen already, or what :meth:`SubsetScores.best` raises.
    """
    _check_net("prune", net)
    if isinstance(exits, SubsetScores):
        exits = exits.best(objective, constraints=constraints, reference=reference, confidence=confidence)
    elif objective != "published" or any(given is not None for given in (constraints, reference, confidence)):
        raise ValueError(
            "prune: objective, constraints, reference and confidence choose among SubsetScores, "
            f"got {type(exits).__name__}"
        )
    selection = None
    if isinstance(exits, SubsetScore):
        score = exits
        ids = tuple(net.exit_ids[e] for e in score.exits if e < net.num_exits)
        if score.exit_ids != ids:
            raise ValueError(
                f"prune: scores must be of this network (original exits {tuple(net.exit_ids)}), "
                f"got a choice of original exits {score.exit_ids} at indices {score.exits}"
            )
        exits, selection = score.exits, score.selection
    result = subset_view(net, checked_exits("prune", exits, net.num_exits), share=False)
    result.selection = selection or result.selection
    if normalize:
        shares = result.output_weights / result.output_weights.sum()
        if not shares.is_meta:
            per_exit("prune", "output_weights divided by their sum", shares, result.num_exits, positive=True)
        result.output_weights = shares
    return result


def single_exit(net: MultiExitNet) -> MultiExitNet:
    """The single-exit network that ``net`` was made from: the whole backbone and the last exit, both weights 1.

    A copy, as with :func:`prune`: train it on its own for the baseline.
    """
    _check_net("single_exit", net)
    result = prune(net, (net.num_exits - 1,))
    result.loss_weights = torch.ones_like(result.loss_weights)
    return result
