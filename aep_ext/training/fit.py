"""Fit one network, or go on where a killed run left off."""

from __future__ import annotations

import logging
import math
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aep_ext._utils import UserError, require
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.training.callbacks import JointEarlyStopping, RunCheckpoint, TrainingProgress
from aep_ext.training.data import ImageDataModule
from aep_ext.training.module import JointLightningModule
from aep_ext.training.progress import Progress
from aep_ext.training.recipes import Recipe

pl: Any = require("lightning.pytorch", "train", "aep_ext.training")


@dataclass(frozen=True)
class FitResult:
    """How a training went: one dict of numbers per epoch, the epoch kept (from 0), and why it ended."""

    history: list[dict[str, float]]
    best_epoch: int
    stopped_early: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "epochs": len(self.history),
            "best_epoch": self.best_epoch,
            "stopped_early": self.stopped_early,
            "seconds": sum(record["seconds"] for record in self.history),
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
    data: ImageDataModule,
    recipe: Recipe,
    checkpoint: str | Path,
    *,
    seed: int = 0,
    class_weight: torch.Tensor | None = None,
    device: str = "auto",
    precision: str = "32-true",
    title: str = "training",
    progress: Progress | None = None,
) -> FitResult:
    """Train all exits of ``net`` jointly and leave the weights of the best epoch in it.

    Args:
        net: with the exit weights it is to be trained with (``net.set_exit_weights``).
        data: the training and validation images.
        recipe: optimizer, schedule, epochs, patience. Batch size and image size are the data module's.
        checkpoint: file that is replaced after every epoch. If it is there, the training goes on from it.
        seed: of the dropout; the order of the images is the data module's.
        class_weight: (K,) for the training loss.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        precision: as Lightning names it, for example ``bf16-mixed``.
        title: begins every line that is printed.
        progress: where it is shown how far the training is; None: nowhere.

    Raises:
        RuntimeError: no epoch was finished.
        UserError: the training diverged: no epoch had a finite validation loss.
    """
    checkpoint = Path(checkpoint)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    keeper = RunCheckpoint(checkpoint)
    # Without a patience it still stops at a first loss of NaN, and at nothing else.
    stopper = JointEarlyStopping(recipe.patience or recipe.epochs + 1)
    module = JointLightningModule(
        net,
        class_weight=class_weight,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        seed=seed,
    )
    stopped = checkpoint.is_file() and _resume_finished(checkpoint, keeper, stopper, recipe)
    if not stopped:
        with quiet_lightning():
            trainer = pl.Trainer(
                max_epochs=recipe.epochs,
                callbacks=[keeper, stopper, TrainingProgress(title, progress or Progress())],
                logger=False,
                enable_checkpointing=True,
                enable_model_summary=False,
                enable_progress_bar=False,
                num_sanity_val_steps=0,
                precision=precision,
                default_root_dir=str(checkpoint.parent),
                **accelerator_of(device),
            )
            resume = str(checkpoint) if checkpoint.is_file() else None
            _fit_or_interrupt(trainer, module, data, resume)
    if keeper.best is None:
        raise RuntimeError(f"fit: no epoch was finished for {title}")
    if not any(math.isfinite(record["val/loss"]) for record in keeper.history):
        raise UserError(
            f"{title}: the training diverged, no epoch had a finite validation loss; try a smaller learning rate "
            f"than {recipe.lr:g}"
        )
    net.cpu().load_state_dict(keeper.best["weights"])
    net.eval()
    return FitResult(keeper.history, int(keeper.best["epoch"]), stopper.wait_count >= stopper.patience)


def _fit_or_interrupt(
    trainer: pl.Trainer, module: JointLightningModule, data: ImageDataModule, resume: str | None
) -> None:
    """Fit; Ctrl-C is KeyboardInterrupt again, which Lightning turns into the end of the process with SIGINT ignored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except SystemExit as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


def _resume_finished(checkpoint: Path, keeper: RunCheckpoint, stopper: JointEarlyStopping, recipe: Recipe) -> bool:
    """Whether the checkpoint is that of a training which was over; its history and best weights are then in ``keeper``.

    Lightning would train one epoch more after an early stop.
    """
    states = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"]
    kept = states[keeper.state_key]
    waited = states.get(stopper.state_key, {}).get("wait_count", 0)
    over = len(kept["history"]) >= recipe.epochs or waited >= stopper.patience
    if over:
        keeper.load_state_dict(kept)
        stopper.load_state_dict(states[stopper.state_key])
    return over
