"""``aep bench RUN``: latency and throughput of a run's gated network against the networks without gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from aep_ext._io import read_json, write_json
from aep_ext._progress import Progress
from aep_ext._utils import UserError, using_threads
from aep_ext.inference import CompiledNet, ExitPolicy, GatedNet, StageProfile, compile
from aep_ext.inference.backends import BACKENDS
from aep_ext.report import write_report
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.training.data import ImageDataModule
from aep_ext.training.evaluate import torch_device
from aep_ext.training.folder import RunFolder
from aep_ext.training.summary import environment
from aep_ext.training.timing import (
    Times,
    device_wait,
    draw_batches,
    latency,
    ratio_of_sums,
    time_in_turn,
)

LEAST_SAVING = 0.01  # of the ungated time; below, a share of what was predicted would be a share of nothing
_REPEATS = 30  # of each part at one row: what is predicted at batch 1 hangs on microseconds
_TOLERANCE = 1e-4  # of a threshold: so near, the shape of a batch (and an engine's own stages for it) may decide


def bench_run(
    folder: str | Path,
    *,
    batches: Sequence[int] = (1, 4, 16, 64, 256),
    backend: str = "eager",
    threads: int = 1,
    samples: int = 512,
    seconds: float = 5.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times a run's gated network and the ungated ones on the same test images, heads and gates included.

    Ungated are the pruned network, and the gated network's own exits without gates where these are others. All take
    turns, batch by batch, in one process; labels are not read. Times are seconds that passed (``perf_counter``), images
    lying ready on the device.

    ``ratio`` is the pruned network's time for all batches over the gated network's, a batch's time being the median of
    its calls; its interval is a 95 % bootstrap over the batches. ``predicted_ratio`` is the same from the times of the
    stages, measured alone, and the exits taken, as if gates cost nothing; ``share_of_predicted_saving`` is
    (ungated - gated) / (ungated - ungated / predicted_ratio), None where less than 1 % was promised.

    Args:
        folder: the run; it delivers a gated network.
        batches: batch sizes.
        backend: "eager": the networks as they are; "openvino", "onnxruntime", "inductor" or "auto": by
            :func:`aep_ext.inference.compile`.
        threads: CPU threads of torch and of the engine.
        samples: how many test images, drawn at random (always the same ones); all if there are fewer.
        seconds: how long to measure at each batch size.
        progress: takes lines.

    Returns:
        What was written as ``bench`` into ``results.json``; the report was made anew from it.

    Raises:
        UserError: no run or no gated network in the folder, its data cannot be found, or an argument is out of range.
        RuntimeError: the gated network does not answer as the simulator says.
    """
    for name, values in (("batches", list(batches)), ("threads", [threads]), ("samples", [samples])):
        if not values or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in values):
            raise UserError(f"{name} must be whole numbers of at least 1, got {values}")
    if not 0 <= seconds < math.inf:
        raise UserError(f"seconds must be finite and at least 0, got {seconds}")
    place, say = RunFolder(folder), (progress or Progress()).line
    gated, pruned = _networks(place)
    config = place.stored().resolved()
    device = torch.device("cpu") if backend in ("openvino", "onnxruntime") else torch_device(config.device)
    data = ImageDataModule.of_config(config)
    order = torch.randperm(len(data.dataset("test")), generator=torch.Generator().manual_seed(0))[:samples]
    x = data.dataset("test").__getitems__(order.tolist())[0].to(device)
    with using_threads(threads):
        say(f"{len(x)} test images, {threads} thread{'s' * (threads > 1)}, backend {backend}: comparing, then timing")
        with torch.no_grad():  # not inference mode: what is made there cannot be told from what was changed since
            timed = _Timed(gated.to(device), pruned.to(device), x, backend, threads, batches)
        with torch.inference_mode():
            rows = [timed.row(n, seconds, say) for n in sorted(set(batches))]
        where = environment(device)
    result = {
        "environment": where,
        "backend": timed.backend,
        "threads": threads,
        "samples": len(x),
        "seconds": seconds,
        "pruned_exits": list(pruned.exit_ids),
        "gated_exits": list(gated.policy.exits),
        "criterion": gated.policy.criterion,
        "criterion_on": gated.policy.criterion_on,
        "exit_counts": timed.exits.bincount(minlength=gated.num_exits).tolist(),
        "notices": timed.notices,
        "rows": rows,
    }
    with place.locked():
        write_json(place.results, {**read_json(place.results), "bench": result})
        write_report(place.path)
    return result


def _networks(place: RunFolder) -> tuple[GatedNet, MultiExitNet]:
    """A run's gated network, and the pruned one of the same training.

    Raises:
        UserError: there is no gated network.
    """
    results = place.finished()
    place.check_delivered(results)
    if results["delivered"]["kind"] != "gated":
        raise UserError(
            f"{place.path} delivers a network without gates: aep calibrate {place.path} with a larger --budget may "
            "find some"
        )
    return cast(GatedNet, place.network("")), cast(MultiExitNet, place.network("pruned"))


