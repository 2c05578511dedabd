"""``bench_run`` on a small run with a gate."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch

from aep_ext import deploy
from aep_ext._io import read_json, write_json
from aep_ext._utils import UserError
from aep_ext.bench import bench_run
from aep_ext.termination import GatedNet
from aep_ext.training.bench import share_of_predicted
from aep_ext.training.bench_contestants import load_nets

pytest.importorskip("lightning", reason="runs need Lightning")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

QUICK = {"batches": (1, 8), "samples": 24, "seconds": 0.05}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with a gate made by hand on three of its exits."""
    from aep_ext.pruning import prune
    from aep_ext.training import run

    folder = tmp_path_factory.mktemp("bench") / "run"
    tiny = {"image_size": 8, "train_samples": 96, "epochs": 2, "batch_size": 32, "device": "cpu", "threads": 1}
    run({**tiny, "output": str(folder)})
    subset = prune(deploy.load(folder / "full"), (0, 2, 3))
    gated = GatedNet(subset, "confidence", [0.3, 0.4], temperatures=[0.5, 0.5, 1.0])
    deploy.save(gated, folder / "gated")
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of it, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "run")


def test_what_is_written(folder):
    lines: list[str] = []
    threads = torch.get_num_threads()
    result = bench_run(folder, **QUICK, write=lines.append)
    assert torch.get_num_threads() == threads
    assert read_json(folder / "bench.json") == json.loads(json.dumps(result))
    assert result["format"] == "aep_ext.bench" and result["version"] == 1
    assert (result["engine"], result["threads"], result["samples"]) == ("eager", 1, 24)
    assert result["environment"]["device"] == "cpu" and result["gated_exits"] == [0, 2, 3]
    assert sum(result["exit_counts"]) == 24
    assert [row["batch"] for row in result["rows"]] == [1, 8] and len(lines) == 3
    for row in result["rows"]:
        for name in ("ungated", "gated"):
            figures = row[name]
            assert 0 < figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"] and figures["images_per_s"] > 0
        low, high = row["ratio_interval"]
        assert 0 < low <= row["ratio"] <= high and row["predicted_ratio"] > 0
        assert 0 <= row["mean_exit"] <= 2 and row["calls"] >= row["batches"] >= 1
    text = (folder / "bench.json").read_text()
    assert str(folder) not in text and (platform.node() in ("", "localhost") or platform.node() not in text)
    assert (folder / "report.html").stat().st_mtime_ns > (folder / "bench.json").stat().st_mtime_ns


def test_the_subset_is_timed_where_it_is_another(folder):
    deploy.save(GatedNet(deploy.load(folder), "confidence", 0.5), folder / "gated")
    result = bench_run(folder, **QUICK)
    assert result["pruned_exits"] == result["gated_exits"]
    assert all(row["subset"] is row["subset_ratio"] is row["subset_ratio_interval"] is None for row in result["rows"])


def test_one_exit_alone_can_be_the_pruned_ensemble(folder):
    from aep_ext.pruning import prune

    deploy.save(prune(deploy.load(folder / "full"), (3,)), folder)
    result = bench_run(folder, **QUICK)
    assert result["pruned_exits"] == [3] and result["rows"][0]["subset"] is not None


def test_the_pruned_network_is_that_of_the_delivered_seed(folder):
    """Where gates.json names a seed, its pruned network is taken, not the one at the top."""
    gated, top = load_nets(folder)
    unit = folder / "seed-0" / "mixed" / "pruned"
    part = folder / "seed-7" / "mixed" / "pruned"
    shutil.copytree(unit, part)
    write_json(folder / "gates.json", {"delivered": {"seed": 7, "exit_weights": "mixed"}})
    (folder / "model.json").unlink()
    _, found = load_nets(folder)
    assert found.exit_ids == top.exit_ids


def test_networks_of_two_trainings_are_found_out(folder):
    gated, pruned = load_nets(folder)
    with torch.no_grad():
        next(pruned.stages.parameters()).add_(1.0)
    deploy.save(pruned, folder)
    with pytest.raises(UserError, match="different trainings"):
        bench_run(folder, **QUICK)


def test_an_engine(folder):
    pytest.importorskip("openvino", reason="the engine")
    deploy.save(GatedNet(deploy.load(folder), "confidence", 0.5), folder / "gated")
    result = bench_run(folder, samples=24, seconds=0.05, batches=(1,), backend="openvino")
    assert result["engine"] == "openvino" and all(row["ratio"] > 0 for row in result["rows"])


def test_errors_before_anything_is_measured(folder, tmp_path):
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
    with pytest.raises(UserError, match="holds no run"):
        bench_run(tmp_path / "nothing")
    assert not (folder / "bench.json").exists()
    shutil.rmtree(folder / "gated")
    with pytest.raises(UserError, match="run aep calibrate .* first"):
        bench_run(folder)
    write_json(folder / "gates.json", {"delivered": None})
    with pytest.raises(UserError, match="found no gate"):
        bench_run(folder)
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match="--resume"):
        bench_run(folder)


def test_a_network_without_gates_is_none(folder):
    deploy.save(deploy.load(folder), folder / "gated")
    with pytest.raises(UserError, match="without gates"):
        bench_run(folder)


def test_the_share_of_what_was_predicted():
    assert share_of_predicted(2.0, 2.0) == 1.0
    assert share_of_predicted(1.0, 2.0) == 0.0
    assert share_of_predicted(4 / 3, 2.0) == pytest.approx(0.5)  # a quarter saved of a half promised
    assert share_of_predicted(0.5, 2.0) == -2.0
    assert share_of_predicted(1.0, 1.005) is None and share_of_predicted(1.0, 0.9) is None
