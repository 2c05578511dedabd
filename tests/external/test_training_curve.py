"""The fused loss in timm's script: what counts as the same curve, and the whole check on a small script."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="the network is timm's resnet18")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
pytest.importorskip("lightning", reason="aep_ext.training needs the extra [train]")

from aep_ext import JointCrossEntropy  # noqa: E402
from benchmarks.external import timm_run, training_curve  # noqa: E402
from benchmarks.external.training_curve import compare, read_curve, replace_line, write_images  # noqa: E402

# A training script with the options, the loss line and the summary of timm's, which AEP_TIMM_TRAIN may name instead.
SCRIPT = """\
import argparse, csv, os
import torch, timm, yaml
from torch import nn
from timm.data import create_dataset, create_loader

parser = argparse.ArgumentParser()
for name, kind in dict(config=str, data_dir=str, output=str, experiment=str, model=str, num_classes=int, workers=int,
                       warmup_epochs=int, epochs=int, batch_size=int, lr=float, seed=int, checkpoint_hist=int,
                       smoothing=float).items():
    parser.add_argument("--" + name.replace("_", "-"), type=kind)
parser.add_argument("--input-size", type=int, nargs=3)
parser.add_argument("--model-kwargs", nargs="*", action=timm.utils.ParseKwargs)
args = parser.parse_args()
device = yaml.safe_load(open(args.config))["device"]
timm.utils.random_seed(args.seed)  # torch, numpy and random: augmentations draw from all three
model = timm.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs).to(device)
train, validation = (
    create_loader(create_dataset("", root=args.data_dir, split=split), input_size=tuple(args.input_size),
                  batch_size=args.batch_size, is_training=split == "train", use_prefetcher=False, num_workers=0,
                  persistent_workers=False)
    for split in ("train", "validation")
)
if args.smoothing:
    train_loss_fn = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
else:
    train_loss_fn = nn.CrossEntropyLoss()
