"""aep_ext's gates and earlyon's on one trained network: accuracy, mean cost, latency and throughput side by side.

    python -m benchmarks.peers.earlyon --run RUN --output benchmarks/results/cifar10-earlyon.json

RUN is a finished folder of ``aep run``. Both get the network's exits, the same validation images to fit temperatures
on (a fifth) and to search thresholds on (the rest), and the same loss of accuracy in points, each against its own
answer without gates: aep_ext against the ensemble of all exits, earlyon, which has no ensemble, against the last exit.
Both are judged on the same test images, their multiply-adds counted by aep_ext. Times are taken in turn on the same
images, of the network of the seed that ``aep calibrate`` delivers, or, where RUN was not calibrated, of the first one.
Beside both stand, where it was, the figures of ``aep calibrate``, which chooses the exits too and holds its loss
against the pruned ensemble (``aep_calibrate``), and the times of what it delivers (``aep_calibrate`` too).

The data is where RUN's configuration says, or where ``--data`` or the environment variable AEP_PEER_DATA say
(``cifar10-jpeg:FILE``). earlyon is on the registry: ``pip install earlyon``; it needs torchvision.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aep_ext import MultiExitNet, deploy
from aep_ext._io import read_json, write_json
from aep_ext.pruning import prune
from aep_ext.termination import AccuracyBudget, ExitCache, GatedNet, calibrate, exit_costs, fit_temperatures
from aep_ext.training import ImageDataModule
from aep_ext.training.bench_racing import Times, draw_batches, latency, race, ratio_of_sums
from aep_ext.training.folder import RunFolder
from aep_ext.training.splits import split_sha256
from aep_ext.training.summary import _environment, spread
from benchmarks.peers import earlyon_net as peer

FORMAT, VERSION = "aep_ext.peer", 1
SHARE = 0.2  # of the validation images for temperatures
SEED = 0
MEASURED_ROWS = 64


@dataclass(frozen=True)
class Images:
    """The images of both: (n, C, H, W) float32 as the network sees them, and labels (n,) int64."""

    temperatures: tuple[Tensor, Tensor]
    thresholds: tuple[Tensor, Tensor]
    report: tuple[Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.report[0].shape[1:])  # type: ignore[return-value]


def split_images(select: tuple[Tensor, Tensor], report: tuple[Tensor, Tensor]) -> tuple[Images, dict[str, Any]]:
    """Cuts the validation images into the two calibration roles; and what a result file says of all three."""
    order = torch.randperm(len(select[0]), generator=torch.Generator().manual_seed(SEED))
    cut = round(SHARE * len(order))
    first, second = (tuple(part[rows] for part in select) for rows in (order[:cut], order[cut:]))
    told = {
        "temperatures": {"samples": cut, "sha256": split_sha256(order[:cut])},
        "thresholds": {"samples": len(order) - cut, "sha256": split_sha256(order[cut:])},
        "report": {"samples": len(report[0])},
    }
    return Images(first, second, report), told  # type: ignore[arg-type]


def gated_by_us(net: MultiExitNet, images: Images, drop: float) -> tuple[GatedNet, dict[str, Any]]:
    """aep_ext's gates by the same images and budget, and how they do on the images to report on."""
    caches = {
        role: ExitCache.collect(net, peer.loader(*part), role=role)
        for role, part in (("temperatures", images.temperatures), ("thresholds", images.thresholds))
    }
    costs = exit_costs(net, images.shape)
    fits = fit_temperatures(caches["temperatures"])
    found = calibrate(
        caches["thresholds"],
        costs=costs,
        budget=AccuracyBudget(drop),
        temperatures=[fit.temperature for fit in fits],
        seed=SEED,
    )
    gated = GatedNet.from_calibration(net, found).eval()
    test = ExitCache.collect(net, peer.loader(*images.report), role="report")
    result = gated.simulate(test.logits, target=test.target, costs=costs)
    ungated = (test.running[-1].argmax(-1) == test.target).double().mean()
    return gated, {
        "top1": result.accuracy,
        "ungated_top1": float(ungated),
        "mean_macs": result.mean_cost,
        "ungated_macs": costs[-1],
        "exit_shares": (result.counts / len(test)).tolist(),
        "thresholds": torch.as_tensor(found.thresholds).tolist(),
        "enabled": torch.as_tensor(found.enabled).tolist(),
        "temperatures": torch.as_tensor(found.temperatures).tolist(),
    }


def gated_by_earlyon(net: MultiExitNet, images: Images, drop: float) -> tuple[Any, dict[str, Any]]:
    """earlyon's wrapper, calibrated by its own functions, and how it does on the images to report on."""
    wrapper = peer.wrap(net, images.shape)
    gap = peer.check_logits(net, wrapper, images.thresholds[0][:MEASURED_ROWS])
    peer.calibrate(wrapper, peer.loader(*images.temperatures), peer.loader(*images.thresholds), drop)
    judged = asdict(peer.judge(net, wrapper, peer.loader(*images.report), images.shape))
    config = wrapper.config
    return wrapper, {
        "top1": judged["top1"],
        "ungated_top1": judged["final_top1"],
        "mean_macs": judged["mean_macs"],
        "ungated_macs": judged["final_macs"],
        "exit_shares": judged["exit_shares"],
        "thresholds": list(config.confidence_thresholds),
        "enabled": list(config.enabled_exits),
        "temperatures": [config.temperatures[name] for name in config.head_names],
        "largest_logit_difference_to_fused_heads": gap,
    }


