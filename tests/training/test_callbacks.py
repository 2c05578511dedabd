"""Early stopping against the published experiment's stop epochs, through a real Trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning", reason="the training needs lightning")

from lightning import pytorch as pl

from aep_ext.training import JointEarlyStopping
from aep_ext.training.fit import quiet_lightning

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "published.json").read_text())["early_stopping_patience12"]


class _Scripted(pl.LightningModule):
    """Reports the losses it is given, one an epoch."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses, self.seen = losses, 0
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_index: int) -> torch.Tensor:
        return self.weight * 0

    def validation_step(self, batch: torch.Tensor, batch_index: int) -> None:
        self.log("val/loss", self.losses[self.seen])
        self.seen += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> list[torch.Tensor]:
        return [torch.zeros(1)]

    val_dataloader = train_dataloader


class _BackboneFirst(_Scripted):
    """Its first three epochs train the backbone alone."""

    def on_train_epoch_start(self) -> None:
        self.train_loss = SimpleNamespace(backbone_only=self.current_epoch < 3)


def stop_epoch(losses: list[float], patience: int = 12, kind: type[_Scripted] = _Scripted) -> int | None:
    """The number of the epoch, from 1, after which training stopped; None where it ran to the end."""
    module = kind(losses)
    with quiet_lightning():
        trainer = pl.Trainer(
            max_epochs=len(losses),
            callbacks=[JointEarlyStopping(patience)],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module)
    return module.seen if trainer.should_stop else None


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "nan_first"])
def test_published_stop_epochs(name: str) -> None:
    losses = [float(loss) for loss in GOLDEN[name]["losses"]]
    assert stop_epoch(losses) == GOLDEN[name]["stop_epoch"]


def test_a_first_loss_of_nan_stops_at_once() -> None:
    assert stop_epoch([math.nan, 1.0, 0.5]) == 1


def test_epochs_of_the_backbone_alone_do_not_count() -> None:
    losses = [1.0, 2.0, 3.0, 9.0, 8.0, 8.5, 1.0]
    assert stop_epoch(losses, patience=1) == 2
    assert stop_epoch(losses, patience=1, kind=_BackboneFirst) == 6


def test_state_survives() -> None:
    before = JointEarlyStopping(3)
    before._first, before.wait_count = False, 2
    after = JointEarlyStopping(3)
    after.load_state_dict(before.state_dict())
    assert (after._first, after.wait_count) == (False, 2)
