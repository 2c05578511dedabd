"""The joint training of all exits as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from aep_ext._recipes import Method, Recipe
from aep_ext._utils import inputs_and_labels, inputs_of, require
from aep_ext.ensemble import ExitWeights, JointCrossEntropy, LearnedLossWeights
from aep_ext.ops import ensemble
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.training.augment import augmented, each_transformed, mixed

pl: Any = require("lightning.pytorch", "train", "aep_ext.training")


class JointLightningModule(pl.LightningModule):
    """Trains a :class:`~aep_ext.MultiExitNet`, all exits and the backbone together, on their joint loss (arXiv
    2301.12168).

    Args:
        net: the network. With one exit this is the ordinary training of a classifier.
        exit_weights: copied into the network's buffers; None: the method's, else those that the network has.
        recipe: how it is optimised; None: that of ``Recipe``'s defaults.
        method: how the exits learn; None, or one exit: by their cross entropies alone.
        class_weight: K weights of the classes for the training loss; the validation loss never uses them.
        transform: called for each training image (C, H, W) by itself, as torchvision's transforms are, before the
            recipe's augmentations; None: nothing.
        seed: seed torch's global generator from (seed, epoch) at the start of every epoch; None: leave it alone.
        changes: fields of the :class:`~aep_ext.training.Recipe` to be otherwise, ``lr=0.1`` for example. Of them the
            module heeds ``optimizer``, ``lr``, ``momentum``, ``weight_decay``, ``schedule``, ``warmup``, ``augment``,
            ``mixup``, ``label_smoothing``, ``ema`` and ``channels_last``; the rest is the Trainer's and the loader's.

    Batches are (images (n, C, H, W), labels (n,) integers), or dicts of them as "pixel_values" or "image", and "labels"
    or "label"; to train on, labels may be probabilities (n, K), as torchvision's MixUp and CutMix make them. Logged at
    the end of every epoch, for ``train`` and ``val`` (``test`` likewise): ``val/loss`` (the joint loss), ``val/top1``
    (of the full ensemble), ``val/exit0_loss``, ``val/exit0_top1`` and so on; losses are means over the samples,
    accuracies fractions of 1. The training's figures are those of the network as it was at each batch; ``val`` and
    ``test`` score ``evaluated``, with ``ema`` the average of the weights. The epoch's values are left in ``record``, a
    plain dict.

    Raises:
        ValueError: a value of the recipe is out of range, or a name unknown.
    """

    def __init__(
        self,
        net: MultiExitNet,
        exit_weights: ExitWeights | None = None,
        *,
        recipe: Recipe | None = None,
        method: Method | None = None,
        class_weight: Tensor | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        seed: int | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        self.recipe = replace(recipe or Recipe("fit", ""), **changes)
        self.method = Method("none") if method is None or net.num_exits == 1 else method
        weights = exit_weights or self.method.exit_weights
        if weights is not None:
            net.set_exit_weights(weights)
        # Torch's stubs before 2.14 do not know memory_format alone.
        self.net = cast(Any, net).to(memory_format=torch.channels_last) if self.recipe.channels_last else net
        self.ema: AveragedModel | None = None
        if self.recipe.ema:
            self.ema = AveragedModel(net, multi_avg_fn=_ema(self.recipe.ema), use_buffers=True).requires_grad_(False)
        self.transform, self.seed = transform, seed
        self._generator: torch.Generator | None = None
        self.train_loss = joint_loss(
            net, self.method, class_weight=class_weight, label_smoothing=self.recipe.label_smoothing
        )
        self.val_loss = JointCrossEntropy(net.loss_weights)
        self.record: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}

    @property
    def evaluated(self) -> MultiExitNet:
        """The network that is validated and kept: the average of the weights, where there is one."""
        return self.net if self.ema is None else cast(MultiExitNet, self.ema.module)

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
        """Begin an epoch; with a seed, augmentation, dropout and the like then depend on (seed, epoch) alone, however
        often a run was resumed."""
        self.record = {}
        self._sums.clear()
        epochs = self.trainer.max_epochs or 0
        alone = self.current_epoch < min(round(self.method.backbone_epochs * epochs), epochs - 1)
        self.train_loss.backbone_only = alone
        self.net.gradient_equilibrium = not alone and (self.method.gradient_equilibrium or self._equilibrium)
        if self.seed is not None:
            torch.manual_seed(self.seed * 1_000_003 + self.current_epoch)
        # Its own, so that the images of an epoch are the same for every network.
        seed = int(torch.randint(1 << 62, ())) if self.seed is None else torch.initial_seed()
        self._generator = torch.Generator().manual_seed(seed)

    def _inputs(self, batch: Any, soft: bool = False) -> tuple[Tensor, Tensor]:
        images, target = inputs_and_labels("fit", batch, soft)
        if self.recipe.channels_last and images.dim() == 4:
            images = images.to(memory_format=torch.channels_last)
        kind = torch.float32 if target.is_floating_point() else torch.int64
        return images, target.to(self.net.output_weights.device, kind)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """The joint loss of a batch, with class weights if there are any."""
        images, target = self._inputs(batch, soft=True)
        labels = target if target.dim() == 1 else target.argmax(1)
        if self.transform is not None:
            seed = int(torch.randint(1 << 62, (), generator=self._generator))
            images = torch.stack(each_transformed(images, self.transform, seed))
        images = augmented(images, self.recipe.augment, self._generator)
        if self.recipe.mixup:
            target = target if target.dim() == 2 else F.one_hot(target, self.net.num_classes).float()
            images, target = mixed(images, target, self.recipe.mixup, self._generator)
        exit_logits = self.net.exit_logits(images)
        loss, exit_losses, *_ = self.train_loss.losses(exit_logits, target)
        self._score("train", exit_logits, labels, loss, exit_losses)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step of the optimizer, and of the average of the weights."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.net)

    def on_train_epoch_end(self) -> None:
        self._finish("train")

    def _evaluate(self, stage: str, batch: Any) -> None:
        images, target = self._inputs(batch)
        exit_logits = self.evaluated.exit_logits(images)
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
        return self.evaluated(inputs_of("JointLightningModule", batch))

    def configure_optimizers(self) -> Any:
        """All parameters in one optimizer; where weights decay, biases and norms in a group that does not. Schedules
        move with every step."""
        recipe = self.recipe
        parameters = [p for p in (*self.net.parameters(), *self.train_loss.parameters()) if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if recipe.weight_decay:
            groups = [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1]},
            ]
        common: dict[str, Any] = {"lr": recipe.lr, "weight_decay": 0.0}
        if recipe.optimizer == "sgd":
            common |= {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0}
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, **common)
        else:
            kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
            optimizer = kinds[recipe.optimizer](groups, **common)
        if recipe.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:  # Lightning says -1
            raise ValueError(f"fit: schedule must be constant for a loader without a length, got {recipe.schedule}")
        scheduler: Any
        if recipe.schedule == "onecycle":
            share = recipe.warmup
            if round(share * steps, 6) in (1, steps):  # a phase without a step: torch divides by its length
                share -= 0.5 / steps
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, recipe.lr, total_steps=int(steps), pct_start=share, cycle_momentum=False
            )
        else:
            factor = warmup_then(recipe.schedule, int(steps), recipe.warmup)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def joint_loss(net: MultiExitNet, method: Method, **options: Any) -> JointCrossEntropy:
    """The loss that a method trains ``net`` with; ``options`` as :class:`~aep_ext.JointCrossEntropy` takes them."""
    # Gradient equilibrium divides by the number of exits: their losses are a sum there, not a mean.
    times = net.num_exits if method.gradient_equilibrium else 1
    learned = method.learned_weights != "no"
    return JointCrossEntropy(
        LearnedLossWeights(net.num_exits, method.learned_weights, total=times) if learned else times * net.loss_weights,
        prefix_weight=method.prefix_weight,
        output_weights=net.output_weights,
        detach_prefix=method.detach_prefix,
        distillation=method.distillation * times / net.num_exits,
        temperature=method.temperature,
        **options,
    )


def _ema(decay: float) -> Callable[..., None]:
    """An exponential moving average whose decay grows to its value, so that the first weights are soon forgotten."""

    def average(averaged: Any, current: Any, count: Tensor) -> None:
        steps = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averaged, current, count)

    return average


def warmup_then(schedule: str, steps: int, warmup: float) -> Callable[[int], float]:
    """The factor on the learning rate at each step: linear warm-up over a share of the steps, then a line ("linear") or
    half a cosine ("cosine") down to 0."""
    first = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < first:
            return (step + 1) / first
        done = min(1.0, (step - first) / max(1, steps - first))
        return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return factor
