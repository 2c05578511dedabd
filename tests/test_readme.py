"""The documents say what the committed result files say, and README's example of the API runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


def _readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_come_from_the_result_files():
    pytest.importorskip("matplotlib", reason="aep_ext.report needs the extra [train]")
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    assert "<!-- results: " in _readme()
    for path in report["DOCUMENTS"]:
        text = path.read_text(encoding="utf-8")
        assert report["rendered"](text) == text
        assert not report["unexplained"](text)


def test_the_check_sees_a_changed_figure(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="aep_ext.report needs the extra [train]")
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    doctored = re.sub(r"\d\d\.\d\d ±", "12.34 ±", _readme(), count=1)
    assert doctored != _readme()
    assert report["rendered"](doctored) == _readme()


def test_the_example_runs(monkeypatch):
    """Word for word, with a small network and small data in place of the pretrained one and the user's loaders."""
    torchvision = pytest.importorskip("torchvision", reason="the example starts from torchvision's resnet18")
    code = re.search(r"```python\n(.*?)```", _readme(), re.DOTALL)[1]
    resnet18 = torchvision.models.resnet18
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights: resnet18(weights=None))
    loader = [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])) for _ in range(2)]

    class Optimizer(torch.optim.SGD):
        def __init__(self) -> None:
            super().__init__([nn.Parameter(torch.zeros(()))], lr=0.1)

    names = {"train_loader": loader, "val_loader": loader, "optimizer": Optimizer()}
    exec(compile(code, "README.md", "exec"), names)
    assert names["small"](loader[0][0]).shape == (4, 10)


def test_the_example_of_inference_runs():
    """Word for word, with a small network."""
    pytest.importorskip("openvino", reason="the example is for machines with an engine")
    import aep_ext
    from aep_ext.surgery.networks import build

    code = re.findall(r"```python\n(.*?)```", _readme(), re.DOTALL)[1]
    net, images = build("resnet_small", 10), torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        loader = [(x, net.eval()(x).argmax(1)) for x in torch.randn(3, 16, 3, 16, 16)]
    names = {"aep_ext": aep_ext, "net": net, "calibration_loader": loader, "images": images}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (8, 10) and names["exit"].shape == (8,)
