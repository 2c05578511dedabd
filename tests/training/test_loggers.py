"""``--logger``: the metrics of every epoch by Lightning's loggers."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="the training needs lightning")

from lightning.pytorch.loggers import CSVLogger

import aep_ext
from aep_ext.surgery import networks
from aep_ext.training import Progress, UserError, run

RUN = {"image_size": 8, "train_samples": 64, "epochs": 2, "batch_size": 32, "device": "cpu", "threads": 1}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_fit_takes_a_logger(tmp_path: Path) -> None:
    net = networks.build("resnet_small", 10, 1)
    data = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,)))]
    result = aep_ext.fit(
        net, data, data, epochs=2, device="cpu", progress=False, logger=CSVLogger(tmp_path, name="mine")
    )
    found = rows(tmp_path / "mine" / "version_0" / "metrics.csv")
    for name in ("train/loss", "val/loss", "val/top1", "val/exit3_top1"):
        values = [float(row[name]) for row in found if row[name]]
        assert values == pytest.approx([record[name] for record in result.history])


class _Killed(Exception):
    pass


@pytest.mark.slow
def test_a_run_s_logs_survive_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    given = {**RUN, "output": str(tmp_path / "run"), "methods": ("mixed",), "terminate": False, "logger": "csv"}

    def write(line: str) -> None:
        if line.startswith("mixed: epoch 2/2"):
            raise _Killed

    with pytest.raises(_Killed):
        run(given, progress=Progress(write))
    run({"output": given["output"]}, resume=True)
    logs = tmp_path / "run" / "logs"
    assert sorted(path.name for path in logs.iterdir()) == ["seed-0-baseline", "seed-0-mixed"]
    assert len([row for row in rows(logs / "seed-0-baseline" / "version_0" / "metrics.csv") if row["val/top1"]]) == 2
    before, after = (rows(logs / "seed-0-mixed" / f"version_{n}" / "metrics.csv") for n in (0, 1))
    assert {row["epoch"] for row in before} == {"0", "1"} and {row["epoch"] for row in after} == {"1"}
    run({**given, "logger": None}, overwrite=True)  # the logs are of the run that is replaced
    assert not logs.exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    given: dict[str, Any] = {**RUN, "output": str(tmp_path / "run"), "logger": name}
    with pytest.raises(UserError, match=rf"^--logger {name} needs {name}: pip install 'aep_ext\[{name}\]'"):
        run(given)
    with pytest.raises(UserError, match="^no such logger: 'printer' \\(there are: tensorboard, csv, wandb\\)"):
        run({**given, "logger": "printer"})
    assert not (tmp_path / "run").exists()
