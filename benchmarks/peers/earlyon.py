"""aep_ext's gates and earlyon's on one trained network: accuracy, mean cost, latency and throughput side by side.

    python -m benchmarks.peers.earlyon --run RUN --output benchmarks/results/cifar10-earlyon.json

RUN is a finished folder of ``aep run``. Both get the network's exits, the same validation images to calibrate on, and
the same loss of accuracy in points, each against its own answer without gates: aep_ext against the ensemble of all
exits, earlyon, which has no ensemble, against the last exit. aep_ext cross-validates on all of the images; earlyon fits
temperatures on a fifth of them and searches thresholds on the rest. Both may leave exits out. Both are evaluated on the
same test images, their multiply-adds counted by aep_ext, and timed in turn on the same images, on the first seed.

The data is where RUN's configuration says, or where ``--data`` or the environment variable AEP_PEER_DATA say
(``cifar10-jpeg:FILE``). earlyon 0.3 is on the registry: ``pip install earlyon``; it needs torchvision. Of its ways to
answer two are timed: ``staged_model(wrapper).infer(x)``, batch 1, the quickest there, and
``wrapper.forward_inference_batched(x)``, where a batch leaves as one, as its least confident sample may.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aep_ext import MultiExitNet, load
from aep_ext._io import write_json
from aep_ext.calibration import CachedLogits, calibrate
from aep_ext.inference import GatedNet, collect_logits, compile
from aep_ext.pruning import prune
from aep_ext.pruning.cost import subset_costs
from aep_ext.training.data import ImageDataModule
from aep_ext.training.folder import RunFolder
from aep_ext.training.splits import split_sha256
from aep_ext.training.summary import environment, spread
from aep_ext.training.timing import Times, draw_batches, latency, ratio_of_sums, time_in_turn

FORMAT, VERSION = "aep_ext.peer", 1
SHARE = 0.2  # of the validation images for earlyon's temperatures
SEED, BATCH, MEASURED_ROWS = 0, 256, 64
FINE_GRID = tuple(round(1 - k / 400, 4) for k in range(1, 281))  # 0.9975 down to 0.3: its own has nine values
METRICS = ("top1", "ungated_top1", "mean_macs", "ungated_macs")
Images = tuple[Tensor, Tensor]
"""(n, C, H, W) float32 as the network sees them, and labels (n,) int64."""


def loader(images: Images) -> DataLoader:
    """(x, y) batches, in order."""
    return DataLoader(TensorDataset(*images), batch_size=BATCH)


def wrap(net: MultiExitNet, shape: Sequence[int]) -> Any:
    """An ``EarlyExitWrapper`` of copies of a network's stages and heads, in eval mode.

    The stages become the children of an ``nn.Sequential``, the form that earlyon can both wrap and cut into stages; the
    last exit's head is its last child and so earlyon's final classifier. All parts are copies: it hangs hooks on them.

    Args:
        net: two exits at least.
        shape: (C, H, W) of an image.

    Raises:
        ValueError: one exit alone.
        ImportError: earlyon is not installed.
    """
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    if net.num_exits < 2:
        raise ValueError(f"wrap: net must have at least two exits, got {net.num_exits}")
    stages, heads = copy.deepcopy(net.stages), copy.deepcopy(net.exits)
    children = OrderedDict((f"stage{number}", stage) for number, stage in enumerate(stages))
    backbone = nn.Sequential(children | {"head": heads[-1]})
    with torch.no_grad():
        features = net.eval().features(torch.zeros(1, *shape))
    points = [
        ExitPoint(f"exit{e}", f"stage{stage}", features[e].shape[1]) for e, stage in enumerate(net.exit_stages[:-1])
    ]
    config = EarlyExitConfig(backbone="aep_ext", num_classes=net.num_classes, exit_points=points)
    early = {point.name: head for point, head in zip(points, heads, strict=False)}
    return EarlyExitWrapper(backbone, early, nn.Identity(), config, input_shape=(1, *shape)).eval()


def check_logits(net: MultiExitNet, wrapper: Any, x: Tensor) -> None:
    """Compares all exits' logits of both, bit for bit where the network runs its heads as modules.

    Raises:
        AssertionError: they are not equal.
    """
    with torch.inference_mode():
        theirs = torch.stack(wrapper(x, mode="training"))
        torch.testing.assert_close(theirs, net.exit_logits(x), rtol=1e-4, atol=1e-4)  # the fused heads sum otherwise
        fused, net.fused = net.fused, False
        plain = net.exit_logits(x)
        net.fused = fused
    if not torch.equal(theirs, plain):
        raise AssertionError(f"earlyon's exit logits are not the network's: {float((theirs - plain).abs().max()):g}")


def calibrate_earlyon(wrapper: Any, temperatures: Images, thresholds: Images, drop: float) -> Any:
    """Its own calibration for an accuracy budget, on a grid finer than its own nine thresholds; changes ``wrapper``.

    Args:
        wrapper: of :func:`wrap`.
        temperatures, thresholds: images for the one and for the other.
        drop: points of accuracy that may be lost against its final classifier.

    Returns:
        Its ``CalibrationResult``.
    """
    from earlyon.core.thresholds import calibrate_thresholds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = calibrate_thresholds(
            wrapper,
            loader(thresholds),
            target_accuracy_drop=drop / 100,
            grid=FINE_GRID,
            fit_temperature=True,
            temperature_loader=loader(temperatures),
        )
    config = wrapper.config
    config.confidence_thresholds, config.enabled_exits = list(found.thresholds), list(found.enabled_exits)
    config.temperatures = dict(found.temperatures)
    config.validate()
    return found


def exit_macs(net: MultiExitNet, shape: Sequence[int], enabled: Sequence[bool]) -> list[int]:
    """Multiply-adds of a sample that earlyon answers at each exit, by aep_ext's counter: E numbers.

    The backbone up to there with the heads of the enabled exits on the way: it runs no head of a disabled one.
    """
    macs = subset_costs(net, tuple(shape)).macs
    masks = [sum(1 << i for i in range(e) if enabled[i]) | 1 << e for e in range(net.num_exits)]
    return [macs[mask - 1] for mask in masks]


def evaluate_earlyon(net: MultiExitNet, wrapper: Any, images: Images) -> dict[str, Any]:
    """Its rule on other images, by its own simulator."""
    from earlyon.core.thresholds import collect_head_logits, simulate_policy
    from earlyon.core.types import exit_label

    cache, config, last = collect_head_logits(wrapper, loader(images), "cpu"), wrapper.config, net.num_exits - 1
    found = simulate_policy(cache, wrapper)
    shares = [found.exit_distribution.get(exit_label(e if e < last else -1), 0.0) for e in range(last + 1)]
    shape = images[0].shape[1:]
    macs = exit_macs(net, shape, config.enabled_exits)
    return {
        "top1": found.accuracy,
        "ungated_top1": float((cache.logits[-1].argmax(-1) == cache.targets).double().mean()),
        "mean_macs": sum(share * cost for share, cost in zip(shares, macs, strict=True)),
        "ungated_macs": exit_macs(net, shape, [False] * last)[-1],
        "exit_shares": shares,
        "thresholds": list(config.confidence_thresholds),
        "enabled": list(config.enabled_exits),
        "temperatures": [config.temperatures[name] for name in config.head_names],
    }


def evaluate_batched(net: MultiExitNet, wrapper: Any, images: Images, rows: int) -> dict[str, float]:
    """Its way for batches on all images, ``rows`` at a time: top-1 and mean multiply-adds."""
    (x, y), correct, spent = images, 0, 0
    macs = exit_macs(net, x.shape[1:], wrapper.config.enabled_exits)
    for part, labels in zip(x.split(rows), y.split(rows), strict=True):
        found = wrapper.forward_inference_batched(part)
        correct += int((found.predictions.argmax(-1) == labels).sum())
        spent += macs[found.exit_taken] * len(part)  # -1, its final classifier, is the last
    return {"top1": correct / len(x), "mean_macs": spent / len(x)}


def gated_by_us(net: MultiExitNet, val: Images, test: Images, drop: float) -> tuple[GatedNet, dict[str, Any]]:
    """aep_ext's gates, and how they do on the test images."""
    macs = subset_costs(net, tuple(val[0].shape[1:])).macs
    cached = {
        role: CachedLogits(*collect_logits(net, loader(images)), role=role, exits=net.exit_ids)
        for role, images in (("val", val), ("test", test))
    }
    found = calibrate(cached["val"], costs=macs, budget=drop, seed=SEED)
    policy, metrics = found.policy, found.evaluate(cached["test"])
    ensemble = torch.einsum("enk,e->nk", cached["test"].logits, net.output_weights.float())
    return GatedNet.from_policy(net, policy), {
        "top1": metrics.accuracy,
        "ungated_top1": float((ensemble.argmax(-1) == test[1]).double().mean()),
        "mean_macs": metrics.mean_cost,
        "ungated_macs": macs[-1],
        "exit_shares": [count / metrics.n for count in metrics.counts],
        "feasible": found.feasible,
        "policy": policy.to_dict(),
    }


