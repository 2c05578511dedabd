"""Lightning callbacks: when to stop, what to keep, how to survive a kill, what to print."""

from __future__ import annotations

import copy
import hashlib
import io
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from aep_ext._io import write_bytes
from aep_ext._progress import Progress
from aep_ext._utils import UserError, require

pl: Any = require("lightning.pytorch", "train", "aep_ext.training")
_callbacks: Any = require("lightning.pytorch.callbacks", "train", "aep_ext.training")
_plugins: Any = require("lightning.pytorch.plugins", "train", "aep_ext.training")

_DIGEST = 64  # hexadecimal digits


class JointEarlyStopping(_callbacks.EarlyStopping):
    """Stop after ``patience`` epochs without a strictly smaller joint validation loss (``val/loss``), as published.

    Epochs that trained the backbone alone do not count.
    NaN and infinity are never an improvement. One case differs from the published code, which would go on for
    ``patience`` epochs: a first loss of NaN stops at once.
    """

    def __init__(self, patience: int, monitor: str = "val/loss") -> None:
        super().__init__(
            monitor=monitor,
            patience=patience,
            mode="min",
            min_delta=0.0,
            check_finite=False,
            check_on_train_epoch_end=True,
        )
        self._first = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _backbone_only(pl_module):
            return
        first, self._first = self._first, False
        value = trainer.callback_metrics.get(self.monitor)
        if first and value is not None and bool(torch.isnan(value)):
            self.wait_count = self.patience - 1  # the call below then counts this epoch as the last straw
        super().on_train_epoch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "first": self._first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._first = bool(state_dict.get("first", False))


def _backbone_only(module: Any) -> bool:
    """Whether this epoch trained the backbone and the last exit alone; of any module."""
    return getattr(getattr(module, "train_loss", None), "backbone_only", False)


class SealedCheckpoints(_plugins.TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically and with their SHA-256 in them.

    A checkpoint is a zip archive; the digest of all that is before it is the archive's comment, so that no kill can
    part the two, and ``torch.load`` reads the file as any other. Lightning's own way is through ``TMPDIR``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        data = bytearray(buffer.getbuffer())
        data[-2:] = _DIGEST.to_bytes(2, "little")  # of an archive without comment these two are its length, 0
        data += hashlib.sha256(data).hexdigest().encode()
        write_bytes(path, data)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = True) -> dict[str, Any]:
        """Tensors and plain values; no pickle is run.

        Raises:
            UserError: the file cannot be read, or is not as it was written.
        """
        remedy = "delete it to train that model from its beginning, or restore the file"
        try:
            data = Path(path).read_bytes()
            if hashlib.sha256(data[:-_DIGEST]).hexdigest().encode() != data[-_DIGEST:]:
                raise UserError(f"{path} was changed since it was written: {remedy}")
            return torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except UserError:
            raise
        except Exception as error:  # of a forger's digest
            raise UserError(f"{path} is no checkpoint: {remedy}") from error


class RunCheckpoint(_callbacks.Checkpoint):
    """One checkpoint file, replaced after every epoch: the state to resume from, the history, and the best weights.

    Best is the highest top-1 of the full ensemble on the validation set (``val/top1``), the earliest epoch on a tie; of
    those that trained all exits.
    All of it lies in one file, so that no kill can part the best weights from the state that knows of them. The file
    holds tensors and plain values only: ``torch.load(path, weights_only=True)`` reads it.

    Args:
        path: the file; None: none is written, the best weights are kept in memory.

    Attributes:
        history: one dict of plain numbers per finished epoch.
        best: ``{"epoch": int, "top1": float, "weights": state dict of the network on the CPU}`` or None.
    """

    def __init__(self, path: str | Path | None) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        self._epoch_began = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_began = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record = {
            "epoch": trainer.current_epoch,
            "seconds": time.perf_counter() - self._epoch_began,
            **pl_module.record,
        }
        self.history.append(record)
        top1 = record["val/top1"]
        if not _backbone_only(pl_module) and (self.best is None or top1 > self.best["top1"]):
            state = pl_module.evaluated.state_dict()
            weights = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
            self.best = {"epoch": trainer.current_epoch, "top1": top1, "weights": weights}
        if self.path is not None:
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"history": copy.deepcopy(self.history), "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.best = list(state_dict["history"]), state_dict["best"]


class TrainingProgress(_callbacks.Callback):
    """Shows how far a training is: a bar over all its steps with the time left, or one plain line an epoch.

    Args:
        title: begins every line.
        progress: where it is shown.
    """

    def __init__(self, title: str, progress: Progress) -> None:
        super().__init__()
        self.title, self.progress = title, progress
        self._shown = ExitStack()
        self._task: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A loader without a length: epochs are counted.
        self._sized = math.isfinite(trainer.num_training_batches)
        total = trainer.max_epochs * (trainer.num_training_batches if self._sized else 1)
        self._task = self._shown.enter_context(self.progress.task(self.title, total))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._task(trainer.global_step if self._sized else trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The validation is over by now, the training's own means are not yet made.
        record = pl_module.record
        reached = f"{self.title}: epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        top1 = f"top-1 {100 * record['val/top1']:.2f} %"
        if self.progress.console is None:
            self.progress.line(f"{reached}, validation loss {record['val/loss']:.4f}, {top1}")
        else:
            self._task(trainer.global_step if self._sized else trainer.current_epoch + 1, title=f"{reached}, {top1}")

    def on_train_end(self, *_: Any) -> None:
        self._shown.close()

    def on_exception(self, *_: Any) -> None:
        self._shown.close()
