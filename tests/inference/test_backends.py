"""Backends: BatchNorm folded only where the results stay the same; OpenVINO imported without its report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aep_ext.inference.backends import missing
from aep_ext.inference.backends.eager import fold_batch_norm


def norm(channels: int) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels)
    module.running_mean.uniform_(-1, 1)
    module.running_var.uniform_(0.5, 2)
    nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.uniform_(module.bias, -1, 1)
    return module


def count(module: nn.Module) -> int:
    return sum(type(part) is nn.BatchNorm2d for part in module.modules())


def check(module: nn.Module, left: int) -> nn.Module:
    module = module.eval()
    x = torch.randn(3, 4, 8, 8)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    norms = count(module)
    folded, reason = fold_batch_norm(module, x)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), module(x), rtol=1e-4, atol=1e-4)
    assert count(folded) == left and count(module) == norms
    assert (folded is module) == (reason is not None)
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    return folded


def test_chain() -> None:
    check(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 1), norm(4)), left=0)


def test_norm_before_convolution_stays() -> None:
    check(nn.Sequential(norm(4), nn.Conv2d(4, 6, 3)), left=1)


def test_relu_between_stays() -> None:
    check(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), norm(6)), left=1)


class Branch(nn.Module):
    """The convolution's result is used beside the BatchNorm too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3), norm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


def test_second_user_stays() -> None:
    check(Branch(), left=1)


class Twice(nn.Module):
    """One convolution in two places, with a BatchNorm of its own behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(4, 4, 1), norm(4), norm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(x))))


def test_shared_convolution_stays() -> None:
    check(Twice(), left=2)
    conv = nn.Conv2d(4, 4, 1)
    check(nn.Sequential(conv, norm(4), conv, norm(4)), left=2)


def test_one_norm_behind_two_convolutions() -> None:
    shared = norm(4)
    folded = check(nn.Sequential(nn.Conv2d(4, 4, 1), shared, nn.ReLU(), nn.Conv2d(4, 4, 1), shared), left=0)
    assert sum(isinstance(part, nn.Conv2d) for part in folded.modules()) == 2


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), norm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


def test_untraceable_is_left_as_it_is() -> None:
    module = Decides().eval()
    folded, reason = fold_batch_norm(module, torch.ones(1, 4, 2, 2))
    assert folded is module and "cannot be traced" in reason


SCRIPT = """
import multiprocessing, os, sys

def refuse(*_, **__):
    os.write(2, b"a process was started")
    os._exit(7)

os.fork = multiprocessing.Process.start = multiprocessing.process.BaseProcess.start = refuse

import torch
from torch import nn
from aep_ext import MultiExitNet
from aep_ext.inference import compile
from aep_ext.surgery.heads import PooledLinearHead

net = MultiExitNet([nn.Conv2d(1, 2, 1)], [PooledLinearHead(2, 2)], exit_stages=[0], num_classes=2)
x = torch.randn(1, 1, 4, 4)
assert compile(net, x, "openvino", threads=1, batches=[])(x).shape == (1, 2)
import openvino.frontend.pytorch, openvino.tools.ovc
assert "openvino_telemetry.backend" not in sys.modules and "openvino_telemetry" not in sys.modules
assert openvino.tools.ovc.telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
print("fine")
"""


def test_no_process_is_forked() -> None:
    reason = missing("openvino")
    if reason:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("before", [None, sys])
def test_what_was_there_comes_back(monkeypatch: pytest.MonkeyPatch, before: object) -> None:
    """Also where the import fails."""
    from aep_ext.inference.backends import openvino

    seen: list[object] = []

    def load(name: str) -> None:
        seen.append(sys.modules["openvino_telemetry"])
        raise ImportError(name)

    monkeypatch.setattr(openvino, "importlib", type("Fake", (), {"import_module": staticmethod(load)}))
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    if before is not None:
        monkeypatch.setitem(sys.modules, "openvino_telemetry", before)
    with pytest.raises(ImportError):
        openvino.import_openvino()
    assert seen == [before] and sys.modules.get("openvino_telemetry") is before
