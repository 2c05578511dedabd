"""``aep_ext.fit`` on plain loaders: one line in place of a loop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

pytest.importorskip("lightning", reason="the training needs lightning")

import lightning.pytorch as pl

import aep_ext
from aep_ext import MultiExitNet
from aep_ext._utils import UserError
from aep_ext.surgery import networks
from aep_ext.training import RECIPES, Recipe

X = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0, :4].mean((1, 2)) > X[:, 0, 4:].mean((1, 2))).long()
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


def fresh() -> MultiExitNet:
    torch.manual_seed(1)
    return networks.build("resnet_small", 2, 1)


def loader(shuffle: bool = False, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), 32, shuffle=shuffle, **options)


def test_one_line_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    net = fresh()
    result = aep_ext.fit(net, loader(shuffle=True), loader(), epochs=4, lr=3e-3, device="cpu")
    assert len(result.history) == 4 and not net.training and list(tmp_path.iterdir()) == []
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()] == [f"training: epoch {n}/4" for n in range(1, 5)]
    assert "lightning" not in err.lower()
    with torch.no_grad():
        top1 = float((net(X).argmax(1) == Y).double().mean())
    best = max(record["val/top1"] for record in result.history)
    assert top1 == pytest.approx(best, abs=1e-6) and result.history[result.best_epoch]["val/top1"] == best
    assert top1 > 0.8 > float((fresh().eval()(X).argmax(1) == Y).double().mean())


@pytest.mark.parametrize(("epochs", "warmup"), [(2, 1.0), (2, 0.0), (2, 1 / 6), (1, 0.5)])
def test_a_one_cycle_schedule_of_few_steps(epochs: int, warmup: float) -> None:
    """A warm-up of one step, or of all, is a phase without a length to torch."""
    recipe = Recipe("short", "", schedule="onecycle", warmup=warmup, epochs=epochs)
    assert len(aep_ext.fit(fresh(), loader(), loader(), recipe=recipe, **QUIET).history) == epochs


def test_weights_of_classes_beside_probabilities_are_no_bad_sign() -> None:
    soft = DataLoader(TensorDataset(X, 0.9 * torch.eye(2)[Y] + 0.05), 32, shuffle=True)
    result = aep_ext.fit(fresh(), soft, loader(), epochs=4, lr=3e-3, class_weight=torch.tensor([5.0, 5.0]), **QUIET)
    assert result.history[-1]["val/top1"] > 0.8 and result.notice == ""


def test_every_kind_of_loader_trains_the_same(equal_weights: Any) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(zip(X, Y, strict=True))

    class Sized:
        def __iter__(self) -> Iterator[Any]:
            return iter(loader())

    batches = list(loader())
    kinds = [
        loader(),
        batches,
        [{"pixel_values": x, "labels": y} for x, y in batches],
        [{"image": x, "label": y.to(torch.int32)} for x, y in batches],
        DataLoader(Stream(), 32),
        Sized(),
    ]
    nets = [fresh() for _ in kinds]
    results = [aep_ext.fit(net, kind, kind, epochs=2, **QUIET) for net, kind in zip(nets, kinds, strict=True)]
    for net, result in zip(nets[1:], results[1:], strict=True):
        assert equal_weights(net.state_dict(), nets[0].state_dict())
        assert [record["val/loss"] for record in result.history] == [
            record["val/loss"] for record in results[0].history
        ]


def test_recipes_and_what_is_given_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from aep_ext.training import module

    seen: list[dict[str, Any]] = []
    create = module.JointLightningModule.__init__
    monkeypatch.setattr(
        module.JointLightningModule,
        "__init__",
        lambda self, net, **options: (seen.append(options), create(self, net, **options))[1],
    )
    aep_ext.fit(fresh(), loader(), loader(), epochs=1, recipe="cifar", optimizer="adamw", **QUIET)
    own = Recipe("mine", "", lr=0.5, weight_decay=0.1, epochs=1, schedule="cosine")
    aep_ext.fit(fresh(), loader(), loader(), recipe=own, lr=0.01, **QUIET)
    aep_ext.fit(fresh(), loader(), loader(), epochs=1, **QUIET)
    names = ("lr", "weight_decay", "optimizer", "schedule")
    assert [tuple(getattr(options["recipe"], name) for name in names) for options in seen] == [
        (RECIPES["cifar"].lr, 5e-4, "adamw", "onecycle"),
        (0.01, 0.1, "adam", "cosine"),
        (1e-3, 0.0, "adam", "constant"),
    ]


def test_a_checkpoint_is_gone_on_from(tmp_path: Path, equal_weights: Any) -> None:
    whole, other = fresh(), fresh()
    aep_ext.fit(whole, loader(), loader(), epochs=3, **QUIET)
    path = tmp_path / "new" / "state.ckpt"
    aep_ext.fit(fresh(), loader(), loader(), epochs=2, checkpoint=path, **QUIET)
    result = aep_ext.fit(other, loader(), loader(), epochs=3, checkpoint=path, **QUIET)
    assert len(result.history) == 3 and equal_weights(other.state_dict(), whole.state_dict())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_training_s_progress_of_a_loader_without_a_length() -> None:
    from rich.console import Console

    from aep_ext.training import Progress

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(zip(X[:8], Y[:8], strict=True))

    console = Console(force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    stream = DataLoader(Stream(), 8)
    aep_ext.fit(fresh(), stream, stream, epochs=2, device="cpu", progress=Progress(console=console))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"net": torch.nn.Linear(1, 1)}, TypeError, "fit: net must be a MultiExitNet, got Linear"),
        ({"val": None}, ValueError, "fit: val must be a loader of .* that every epoch can go through, got NoneType"),
        ({"train": pl.LightningDataModule()}, ValueError, "fit: val must be left out .*, got DataLoader"),
        ({"train": iter([(X, Y)])}, ValueError, "fit: train must be a loader .*, got list_iterator"),
        ({"epochs": 0}, ValueError, "fit: epochs must be at least 1, got 0"),
        ({"optimizer": "lion"}, ValueError, "optimizer must be one of .* got 'lion'"),
        ({"recipe": "soup"}, UserError, "no such recipe: 'soup'"),
        ({"train": [X]}, TypeError, r"fit: loader must yield \(x, y\) batches"),
        ({"train": [(X, Y.float())]}, ValueError, r"fit: a batch's y must be integers of shape \[96\]"),
        ({"lr": 1e30}, UserError, "the training diverged"),
    ],
)
def test_what_is_refused(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"net": fresh(), "train": loader(), "val": loader(), "epochs": 1, **QUIET}
    with pytest.raises(kind, match=message):
        aep_ext.fit(**{**arguments, **change})


def test_cosine_needs_a_length() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter([(X, Y)])

    with pytest.raises(ValueError, match="schedule must be constant for a loader without a length"):
        aep_ext.fit(fresh(), DataLoader(Stream(), None), loader(), epochs=1, schedule="cosine", **QUIET)


def test_lightning_is_imported_when_fit_is_asked_for() -> None:
    code = (
        "import sys, aep_ext\n"
        "from aep_ext import *\n"
        "assert not any(name.startswith(('lightning', 'PIL', 'rich')) for name in sys.modules)\n"
        "sys.modules['lightning'] = None\n"
        "try:\n    aep_ext.fit\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs lightning: pip install 'aep_ext[train]'" in done.stdout and done.stdout.count("\n") == 1