validate_loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
folder = os.path.join(args.output, args.experiment)
os.makedirs(folder)
with open(os.path.join(folder, "summary.csv"), "w") as file:
    rows = csv.writer(file)
    rows.writerow(["epoch", "train_loss", "eval_loss", "eval_top1"])
    for epoch in range(args.epochs):
        model.train()
        losses = []
        for x, y in train:
            loss = train_loss_fn(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            found = [(validate_loss_fn(o, y).item(), 100 * (o.argmax(1) == y).float().mean().item())
                     for o, y in ((model(x), y) for x, y in validation)]
        rows.writerow([epoch, sum(losses) / len(losses), *(sum(v) / len(v) for v in zip(*found))])
"""


SMALL = ("--train=32", "--validation=16", "--epochs=1", "--batch-size=16", "--pixels=32")


def curve(*losses: float, top1: float = 50.0) -> list[dict[str, float]]:
    return [
        {"epoch": epoch, "train_loss": loss, "eval_loss": loss, "eval_top1": top1} for epoch, loss in enumerate(losses)
    ]


def agreement(candidate: list[dict[str, float]], metric: str = "train_loss", rounded: float = 1.001) -> list[bool]:
    plain, yardsticks = curve(2.0, 1.0, 0.5), [curve(2.0, 1.0, 0.5), curve(2.0, rounded, 0.5)]
    rows = compare(plain, yardsticks, candidate, validation_images=100)
    return [row["agrees"] for row in rows if row["metric"] == metric]


def test_allowed_is_three_times_the_largest_yardstick_so_far_or_the_floor():
    assert agreement(curve(2.0, 1.0029, 0.5029)) == [True, True, True]
    assert agreement(curve(2.0, 1.0031, 0.5031)) == [True, False, False]
    assert agreement(curve(2.0029, 1.0, 0.5)) == [False, True, True]  # before the yardstick has moved
    assert agreement(curve(2.000009, 1.0, 0.5)) == [True, True, True]
    assert all(agreement(curve(2.0, 1.0, 0.5, top1=51.0), "eval_top1"))  # one validation image
    assert not any(agreement(curve(2.0, 1.0, 0.5, top1=52.0), "eval_top1"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_does_not_agree(value):
    assert agreement(curve(2.0, value, 0.5)) == [True, False, True]
    assert agreement(curve(2.0, 1.0, 0.5), rounded=value) == [True, False, False]


def test_a_summary_is_read_in_full_precision(tmp_path):
    file = tmp_path / "summary.csv"
    file.write_text("epoch,train_loss,eval_loss,eval_top1,lr\n0,2.3025850929940455,0.1,12.5,0.05\n")
    assert read_curve(file) == [{"epoch": 0, "train_loss": 2.3025850929940455, "eval_loss": 0.1, "eval_top1": 12.5}]
    file.write_text("epoch,train_loss\n0,1.0\n")
    with pytest.raises(ValueError, match="eval_loss"):
        read_curve(file)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_exactly_one_line_differs_at_its_indentation(ending):
    script = SCRIPT.replace("\n", ending)
    changed = replace_line(script, "import x; train_loss_fn = x.Loss()")
    pairs = list(zip(script.splitlines(keepends=True), changed.splitlines(keepends=True), strict=True))
    assert [new for old, new in pairs if old != new] == [f"    import x; train_loss_fn = x.Loss(){ending}"]
    with pytest.raises(ValueError, match="exactly once, found 2 times"):
        replace_line(script + training_curve.LOSS_LINE, "pass")


def test_the_losses_are_the_same_and_the_yardsticks_rounded_differently():
    def value_and_gradient(loss: nn.Module, logits: torch.Tensor) -> list[torch.Tensor]:
        logits = logits.clone().requires_grad_()
        value = loss(logits, target)
        value.backward()
        return [value.detach(), logits.grad]

    weights, logits, target = (0.125, 0.25, 0.625), 3 * torch.randn(3, 64, 10), torch.randint(10, (64,))
    plain = timm_run.SummedCrossEntropy(weights)
    yardsticks = timm_run.WrittenOutCrossEntropy(weights), timm_run.SummedCrossEntropy(weights, dtype=torch.float64)
    expected = value_and_gradient(plain, logits.double())
    for loss in (*yardsticks, JointCrossEntropy(weights)):
        torch.testing.assert_close(value_and_gradient(loss, logits.double()), expected, rtol=1e-12, atol=1e-12)
    for loss in yardsticks:
        gradient = value_and_gradient(loss, logits)[1]
        assert gradient.dtype == torch.float32 and not torch.equal(gradient, value_and_gradient(plain, logits)[1])


def test_timm_builds_the_network_without_kinks():
    timm_run.register()
    # The arguments are what timm's script passes where nothing is asked for.
    options = {"pretrained": False, "in_chans": 3, "num_classes": 10, "drop_rate": 0.0, "drop_path_rate": None}
    net, x = timm.create_model(timm_run.MODEL, smooth=True, **options), torch.randn(2, 3, 32, 32)
    assert net.train()(x).shape == (timm_run.EXITS, 2, 10) and net.eval()(x).shape == (2, 10)
    assert timm.data.resolve_data_config({}, model=net)["std"]
    assert not any(isinstance(module, (nn.ReLU, nn.MaxPool2d)) for module in net.modules())


def test_images_are_written_once_each(tmp_path):
    write_images(tmp_path, "digits", train=40, validation=20, size=16)
    files = {split: sorted((tmp_path / split).glob("*/*.png")) for split in ("train", "validation")}
    assert {split: len(found) for split, found in files.items()} == {"train": 40, "validation": 20}
    with pytest.raises(ValueError, match=r"train must be within 1\.\.1777, got 1778"):
        write_images(tmp_path, "digits", train=1778, validation=20, size=8)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "train.py"
    given = os.environ.get("AEP_TIMM_TRAIN")
    file.write_bytes(Path(given).read_bytes() if given else SCRIPT.encode())
    return file


@pytest.mark.slow
def test_the_fused_loss_passes_and_the_wrong_weight_does_not(script, tmp_path, capfd):
    file = tmp_path / "result.json"
    status = training_curve.main([f"--script={script}", *SMALL, f"--result={file}"])
    assert status == 0, capfd.readouterr()
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["script"]["sha256"] == hashlib.sha256(script.read_bytes()).hexdigest()
    case = result["cases"]["float32"]
    assert case["passed"] and result["passed"]
    compared = case["compared_with_plain"]
    assert compared["fused"]["agrees"] and not compared["wrong_weight"]["agrees"]
    assert len(case["runs"]["fused"]["curve"]) == 1
    assert str(tmp_path) not in file.read_text(encoding="utf-8")  # no paths of this machine


@pytest.mark.parametrize("made_up", ["right", "wrong weight", "too far", "control passes"])
def test_the_verdict_is_the_fused_curves_and_the_controls(script, tmp_path, monkeypatch, capsys, made_up):
    """With curves that are made up, by what the copies of the script say."""
    shifts = {
        "SummedCrossEntropy": 0.0,
        "WrittenOutCrossEntropy": 1e-4,
        str(training_curve.WEIGHTS): {"too far": 4e-4, "wrong weight": 0.1}.get(made_up, 2e-4),
        str(training_curve.WRONG_WEIGHTS): 2e-4 if made_up == "control passes" else 0.1,
    }

    def train(text, options, images, folder):
        line = next(line for line in text.splitlines() if "import aep_ext;" in line or "import timm_run;" in line)
        loss = 2.0 + next(shift for words, shift in shifts.items() if words in line)
        return [{"epoch": 0, "train_loss": loss, "eval_loss": 2.0, "eval_top1": 50.0}], 0.0

    monkeypatch.setattr(training_curve, "train", train)
    file = tmp_path / "result.json"
    status = training_curve.main([f"--script={script}", *SMALL, f"--result={file}"])
    assert status == (0 if made_up == "right" else 1)
    assert json.loads(file.read_text(encoding="utf-8"))["passed"] == (made_up == "right")
    said = capsys.readouterr().out
    assert ("fused agrees" in said) == (made_up in ("right", "control passes"))
    assert ("wrong_weight agrees" in said) == (made_up == "control passes")


def test_a_script_without_the_line_is_refused_before_any_training(tmp_path, capsys):
    script, result = tmp_path / "train.py", tmp_path / "result.json"
    script.write_text("print('no loss here')\n")
    assert training_curve.main([f"--script={script}", *SMALL, f"--result={result}"]) == 2
    assert "'train_loss_fn = nn.CrossEntropyLoss()' exactly once, found 0 times" in capsys.readouterr().err
    assert not result.exists()


def test_a_script_that_fails_or_is_not_there_is_said_so(tmp_path, capsys):
    script, result = tmp_path / "train.py", tmp_path / "result.json"
    assert training_curve.main([f"--script={script}", f"--result={result}"]) == 2
    assert "cannot read" in capsys.readouterr().err
    script.write_text(
        "from torch import nn\nimport torch\ntrain_loss_fn = nn.CrossEntropyLoss()\nraise OSError('full')\n"
    )
    assert training_curve.main([f"--script={script}", *SMALL, f"--result={result}"]) == 2
    assert "ended with status 1" in (error := capsys.readouterr().err) and "full" in error
    assert not result.exists()