class _Timed:
    """The networks that take turns, compared with the simulator and their stages timed.

    Args:
        gated, pruned: in eval mode, on the device of ``x``.
        x: images (n, C, H, W).
        backend, threads, batches: see :func:`bench_run`.

    Attributes:
        backend: that runs them.
        calls: by name ``ungated``, ``subset`` (left out where its exits are the pruned network's) and ``gated``.
        exits: (n,) int64, the exit that each image takes where gates are open.
        notices: of the backend.
    """

    def __init__(
        self, gated: GatedNet, pruned: MultiExitNet, x: Tensor, backend: str, threads: int, batches: Sequence[int]
    ) -> None:
        same = list(pruned.exit_ids) == list(gated.policy.exits)
        ungated: MultiExitNet | CompiledNet = pruned
        self.x, self.backend, self.notices = x, backend, []
        if backend != "eager":
            options = {"threads": threads, "batches": batches}
            gated = _compiled(gated, x[: max(batches)], backend, options)
            engine = cast(CompiledNet, gated.net)
            self.backend, self.notices = engine.backend, list(engine.notices)
            ungated = engine if same else _compiled(pruned, x[: max(batches)], self.backend, options)
        self.gated, self.exits = gated, _compare(gated, x)
        weights = tuple(ungated.output_weights.tolist())  # of a network for the times of its stages alone
        shut = GatedNet(ungated, ExitPolicy(output_weights=weights, enabled=(False,) * (len(weights) - 1)))
        profiles = [_profiles(net, x, batches) for net in ((gated,) if same else (gated, shut))]
        self.profile, self.pruned_profile = profiles[0], profiles[-1]
        self.calls: dict[str, Callable[[Tensor], object]] = {"ungated": ungated, "subset": gated.net, "gated": gated}
        if same:
            del self.calls["subset"]

    def row(self, n: int, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
        """One batch size."""
        chosen = draw_batches(len(self.x), n)
        wait = device_wait(self.x.device)
        times = time_in_turn(self.calls, [self.x[part.to(self.x.device)] for part in chosen], seconds, wait=wait)
        met = [part for part, taken in zip(chosen, times["gated"].batches, strict=True) if taken]
        open_ = self.gated.gates_at(n)
        last = self.gated.num_exits - 1
        taken = self.exits[torch.cat(met)] if open_ else torch.full((n * len(met),), last)
        counts = taken.bincount(minlength=last + 1)
        own, pruned = (profiles[n > 1] for profiles in (self.profile, self.pruned_profile))
        row: dict[str, Any] = {"batch": n, "subset": None, **{name: latency(t, n) for name, t in times.items()}}
        row["ratio"], row["ratio_interval"] = _ratio(times, "ungated")
        row["subset_ratio"], row["subset_ratio_interval"] = _ratio(times, "subset")
        row["predicted_ratio"] = pruned.ungated(n) / n / own.predicted(counts, n)
        # Where the gates stay shut at this size nothing is to be saved.
        row["share_of_predicted_saving"] = share_of_predicted(row["ratio"], row["predicted_ratio"]) if open_ else None
        row["mean_exit"] = float(taken.double().mean())
        row["gates"], row["batches"], row["calls"] = open_, len(met), sum(map(len, times["gated"].batches))
        say(_line(row))
        return row


def _compiled(net: MultiExitNet | GatedNet, example: Tensor, backend: str, options: dict[str, Any]) -> Any:
    if backend not in ("auto", *BACKENDS):
        raise UserError(f"no such backend: {backend!r} (auto, {', '.join(BACKENDS)})")
    try:
        return compile(net, example, backend, **options)
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"backend {backend} cannot be had: {' '.join(str(error).split())}") from error


def _profiles(net: GatedNet, x: Tensor, batches: Sequence[int]) -> tuple[StageProfile, StageProfile]:
    """At one row, often enough to predict by, and up to the largest batch."""
    n = max(batches)
    x = x[torch.arange(n, device=x.device) % len(x)]
    return net.measure(x[:1], repeats=_REPEATS), net.measure(x)


def _compare(gated: GatedNet, x: Tensor) -> Tensor:
    """The gated network's exits and logits against the simulator's, on its exit logits; gives the exits."""
    logits = gated.net.exit_logits(x)
    expected, found = gated.simulate(logits), gated(x)
    same = expected.exit == found.exit
    near = gated.near_threshold(logits, _TOLERANCE)
    if bool((~same & ~near).any()):
        raise RuntimeError(
            "aep bench: the gated network must take the simulator's exits except near a threshold, got "
            f"{int((~same & ~near).sum())} of {len(x)} others"
        )
    torch.testing.assert_close(
        found.logits[same], expected.logits[same], rtol=1e-3, atol=1e-3, msg=lambda text: f"aep bench: logits: {text}"
    )
    return found.exit.cpu()


def _ratio(times: dict[str, Times], slow: str) -> tuple[float | None, list[float] | None]:
    """How many times as long ``slow`` takes as the gated network, with its interval."""
    if slow not in times:
        return None, None
    return ratio_of_sums(times[slow].typical(), times["gated"].typical())


def share_of_predicted(ratio: float, predicted: float) -> float | None:
    """What part of the predicted saving is there: 1 where all of it, below 0 where gates cost more than they save;
    None where less than :data:`LEAST_SAVING` of the time was to be saved.

    Args:
        ratio: the time without gates over that with them.
        predicted: the same from the stages' times.
    """
    promised = 1 - 1 / predicted
    return (1 - 1 / ratio) / promised if promised >= LEAST_SAVING else None


def _line(row: dict[str, Any]) -> str:
    low, high = row["ratio_interval"]
    share = row["share_of_predicted_saving"]
    told = "" if share is None else f", {100 * share:.0f} % of the predicted saving"
    return (
        f"batch {row['batch']}: p50 {row['ungated']['p50_ms']:.3f} ms ungated, {row['gated']['p50_ms']:.3f} ms gated; "
        f"{row['ungated']['images_per_s']:.0f} and {row['gated']['images_per_s']:.0f} images/s; "
        f"ratio {row['ratio']:.2f} [{low:.2f}, {high:.2f}]{told}"
    )