def gated_by_earlyon(net: MultiExitNet, val: Images, test: Images, drop: float) -> tuple[Any, dict[str, Any]]:
    """earlyon's wrapper, calibrated by its own functions, and how it does on the test images."""
    wrapper = wrap(net, val[0].shape[1:])
    check_logits(net, wrapper, val[0][:MEASURED_ROWS])
    order = torch.randperm(len(val[0]), generator=torch.Generator().manual_seed(SEED))
    parts = order.split([round(SHARE * len(order)), len(order) - round(SHARE * len(order))])
    calibrate_earlyon(wrapper, *((val[0][rows], val[1][rows]) for rows in parts), drop)
    return wrapper, evaluate_earlyon(net, wrapper, test)


def timed(
    net: MultiExitNet,
    gated: GatedNet,
    wrapper: Any,
    x: Tensor,
    *,
    batches: Sequence[int],
    seconds: float,
    backend: str | None,
) -> list[dict[str, Any]]:
    """Times all in turn on the images x; one row for every batch size."""
    from earlyon.staged import staged_model

    stages = staged_model(wrapper).eval()  # earlyon compares the two itself on an image of zeros
    ours: dict[str, Callable[[Tensor], object]] = {
        "aep_ext": gated,
        "ensemble": net,
        "last_exit": prune(net, [net.num_exits - 1]).eval(),
    }
    if backend is not None:
        example = x[:MEASURED_ROWS]
        ours["aep_ext_on_engine"] = compile(gated, example, backend, threads=torch.get_num_threads(), batches=batches)
    for found in (gated, ours.get("aep_ext_on_engine")):
        if isinstance(found, GatedNet):
            found.measure(x[:MEASURED_ROWS])
    rows = []
    with torch.inference_mode():
        for n in batches:
            theirs = {"earlyon_batched": wrapper.forward_inference_batched}
            if n == 1:
                theirs = {"earlyon_staged": stages.infer}
            times = time_in_turn(ours | theirs, [x[part] for part in draw_batches(len(x), n, SEED)], seconds)
            rows.append(_row(n, times))
    return rows


