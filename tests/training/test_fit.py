"""Training one network: what is kept, and going on after an interruption."""

from __future__ import annotations

import importlib
import math
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lightning", reason="the training needs lightning")

from aep_ext import ExitWeights, MultiExitNet
from aep_ext._recipes import precision_on
from aep_ext._utils import UserError
from aep_ext.pruning import single_exit
from aep_ext.surgery import networks
from aep_ext.training import (
    METHODS,
    RECIPES,
    FitResult,
    ImageDataModule,
    JointLightningModule,
    Method,
    Progress,
    Recipe,
    fit,
)
from aep_ext.training.augment import mixed
from aep_ext.training.callbacks import RunCheckpoint, SealedCheckpoints
from aep_ext.training.fit import accelerator_of

fit_module = importlib.import_module("aep_ext.training.fit")  # the package's `fit` is the function

RECIPE = replace(RECIPES["quick"], epochs=4, lr=3e-3, schedule="constant")


def fresh() -> MultiExitNet:
    torch.manual_seed(5)
    net = networks.build("resnet_small", 10, 1)
    net.set_exit_weights(ExitWeights.mixed(4))
    return net


def module() -> ImageDataModule:
    return ImageDataModule("digits", image_size=8, batch_size=32, train_samples=96, seed=1)


def best_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of the best epoch so far, from a checkpoint."""
    return torch.load(path, weights_only=True)["callbacks"]["RunCheckpoint"]["best"]["weights"]


class _Killed(Exception):
    pass


def killed_after(epochs: int) -> Any:
    """A ``write`` that dies when the given epoch has been announced, which is before its checkpoint is written."""

    def write(line: str) -> None:
        if f"epoch {epochs + 1}/" in line:
            raise _Killed

    return write


def test_keeps_the_best_epoch(tmp_path: Path, equal_weights: Any) -> None:
    lines: list[str] = []
    net = fresh()
    result = fit(
        net,
        module(),
        recipe=RECIPE,
        checkpoint=tmp_path / "a.ckpt",
        seed=1,
        device="cpu",
        title="mine",
        progress=Progress(lines.append),
    )
    accuracies = [record["val/top1"] for record in result.history]
    assert len(accuracies) == 4 and accuracies[result.best_epoch] == max(accuracies)
    assert result.best_epoch == accuracies.index(max(accuracies)) and not result.stopped_early and not net.training
    assert {"epoch", "seconds", "train/loss", "train/top1", "val/loss", "val/exit0_top1"} <= set(result.history[0])
    assert [line.split(",")[0] for line in lines] == [f"mine: epoch {number}/4" for number in range(1, 5)]
    assert equal_weights(net.state_dict(), best_weights(tmp_path / "a.ckpt"))
    scored = net(module().dataset("val").__getitems__(list(range(360)))[0]).argmax(1)
    right = (scored == module().dataset("val").labels).double().mean()
    assert float(right) == pytest.approx(max(accuracies), abs=0.003)
    assert result.to_dict()["epochs"] == 4


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        replace(RECIPE, schedule="cosine"),
        replace(RECIPE, schedule="linear", augment=("crop", "cutout"), label_smoothing=0.1, mixup=0.2),
        replace(RECIPES["cifar"], epochs=4, lr=0.03),
    ],
    ids=["constant", "cosine", "linear", "cifar"],
)
def test_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, equal_weights: Any, recipe: Recipe) -> None:
    whole, broken = fresh(), fresh()
    expected = fit(whole, module(), recipe=recipe, checkpoint=tmp_path / "whole.ckpt", seed=1, device="cpu")
    with pytest.raises(_Killed):
        fit(
            broken,
            module(),
            recipe=recipe,
            checkpoint=tmp_path / "broken.ckpt",
            seed=1,
            device="cpu",
            progress=Progress(killed_after(2)),
        )
    kept = torch.load(tmp_path / "broken.ckpt", weights_only=True)
    assert len(kept["callbacks"]["RunCheckpoint"]["history"]) == 2
    other = networks.build("resnet_small", 10, 1)  # whatever the weights are when it goes on
    other.set_exit_weights(ExitWeights.mixed(4))
    lines: list[str] = []
    result = fit(
        other,
        module(),
        recipe=recipe,
        checkpoint=tmp_path / "broken.ckpt",
        seed=1,
        device="cpu",
        progress=Progress(lines.append),
    )
    assert [line.split(",")[0] for line in lines] == ["training: epoch 3/4", "training: epoch 4/4"]
    assert equal_weights(other.state_dict(), whole.state_dict())
    for ours, theirs in zip(result.history, expected.history, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert result.best_epoch == expected.best_epoch
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


class Plain:
    """The same training by hand: a list of loaders' batches, torch's own optimizer, and formulas."""

    def __init__(self, net: MultiExitNet, recipe: Recipe) -> None:
        self.net, self.recipe, self.step, self.average = net, recipe, 0, None
        decaying = [p for p in net.parameters() if p.dim() > 1]
        others = [p for p in net.parameters() if p.dim() <= 1]
        groups = [{"params": decaying, "weight_decay": recipe.weight_decay}, {"params": others}]
        self.optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=True)

    def train(self, batches: list[tuple[torch.Tensor, torch.Tensor]], factor: Any) -> None:
        for x, y in batches:
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.lr * factor(self.step)
            losses = [
                F.cross_entropy(logits, y, label_smoothing=self.recipe.label_smoothing)
                for logits in self.net.exit_logits(x)
            ]
            self.optimizer.zero_grad()
            sum(a * loss for a, loss in zip(self.net.loss_weights.tolist(), losses, strict=True)).backward()
            self.optimizer.step()
            state = {name: value.detach().double() for name, value in self.net.state_dict().items()}
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            if self.average is None:
                self.average = {name: value.clone() for name, value in state.items()}
            else:
                self.average = {n: decay * v + (1 - decay) * state[n] for n, v in self.average.items()}
            self.step += 1


@pytest.mark.parametrize("schedule", ["linear", "onecycle"])
def test_a_training_against_plain_torch(tmp_path: Path, schedule: str) -> None:
    """Nesterov, decay of weights alone, schedule, smoothing and the average of weights and buffers."""
    recipe = Recipe(
        "mine",
        "",
        optimizer="sgd",
        lr=0.02,
        momentum=0.8,
        weight_decay=0.05,
        schedule=schedule,
        warmup=0.25,
        epochs=2,
        label_smoothing=0.2,
        ema=0.5,
    )
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)) for _ in range(6)
    ]
    factors = {"linear": [1 / 3, 2 / 3, 1, *(1 - n / 9 for n in range(9))], "onecycle": []}
    for step in range(12):
        # OneCycleLR: 1/25 up to 1 at step 0.25 * 12 - 1 and down to 1e-4 / 25 at the last, half cosines both.
        if step <= 2:
            first, last, done = 1 / 25, 1.0, step / 2
        else:
            first, last, done = 1.0, 1e-4 / 25, (step - 2) / 9
        factors["onecycle"].append(last + (first - last) / 2 * (1 + math.cos(math.pi * done)))
    net, plain = fresh(), Plain(fresh().train(), recipe)
    result = fit(net, batches, batches, recipe=recipe, checkpoint=tmp_path / "a.ckpt", device="cpu", progress=False)
    averages = []
    for _ in range(2):
        plain.train(batches, lambda step: factors[schedule][step])
        averages.append(plain.average)
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    for name, value in plain.net.state_dict().items():
        assert torch.allclose(state[f"net.{name}"], value, atol=1e-5), name
    for name, value in averages[result.best_epoch].items():
        if not name.endswith("num_batches_tracked"):  # an integer
            assert torch.allclose(net.state_dict()[name].double(), value, atol=1e-5), name
    whole = torch.cat([x for x, _ in batches])
    right = (net(whole).argmax(1) == torch.cat([y for _, y in batches])).double().mean()
    assert float(right) == pytest.approx(result.history[result.best_epoch]["val/top1"])  # the average is what is scored


def test_mixup_and_a_transform_reach_the_loss() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watched(torch.nn.Module):
        def losses(self, exit_logits: torch.Tensor, target: torch.Tensor) -> Any:
            seen.append((exit_logits, target))
            return loss.losses(exit_logits, target)

    task = JointLightningModule(fresh(), mixup=1.0, transform=lambda image: 2 * image)
    loss, task.train_loss = task.train_loss, Watched()  # type: ignore[assignment]
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    torch.manual_seed(3)
    found = task.training_step((x, y), 0)
    torch.manual_seed(3)
    torch.randint(1 << 62, ())  # of the transform
    images, soft = mixed(2 * x, torch.eye(10)[y], 1.0)
    logits = task.net.exit_logits(images)
    torch.testing.assert_close(seen[0][0], logits)
    torch.testing.assert_close(seen[0][1], soft)
    expected = sum(a * F.cross_entropy(o, soft) for a, o in zip(task.net.loss_weights.tolist(), logits, strict=True))
    torch.testing.assert_close(found, expected)
    plain = JointLightningModule(fresh())  # labels that are probabilities already, as CutMix makes them
    torch.testing.assert_close(
        plain.training_step((x, soft), 0),
        sum(
            a * F.cross_entropy(o, soft)
            for a, o in zip(plain.net.loss_weights.tolist(), plain.net.exit_logits(x), strict=True)
        ),
    )
    with pytest.raises(ValueError, match=r"y must be integers of shape \[8\], got torch.float32"):
        plain.validation_step((x, soft), 0)


@pytest.mark.slow
def test_a_transform_of_every_image_under_resume(tmp_path: Path, equal_weights: Any) -> None:
    """Whether the loader calls it, its workers, or fit."""

    def noisy(image: torch.Tensor) -> torch.Tensor:
        return image + torch.randn(image.shape)

    def noisy_pixels(image: torch.Tensor) -> torch.Tensor:
        return (image / 255 + torch.rand(image.shape)).clamp(0, 1)

    def trained(net: MultiExitNet, name: str, write: Any = None) -> None:
        workers = 2 if name.startswith("workers") else 0
        data: Any = ImageDataModule(
            "digits", image_size=8, batch_size=32, train_samples=96, seed=1, transform=noisy_pixels, workers=workers
        )
        augment, val = None, None
        if name.startswith("fit"):
            data, val, augment = module().train_dataloader(), module().val_dataloader(), noisy
        recipe = replace(RECIPE, epochs=3)
        options = {"augment": augment, "checkpoint": tmp_path / name, "seed": 1, "device": "cpu"}
        fit(net, data, val, recipe=recipe, progress=Progress(write) if write else False, **options)

    ends = {}
    for kind in ("fit", "data", "workers"):
        whole, broken = fresh(), fresh()
        trained(whole, f"{kind}-whole")
        with pytest.raises(_Killed):
            trained(broken, f"{kind}-broken", killed_after(1))
        trained(broken, f"{kind}-broken")
        assert equal_weights(whole.state_dict(), broken.state_dict()), kind
        ends[kind] = whole.state_dict()
    assert equal_weights(ends["data"], ends["workers"]) and not equal_weights(ends["data"], ends["fit"])


def test_augment_is_names_or_a_callable() -> None:
    data = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,)))]
    options: dict[str, Any] = {"epochs": 1, "device": "cpu", "progress": False}
    with pytest.raises(ValueError, match="^fit: augment must be a sequence of names, or a callable, got 'flip'"):
        fit(fresh(), data, data, augment="flip", **options)
    with pytest.raises(ValueError, match="^fit: augment must be names beside an ImageDataModule"):
        fit(fresh(), module(), augment=lambda image: image, **options)
    with pytest.raises(ValueError, match="augment must be one of flip, .*, got 'spin'"):
        fit(fresh(), data, data, augment=["spin"], **options)


def test_channels_last_is_of_the_training_alone() -> None:
    seen: list[bool] = []
    net = fresh()
    first = next(module for module in net.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_pre_hook(
        lambda module, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    data = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,)))]
    fit(net, data, data, recipe=replace(RECIPE, epochs=1, channels_last=True), device="cpu", progress=False)
    assert seen and all(seen) and all(p.is_contiguous() for p in net.parameters())


def test_the_precision_that_pays() -> None:
    has = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert precision_on("auto", "cpu") == ("bf16-mixed" if has else "32-true")
    assert precision_on("16-mixed", "cpu") == "16-mixed"


def test_a_finished_training_is_not_begun_again(tmp_path: Path, equal_weights: Any) -> None:
    first = fit(fresh(), module(), recipe=replace(RECIPE, epochs=2), checkpoint=tmp_path / "a.ckpt", device="cpu")
    lines: list[str] = []
    net = fresh()
    second = fit(
        net,
        module(),
        recipe=replace(RECIPE, epochs=2),
        checkpoint=tmp_path / "a.ckpt",
        device="cpu",
        progress=Progress(lines.append),
    )
    assert lines == [] and second.history == first.history
    assert equal_weights(net.state_dict(), best_weights(tmp_path / "a.ckpt"))


def test_early_stop_is_remembered(tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=8, lr=30.0, optimizer="sgd", patience=1)  # diverges: no later epoch is better
    first = fit(fresh(), module(), recipe=recipe, checkpoint=tmp_path / "a.ckpt", device="cpu")
    assert first.stopped_early and len(first.history) < 8
    again = fit(fresh(), module(), recipe=recipe, checkpoint=tmp_path / "a.ckpt", device="cpu")
    assert again.stopped_early and again.history == first.history


def test_checkpoint_holds_tensors_and_plain_values(tmp_path: Path) -> None:
    fit(fresh(), module(), recipe=replace(RECIPE, epochs=1), checkpoint=tmp_path / "a.ckpt", device="cpu")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {"state_dict", "optimizer_states", "loops", "callbacks"} <= set(state)
    keeper = RunCheckpoint(tmp_path / "b.ckpt")
    keeper.load_state_dict(state["callbacks"]["RunCheckpoint"])
    assert keeper.best is not None and keeper.best["epoch"] == 0 and len(keeper.history) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt"]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    recipe, path, marker = replace(RECIPE, epochs=1), tmp_path / "a.ckpt", tmp_path / "executed"
    fit(fresh(), module(), recipe=recipe, checkpoint=path, device="cpu")
    good = path.read_bytes()

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    def sealed(value: Any, name: str) -> bytes:
        SealedCheckpoints().save_checkpoint(value, tmp_path / name)
        return (tmp_path / name).read_bytes()

    changed = "a.ckpt was changed since it was written: delete it to train that model from its beginning"
    for data, message in (
        *((good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :], changed) for place in (100, 90_000, -100, -1)),
        (good[:-1000], changed),
        (b"", changed),
        (sealed({"callbacks": Bomb()}, "bomb"), "a.ckpt is no checkpoint: delete it"),
        (sealed({"callbacks": {}}, "other"), "a.ckpt is of another training: delete it"),
        (sealed({**torch.load(path), "state_dict": {}}, "smaller"), "a.ckpt is of another training: delete it"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            fit(fresh(), module(), recipe=recipe, checkpoint=path, device="cpu")
        assert path.read_bytes() == data and not marker.exists()
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot (read|write) .*a.ckpt: Is a directory"):
        fit(fresh(), module(), recipe=recipe, checkpoint=path, device="cpu")


def test_checkpoints_do_not_pass_through_the_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))  # as TMPDIR, which Python checks only once
    fit(fresh(), module(), recipe=replace(RECIPE, epochs=1), checkpoint=tmp_path / "a.ckpt", device="cpu")
    assert (tmp_path / "a.ckpt").is_file()


def test_a_training_that_learns_nothing_says_so(tmp_path: Path) -> None:
    lines: list[str] = []

    def trained(lr: float) -> FitResult:
        recipe = replace(RECIPE, lr=lr, epochs=2)
        checkpoint = tmp_path / f"{lr}.ckpt"
        return fit(
            fresh(), module(), recipe=recipe, checkpoint=checkpoint, device="cpu", progress=Progress(lines.append)
        )

    assert trained(RECIPE.lr).notice == "" and not any("WARNING" in line for line in lines)
    wild = trained(1e6)  # finite losses: an ordinary training by its looks
    assert "learned nothing or diverged: the training loss ended at" in wild.notice
    assert lines[-1] == f"training: WARNING: {wild.notice}" and wild.to_dict()["notice"] == wild.notice
    assert "learned nothing" in trained(1e-12).notice


EVERYTHING = Method(
    "everything",
    exit_weights="descending",
    prefix_weight=0.5,
    distillation=0.2,
    gradient_equilibrium=True,
    learned_weights="softmax",
    backbone_epochs=0.5,
)


def test_all_techniques_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, bool, bool]] = set()
    moved: list[tuple[int, bool, bool]] = []
    step, net = JointLightningModule.training_step, fresh()
    before = [net.exits[e].linear.weight.detach().clone() for e in (0, 3)]

    def watched(self: JointLightningModule, batch: Any, index: int) -> torch.Tensor:
        seen.add((self.current_epoch, self.train_loss.backbone_only, self.net.gradient_equilibrium))
        heads = [not torch.equal(self.net.exits[e].linear.weight, old) for e, old in zip((0, 3), before, strict=True)]
        moved.append((self.current_epoch, *heads))
        return step(self, batch, index)

    monkeypatch.setattr(JointLightningModule, "training_step", watched)
    result = fit(net, module(), epochs=4, method=EVERYTHING, device="cpu", progress=False)
    assert sorted(seen) == [(0, True, False), (1, True, False), (2, False, True), (3, False, True)]
    # In the first half the last exit learns, and the first not at all.
    assert [pair[1:] for pair in moved if pair[0] == 1] == [(False, True)] * 3 and moved[-1] == (3, True, True)
    assert result.best_epoch >= 2 and not net.gradient_equilibrium
    torch.testing.assert_close(net.loss_weights, torch.tensor(ExitWeights.descending(4).loss))


def test_the_loss_of_a_method() -> None:
    loss = JointLightningModule(fresh(), method=replace(EVERYTHING, temperature=2.0, detach_prefix=True)).train_loss
    assert (loss.prefix_weight, loss.detach_prefix, loss.distillation, loss.temperature) == (0.5, True, 0.2, 2.0)
    assert loss.learned.form == "softmax"
    torch.testing.assert_close(loss.output_weights, torch.tensor(ExitWeights.descending(4).output))
    torch.testing.assert_close(loss.learned(), torch.ones(4))  # gradient equilibrium divides by 4
    mean = JointLightningModule(fresh(), method=replace(EVERYTHING, gradient_equilibrium=False)).train_loss
    assert mean.distillation == 0.05 and float(mean.learned().detach().sum()) == 1.0  # a mean over the exits, not a sum
    plain = JointLightningModule(fresh()).train_loss
    assert (plain.prefix_weight, plain.distillation, plain.learned) == (0.0, 0.0, None)
    torch.testing.assert_close(plain.exit_weights, torch.tensor(ExitWeights.mixed(4).loss))


def test_a_single_exit_knows_no_method(equal_weights: Any) -> None:
    nets = []
    for method in (None, EVERYTHING):
        net = single_exit(fresh())
        fit(net, module(), epochs=1, seed=0, method=method, device="cpu", progress=False)
        nets.append(net)
    equal_weights(*(net.state_dict() for net in nets))


def test_a_recipe_by_name_brings_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []

    def watched(*args: Any, **options: Any) -> Any:
        built.append(options["method"])
        raise _Killed

    monkeypatch.setattr(fit_module, "JointLightningModule", watched)
    asked: list[dict[str, Any]] = [
        {},
        {"recipe": RECIPES["quick"]},
        {"recipe": "quick"},
        {"recipe": "quick", "method": "MIX"},
    ]
    for options in asked:
        with pytest.raises(_Killed):
            fit(fresh(), module(), **options)
    assert built == [None, None, METHODS[RECIPES["quick"].method], METHODS["mixed"]]
    with pytest.raises(
        UserError, match=r"no such method: 'soup' \(there are: uniform, ascending, descending, mixed, best\)"
    ):
        fit(fresh(), module(), method="soup")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("prefix_weight", 1.5, "prefix-weight must be a share within 0..1, got 1.5"),
        ("backbone_epochs", -0.1, "backbone-epochs must be a share within 0..1, got -0.1"),
        ("distillation", -1.0, "distillation must be finite and >= 0, got -1.0"),
        ("temperature", 0.0, "temperature must be finite and > 0, got 0.0"),
        ("learned_weights", "luck", "no such learned-weights: 'luck' .*uncertainty, softmax"),
        ("exit_weights", "luck", "no such exit-weights: 'luck' .*uniform, ascending, descending, mixed"),
    ],
)
def test_methods_are_checked(field: str, value: Any, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        Method("mine", **{field: value})


def test_interrupt(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)

    def write(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(fresh(), module(), recipe=RECIPE, checkpoint=tmp_path / "a.ckpt", device="cpu", progress=Progress(write))
    assert signal.getsignal(signal.SIGINT) is handler


def test_devices() -> None:
    assert accelerator_of("auto") == accelerator_of("cuda" if torch.cuda.is_available() else "cpu")
    assert accelerator_of("cpu") == {"accelerator": "cpu", "devices": 1}
    assert accelerator_of("cuda:1") == {"accelerator": "gpu", "devices": [1]}


@pytest.mark.parametrize("patience", [None, 12])
def test_a_training_that_diverges_stops_at_once_and_says_so(tmp_path: Path, patience: int | None) -> None:
    lines: list[str] = []
    recipe = replace(RECIPE, lr=1e30, patience=patience)
    with pytest.raises(UserError, match=r"^mine: the training diverged.*smaller learning rate than 1e\+30"):
        fit(
            fresh(),
            module(),
            recipe=recipe,
            checkpoint=tmp_path / "a.ckpt",
            device="cpu",
            title="mine",
            progress=Progress(lines.append),
        )
    assert len(lines) == 1
