"""``bench_run`` on a small run with a gate."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch

from aep_ext._io import read_json, sha256, write_json
from aep_ext._utils import UserError
from aep_ext.export import load, save
from aep_ext.inference import ExitPolicy, GatedNet

pytest.importorskip("lightning", reason="runs need Lightning")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from aep_ext.training import Progress
from aep_ext.training.bench import bench_run, share_of_predicted
from aep_ext.training.folder import MODEL_FILES

QUICK = {"batches": (1, 8), "samples": 24, "seconds": 0.05}


def gate(folder: Path, exits: tuple[int, ...], **numbers: object) -> None:
    """Deliver these exits of the run with a gate made by hand."""
    policy = ExitPolicy(output_weights=[1.0] * len(exits), exits=exits, **numbers)
    save(GatedNet.from_policy(load(folder / "full"), policy), folder)
    results = read_json(folder / "results.json")
    results["delivered"] |= {"kind": "gated", "exits": list(exits), "notice": ""}
    results["delivered"]["files"] |= {name: sha256(folder / name) for name in MODEL_FILES}
    write_json(folder / "results.json", results)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with a gate made by hand on three of its exits, others than the pruned network's."""
    from aep_ext.training import run

    folder = tmp_path_factory.mktemp("bench") / "run"
    tiny = {"image_size": 8, "train_samples": 300, "epochs": 2, "batch_size": 32, "device": "cpu", "threads": 1}
    run({**tiny, "output": str(folder)})
    gate(folder, (0, 1, 2), thresholds=(0.3, 0.4), temperatures=(0.5, 0.5, 1.0))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_what_is_written(folder: Path) -> None:
    lines: list[str] = []
    threads = torch.get_num_threads()
    before = read_json(folder / "results.json")
    result = bench_run(folder, **QUICK, progress=Progress(lines.append))
    assert torch.get_num_threads() == threads
    assert read_json(folder / "results.json") == {**before, "bench": json.loads(json.dumps(result))}
    assert (result["backend"], result["threads"], result["samples"]) == ("eager", 1, 24)
    assert result["environment"]["device"] == "cpu" and result["gated_exits"] == [0, 1, 2]
    assert sum(result["exit_counts"]) == 24 and result["criterion"] == "confidence"
    assert [row["batch"] for row in result["rows"]] == [1, 8] and len(lines) == 3
    for row in result["rows"]:
        for name in ("ungated", "subset", "gated"):
            figures = row[name]
            assert 0 < figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"] and figures["images_per_s"] > 0
        low, high = row["ratio_interval"]
        assert 0 < low <= row["ratio"] <= high and row["predicted_ratio"] > 0
        assert 0 <= row["mean_exit"] <= 2 and row["calls"] >= row["batches"] >= 1
    text = (folder / "results.json").read_text()
    assert str(folder) not in text and (platform.node() in ("", "localhost") or platform.node() not in text)
    assert (folder / "report.html").stat().st_mtime_ns > (folder / "results.json").stat().st_mtime_ns


def test_the_subset_is_timed_only_where_it_is_another(folder: Path) -> None:
    gate(folder, tuple(load(folder / "pruned").exit_ids), thresholds=0.5)
    result = bench_run(folder, **QUICK)
    assert result["pruned_exits"] == result["gated_exits"]
    assert all(row["subset"] is row["subset_ratio"] is row["subset_ratio_interval"] is None for row in result["rows"])


def test_one_exit_alone_can_be_delivered(folder: Path) -> None:
    gate(folder, (2,))
    result = bench_run(folder, **QUICK)
    assert result["gated_exits"] == [2] and result["exit_counts"] == [24] and result["rows"][0]["mean_exit"] == 0


def test_a_network_that_does_not_answer_as_simulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = GatedNet.forward
    monkeypatch.setattr(GatedNet, "forward", lambda net, x: real(net, x)._replace(exit=real(net, x).exit.flip(0) * 0))
    with pytest.raises(RuntimeError, match="aep bench: the gated network must take the simulator's exits"):
        bench_run(folder, **QUICK)


def test_an_engine(folder: Path) -> None:
    pytest.importorskip("openvino", reason="the engine")
    result = bench_run(folder, samples=24, seconds=0.05, batches=(1,), backend="openvino")
    assert result["backend"] == "openvino" and all(row["ratio"] > 0 for row in result["rows"])


def test_errors_before_anything_is_measured(folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ({"batches": ()}, "batches must be whole numbers of at least 1"),
        ({"batches": (0,)}, "batches must be whole numbers of at least 1"),
        ({"threads": 0}, "threads must be whole numbers"),
        ({"samples": 0}, "samples must be whole numbers"),
        ({"seconds": -1.0}, "seconds must be finite and at least 0"),
        ({"backend": "abacus"}, "no such backend: 'abacus'"),
    ):
        with pytest.raises(UserError, match=message):
            bench_run(folder, **{**QUICK, **arguments})
    with pytest.raises(UserError, match="holds none"):
        bench_run(tmp_path / "nothing")
    results = read_json(folder / "results.json")
    assert results["bench"] is None
    results["delivered"]["kind"] = "pruned"
    write_json(folder / "results.json", results)
    with pytest.raises(UserError, match="delivers a network without gates: aep calibrate .* larger --budget"):
        bench_run(folder)
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match="--resume"):
        bench_run(folder)


def test_the_share_of_what_was_predicted() -> None:
    assert share_of_predicted(2.0, 2.0) == 1.0
    assert share_of_predicted(1.0, 2.0) == 0.0
    assert share_of_predicted(4 / 3, 2.0) == pytest.approx(0.5)  # a quarter saved of a half promised
    assert share_of_predicted(0.5, 2.0) == -2.0
    assert share_of_predicted(1.0, 1.005) is None and share_of_predicted(1.0, 0.9) is None
