"""accelerate(): early exits for a trained network, which itself is left as it is."""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aep_ext import ops
from aep_ext._progress import Progress
from aep_ext._utils import UserError, aligned, inputs_and_labels, inputs_of, require, using_threads
from aep_ext.calibration import CachedLogits, RiskBudget, terminate
from aep_ext.export import Preprocessing, load, save
from aep_ext.export.save_load import DESCRIPTION
from aep_ext.inference import GatedNet, collect_logits
from aep_ext.pruning import count_macs, single_exit
from aep_ext.surgery import MultiExitNet, anticipate, networks
from aep_ext.training.data import ImageDataModule
from aep_ext.training.evaluate import LATENCY_IMAGES, latency_beside, torch_device

FEWEST = 20
"""Of fewer calibration images one is five points."""
OVERLAP = 0.01
"""Of the calibration images; single duplicates are common in real data."""
CACHE_BYTES = 2 << 30
CACHED_BATCH = 128
FEWEST_STEPS = 16
"""Of an epoch of held feature maps: few images come in smaller batches."""
_CACHE_TYPE = torch.bfloat16  # half the memory of float32, and its range
_NO_VOTE = 1e-30  # of the exits that do not teach

Batch = tuple[list[Tensor], Tensor, Tensor]
"""Feature maps of the early exits, logits of the last one (n, K), labels (n,)."""


@dataclass(frozen=True)
class Acceleration:
    """What :func:`accelerate` did.

    Attributes:
        before, after: of the model and of the gated network: ``top1`` (fraction of 1), ``macs`` (mean multiply-adds an
            image) and ``latency`` (mean milliseconds at batch 1, the two taking turns).
        measured_on: "test", or "calibration", where ``after`` is cross-validated.
        images: how many those are.
        exits: numbers of the exits kept, from 0; heads: of the early ones before the choice, by name.
        counts: how many of the images were answered at each exit.
        drop_points, interval: cross-validated points of top-1 lost on the calibration images, and the paired 95 %
            interval.
        guarantee, notice: of the calibration, see :class:`~aep_ext.calibration.Calibration`.
        cached: whether the features were held in memory.
        train_images, calibration_images: how many.
        minutes: of all of it.
    """

    before: dict[str, float]
    after: dict[str, float]
    measured_on: str
    images: int
    exits: tuple[int, ...]
    heads: tuple[str, ...]
    counts: tuple[int, ...]
    drop_points: float
    interval: tuple[float, float]
    guarantee: str
    notice: str
    cached: bool
    train_images: int
    calibration_images: int
    minutes: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        rows = [["", "top-1", "multiply-adds", "", "latency", ""]]
        for name, found in (("before", self.before), ("after", self.after)):
            shares = [f"{100 * found[key] / self.before[key]:.0f} %" for key in ("macs", "latency")]
            macs, latency = f"{found['macs'] / 1e6:.2f} M", f"{found['latency']:.2f} ms"
            rows.append([name, f"{100 * found['top1']:.2f} %", macs, shares[0], latency, shares[1]])
        where = " + ".join(f"exit {e + 1}: {n}" for e, n in zip(self.exits, self.counts, strict=True))
        low, high = self.interval
        lines = [
            f"{self.images} {self.measured_on} images ({where})",
            f"calibration: {self.drop_points:.2f} points below the model (95 % interval {low:.2f} to {high:.2f})",
            f"{self.minutes:.1f} minutes, {self.train_images} training images, {self.calibration_images} calibration "
            f"images, heads {', '.join(self.heads)}",
        ]
        return "\n".join([*aligned(rows, left=1), *lines, *filter(None, (self.guarantee, self.notice))])


