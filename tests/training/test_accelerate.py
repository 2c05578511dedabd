"""accelerate(): early exits for a trained network, whose own answers stay as they are."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning.pytorch", reason="aep_ext.training needs the extra [train]")

import aep_ext
from aep_ext import GatedNet, load, save
from aep_ext.cli import main
from aep_ext.export import Preprocessing, describe
from aep_ext.pruning import single_exit
from aep_ext.surgery.networks import build
from aep_ext.training import Acceleration, evaluate

SIZE, CLASSES = 16, 3


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "SECONDS_A_NETWORK", 0.02)


class Residual(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.short = nn.Conv2d(before, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + self.short(x))


class Inverted(nn.Sequential):
    """MobileNet's block."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__(
            *(nn.Conv2d(before, 2 * before, 1), nn.BatchNorm2d(2 * before), nn.Hardswish(inplace=True)),
            *(nn.Conv2d(2 * before, 2 * before, 3, stride, 1, groups=2 * before), nn.BatchNorm2d(2 * before)),
            *(nn.Hardswish(inplace=True), nn.Conv2d(2 * before, width, 1), nn.BatchNorm2d(width)),
        )


def _blocks(kind: Callable[..., nn.Module]) -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
    blocks = nn.Sequential(kind(8, 8, 1), kind(8, 12, 2), kind(12, 12, 1), kind(12, 16, 2), kind(16, 16, 1))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, CLASSES))


def _plain() -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, width in ((1, 8), (8, 12), (12, 16), (16, 16)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] * (before in (1, 12))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 20), nn.ReLU(), nn.Linear(20, CLASSES))


FAMILIES = {
    "residual": lambda: _blocks(Residual),
    "plain": _plain,
    "mobile": lambda: _blocks(Inverted),
}


