"""Fit one network, or go on where a killed run left off."""

from __future__ import annotations

import logging
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from aep_ext._progress import Progress
from aep_ext._recipes import Method, Recipe, method_named, precision_on, recipe_named
from aep_ext._utils import UserError, require
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.training.callbacks import JointEarlyStopping, RunCheckpoint, SealedCheckpoints, TrainingProgress
from aep_ext.training.data import ImageDataModule
from aep_ext.training.module import JointLightningModule

pl: Any = require("lightning.pytorch", "train", "aep_ext.training")


@dataclass(frozen=True)
class FitResult:
    """How a training went: one dict of numbers per epoch, the epoch kept (from 0), why it ended, and, where the network
    learned nothing, a notice that says so."""

    history: list[dict[str, float]]
    best_epoch: int
    stopped_early: bool
    notice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "epochs": len(self.history),
            "best_epoch": self.best_epoch,
            "stopped_early": self.stopped_early,
            "seconds": sum(record["seconds"] for record in self.history),
            "notice": self.notice,
            "history": self.history,
        }


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's greetings and its advice on loggers and workers; errors still show."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings(
                "ignore", message=r".*(does not have many workers|log_every_n_steps|isinstance\(treespec).*"
            )
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def accelerator_of(device: str) -> dict[str, Any]:
    """Trainer arguments for ``auto``, ``cpu``, ``cuda`` or ``cuda:1``."""
    kind, _, number = device.partition(":")
    if kind == "auto":  # as torch_device: Lightning's own "auto" also takes devices that lack float64
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        return {"accelerator": "gpu", "devices": [int(number or 0)]}
    return {"accelerator": kind, "devices": 1}


def fit(
    net: MultiExitNet,
    train: Iterable[Any] | ImageDataModule,
    val: Iterable[Any] | None = None,
    *,
    epochs: int | None = None,
    lr: float | None = None,
    optimizer: str | None = None,
    weight_decay: float | None = None,
    schedule: str | None = None,
    augment: Sequence[str] | Callable[[torch.Tensor], torch.Tensor] | None = None,
    recipe: Recipe | str | None = None,
    method: Method | str | None = None,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    class_weight: torch.Tensor | None = None,
    device: str = "auto",
    precision: str | None = None,
    logger: Any = None,
    title: str = "training",
    progress: Progress | bool = True,
) -> FitResult:
    """Train all exits of ``net`` jointly and leave the weights of the best epoch in it.

    ::

        aep_ext.fit(net, train_loader, val_loader, epochs=20, lr=1e-3)

    An epoch is the better, the higher the top-1 of the ensemble of all exits on ``val``.

    Args:
        net: the network; without a method it is trained with the exit weights that it has. Afterwards it is in eval
            mode, on the device where it was.
        train: a loader of (x, y) batches, x (n, C, H, W), y (n,) integers or probabilities (n, K), or of dicts with
            "pixel_values" or "image", and "labels" or "label". Or a Lightning data module that has ``val`` too.
        val: such a loader, y integers.
        epochs: at most so many (20).
        lr: learning rate (1e-3).
        optimizer: adam (the default), adamw, sgd (with Nesterov momentum) or rmsprop.
        weight_decay: as the optimizer takes it (0), of weights, not of biases and norms.
        schedule: constant (the default), cosine, linear or onecycle, see :class:`Recipe`.
        augment: names of :class:`Recipe`'s augmentations; or a callable, for example a transform of torchvision v2,
            that is given each training image (C, H, W) by itself as the loader has it. :class:`ImageDataModule` takes
            the latter itself, for images that are not yet normalised.
        recipe: a :class:`Recipe` or the name of one: what is not given above is as it says, and its patience counts:
            so many epochs without a smaller joint validation loss end the training. Its image and batch sizes do not.
        method: how the exits learn: a :class:`Method` or the name of one; its exit weights are copied into ``net``, its
            form of heads does not count. None: the recipe's if ``recipe`` is a name, else the exits' cross entropies
            alone. A network with one exit is trained without any.
        checkpoint: file that is replaced after every epoch; if it is there, the training goes on from it. None: none.
        seed: torch's generator is seeded from it and the epoch at the start of every epoch, for dropout and the like;
            the order of the images is the loader's. None: it is left alone.
        class_weight: (K,) for the training loss.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        precision: as :class:`Recipe`'s (32-true).
        logger: a logger of Lightning's, or several, for the metrics of every epoch; None: none.
        title: begins every line that is printed.
        progress: a bar in a terminal and a line an epoch elsewhere; False: nothing.

    Returns:
        :class:`FitResult`: the losses and accuracies of every epoch, the epoch that was kept.

    Raises:
        TypeError: ``net`` is no MultiExitNet, or a loader yields something else.
        ValueError: no such optimizer or schedule, or a loader that can be gone through only once.
        RuntimeError: no epoch was finished.
        UserError: no such recipe or method, or the training diverged: no epoch had a finite validation loss; or the
            checkpoint is damaged, of another network, or cannot be written.
        ImportError: Lightning is missing.
    """
    if not isinstance(net, MultiExitNet):
        raise TypeError(f"fit: net must be a MultiExitNet, got {type(net).__name__}")
    data = _loaders(train, val)
    if isinstance(augment, str):
        raise ValueError(f"fit: augment must be a sequence of names, or a callable, got {augment!r}")
    if isinstance(recipe, str):
        recipe = recipe_named(recipe)
        method = method or recipe.method
    recipe = recipe or Recipe("fit", "")
    method = method_named(method) if isinstance(method, str) else method
    given: dict[str, Any] = {
        "epochs": epochs,
        "lr": lr,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "precision": precision,
        "augment": None if augment is None or callable(augment) else tuple(augment),
    }
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    if callable(augment) and isinstance(train, ImageDataModule):
        raise ValueError("fit: augment must be names beside an ImageDataModule, which takes transforms itself")
    if recipe.epochs < 1:
        raise ValueError(f"fit: epochs must be at least 1, got {recipe.epochs}")
    if isinstance(progress, bool):
        progress = Progress.of_terminal(quiet=not progress)
    home = net.output_weights.device
    checkpoint = None if checkpoint is None else Path(checkpoint)
    keeper = RunCheckpoint(checkpoint)
    # Without a patience it still stops at a first loss of NaN, and at nothing else.
    stopper = JointEarlyStopping(recipe.patience or recipe.epochs + 1)
    module = JointLightningModule(
        net,
        recipe=recipe,
        method=method,
        class_weight=class_weight,
        transform=augment if callable(augment) else None,
        seed=seed,
    )
    resume = checkpoint if checkpoint is not None and checkpoint.is_file() else None
    if resume is None or not _resume_finished(resume, module, keeper, stopper, recipe):
        with quiet_lightning():
            trainer = pl.Trainer(
                max_epochs=recipe.epochs,
                callbacks=[keeper, stopper, TrainingProgress(title, progress)],
                plugins=[SealedCheckpoints()],
                logger=logger or False,
                enable_checkpointing=True,
                enable_model_summary=False,
                enable_progress_bar=False,
                num_sanity_val_steps=0,
                precision=precision_on(recipe.precision, device),
                default_root_dir=None if checkpoint is None else str(checkpoint.parent),
                **accelerator_of(device),
            )
            _fit_or_interrupt(trainer, module, data, None if resume is None else str(resume))
    if keeper.best is None:
        raise RuntimeError(f"fit: no epoch was finished for {title}")
    if not any(math.isfinite(record["val/loss"]) for record in keeper.history):
        raise UserError(
            f"{title}: the training diverged, no epoch had a finite validation loss; try a smaller learning rate "
            f"than {recipe.lr:g}"
        )
    net.to(home).load_state_dict(keeper.best["weights"])
    if recipe.channels_last:
        cast(Any, net).to(memory_format=torch.contiguous_format)
    net.eval()
    notice = _learned_nothing(keeper, net)
    if notice:
        progress.line(f"{title}: WARNING: {notice}")
    return FitResult(keeper.history, int(keeper.best["epoch"]), stopper.wait_count >= stopper.patience, notice)


