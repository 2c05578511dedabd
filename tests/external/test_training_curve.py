"""The whole check on a small script: the fused loss passes, a wrong one does not, and errors are said in one line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="the network is timm's resnet18")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
pytest.importorskip("lightning", reason="aep_ext.training needs the extra [train]")

from benchmarks.external import training_curve  # noqa: E402

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


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "train.py"
    given = os.environ.get("AEP_TIMM_TRAIN")
    file.write_bytes(Path(given).read_bytes() if given else SCRIPT.encode())
    return file


SMALL = ("--train=32", "--validation=16", "--epochs=1", "--batch-size=16", "--pixels=32")


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
        line = next(line for line in text.splitlines() if "import aep_ext;" in line or "import plain_losses;" in line)
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


@pytest.mark.parametrize("smoothing", [False, True])
def test_every_run_replaces_the_line_that_makes_the_loss(smoothing):
    old, lines = training_curve.loss_lines(smoothing, memory=["in_place"])
    assert old in [line.strip() for line in SCRIPT.splitlines()]
    assert len(set(lines.values())) == len(lines) == 6
    assert all(("label_smoothing=args.smoothing" in line) == smoothing for line in lines.values())
    assert lines["fused, in_place"].endswith("memory='in_place')")
    for line in lines.values():
        compile(line, "line", "exec")


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
