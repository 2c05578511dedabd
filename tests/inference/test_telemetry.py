"""Preparing for OpenVINO reports to nobody: its import, as it is, sends a report from a process that it forks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aep_ext.inference.backends import missing

SCRIPT = """
import multiprocessing, os, sys

def refuse(*_, **__):
    os.write(2, b"a process was started")
    os._exit(7)

os.fork = multiprocessing.Process.start = multiprocessing.process.BaseProcess.start = refuse

import torch
from torch import nn
from aep_ext import MultiExitNet
from aep_ext.deploy import prepare
from aep_ext.surgery.heads import PooledLinearHead

net = MultiExitNet([nn.Conv2d(1, 2, 1)], [PooledLinearHead(2, 2)], exit_stages=[0], num_classes=2)
x = torch.randn(1, 1, 4, 4)
assert prepare(net, x, "openvino", threads=1, batches=[])(x).shape == (1, 2)
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
    from aep_ext.inference.backends import _import

    seen: list[object] = []

    def load(name: str) -> None:
        seen.append(sys.modules["openvino_telemetry"])
        raise ImportError(name)

    monkeypatch.setattr(_import, "importlib", type("Fake", (), {"import_module": staticmethod(load)}))
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    if before is not None:
        monkeypatch.setitem(sys.modules, "openvino_telemetry", before)
    with pytest.raises(ImportError):
        _import.import_openvino()
    assert seen == [None] and sys.modules.get("openvino_telemetry") is before
