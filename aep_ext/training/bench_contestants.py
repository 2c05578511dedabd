"""Who is timed: a run's gated network, its subset without gates, and the pruned ensemble; on an engine if asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aep_ext import deploy
from aep_ext._io import read_json
from aep_ext._utils import UserError
from aep_ext.inference.backends import BACKENDS
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.termination import GatedNet, StageCosts

GATED = "gated"
_REPEATS = 30  # of each part at one row: what is predicted at batch 1 hangs on microseconds
_TOLERANCE = 1e-4  # of a threshold: so near, the shape of a batch (and an engine's own units for it) may decide


def load_nets(folder: Path) -> tuple[GatedNet, MultiExitNet]:
    """A run's gated network, and the pruned ensemble of the same training.

    Raises:
        UserError: one of them is not there, or they are not of one training.
    """
    gates = read_json(folder / "gates.json") if (folder / "gates.json").is_file() else {}
    if not (folder / GATED / deploy.save_load.DESCRIPTION).is_file():
        if gates:
            raise UserError(f"{folder} has no gated network: aep calibrate found no gate that saves within its budget")
        raise UserError(f"{folder} has no gated network: run aep calibrate {folder} first")
    gated = deploy.load(folder / GATED)
    if not isinstance(gated, GatedNet):
        raise UserError(f"{folder / GATED} holds a network without gates: run aep calibrate {folder} again")
    delivered = gates.get("delivered") or {}
    unit = folder / f"seed-{delivered.get('seed')}" / str(delivered.get("exit_weights")) / "pruned"
    place = unit if unit.is_dir() else folder
    try:
        pruned = deploy.load(place)
    except FileNotFoundError as error:
        raise UserError(f"{place} holds no pruned network ({error}): go on with --resume") from error
    if not isinstance(pruned, MultiExitNet) or not _same_backbone(gated.net, pruned):
        raise UserError(f"{folder / GATED} and {place} hold networks of different trainings: run aep calibrate again")
    return gated, pruned


def _same_backbone(a: MultiExitNet, b: MultiExitNet) -> bool:
    """Whether the stages that both have are the same."""
    ours, theirs = a.stages.state_dict(), b.stages.state_dict()
    common = ours.keys() & theirs.keys()
    return bool(common) and all(torch.equal(ours[name], theirs[name]) for name in common)


@dataclass
class Contestants:
    """What is timed, and what is predicted of it.

    Attributes:
        engine: that runs them.
        calls: by name ``ungated`` (the pruned ensemble with its heads), ``subset`` (the gated network's exits without
            gates; left out where they are the pruned ensemble's) and ``gated``: images (n, C, H, W) -> anything.
        exits: (n,) int64, the exit that each image takes where gates are open.
        gates_at: whether they are, at a batch size, as the measured costs have it.
        live: where samples can leave then: E - 1 flags.
        one, many: stage times of the gated subset, for batch 1 and for larger ones.
        pruned_one, pruned_many: of the pruned ensemble.
        notices: of the engine.
    """

    engine: str
    calls: dict[str, Callable[[Tensor], object]]
    exits: Tensor
    gates_at: Callable[[int], bool]
    live: tuple[bool, ...]
    one: StageCosts
    many: StageCosts
    pruned_one: StageCosts
    pruned_many: StageCosts
    notices: tuple[str, ...] = ()

    def predicted_ratio(self, counts: Tensor, rows: int) -> float:
        """What the stage times promise: the pruned ensemble's time over the gated network's without its gates' own.

        Both from parts measured alone; for rows > 1 every exit sees the mean number of rows that get there.

        Args:
            counts: (E,) how many samples leave at each exit.
            rows: the batch size.
        """
        own, pruned = (self.one, self.pruned_one) if rows == 1 else (self.many, self.pruned_many)
        return pruned.ungated(rows) / rows / own.predicted(counts, rows)


def contestants(
    gated: GatedNet, pruned: MultiExitNet, x: Tensor, backend: str, threads: int, batches: Sequence[int]
) -> Contestants:
    """Gets the networks ready on ``backend``, measures their parts and compares their answers.

    Args:
        gated, pruned: on one device, in eval mode.
        x: images (n, C, H, W) on that device.
        backend: "eager" (the networks as they are), or one of ``deploy.prepare``.
        threads: of an engine.
        batches: batch sizes; an engine gets units for each.

    Raises:
        UserError: no such backend, or it cannot run here.
        RuntimeError: the gated network does not answer as the simulator says.
    """
    gated.mode = "auto"
    same = tuple(pruned.exit_ids) == tuple(gated.net.exit_ids)
    numbers = (gated.policy, gated.thresholds, gated.temperatures, gated.enabled)
    if backend == "eager":
        engine, notices, small, large, judge = "eager", (), pruned, gated.net, gated
    else:
        large = _prepared(gated.net, x[: max(batches)], backend, threads, batches)
        small = large if same else _prepared(pruned, x[: max(batches)], large.backend, threads, batches)
        engine, notices = large.backend, large.notices
        judge = GatedNet(large, *numbers, mode="auto").eval()
    exits = _compare(judge, large, x)
    one, many = _stage_times(judge, x, batches)
    without = GatedNet(small, "confidence", 2.0).eval()  # for its parts' times alone
    pruned_one, pruned_many = (one, many) if same else _stage_times(without, x, batches)
    calls: dict[str, Callable[[Tensor], object]] = {"ungated": small, "subset": large, "gated": judge}
    if same:
        del calls["subset"]
    return Contestants(
        engine, calls, exits, judge.gates_at, judge.live, one, many, pruned_one, pruned_many, tuple(notices)
    )


def _prepared(net: MultiExitNet, x: Tensor, backend: str, threads: int, batches: Sequence[int]) -> deploy.PreparedNet:
    if backend not in ("auto", *BACKENDS):
        raise UserError(f"no such backend: {backend!r} (auto, {', '.join(BACKENDS)})")
    try:
        return deploy.prepare(net, x, backend, threads=threads, batches=batches)
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"backend {backend} cannot be had: {' '.join(str(error).split())}") from error


def _stage_times(net: GatedNet, x: Tensor, batches: Sequence[int]) -> tuple[StageCosts, StageCosts]:
    """At one row, often enough to predict by, and up to the largest batch."""
    n = max(batches)
    x = x[torch.arange(n, device=x.device) % len(x)]
    return net.measure(x[:1], repeats=_REPEATS), net.measure(x)


def _compare(judge: GatedNet, subset: Any, x: Tensor) -> Tensor:
    """The gated network's exits and logits against the simulator's, on the subset's exit logits; gives the exits."""
    logits = subset.exit_logits(x)
    expected, found = judge.simulate(logits), judge(x)
    same = expected.exits == found.exit
    near = judge.near_threshold(logits, _TOLERANCE)
    if bool((~same & ~near).any()):
        raise RuntimeError(
            "aep bench: the gated network must take the simulator's exits except near a threshold, got "
            f"{int((~same & ~near).sum())} of {len(x)} others"
        )
    torch.testing.assert_close(
        found.logits[same], expected.logits[same], rtol=1e-3, atol=1e-3, msg=lambda text: f"aep bench: logits: {text}"
    )
    return found.exit.cpu()