def images(count: int, seed: int, noise: float = 0.8) -> tuple[Tensor, Tensor]:
    """A bright place says the class; how noisy an image is differs."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (count,), generator=generator)
    x = torch.randn(count, 1, SIZE, SIZE, generator=generator) * noise * torch.rand(count, 1, 1, 1, generator=generator)
    for row, label in enumerate(y.tolist()):
        x[row, 0, 4 * label : 4 * label + 6, 4 * label : 4 * label + 6] += 0.5
    return x, y


def loader(count: int, seed: int, batch: int = 60) -> DataLoader:
    return DataLoader(TensorDataset(*images(count, seed)), batch_size=batch)


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    model.train()
    for _ in range(8):
        for x, y in loader(240, 0):
            logits = model(x)
            loss = nn.functional.cross_entropy(logits[0] if logits.dim() == 3 else logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = {name: trained(make()) for name, make in FAMILIES.items()}
        found["resnet_small"] = trained(single_exit(build("resnet_small@0.5", CLASSES, 1)))
    return found


def quick(model: nn.Module, **options: object) -> tuple[GatedNet, Acceleration]:
    given = {"train_loader": loader(240, 0), "calibration_loader": loader(300, 1), "epochs": 3}
    given |= {"progress": False, "folds": 2, "exits": None if isinstance(model, aep_ext.MultiExitNet) else 3}
    return aep_ext.accelerate(model, **{**given, **options})


@pytest.mark.parametrize("name", [*FAMILIES, "resnet_small"])
def test_the_last_exit_answers_bit_for_bit_as_the_model(models: dict[str, nn.Module], name: str) -> None:
    model = models[name]
    before = copy.deepcopy(model.state_dict())
    gated, report = quick(model, budget=3.0, test_loader=loader(200, 2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and not model.training
    x, y = images(200, 2)
    last = gated.num_exits - 1
    assert last > 0 and gated.policy.last_alone
    with torch.no_grad():
        own = model(x)
        sure = (gated.net.exit_logits(x[:40])[0] / gated.temperatures[0]).softmax(-1).amax(-1)
        gated.enabled[:], gated.thresholds[0] = torch.arange(last) == 0, sure.median().double()
        singles = [(gated(x[row : row + 1]), model(x[row : row + 1])) for row in range(40)]
    assert {int(answer.exit) for answer, _ in singles} == {0, last}  # half of them leave
    assert all(torch.equal(answer.logits, wanted) for answer, wanted in singles if answer.exit == last)
    assert report.before["top1"] == float((own.argmax(1) == y).double().mean())
    assert report.after["macs"] < report.before["macs"] and report.measured_on == "test" and report.cached
    assert report.after["top1"] > report.before["top1"] - 0.08
    gated.enabled.fill_(False)  # nobody leaves: the whole batch is the model's
    assert torch.equal(gated(x).logits, own) and bool((gated(x).exit == last).all())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", pytest.param("vgg11", marks=pytest.mark.slow)])
def test_torchvisions_networks_keep_their_answers(name: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="the networks are torchvision's")
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    data = [(images(n, seed)[0].repeat(1, 3, 2, 2), images(n, seed)[1]) for n, seed in ((40, 0), (40, 1))]
    model.train()(data[0][0])  # BatchNorm statistics other than the initial ones
    model.eval()
    gated, report = quick(model, train_loader=data[:1], calibration_loader=data[1:], epochs=1, exits=2, budget=100.0)
    x = data[1][0][:6]
    with torch.no_grad():
        for enabled in (True, False):
            gated.enabled.fill_(enabled)
            found = [gated(x[row : row + 1]) for row in range(6)]
            for row, answer in enumerate(found):
                if answer.exit == gated.num_exits - 1:
                    assert torch.equal(answer.logits, model(x[row : row + 1]))
        assert torch.equal(gated(x).logits, model(x)) and gated.policy.last_alone
    assert len(report.heads) == 1


def test_features_are_the_same_where_they_are_computed_anew(models: dict[str, nn.Module]) -> None:
    gated, report = quick(models["plain"], cache_bytes=0, epochs=2, exits=3, head=["conv@8", "linear"])
    assert not report.cached and report.heads == ("conv@8", "linear") and report.train_images == 240
    assert report.measured_on == "calibration" and report.images == 300 and sum(report.counts) == 300
    assert "before" in str(report) and "minutes, 240 training images, 300 calibration images" in str(report)
    assert report.to_dict()["exits"] == list(report.exits)
    held, _ = quick(models["plain"], epochs=2, exits=3, head=["conv@8", "linear"])
    assert held.num_exits == gated.num_exits


def test_the_heads_learn_and_nothing_else(models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[aep_ext.MultiExitNet] = []
    room = sys.modules["aep_ext.training.accelerate"]

    def terminate(net: aep_ext.MultiExitNet, *args: object, **options: object) -> GatedNet:
        seen.append(net)
        return aep_ext.terminate(net, *args, **options)

    monkeypatch.setattr(room, "terminate", terminate)
    model = models["residual"]
    quick(model, epochs=8, distillation=0.3, head="pooled4")  # the class is a matter of the place
    (net,) = seen
    assert not any(parameter.requires_grad for parameter in net.parameters()) and not net.training
    x, y = images(300, 5)
    with torch.no_grad():
        logits = net.exit_logits(x)
        assert torch.equal(logits[-1], model(x))
    accuracy = [(one.argmax(1) == y).double().mean().item() for one in logits]
    assert min(accuracy[:-1]) > 1.3 / CLASSES, accuracy
    own, theirs = net.original_state_dict(), model.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)


def test_with_a_guarantee_and_saved(models: dict[str, nn.Module], tmp_path: Path) -> None:
    gated, report = quick(models["resnet_small"], risk=0.1, delta=0.2)
    assert "with probability 0.8" in report.guarantee and gated.policy.last_alone
    save(gated, tmp_path, metadata={"acceleration": report.to_dict()})
    again, x = load(tmp_path), images(50, 3)[0]
    assert again.policy == gated.policy and torch.equal(again(x).logits, gated(x).logits)
    with pytest.raises(ValueError, match="accelerate: model must be a network without gates, got GatedNet"):
        quick(again)


def test_no_early_exit_keeps_an_impossible_budget(models: dict[str, nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gated, report = quick(models["mobile"], budget=-50.0)
    assert report.notice and "points of the reference" in report.notice
    x = images(20, 4)[0]
    if gated.num_exits == 1:
        assert torch.equal(gated(x).logits, models["mobile"](x).detach())


def _with_labels(first: int, label: int) -> list[tuple[Tensor, Tensor]]:
    return [(images(30, first)[0], torch.full((30,), label))]


BAD = {
    "calibration images must not be training images, got 60 of 120 that are": {
        "calibration_loader": [*loader(60, 1), next(iter(loader(240, 0)))]
    },
    "there must be at least 20 calibration images, got 19": {"calibration_loader": loader(19, 1)},
    "at least as many training images as classes, 3, got 2": {"train_loader": loader(2, 0)},
    "labels of the calibration images must be classes of the model, 0..2, got 3": {
        "calibration_loader": _with_labels(1, 3)
    },
    "labels of the training images must be classes of the model, 0..2, got -1": {"train_loader": _with_labels(0, -1)},
    "train_loader must yield images, got none": {"train_loader": []},
    "train_loader must be one that can be gone through again, got an iterator": {"train_loader": iter(loader(30, 0))},
    "epochs must be at least 1, got 0": {"epochs": 0},
    "head must be one of copy": {"head": "big"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gets_one_line(models: dict[str, nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        quick(models["plain"], **BAD[message])
    assert "\n" not in str(refusal.value)


class Headless(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


def test_a_model_whose_head_cannot_be_found_is_refused(models: dict[str, nn.Module]) -> None:
    for model in (Headless(nn.Conv2d(1, 4, 3)), nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, CLASSES))):
        with pytest.raises(ValueError, match="anticipate: .* (cannot be cut|holds no Conv2d|has no)") as refusal:
            quick(model)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="of networks with exits those by name"):
        quick(aep_ext.prune(build("resnet_small", CLASSES, 1), [0]))
    with pytest.raises(ValueError, match="exits and cuts must be left out for a network of ours"):
        quick(models["resnet_small"], exits=2)


def test_a_whole_multi_exit_net_counts_by_its_last_exit(models: dict[str, nn.Module]) -> None:
    full = build("resnet_small@0.5", CLASSES, 1).eval()
    x = images(9, 3)[0]
    gated, report = quick(full, epochs=1, budget=100.0)
    gated.enabled.fill_(False)
    wanted = single_exit(full)(x).detach()
    assert torch.equal(gated(x).logits, wanted)
    assert list(report.heads) == build("resnet_small@0.5", CLASSES, 1, head="auto", example=(1, 16, 16)).origin["heads"]


MODELS = """
from torch import nn

