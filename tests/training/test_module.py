"""The LightningModule: its losses, its metrics, its optimizers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lightning", reason="the training needs lightning")

from lightning import pytorch as pl

from aep_ext import ExitWeights
from aep_ext._recipes import Method
from aep_ext.surgery import networks
from aep_ext.training import ImageDataModule, JointLightningModule
from aep_ext.training.fit import quiet_lightning
from aep_ext.training.module import joint_loss, warmup_then


def trainer(**options: object) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 1, **options},
    )


def test_training_loss_is_the_weighted_sum() -> None:
    net = networks.build("resnet_small", 10, 1)
    weights, class_weight = ExitWeights.mixed(4), torch.rand(10) + 0.5
    module = JointLightningModule(net, weights, class_weight=class_weight)
    images, target = torch.randn(6, 1, 8, 8), torch.randint(10, (6,))
    expected = sum(
        a * F.cross_entropy(logits, target, class_weight)
        for a, logits in zip(weights.loss, copy.deepcopy(net).train().exit_logits(images), strict=True)
    )
    torch.testing.assert_close(module.training_step((images, target), 0), expected)
    assert torch.allclose(net.output_weights, torch.tensor(weights.output))


def test_validation_is_a_mean_over_samples_without_class_weights(data: ImageDataModule) -> None:
    net = networks.build("resnet_small", 10, 1)
    module = JointLightningModule(net, ExitWeights.mixed(4), class_weight=torch.rand(10) + 0.5)
    with quiet_lightning():
        trainer().validate(module, datamodule=data, verbose=False)
    images, target = data.dataset("val").__getitems__(list(range(360)))
    net.eval()
    with torch.no_grad():
        logits = net.exit_logits(images)
        together = net(images)
    losses = [float(F.cross_entropy(row, target)) for row in logits]
    record = module.record
    assert record["val/loss"] == pytest.approx(
        sum(a * b for a, b in zip(ExitWeights.mixed(4).loss, losses, strict=True)), rel=1e-4
    )
    assert [record[f"val/exit{e}_loss"] for e in range(4)] == pytest.approx(losses, rel=1e-4)
    assert record["val/top1"] == pytest.approx(float((together.argmax(1) == target).double().mean()), abs=0.01)
    assert set(record) == {
        "val/loss",
        "val/top1",
        *(f"val/exit{e}_{what}" for e in range(4) for what in ("loss", "top1")),
    }


def test_a_user_s_own_trainer(data: ImageDataModule) -> None:
    module = JointLightningModule(networks.build("resnet_small", 10, 1), lr=1e-3, schedule="cosine", seed=3)
    with quiet_lightning():
        mine = trainer(max_epochs=2)
        mine.fit(module, datamodule=data)
        mine.test(module, datamodule=data, verbose=False)
    assert {"train/loss", "val/loss", "val/top1", "val/exit3_top1"} <= set(module.record) | set(mine.callback_metrics)
    assert 0 <= module.record["test/top1"] <= 1
    assert module.net.output_weights.tolist() == [0.25] * 4
    assert mine.lr_scheduler_configs[0].interval == "step"
    assert module(torch.zeros(2, 1, 8, 8)).shape == ((4, 2, 10) if module.training else (2, 10))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop"])
def test_optimizers_by_name(name: str) -> None:
    net = networks.build("resnet_small", 3, 1)
    module = JointLightningModule(net, optimizer=name, lr=0.01, weight_decay=0.1)
    optimizer = module.configure_optimizers()
    assert type(optimizer).__name__.lower() == name
    decaying, others = optimizer.param_groups
    assert decaying["lr"] == 0.01 and (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decaying["params"]} == {2, 4} and {p.dim() for p in others["params"]} == {1}
    assert len(decaying["params"]) + len(others["params"]) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("optimizer", "lion", "one of adam, adamw, sgd, rmsprop, got 'lion'"),
        ("schedule", "lion", "one of constant, cosine, linear, onecycle, got 'lion'"),
        ("augment", ("flip", "lion"), "one of flip, translate, crop, cutout, got 'lion'"),
        ("precision", "64-true", "one of 32-true, 16-mixed, bf16-mixed, auto, got '64-true'"),
        ("lr", 0.0, "finite and greater than 0, got 0.0"),
        ("momentum", 1.0, "at least 0 and less than 1, got 1.0"),
        ("ema", -0.1, "at least 0 and less than 1, got -0.1"),
        ("label_smoothing", 1.5, "within 0..1, got 1.5"),
        ("warmup", float("nan"), "within 0..1, got nan"),
    ],
)
def test_bad_values_of_the_recipe(option: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^Recipe: {option} must be {rule}$"):
        JointLightningModule(networks.build("resnet_small", 3, 1), **{option: value})


def test_warmup_then_a_line_or_a_cosine() -> None:
    for schedule, half in (("cosine", 0.5 * (1 + math.cos(math.pi * 47 / 95))), ("linear", 1 - 47 / 95)):
        factor = warmup_then(schedule, 100, 0.05)
        assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert factor(52) == pytest.approx(half)
        assert factor(100) == pytest.approx(0.0) and factor(1000) == pytest.approx(0.0)
        assert warmup_then(schedule, 1, 0.05)(0) == 1.0


def test_predicting_takes_images_with_or_without_labels() -> None:
    module = JointLightningModule(networks.build("resnet_small", 3, 1)).eval()
    images = torch.randn(2, 1, 16, 16)
    for batch in (images, (images, torch.zeros(2)), [images]):
        assert torch.equal(module.predict_step(batch, 0), module.net(images))


def test_with_gradient_equilibrium_the_exits_losses_are_summed() -> None:
    """Every exit then trains the backbone as much as the one of a single-exit network does, on average."""
    net = networks.build("resnet_small", 10)
    net.set_exit_weights("uniform")
    assert joint_loss(net, Method("plain")).exit_weights.tolist() == [0.25] * 4
    assert joint_loss(net, Method("equal", gradient_equilibrium=True)).exit_weights.tolist() == [1.0] * 4
