"""Choosing among a partition's cut points: by number, or by name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import fx, nn

from aep_ext.surgery.partition import Partition, alive_after, describe
from aep_ext.surgery.tracing import is_plain_sequential

__all__ = ["PLACEMENTS", "choose", "cut_name", "named_cuts", "to_open_for"]

PLACEMENTS = ("cost", "stages")
DEFAULT_EXITS = 4


def choose(found: Partition, exits: int | None, placement: str) -> list[fx.Node]:
    """The boundaries or places behind which exits shall sit, the last one included.

    "cost": near the shares (e - 0.2) / E of the multiply-adds, e = 1..E-1, on places; without a number of exits four,
    or as many as there are places. "stages": all boundaries; with a number, near the shares e / E. If there are too few
    boundaries or places, the ends of all segments serve.

    Raises:
        ValueError: more exits than places.
    """
    candidates = found.places if placement == "cost" else found.boundaries
    if exits is None and len(candidates) < 2:
        what = "block or layer" if placement == "cost" else "stage boundary"
        raise ValueError(
            f"anticipate: {type(found.model).__name__} has no {what} before its head (after "
            f"{cut_name(found, candidates[-1])!r}); name places with cuts= or give a number of exits="
        )
    if exits is None:
        if placement == "stages":
            return candidates
        exits = min(DEFAULT_EXITS, len(candidates))
    if exits > len(candidates):
        candidates = [segment.end for segment in found.segments]
    if not 1 <= exits <= len(candidates):
        names = ", ".join(cut_name(found, node) for node in candidates)
        raise ValueError(f"anticipate: exits must be within 1..{len(candidates)}, got {exits} (places found: {names})")
    nodes = list(found.traced.graph.nodes)
    cumulated = dict(zip(nodes, accumulate(found.measured.macs[node] for node in nodes), strict=True))
    total = cumulated[candidates[-1]]
    chosen: list[int] = []
    for e in range(1, exits):
        first = chosen[-1] + 1 if chosen else 0
        last = len(candidates) - 1 - (exits - e)
        goal = total * (e - 0.2 if placement == "cost" else e) / exits
        chosen.append(min(range(first, last + 1), key=lambda i: abs(cumulated[candidates[i]] - goal)))
    return [candidates[i] for i in chosen] + [candidates[-1]]


def _countable(found: Partition) -> list[fx.Node]:
    """Nodes that a "+k" counts: those that make tensors."""
    return [n for n in found.traced.graph.nodes if n in found.measured.shapes and n.op not in ("get_attr", "output")]


def cut_name(found: Partition, cut: fx.Node) -> str:
    """The name under which ``cuts=`` finds this node: a module called once, and "+k" if the cut is k operations behind
    it."""
    names: dict[fx.Node, str] = {}
    for path, made in found.traced.outputs.items():
        if len(made) == 1 and path and (made[0] not in names or len(path) < len(names[made[0]])):
            names[made[0]] = path
    steps = _countable(found)
    index = steps.index(cut)
    for k in range(index + 1):
        base = names.get(steps[index - k])
        if base is not None:
            return base if k == 0 else f"{base}+{k}"
    return f"input+{index}"


def to_open_for(model: nn.Module, cuts: Sequence[str]) -> set[str]:
    """Modules that must be opened so that the named cut points can be seen.

    Raises:
        ValueError: no such module.
    """
    opened: set[str] = set()
    known = dict(model.named_modules())
    for cut in cuts:
        path = cut.split("+")[0]
        if path != "input" and path not in known:
            top = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"anticipate: cut point {cut!r}: {type(model).__name__} has no module {path!r} (at its top: {top})"
            )
        parts = path.split(".")
        for n in range(1, len(parts)):
            parent = ".".join(parts[:n])
            if not isinstance(known[parent], (nn.ModuleList, nn.ModuleDict)) and not is_plain_sequential(known[parent]):
                opened.add(parent)
    return opened


def named_cuts(found: Partition, cuts: Sequence[str]) -> list[fx.Node]:
    """The nodes behind the named cut points, and the one where the head begins.

    Raises:
        ValueError: a name that is not run, is run more than once, lies inside a branch or in the head, or comes twice.
    """
    nodes = list(found.traced.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    alive = alive_after(nodes)
    chosen: dict[fx.Node, str] = {}
    for cut in cuts:
        node = _named_node(found, cut)
        if node is found.head_start:
            continue
        here = alive[position[node]]
        if here != [node]:
            names = ", ".join(describe(n) for n in here[:4])
            raise ValueError(
                f"anticipate: cannot cut after {cut!r}: {len(here)} tensors are alive there ({names}), so it lies "
                "inside a branch; cut "
                "where one feature map carries everything"
            )
        if position[node] > position[found.head_start]:
            raise ValueError(
                f"anticipate: cannot cut after {cut!r}: it lies in the head, which begins after "
                f"{cut_name(found, found.head_start)!r}"
            )
        if node not in found.cuts:
            raise ValueError(
                f"anticipate: cannot cut after {cut!r}: its result is no feature map [N, C, H, W] that grows with the "
                "image, got shape "
                f"{list(found.measured.shapes.get(node, ()))}"
            )
        if node in chosen:
            raise ValueError(f"anticipate: cut points {chosen[node]!r} and {cut!r} are the same place")
        chosen[node] = cut
    return sorted(chosen, key=position.__getitem__) + [found.head_start]


def _named_node(found: Partition, cut: str) -> fx.Node:
    path, plus, further = cut.partition("+")
    if plus and not further.isdigit():
        raise ValueError(f"anticipate: cut point {cut!r}: what follows '+' must be a number of operations")
    steps = _countable(found)
    made = [steps[0]] if path == "input" else found.traced.outputs.get(path, [])
    if len(made) != 1:
        times = f"{len(made)} times" if made else "not"
        raise ValueError(
            f"anticipate: cut point {cut!r}: {path!r} must be run exactly once by the forward, it is run {times}"
        )
    index = (steps.index(made[0]) if made[0] in steps else -1) + int(further or 0)
    if not 0 <= index < len(steps):
        raise ValueError(f"anticipate: cut point {cut!r} is behind the end of the network")
    return steps[index]