def net():
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU(), *pool)

def three_classes():
    return nn.Sequential(*net()[:-1], nn.Linear(12, 3))

def broken():
    raise RuntimeError("not today")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of the user's, weights of it, and a saved network."""
    room = sys.modules["aep_ext.training.accelerate"]
    monkeypatch.setattr(room, "terminate", partial(aep_ext.terminate, folds=2))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "usermodels.py").write_text(MODELS)
    yield tmp_path
    sys.modules.pop("usermodels", None)


QUICK = ["--data", "digits", "--epochs", "1", "--train-samples", "130", "--quiet", "--budget", "2"]


def test_the_command_on_a_saved_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    net = single_exit(build("resnet_small@0.25", 10, 1)).eval()
    net.preprocessing = Preprocessing(12, 1, (0.25,), (0.5,))
    save(net, "baseline")
    assert main(["accelerate", "baseline", *QUICK, "--output", "fast"]) == 0
    printed = capsys.readouterr().out
    assert "before" in printed and "540 test images" in printed and "saved: fast" in printed
    gated = load("fast")
    assert isinstance(gated, GatedNet) and gated.preprocessing == net.preprocessing and len(gated.classes) == 10
    told = describe("fast")["metadata"]["acceleration"]
    assert told["train_images"] == 130 and told["measured_on"] == "test" and told["minutes"] > 0
    x = torch.randn(5, 1, 12, 12)
    if gated.policy.enabled:
        gated.enabled.fill_(False)
    assert torch.equal(gated(x).logits, net(x).detach())
    assert main(["accelerate", "baseline", *QUICK, "--output", "fast"]) == 2
    assert "fast holds a network already: --overwrite" in capsys.readouterr().err
    assert main(["accelerate", "fast", *QUICK, "--output", "new"]) == 2
    assert "fast holds a gated network" in capsys.readouterr().err and not Path("new").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_command_on_a_function_with_a_file(here: Path, suffix: str) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    namespace: dict[str, object] = {}
    exec(MODELS, namespace)
    model = namespace["net"]().eval()
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, "w.pth")
    else:
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), "w.safetensors")
    given = [*QUICK, "--weights", f"w{suffix}", "--normalize", "0.3,0.4", "--image-size", "14", "--exits", "2"]
    assert main(["accelerate", "usermodels:net", *given]) == 0
    gated, x = load("accelerated", model=namespace["net"]()), torch.randn(4, 1, 14, 14)
    assert gated.preprocessing == Preprocessing(14, 1, (0.3,), (0.4,))
    if gated.policy.enabled:
        gated.enabled.fill_(False)
    assert torch.equal(gated(x).logits, model(x).detach())