def accelerate(
    model: nn.Module,
    train_loader: Iterable[Any],
    calibration_loader: Iterable[Any],
    *,
    budget: float = 0.5,
    risk: float | None = None,
    delta: float = 0.1,
    test_loader: Iterable[Any] | None = None,
    exits: int | None = None,
    cuts: Sequence[str] | None = None,
    head: str | Sequence[str] = "auto",
    placement: str = "cost",
    epochs: int = 10,
    lr: float = 3e-3,
    distillation: float = 0.5,
    temperature: float = 3.0,
    cache_bytes: int = CACHE_BYTES,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | bool = True,
    **calibration: Any,
) -> tuple[GatedNet, Acceleration]:
    """Gives a trained network early exits in minutes, without changing it.

    ::

        gated, report = aep_ext.accelerate(model, train_loader, calibration_loader, budget=0.5)
        print(report)
        aep_ext.save(gated, "fast")

    The network is frozen, its BatchNorm statistics too. Heads learn on its feature maps, from the labels and from the
    network's own answers; thresholds are then chosen on the calibration images (:func:`aep_ext.terminate`). An image
    that takes no early exit is answered by the last one alone, as by the model, bit for bit (on the same device, in a
    batch of the same size).

    Args:
        model: a trained CNN classifier that :func:`aep_ext.anticipate` takes, or a network that ``aep_ext.load`` gives,
            of which the last exit counts. Left as it is.
        train_loader: (x, y) batches, x (n, C, H, W) made as the model wants them, y (n,) integers; or dicts, as
            :func:`aep_ext.fit` takes them. The model's own training images will do. It is gone through once where the
            feature maps fit into ``cache_bytes``, else once an epoch.
        calibration_loader: such batches of images that neither the model nor the heads were trained on.
        budget: points of top-1 that may be lost against the model.
        risk, delta: instead of the budget: with probability 1 - delta at most this fraction of top-1 is lost, see
            :class:`~aep_ext.calibration.RiskBudget`.
        test_loader: such batches for the report; without, it is of the calibration images, cross-validated.
        exits, cuts, head, placement: see :func:`aep_ext.anticipate`. Not for a network that ``aep_ext.load`` gives,
            except ``head``.
        epochs, lr: of AdamW with a one-cycle schedule, on the heads.
        distillation, temperature: weight d and temperature T of the divergence from the model's answers, see
            :func:`aep_ext.ops.multi_exit_loss`.
        cache_bytes: memory for feature maps, which are kept in bfloat16.
        seed: of the heads' first values and of the order of the images.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        progress: False: nothing is shown.
        calibration: further arguments of :func:`aep_ext.calibration.calibrate`.

    Returns:
        The :class:`GatedNet`, in eval mode on the CPU, and an :class:`Acceleration`. Where no early exit keeps the
        budget the net has one exit, the model's own.

    Raises:
        TypeError: a loader yields something else.
        ValueError: the model cannot be cut, or its head not be found; labels that it does not have; fewer than 20
            calibration images, or fewer training images than classes; more than 1 % of the calibration images
            among the training images; a loader that can be gone through only once.
    """
    began = time.monotonic()
    if isinstance(progress, bool):
        progress = Progress.of_terminal(quiet=not progress)
    for name, loader in (("train", train_loader), ("calibration", calibration_loader), ("test", test_loader)):
        if isinstance(loader, Iterator) or (loader is None and name != "test"):
            raise ValueError(f"accelerate: {name}_loader must be one that can be gone through again, got an iterator")
    if epochs < 1:
        raise ValueError(f"accelerate: epochs must be at least 1, got {epochs}")
    example = next((inputs_of("accelerate", batch)[:1] for batch in train_loader), None)
    if example is None or not len(example):
        raise ValueError("accelerate: train_loader must yield images, got none")
    where = torch_device(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = _with_exits(model, example, exits=exits, cuts=cuts, head=head, placement=placement).to(where)
        net.requires_grad_(False).eval()
        kept = _images(calibration_loader, "calibration", net.num_classes)
        if len(kept) < FEWEST:
            raise ValueError(f"accelerate: there must be at least {FEWEST} calibration images, got {len(kept)}")
        features = _Features(net, train_loader, cache_bytes, progress)
        if features.count < net.num_classes:
            raise ValueError(
                f"accelerate: there must be at least as many training images as classes, {net.num_classes}, "
                f"got {features.count}"
            )
        shared = len(kept & features.seen)
        if shared > OVERLAP * len(kept):
            raise ValueError(
                f"accelerate: calibration images must not be training images, got {shared} of {len(kept)} that are"
            )
        early = nn.ModuleList(list(net.exits)[:-1]).requires_grad_(True)
        if early:
            _train(early, features, epochs, lr, distillation, temperature, seed, progress)
        net.eval()
    wanted: Any = budget if risk is None else RiskBudget(risk, delta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the notice is in the report
        with progress.task("calibrating", 1):
            gated = terminate(
                net, calibration_loader, budget=wanted, reference="last", last_alone=True, device=where, **calibration
            )
    report = _report(model, net, gated, calibration_loader, test_loader, where, example, features)
    return gated.cpu(), Acceleration(**report, minutes=(time.monotonic() - began) / 60)


def _with_exits(model: nn.Module, example: Tensor, **options: Any) -> MultiExitNet:
    """The model with new early heads. Its modules run themselves, since a fused pool sums in another order."""
    if not isinstance(model, nn.Module) or isinstance(model, GatedNet):
        raise ValueError(f"accelerate: model must be a network without gates, got {type(model).__name__}")
    if not isinstance(model, MultiExitNet):
        return anticipate(model, example=example, fused=False, **options)
    if options["exits"] is not None or options["cuts"] is not None:
        raise ValueError("accelerate: exits and cuts must be left out for a network of ours, whose stages say where")
    origin, last = model.origin, single_exit(model)
    if origin.get("kind") != "network" or last.exit_ids[-1] != origin["exits"] - 1:
        raise ValueError(
            f"accelerate: of networks with exits those by name that have their last exit are taken, got one of kind "
            f"{origin.get('kind')!r} with the exits {list(model.exit_ids)}: give the model that it was made from"
        )
    net = networks.build(
        *(origin[name] for name in ("name", "num_classes", "in_channels")),
        cuts=origin.get("cuts"),
        head=options["head"],
        placement=options["placement"] if origin.get("cuts") is None else "stages",
        example=tuple(example.shape[1:]),
    )
    net.stages.load_state_dict(last.stages.state_dict())
    net.exits[-1].load_state_dict(last.exits[0].state_dict())
    net.fused = model.fused and last._fusable_linears() is not None
    net.classes, net.preprocessing = model.classes, model.preprocessing
    return net.to(next(iter(last.parameters())).dtype)


def _images(loader: Iterable[Any], name: str, num_classes: int) -> set[bytes]:
    """Hashes of a loader's images, whose labels are checked."""
    found: set[bytes] = set()
    for batch in loader:
        x, y = inputs_and_labels("accelerate", batch)
        _check_labels(y, name, num_classes)
        found |= _hashes(x)
    return found


def _hashes(x: Tensor) -> set[bytes]:
    rows = x.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return {hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows}


def _check_labels(y: Tensor, name: str, num_classes: int) -> None:
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= num_classes):
        wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
        raise ValueError(
            f"accelerate: labels of the {name} images must be classes of the model, 0..{num_classes - 1}, got {wrong}"
        )


class _Features:
    """What heads learn from: feature maps at the early exits, the last exit's logits, labels. Held in memory where they
    fit, else computed anew each time."""

    def __init__(self, net: MultiExitNet, loader: Iterable[Any], limit: int, progress: Progress) -> None:
        self.net, self.loader = net, loader
        self.seen: set[bytes] = set()
        self.count = self.batches = self.batch = 0
        self.cache: list[Tensor] | None = None
        parts: list[list[Tensor]] | None = []
        held = 0
        for batch in progress.loader("features", loader):
            x, y = inputs_and_labels("accelerate", batch)
            _check_labels(y, "training", net.num_classes)
            self.seen |= _hashes(x)
            self.count += len(x)
            self.batches += 1
            if parts is not None and len(x):
                maps, own, y = self._computed(x, y)
                parts.append([*(part.to(_CACHE_TYPE) for part in maps), own, y])
                held += sum(part.nbytes for part in parts[-1])
                if held > limit:
                    parts = None
        if parts:
            self.cache = []
            for _ in range(len(parts[0])):  # one at a time, since this holds it twice
                self.cache.append(torch.cat([part.pop(0) for part in parts]))
            self.batch = max(2, min(CACHED_BATCH, self.count // FEWEST_STEPS))
            self.batches = -(-self.count // self.batch)

    def _computed(self, x: Tensor, y: Tensor) -> Batch:
        device = self.net.output_weights.device
        with torch.no_grad():
            maps = self.net.features(x.to(device))
            own = self.net.exits[-1](maps[-1])
        return maps[:-1], own, y.to(device, torch.int64)

    def epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        """All of it once, in a random order where it is held."""
        if self.cache is None:
            for batch in self.loader:
                yield self._computed(*inputs_and_labels("accelerate", batch))
            return
        like = self.cache[-2].dtype
        for rows in torch.randperm(self.count, generator=generator).split(self.batch):
            *maps, own, y = (part[rows.to(part.device)] for part in self.cache)
            yield [part.to(like) for part in maps], own, y


def _train(
    heads: nn.ModuleList,
    features: _Features,
    epochs: int,
    lr: float,
    distillation: float,
    temperature: float,
    seed: int,
    progress: Progress,
) -> None:
    """The heads share nothing: their losses are added up as they are."""
    heads.train()
    optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * features.batches)
    generator = torch.Generator().manual_seed(seed)
    device = features.net.output_weights.device
    ones = torch.ones(len(heads) + 1, device=device)
    teacher = torch.tensor([_NO_VOTE] * len(heads) + [1.0], device=device)  # the last exit
    with progress.task("heads", epochs * features.batches) as task:
        for epoch in range(epochs):
            for number, (maps, own, y) in enumerate(features.epoch(generator)):
                if len(y) > 1:  # BatchNorm cannot learn from one image
                    early = [head(part) for head, part in zip(heads, maps, strict=True)]
                    options: dict[str, Any] = {"distillation": distillation, "temperature": temperature}
                    logits = torch.stack([*early, own])
                    loss = ops.multi_exit_loss(logits, y, ones, output_weights=teacher, **options).loss
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                scheduler.step()
                task(epoch * features.batches + number + 1)
    heads.eval().requires_grad_(False)


def _report(
    model: nn.Module,
    net: MultiExitNet,
    gated: GatedNet,
    calibration_loader: Iterable[Any],
    test_loader: Iterable[Any] | None,
    device: torch.device,
    example: Tensor,
    features: _Features,
) -> dict[str, Any]:
    found = gated.calibration
    before = {
        "top1": found.reference_correct / found.n,
        "macs": float(count_macs(single_exit(net), tuple(example.shape[1:]))),
    }
    after = {"top1": before["top1"] - found.drop_points / 100, "macs": found.mean_cost}
    images, counts = found.n, found.counts
    if test_loader is not None:
        _images(test_loader, "test", net.num_classes)
        test = CachedLogits(*collect_logits(net, test_loader, device=device), exits=net.exit_ids, role="test")
        outcome = found.evaluate(test)
        images, counts = len(test), tuple(outcome.counts.tolist())
        before["top1"] = float((test.logits[-1].argmax(1) == test.target).double().mean())
        after = {"top1": float(outcome.accuracy or 0.0), "macs": float(outcome.mean_cost or 0.0)}
    shown: list[Tensor] = []
    for batch in calibration_loader if test_loader is None else test_loader:
        shown.append(inputs_of("accelerate", batch))
        if sum(map(len, shown)) >= LATENCY_IMAGES:
            break
    beside = {"before": copy.deepcopy(model), "after": copy.deepcopy(gated)}
    times = latency_beside(beside, torch.cat(shown), device)
    before["latency"], after["latency"] = times["before"]["mean"], times["after"]["mean"]
    return {
        "before": before,
        "after": after,
        "measured_on": "calibration" if test_loader is None else "test",
        "images": images,
        "exits": found.policy.exits,
        "heads": tuple(net.origin.get("heads", ["copy"] * (net.num_exits - 1))),
        "counts": counts,
        "drop_points": found.drop_points,
        "interval": found.interval,
        "guarantee": found.guarantee,
        "notice": found.notice,
        "cached": features.cache is not None,
        "train_images": features.count,
        "calibration_images": found.data["n"],
    }


def accelerate_command(
    model: str,
    *,
    data: str,
    output: str = "accelerated",
    overwrite: bool = False,
    data_root: str = "data",
    weights: str | None = None,
    image_size: int | None = None,
    normalize: tuple[float, ...] | None = None,
    classes: int | None = None,
    train_samples: int | None = None,
    calibration_samples: int = 0,
    batch_size: int = 128,
    threads: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Acceleration:
    """What ``aep accelerate`` does: :func:`accelerate` on a data set by name, saved to a folder.

    Heads learn on the training images, thresholds are chosen on the validation images (or on ``calibration_samples``
    training images held out), and the report is of the test images.

    Args:
        model: a folder that ``aep_ext.save`` or ``aep run`` wrote, a network's name, or "module:function", a function
            without arguments that gives the model.
        data, data_root, image_size, calibration_samples: see :class:`~aep_ext.training.data.ImageDataModule`.
        train_samples: learn from so many training images only.
        output: the folder to write; ``overwrite`` replaces what it holds.
        weights: of a network by name, as :func:`aep_ext.surgery.networks.build` takes them; of a function's model, a
            file.
        normalize: mean and standard deviation that the model was trained with, one for each channel, means first. By
            default a saved network's own, those of pretrained weights by name, else those that ``aep run`` uses.
        classes: K of a network by name; by default as many as the data has.
        batch_size: of the training images.
        threads: CPU threads.
        options: of :func:`accelerate`.

    Raises:
        UserError: there is no such model, data or file, or it is refused; nothing is written then.
    """
    progress = progress or Progress()
    require("safetensors.torch", "export", "aep accelerate")
    if (Path(output) / DESCRIPTION).exists() and not overwrite:
        raise UserError(f"{output} holds a network already: --overwrite replaces it, --output names another folder")
    try:
        saved = load(model) if Path(model).is_dir() else None
        if isinstance(saved, GatedNet):
            raise UserError(
                f"{model} holds a gated network; give the folder of one without gates, such as its baseline"
            )
        if saved is not None and weights is not None:
            raise UserError(f"--weights must be left out for a saved network, got {weights}")
        preprocessing = getattr(saved, "preprocessing", None)
        made = None if saved is not None or networks.known(model) else _made(model, weights)
        found = ImageDataModule(
            data,
            image_size=image_size or (None if made else networks.image_size(model, weights)),
            batch_size=batch_size,
            data_root=data_root,
            calibration_samples=calibration_samples,
            channels=networks.weight_channels(weights),
            num_classes=classes,
        )
        source, rows = found.splits.parts["train"]  # not by train_samples: what that leaves would be calibrated on
        found.splits.parts["train"] = (source, rows[:train_samples])
        if preprocessing is None:
            preprocessing = _normalised(found.preprocessing, normalize, None if made else model, weights)
        found.preprocessing, found.channels = preprocessing, preprocessing.channels
        network = saved or made or _network(model, weights, found)
        with using_threads(threads):
            gated, report = accelerate(
                network,
                found.loader("train"),
                found.loader(found.calibration_split),
                test_loader=found.loader("test"),
                progress=progress,
                **options,
            )
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
    names = {"classes": list(found.splits.classes)} if len(found.splits.classes) == found.num_classes else {}
    metadata = {**names, "preprocessing": preprocessing.to_dict(), "acceleration": report.to_dict()}
    save(gated, output, metadata=metadata)
    return report


@contextmanager
def _importable_here() -> Iterator[None]:
    """Modules of the working directory can be imported, as by ``python -m``."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def _made(name: str, weights: str | None) -> nn.Module:
    """The model that "module:function" gives.

    Raises:
        UserError: there is none.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"no such model: {name!r} is no folder and no module:function, and {networks.unknown(name)}")
    try:
        with _importable_here():
            model = getattr(importlib.import_module(module), function)()
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"no such model: {name} ({type(error).__name__}: {error})") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} must give a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        networks.load_weights(networks.read_weights(weights), weights, into=model)
    return model.eval()


def _network(name: str, weights: str | None, data: ImageDataModule) -> MultiExitNet:
    """A trained network by name."""
    if weights is None:
        raise UserError(f"{name} must have weights: --weights DEFAULT, or a file FILE.safetensors or FILE.pth")
    known = None if networks.is_file(weights) else networks.trained_as(name, weights)
    if known is not None and known[1] != data.num_classes:
        raise UserError(f"{name} with the weights {weights} has {known[1]} classes, the data {data.num_classes}")
    shape = (data.channels, *[data.preprocessing.image_size] * 2)
    net = networks.build(name, data.num_classes, shape[0], weights, example=shape)
    if known is None:  # the last exit too
        networks.load_weights(networks.read_weights(weights), weights, into=net)
    if "/" in name:  # the library's own answers, and a fused pool sums in another order
        net.fused = False
    return single_exit(net)


def _normalised(
    found: Preprocessing, numbers: tuple[float, ...] | None, name: str | None, weights: str | None
) -> Preprocessing:
    """With the mean and standard deviation that the model was trained with."""
    if numbers is None and name is not None and weights is not None and not networks.is_file(weights):
        numbers = networks.trained_as(name, weights)[0]
    if numbers is None:
        return found
    if len(numbers) != 2 * found.channels:
        raise UserError(
            f"normalize must be {found.channels} means and {found.channels} standard deviations, got {len(numbers)} "
            "numbers"
        )
    return replace(found, mean=numbers[: found.channels], std=numbers[found.channels :])
