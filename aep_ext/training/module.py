"""The joint training of all exits as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aep_ext._recipes import OPTIMIZERS, SCHEDULES, Method
from aep_ext._utils import inputs_and_labels, inputs_of, require
from aep_ext.ensemble import ExitWeights, JointCrossEntropy, LearnedLossWeights
from aep_ext.ops import ensemble
from aep_ext.surgery.multi_exit import MultiExitNet

pl: Any = require("lightning.pytorch", "train", "aep_ext.training")

WARMUP_SHARE = 0.05


class JointLightningModule(pl.LightningModule):
    """Trains a :class:`~aep_ext.MultiExitNet`, all exits and the backbone together, on their joint loss (arXiv
    2301.12168).

    Args:
        net: the network. With one exit this is the ordinary training of a classifier.
        exit_weights: copied into the network's buffers; None: the method's, else those that the network has.
        method: how the exits learn; None, or one exit: by their cross entropies alone.
        class_weight: K weights of the classes for the training loss; the validation loss never uses them.
        lr, weight_decay, optimizer, schedule: see :class:`~aep_ext.training.Recipe`.
        seed: seed torch's global generator from (seed, epoch) at the start of every epoch; None: leave it alone.

    Batches are (images (n, C, H, W), labels (n,) integers), or dicts of them as "pixel_values" or "image", and "labels"
    or "label". Logged at the end of every epoch, for ``train`` and ``val``
    (``test`` likewise): ``val/loss`` (the joint loss), ``val/top1`` (of the full ensemble), ``val/exit0_loss``,
    ``val/exit0_top1`` and so on; losses are means over the samples, accuracies fractions of 1. The training's figures
    are those of the network as it was at each batch. The epoch's values as a plain dict are left in ``record``.

    Raises:
        ValueError: no such optimizer or schedule.
    """

    def __init__(
        self,
        net: MultiExitNet,
        exit_weights: ExitWeights | None = None,
        *,
        method: Method | None = None,
        class_weight: Tensor | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        optimizer: str = "adam",
        schedule: str = "constant",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"JointLightningModule: optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}"
            )
        if schedule not in SCHEDULES:
            raise ValueError(f"JointLightningModule: schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        self.method = Method("none") if method is None or net.num_exits == 1 else method
        weights = exit_weights or self.method.exit_weights
        if weights is not None:
            net.set_exit_weights(weights)
        self.net = net
        self.lr, self.weight_decay, self.optimizer_name, self.schedule = lr, weight_decay, optimizer, schedule
        self.seed = seed
        self.train_loss = joint_loss(net, self.method, class_weight=class_weight)
        self.val_loss = JointCrossEntropy(net.loss_weights)
        self.record: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """What the network gives: exit logits (E, N, K) in training mode, the ensemble's logits (N, K) in eval mode."""
        return self.net(x)

    def _score(self, stage: str, exit_logits: Tensor, target: Tensor, loss: Tensor, exit_losses: Tensor) -> None:
        """Add a batch to the epoch's sums: [samples, loss, right in the ensemble, E losses, E right]."""
        with torch.no_grad():
            n = len(target)
            together = ensemble(exit_logits.detach(), self.net.output_weights).argmax(-1) == target
            alone = (exit_logits.argmax(-1) == target).sum(-1)
            row = torch.cat(
                [
                    torch.stack([loss.new_tensor(n), loss.detach() * n, together.sum()]).double(),
                    exit_losses.detach().double() * n,
                    alone.double(),
                ]
            )
            self._sums[stage] = self._sums[stage] + row if stage in self._sums else row

    def _finish(self, stage: str) -> None:
        """Turn the epoch's sums, of all processes, into logged means."""
        row = self._sums.pop(stage, None)
        if row is None:
            return
        if self.trainer.world_size > 1:
            row = self.all_gather(row).sum(0)
        exits = self.net.num_exits
        values = (row[1:] / row[0]).tolist()
        names = ["loss", "top1", *(f"exit{e}_loss" for e in range(exits)), *(f"exit{e}_top1" for e in range(exits))]
        found = {f"{stage}/{name}": value for name, value in zip(names, values, strict=True)}
        self.record.update(found)
        for name, value in found.items():
            self.log(name, value, prog_bar=name in ("train/loss", "val/loss", "val/top1"))

    def on_fit_start(self) -> None:
        self._equilibrium = self.net.gradient_equilibrium

    def on_fit_end(self) -> None:
        self.net.gradient_equilibrium = self._equilibrium

    def on_train_epoch_start(self) -> None:
        """Begin an epoch; with a seed, dropout and the like then depend on (seed, epoch) alone, however often a run was
        resumed."""
        self.record = {}
        self._sums.clear()
        epochs = self.trainer.max_epochs or 0
        alone = self.current_epoch < min(round(self.method.backbone_epochs * epochs), epochs - 1)
        self.train_loss.backbone_only = alone
        self.net.gradient_equilibrium = not alone and (self.method.gradient_equilibrium or self._equilibrium)
        if self.seed is not None:
            torch.manual_seed(self.seed * 1_000_003 + self.current_epoch)

    def _exit_logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, target = inputs_and_labels("fit", batch)
        return self.net.exit_logits(images), target.to(self.net.output_weights.device, torch.int64)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """The joint loss of a batch, with class weights if there are any."""
        exit_logits, target = self._exit_logits(batch)
        loss, exit_losses, *_ = self.train_loss.losses(exit_logits, target)
        self._score("train", exit_logits, target, loss, exit_losses)
        return loss

    def on_train_epoch_end(self) -> None:
        self._finish("train")

    def _evaluate(self, stage: str, batch: Any) -> None:
        exit_logits, target = self._exit_logits(batch)
        self._score(stage, exit_logits, target, *self.val_loss.losses(exit_logits, target)[:2])

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Score a batch of the validation images."""
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def test_step(self, batch: Any, batch_index: int) -> None:
        """Score a batch of the test images."""
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def predict_step(self, batch: Any, batch_index: int) -> Tensor:
        """The ensemble's logits (n, K) of a batch: images, images with anything behind them, or a dict of them."""
        return self.net(inputs_of("JointLightningModule", batch))

    def configure_optimizers(self) -> Any:
        """All parameters in one optimizer; the cosine schedule moves with every step."""
        parameters = [p for p in (*self.net.parameters(), *self.train_loss.parameters()) if p.requires_grad]
        common: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer_name == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **common)
        else:
            kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
            optimizer = kinds[self.optimizer_name](parameters, **common)
        if self.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:  # Lightning says -1
            raise ValueError("fit: schedule must be constant for a loader without a length, got cosine")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def joint_loss(net: MultiExitNet, method: Method, **options: Any) -> JointCrossEntropy:
    """The loss that a method trains ``net`` with; ``options`` as :class:`~aep_ext.JointCrossEntropy` takes them."""
    learned = method.learned_weights != "no"
    return JointCrossEntropy(
        LearnedLossWeights(net.num_exits, method.learned_weights) if learned else net.loss_weights,
        prefix_weight=method.prefix_weight,
        output_weights=net.output_weights,
        detach_prefix=method.detach_prefix,
        distillation=method.distillation,
        temperature=method.temperature,
        **options,
    )


def cosine_schedule(steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step: linear warm-up over 5 % of the steps, then half a cosine down to
    0."""
    warmup = max(1, round(WARMUP_SHARE * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return factor