def _row(n: int, times: dict[str, Times]) -> dict[str, Any]:
    """One batch size: latencies, and the time of each over that of aep_ext's gates."""
    own = times["aep_ext"].typical()
    ratios = {
        name: dict(zip(("ratio", "interval"), ratio_of_sums(taken.typical(), own), strict=True))
        for name, taken in times.items()
        if name != "aep_ext"
    }
    theirs = [name for name in times if name.startswith("earlyon")]
    return {
        "batch": n,
        "times": {name: latency(taken, n) for name, taken in times.items()},
        "ratios": ratios,
        "quickest_earlyon": min(theirs, key=lambda name: ratios[name]["ratio"]),
        "calls": len(times["aep_ext"].calls()),
    }


def compare_run(
    run: str | Path,
    *,
    data: str | None = None,
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
        drop: points of accuracy that each may lose.
        threads: of torch.
        samples: test images to time on.
        seconds: how long to time at each batch size.
        batches: batch sizes.
        backend: an engine that aep_ext's gates are timed on too (earlyon brings no engine).
        write: takes lines of progress.
    """
    import earlyon

    torch.set_num_threads(threads)
    folder = RunFolder(run)
    config = folder.stored().resolved()
    config = replace(config, data=data or config.data)
    module = ImageDataModule.of_config(config)
    datasets = [module.dataset(split) for split in ("val", "test")]
    val, test = (dataset.__getitems__(list(range(len(dataset)))) for dataset in datasets)
    method, seeds, rows = config.methods[0], [], []
    for seed in config.seeds or ():
        began = time.monotonic()
        net = load(folder.model(seed, method) / "full").eval()
        gated, ours = gated_by_us(net, val, test, drop)
        wrapper, theirs = gated_by_earlyon(net, val, test, drop)
        seeds.append({"seed": seed, "aep_ext": ours, "earlyon": theirs})
        told = ", ".join(
            f"{name} {part['top1']:.4f} at {part['mean_macs']:.0f} multiply-adds "
            f"(ungated {part['ungated_top1']:.4f} at {part['ungated_macs']})"
            for name, part in (("aep_ext", ours), ("earlyon", theirs))
        )
        write(f"seed {seed} ({time.monotonic() - began:.0f} s): {told}")
        if not rows:
            chosen = torch.randperm(len(test[0]), generator=torch.Generator().manual_seed(SEED))[:samples]
            x = test[0][chosen]
            rows = timed(net, gated, wrapper, x, batches=batches, seconds=seconds, backend=backend)
            for row in rows:
                n, ratio = row["batch"], row["ratios"][row["quickest_earlyon"]]["ratio"]
                row["earlyon_batched"] = evaluate_batched(net, wrapper, test, n) if n > 1 else None
                write(f"batch {n}: {row['quickest_earlyon']} takes {ratio:.2f} times as long")
    return {
        "format": FORMAT,
        "version": VERSION,
        "peer": {"name": "earlyon", "version": earlyon.__version__},
        "environment": environment(torch.device("cpu")),
        "data": {
            "title": module.splits.title,
            "val": {"samples": len(val[0]), "sha256": split_sha256(module.splits.parts["val"][1])},
            "test": {"samples": len(test[0])},
        },
        "network": config.network,
        "exits": list(net.exit_ids),
        "exit_weights": method,
        "drop_points": drop,
        "summary": {
            name: {key: spread([seed[name][key] for seed in seeds]) for key in METRICS}
            for name in ("aep_ext", "earlyon")
        },
        "seeds": seeds,
        "timed": {
            "seed": seeds[0]["seed"],
            "samples": min(samples, len(test[0])),
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
