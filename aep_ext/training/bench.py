"""``aep bench RUN``: latency and throughput of a run's gated network against the same network without gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aep_ext._io import write_json
from aep_ext._utils import UserError
from aep_ext.report import write_report
from aep_ext.training.bench_contestants import Contestants, contestants, load_nets
from aep_ext.training.bench_racing import Times, draw_batches, latency, race, ratio_of_sums
from aep_ext.training.config import RunConfig
from aep_ext.training.data import ImageDataModule
from aep_ext.training.dataset import ImageDataset
from aep_ext.training.evaluate import torch_device
from aep_ext.training.folder import RunFolder
from aep_ext.training.summary import _environment

FORMAT = "aep_ext.bench"
VERSION = 1
SEED = 0
LEAST_SAVING = 0.01  # of the ungated time; below, a share of what was predicted would be a share of nothing


def bench_run(
    folder: str | Path,
    *,
    batches: Sequence[int] = (1, 4, 16, 64, 256),
    backend: str = "eager",
    threads: int = 1,
    samples: int = 512,
    seconds: float = 5.0,
    write: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Times a run's gated network and the ungated ones on the same test images, heads and gates included.

    Ungated are the pruned ensemble, and the gated network's own exits without gates where these are more. All take
    turns, batch by batch, in one process; labels are not read. Times are seconds that passed (``perf_counter``), images
    lying ready on the device.

    ``ratio`` is the pruned ensemble's time for all batches over the gated network's, a batch's time being the median of
    its calls; its interval is a 95 % bootstrap over the batches. ``predicted_ratio`` is the same from the times of the
    parts, measured alone, and the exits taken, as if gates cost nothing; ``share_of_predicted_saving`` is
    (ungated - gated) / (ungated - ungated / predicted_ratio), None where less than 1 % was promised.

    Args:
        folder: the run, calibrated.
        batches: batch sizes.
        backend: "eager": the networks as they are; "openvino", "onnxruntime", "inductor" or "auto": by
            :func:`aep_ext.inference.compile`.
        threads: CPU threads of torch and of the engine.
        samples: how many test images, drawn at random (always the same ones); all if there are fewer.
        seconds: how long to measure at each batch size.
        write: takes lines of progress; None: silence.

    Returns:
        What was written to ``bench.json`` in the folder; the report was made anew from it.

    Raises:
        UserError: no run or no gated network in the folder, its data cannot be found, or an argument is out of range.
    """
    place = RunFolder(folder)
    _check(batches, threads, samples, seconds)
    if not place.config.is_file():
        raise UserError(f"{place.path} holds no run")
    if not place.results.is_file():
        raise UserError(f"{place.path} holds no results: an unfinished run goes on with --resume")
    config = place.stored().resolved()
    gated, pruned = load_nets(place.path)
    device = torch.device("cpu") if backend in ("openvino", "onnxruntime") else torch_device(config.device)
    say = write or (lambda line: None)
    gated, pruned, x = gated.to(device), pruned.to(device), _images(config, samples).to(device)
    with _threads(threads):
        say(f"{len(x)} test images, {threads} thread{'s' * (threads > 1)}, backend {backend}: comparing, then timing")
        with torch.no_grad():  # not inference mode: what is made there cannot be told from what was changed since
            ready = contestants(gated, pruned, x, backend, threads, batches)
        with torch.inference_mode():
            exits = ready.exits
            rows = [_row(ready, x, exits, n, seconds, say) for n in sorted(set(batches))]
        environment = _environment(device)
    result = {
        "format": FORMAT,
        "version": VERSION,
        "environment": environment,
        "engine": ready.engine,
        "threads": threads,
        "samples": len(x),
        "seconds": seconds,
        "pruned_exits": list(pruned.exit_ids),
        "gated_exits": list(gated.net.exit_ids),
        "policy": {"name": gated.policy.name, "on": gated.policy.on},
        "live": list(ready.live),
        "exit_counts": exits.bincount(minlength=gated.num_exits).tolist(),
        "notices": list(ready.notices),
        "rows": rows,
    }
    write_json(place.path / "bench.json", result)
    write_report(place.path)
    return result


def _check(batches: Sequence[int], threads: int, samples: int, seconds: float) -> None:
    numbers = {"batches": list(batches), "threads": [threads], "samples": [samples]}
    for name, values in numbers.items():
        if not values or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in values):
            raise UserError(f"{name} must be whole numbers of at least 1, got {values}")
    if not 0 <= seconds < math.inf:
        raise UserError(f"seconds must be finite and at least 0, got {seconds}")


def _images(config: RunConfig, samples: int) -> Tensor:
    """Test images as the network sees them, (n, C, H, W) float32: a random choice, the same at every call."""
    data = ImageDataModule(
        config.data,
        image_size=config.image_size,
        data_root=config.data_root,
        channels=3 if config.weights else None,
        num_classes=config.classes,
        train_samples=config.train_samples,
    )
    source, indices = data.roles.parts["report"]
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(SEED))[:samples]
    dataset = ImageDataset(
        source, indices[order], size=data.image_size, channels=data.channels, mean=data.mean, std=data.std
    )
    return dataset.__getitems__(list(range(len(dataset))))[0]


def _row(
    ready: Contestants, x: Tensor, exits: Tensor, n: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """One batch size."""
    chosen = draw_batches(len(x), n, SEED)
    times = race(ready.calls, [x[part.to(x.device)] for part in chosen], seconds, wait=_wait(x.device))
    met = [part for part, taken in zip(chosen, times["gated"].batches, strict=True) if taken]
    taken = exits[torch.cat(met)]
    if not ready.gates_at(n):
        taken = torch.full_like(taken, len(ready.live))
    counts = taken.bincount(minlength=len(ready.live) + 1)
    row: dict[str, Any] = {"batch": n, **{name: latency(taken, n) for name, taken in times.items()}}
    row.setdefault("subset", None)
    row["ratio"], row["ratio_interval"] = _ratio(times, "ungated")
    row["subset_ratio"], row["subset_ratio_interval"] = _ratio(times, "subset")
    row["predicted_ratio"] = ready.predicted_ratio(counts, n)
    # Where the gates stay shut at this size nothing is to be saved.
    share = share_of_predicted(row["ratio"], row["predicted_ratio"]) if ready.gates_at(n) else None
    row["share_of_predicted_saving"] = share
    positions = torch.arange(len(counts), dtype=torch.float64)
    row["mean_exit"] = float((counts * positions).sum() / counts.sum())
    row["gates"] = ready.gates_at(n)
    row["batches"], row["calls"] = len(met), sum(map(len, times["gated"].batches))
    say(_line(row))
    return row


def _ratio(times: dict[str, Times], name: str) -> tuple[float, list[float]] | tuple[None, None]:
    if name not in times:
        return None, None
    return ratio_of_sums(times[name].typical(), times["gated"].typical(), seed=SEED)


def share_of_predicted(ratio: float, predicted: float) -> float | None:
    """(1 - 1 / ratio) / (1 - 1 / predicted): which part of the promised saving came, None where none was promised.

    Args:
        ratio: measured time without gates over that with them.
        predicted: the same from the parts' times.
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


def _wait(device: torch.device) -> Callable[[], None]:
    """Returns when the device has done what it was given. (The branch for a GPU has not run on one.)"""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