def delivered(folder: RunFolder, method: str) -> dict[int, dict[str, Any]]:
    """What ``aep calibrate`` wrote of each seed, which also chooses the exits: their numbers, accuracy and mean cost.

    Its budget is against the pruned ensemble, by validation images split and cross-validated in its own way.
    """
    path = folder.path / "gates.json"
    if not path.is_file():
        return {}
    return {
        part["seed"]: {
            "exits": part["exits"],
            "top1": part["report"]["gated"]["top1"],
            "ungated_top1": part["report"]["pruned"]["top1"],
            "mean_macs": part["report"]["gated"]["mean_macs"],
            "ungated_macs": part["report"]["pruned"]["macs"],
        }
        for part in read_json(path)["methods"][method]["seeds"]
    }


def delivered_seed(folder: RunFolder, method: str) -> int | None:
    """The seed of the gated network that ``aep calibrate`` delivered, if it is of this method."""
    path = folder.path / "gates.json"
    named = read_json(path).get("delivered") if path.is_file() else None
    return named["seed"] if named and named["exit_weights"] == method else None


def load_delivered(folder: RunFolder) -> GatedNet:
    """That network."""
    net = deploy.load(folder.path / read_json(folder.path / "gates.json")["delivered"]["folder"])
    assert isinstance(net, GatedNet)
    return net


class LastExit(torch.nn.Module):
    """The stages and the last head alone: the network without early exits."""

    def __init__(self, net: MultiExitNet) -> None:
        super().__init__()
        self.stages, self.head = net.stages, net.exits[-1]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def on_engine(gated: GatedNet, x: Tensor, backend: str, batches: Sequence[int]) -> GatedNet:
    """The same gates over the network prepared for an engine, its costs measured."""
    prepared = deploy.prepare(gated.net, x[:MEASURED_ROWS], backend, threads=torch.get_num_threads(), batches=batches)
    result = GatedNet(prepared, gated.policy, gated.thresholds, gated.temperatures, gated.enabled).eval()
    result.measure(x[:MEASURED_ROWS])
    return result


def contestants(
    gated: GatedNet, wrapper: Any, rows: int, others: dict[str, GatedNet | None]
) -> dict[str, Callable[[Tensor], object]]:
    """Who is timed at a batch size: for larger batches earlyon's own way for them, and its quickest way one by one."""
    net, stages = gated.net, peer.staged(wrapper)
    both: dict[str, Callable[[Tensor], object]] = {"aep_ext": gated, "ensemble": net, "last_exit": LastExit(net).eval()}
    both |= {name: net for name, net in others.items() if net is not None}
    if rows == 1:
        return {**both, "earlyon_wrapper": wrapper, "earlyon_staged": stages.infer}
    return {
        **both,
        "earlyon_batched": wrapper.forward_inference_batched,
        "earlyon_staged_one_by_one": lambda x: [stages.infer(one) for one in x.split(1)],
    }