def _learned_nothing(keeper: RunCheckpoint, net: MultiExitNet) -> str:
    """What to say of a training that ended no better than a constant answer; "" of any other.

    Where all classes get the same probability the joint loss is sum(a_e) ln K, whatever the weights of the classes.
    """
    assert keeper.best is not None
    chance, last, top1 = 1 / net.num_classes, keeper.history[-1], keeper.best["top1"]
    # Not train/loss, which a method may have made of more terms. Probabilities as labels are not divided by the weights
    # of their classes; the validation loss has neither.
    loss = sum(weight * last[f"train/exit{e}_loss"] for e, weight in enumerate(net.loss_weights.tolist()))
    loss = min(loss, last["val/loss"])
    constant = -float(net.loss_weights.sum()) * math.log(chance)
    if net.num_classes == 1 or (loss < constant and top1 > chance):
        return ""
    found = f"the training loss ended at {loss:.3g}, where guessing has {constant:.3g}"
    if loss < constant:
        found = f"validation top-1 is {100 * top1:.1f} %, where guessing has {100 * chance:.1f} %"
    return f"the network learned nothing or diverged: {found}; try a smaller learning rate, or train longer"


def _loaders(train: Any, val: Any) -> dict[str, Any]:
    """The data as arguments of ``Trainer.fit``."""
    if isinstance(train, pl.LightningDataModule):
        if val is not None:
            raise ValueError(f"fit: val must be left out beside a data module, got {type(val).__name__}")
        return {"datamodule": train}
    for name, loader in (("train", train), ("val", val)):
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
            raise ValueError(
                f"fit: {name} must be a loader of (x, y) batches that every epoch can go through, "
                f"got {type(loader).__name__}"
            )
    # Lightning takes a list for several loaders.
    train, val = (DataLoader(x, batch_size=None) if isinstance(x, (list, tuple)) else x for x in (train, val))  # type: ignore[arg-type]
    return {"train_dataloaders": train, "val_dataloaders": val}


def _fit_or_interrupt(
    trainer: pl.Trainer, module: JointLightningModule, data: dict[str, Any], resume: str | None
) -> None:
    """Fit; Ctrl-C is KeyboardInterrupt again, which Lightning turns into the end of the process with SIGINT ignored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, **data, ckpt_path=resume, weights_only=True)
    except SystemExit as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


def _resume_finished(
    checkpoint: Path,
    module: JointLightningModule,
    keeper: RunCheckpoint,
    stopper: JointEarlyStopping,
    recipe: Recipe,
) -> bool:
    """Whether the checkpoint is that of a training which was over; its history and best weights are then in ``keeper``.

    Lightning would train one epoch more after an early stop.
    """
    state, own = SealedCheckpoints().load_checkpoint(checkpoint), module.state_dict()
    try:
        states, kept = state["callbacks"], state["callbacks"][keeper.state_key]
        fits = {name: tensor.shape for name, tensor in state["state_dict"].items()} == {
            n: t.shape for n, t in own.items()
        }
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"{checkpoint} is of another training: delete it to train from the beginning, or restore the file"
        )
    waited = states.get(stopper.state_key, {}).get("wait_count", 0)
    over = len(kept["history"]) >= recipe.epochs or waited >= stopper.patience
    if over:
        keeper.load_state_dict(kept)
        stopper.load_state_dict(states[stopper.state_key])
    return over