REFUSED = {
    "no such model: 'nothing' is no folder and no module:function, and no such network": ["nothing"],
    "no such model: usermodels:gone (AttributeError": ["usermodels:gone"],
    "no such model: usermodels:broken (RuntimeError: not today)": ["usermodels:broken"],
    "resnet_small must have weights": ["resnet_small"],
    "resnet_small: there are no weights 'DEFAULT' of all of it": ["resnet_small", "--weights", "DEFAULT"],
    "weights w.pth: cannot be read": ["usermodels:net", "--weights", "w.pth"],
    "weights l.pth: must hold a state dict, tensors by name, got list": ["usermodels:net", "--weights", "l.pth"],
    "weights s.pth: lack 4 of the network's 6 tensors, first '0.bias'": ["usermodels:net", "--weights", "s.pth"],
    "labels of the calibration images must be classes of the model, 0..2": ["usermodels:three_classes"],
    "normalize must be 1 means and 1 standard deviations, got 3 numbers": ["usermodels:net", "--normalize", "1,2,3"],
    "no such data: nowhere/photos": ["usermodels:net", "--data", "nowhere/photos"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_of_the_command_gets_one_line(here: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    Path("w.pth").write_bytes(b"nonsense")
    torch.save([1, 2], "l.pth")
    torch.save({"0.weight": torch.zeros(8, 1, 3, 3), "2.weight": torch.zeros(12, 8, 3, 3)}, "s.pth")
    assert main(["accelerate", *QUICK, *REFUSED[message]]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not Path("accelerated").exists()


def test_a_run_starts_from_a_file_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from aep_ext.training.folder import RunFolder
    from aep_ext.training.run import Job, RunConfig

    source = build("resnet_small@0.25", 4, 1)
    path = str(tmp_path / "w.pth")
    torch.save(source.original_state_dict(), path)
    config = RunConfig(network="resnet_small@0.25", weights=path, methods=("mixed",)).resolved()
    job = Job(config, RunFolder(tmp_path / "run"))
    assert job.data.channels == 1
    assert torch.equal(job.structure.stages[3].layer4.conv2.weight, source.stages[3].layer4.conv2.weight)
    for wrong in ("gone.pth", "gone.safetensors"):
        assert main(["run", "--weights", str(tmp_path / wrong), "--output", str(tmp_path / "new")]) == 2
        told = capsys.readouterr().err
        assert "cannot be read" in told and told.count("\n") == 1 and not (tmp_path / "new").exists()