def timed(
    gated: GatedNet,
    wrapper: Any,
    x: Tensor,
    batches: Sequence[int],
    seconds: float,
    backend: str | None,
    calibrated: GatedNet | None,
    write: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Times all in turn on the images x, after their answers were compared; one row for every batch size."""
    peer.check_paths(wrapper, peer.staged(wrapper), x)
    gated.measure(x[:MEASURED_ROWS])
    others = {"aep_calibrate": calibrated, "aep_ext_on_engine": None, "aep_calibrate_on_engine": None}
    if calibrated is not None:
        calibrated.measure(x[:MEASURED_ROWS])
    if backend is not None:
        others["aep_ext_on_engine"] = on_engine(gated, x, backend, batches)
        others["aep_calibrate_on_engine"] = calibrated and on_engine(calibrated, x, backend, batches)
    rows = []
    with torch.inference_mode():
        for n in batches:
            calls = contestants(gated, wrapper, n, others)
            times = race(calls, [x[part] for part in draw_batches(len(x), n, SEED)], seconds)
            rows.append(_row(n, times))
            write(_line(rows[-1]))
    return rows


def _row(n: int, times: dict[str, Times]) -> dict[str, Any]:
    row: dict[str, Any] = {"batch": n, "times": {name: latency(taken, n) for name, taken in times.items()}}
    own = times["aep_ext"].typical()
    row["ratios"] = {
        name: dict(zip(("ratio", "interval"), ratio_of_sums(taken.typical(), own), strict=True))
        for name, taken in times.items()
        if name != "aep_ext"
    }
    theirs = [name for name in times if name.startswith("earlyon")]
    row["quickest_earlyon"] = min(theirs, key=lambda name: row["ratios"][name]["ratio"])
    row["calls"] = len(times["aep_ext"].calls())
    return row


def _line(row: dict[str, Any]) -> str:
    told = [
        f"{name} {found['p50_ms']:.3f} / {found['p95_ms']:.3f} ms, {found['images_per_s']:.0f} images/s"
        for name, found in row["times"].items()
    ]
    name = row["quickest_earlyon"]
    ratio, (low, high) = row["ratios"][name]["ratio"], row["ratios"][name]["interval"]
    return (
        f"batch {row['batch']} (p50 / p95): {'; '.join(told)}; {name} takes {ratio:.2f} [{low:.2f}, {high:.2f}] times"
    )


def compare_run(
    run: str | Path,
    *,
    data: str | None = None,
    exits: Sequence[int] | None = None,
    drop: float = 0.5,
    threads: int = 1,
    samples: int = 512,
    seconds: float = 20.0,
    batches: Sequence[int] = (1, 64),
    backend: str | None = None,
    write: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The whole comparison on a run's trained networks; see the module.

    Args:
        run: folder of a finished run.
        data: where its data is, if not where its configuration says.
        exits: original numbers of the exits that both use; all of them by default.
        drop: points of accuracy that each may lose.
        threads: of torch.
        samples: test images to time on.
        seconds: how long to time at each batch size.
        batches: batch sizes.
        backend: an engine of ``deploy.prepare`` that aep_ext's gates are timed on too (earlyon brings no engine).
        write: takes lines of progress.
    """
    import earlyon

    torch.set_num_threads(threads)
    folder = RunFolder(run)
    config = folder.stored().resolved()
    config = replace(config, data=data or config.data)
    module = ImageDataModule(
        config.data, image_size=config.image_size, data_root=config.data_root, train_samples=config.train_samples
    )
    parts = []
    for role in ("select", "report"):
        dataset = module.dataset(role)
        parts.append(dataset.__getitems__(list(range(len(dataset)))))
    images, roles = split_images(*parts)
    method, seeds, timed_net = config.exit_weights[0], [], None
    chosen_exits, wanted = delivered(folder, method), delivered_seed(folder, method)
    for seed in config.seeds or ():
        began = time.monotonic()
        net = deploy.load(folder.unit(seed, method) / "full")
        net = prune(net, range(net.num_exits) if exits is None else exits).eval()
        gated, ours = gated_by_us(net, images, drop)
        wrapper, theirs = gated_by_earlyon(net, images, drop)
        if timed_net is None or seed == wanted:
            timed_net, timed_seed = (gated, wrapper), seed
        seeds.append({"seed": seed, "aep_ext": ours, "earlyon": theirs, "aep_calibrate": chosen_exits.get(seed)})
        told = ", ".join(
            f"{name} {part['top1']:.4f} at {part['mean_macs']:.0f} multiply-adds "
            f"(ungated {part['ungated_top1']:.4f} at {part['ungated_macs']})"
            for name, part in (("aep_ext", ours), ("earlyon", theirs))
        )
        write(f"seed {seed} ({time.monotonic() - began:.0f} s): {told}")
    assert timed_net is not None
    chosen = torch.randperm(len(images.report[0]), generator=torch.Generator().manual_seed(SEED))[:samples]
    batched = {
        n: peer.judge_batched(timed_net[0].net, timed_net[1], *images.report, n, images.shape) for n in batches if n > 1
    }
    calibrated = load_delivered(folder) if timed_seed == wanted else None
    rows = timed(*timed_net, images.report[0][chosen], batches, seconds, backend, calibrated, write)
    for row in rows:
        row["earlyon_batched"] = batched.get(row["batch"])
    return {
        "format": FORMAT,
        "version": VERSION,
        "peer": {"name": "earlyon", "version": earlyon.__version__},
        "environment": _environment(torch.device("cpu")),
        "data": {"title": module.roles.title, "roles": roles},
        "network": config.network,
        "exits": list(timed_net[0].net.exit_ids),
        "exit_weights": method,
        "drop_points": drop,
        "summary": {
            name: {
                key: spread([seed[name][key] for seed in seeds])
                for key in ("top1", "ungated_top1", "mean_macs", "ungated_macs")
            }
            for name in ("aep_ext", "earlyon", "aep_calibrate")
            if all(seed[name] for seed in seeds)
        },
        "seeds": seeds,
        "timed": {
            "seed": timed_seed,
            "samples": len(chosen),
            "seconds": seconds,
            "engine": backend,
            "rows": rows,
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="earlyon", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="a finished folder of aep run")
    parser.add_argument("--output", required=True, metavar="FILE", help="the result file (JSON)")
    parser.add_argument("--data", default=os.environ.get("AEP_PEER_DATA"), help="where the run's data is")
    parser.add_argument("--exits", type=lambda text: [int(part) for part in text.split(",")], metavar="E,E,...")
    parser.add_argument("--drop", type=float, default=0.5, metavar="POINTS")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--samples", type=int, default=512, metavar="N")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S")
    parser.add_argument("--backend", help="an engine to time aep_ext on too: openvino, onnxruntime, inductor or auto")
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    result = compare_run(options.pop("run"), **options, write=lambda line: print(line, flush=True))
    write_json(output, result)
    print(f"written: {output}")


if __name__ == "__main__":
    main()
