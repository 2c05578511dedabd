"""The main job: what a run folder holds, that its figures agree with its models, and that a kill costs one epoch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the training needs lightning")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from aep_ext.export import load
from aep_ext.pruning import SubsetScores, count_macs, count_parameters
from aep_ext.training import ImageDataModule, Progress, UserError, calibrate_run, run
from aep_ext.training.summary import spread

Finished = tuple[Path, dict[str, Any], list[str]]
ROOT = Path(__file__).parents[2]


def parts_of(results: dict[str, Any]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for entry in results["seeds"]:
        for name, part in entry["methods"].items():
            yield entry["seed"], name, part


def answers_of(folder: Path, seed: int, name: str) -> dict[str, Any]:
    return dict(np.load(folder / f"seed-{seed}" / name / "predictions.npz"))


def test_files_of_the_contract(finished: Finished) -> None:
    folder, results, _ = finished
    wanted = ["config.json", "results.json", "report.html", "model.safetensors", "model.json", "full/model.safetensors"]
    wanted += ["baseline/model.json", "pruned/model.json", "examples.npz", "checkpoints/seed-1/mixed.ckpt"]
    wanted += ["seed-0/ascending/pruned/model.json", "seed-0/baseline/full/model.json", "seed-1/mixed/gated.json"]
    assert [name for name in wanted if not (folder / name).is_file()] == []
    assert [path for path in folder.rglob("*") if path.name.startswith(".") or "lightning_logs" in path.name] == []
    assert json.loads((folder / "results.json").read_text()) == {k: v for k, v in results.items() if k != "output"}
    assert (results["format"], results["version"]) == ("aep_ext.run", 2)


def test_progress_is_a_line_an_epoch_and_one_a_calibration(finished: Finished) -> None:
    lines = finished[2]
    assert len(lines) == 2 * 3 * 2 + 4 and lines[0].startswith("seed 0 / baseline: epoch 1/2, validation loss ")
    assert [line.partition(": ")[0] for line in lines[-4:]] == [
        f"seed {seed} / {name}" for seed in (0, 1) for name in ("mixed", "ascending")
    ]


def test_every_seed_trains_one_baseline_and_every_family(finished: Finished) -> None:
    _, results, _ = finished
    assert [seed["seed"] for seed in results["seeds"]] == [0, 1]
    assert all(list(seed["methods"]) == ["mixed", "ascending"] for seed in results["seeds"])
    weights = results["summary"]["methods"]["mixed"]["exit_weights"]
    assert weights["loss"] == pytest.approx([0.4, 0.3, 0.2, 0.1]) and weights["output"] == weights["loss"][::-1]


def test_summary_is_of_the_seeds(finished: Finished) -> None:
    _, results, _ = finished
    baseline = results["summary"]["baseline"]
    for family, method in results["summary"]["methods"].items():
        for kind in ("full", "pruned", "gated"):
            values = [entry["methods"][family][kind]["test"]["top1"] for entry in results["seeds"]]
            assert method[kind]["top1"] == spread(values)
            assert method[kind]["top1"]["std"] == pytest.approx(np.std(values, ddof=1))
            compared = method[kind]["non_inferiority"]
            assert compared["difference"] == pytest.approx(np.mean(values) - baseline["top1"]["mean"])
            assert compared["samples"] == 540 and compared["seeds"] == 2 and compared["margin"] == 0.08
            assert set(method[kind]["latency"]) == {"mean", "median", "p95", "ratio"}
        costs = [entry["methods"][family]["gated"]["test"]["mean_macs"] for entry in results["seeds"]]
        assert method["gated"]["macs"]["values"] == costs
        saved = [
            1 - cost / entry["baseline"]["full"]["macs"] for cost, entry in zip(costs, results["seeds"], strict=True)
        ]
        assert method["gated"]["saving"]["values"] == pytest.approx(saved)
        assert len(method["subsets"]) == 15 and all(row["latency_ms"] > 0 for row in method["subsets"])
    assert baseline["latency"]["ratio"] == 1.0 and baseline["latency"]["mean"] > 0


def test_pruning_follows_the_scores(finished: Finished) -> None:
    for _, _, part in parts_of(finished[1]):
        best = SubsetScores.from_dict(part["scores"]).best()
        pruned = part["pruned"]
        assert pruned["exits"] == list(best.exits)
        assert (pruned["parameters"], pruned["macs"]) == (best.parameters, best.macs)
        assert pruned["val"]["correct1"] == best.correct1 and pruned["val"]["correct5"] == best.correct5
        assert part["full"]["val"]["correct1"] == part["scores"]["counts"][-1][0]
        assert [row["macs"] for row in part["full"]["each_exit"]] == [
            part["scores"]["macs"][m - 1] for m in (1, 3, 7, 15)
        ]


def test_stored_answers_and_models_agree_with_the_figures(finished: Finished) -> None:
    folder, results, _ = finished
    images, labels = images_of_the_test()
    models = [(entry["seed"], "baseline", entry["baseline"]) for entry in results["seeds"]] + list(parts_of(results))
    for seed, name, part in models:
        stored = answers_of(folder, seed, name)
        assert (stored["test_labels"] == labels.numpy()).all()
        for kind in ("full",) if name == "baseline" else ("full", "pruned"):
            right = stored[f"test_correct_{kind}"]
            assert int(right.sum()) == part[kind]["test"]["correct1"] and right.dtype == bool
            net = load(folder / f"seed-{seed}" / name / kind).eval()
            with torch.no_grad():
                answers = net(images).argmax(1) == labels
            assert int((answers.numpy() != right).sum()) <= 1  # batches of another size may round otherwise
            assert count_parameters(net) == part[kind]["parameters"]
            assert count_macs(net, (1, 8, 8)) == part[kind]["macs"]


def images_of_the_test() -> tuple[torch.Tensor, torch.Tensor]:
    return ImageDataModule("digits", image_size=8, train_samples=300).dataset("test").__getitems__(list(range(540)))


def test_results_name_no_path(finished: Finished) -> None:
    folder, results, _ = finished
    assert str(folder) not in (folder / "results.json").read_text()
    splits = results["data"]["splits"]
    assert splits["train"]["samples"] == 300 and len(splits["test"]["sha256"]) == 64
    assert "output" not in results["config"] and results["config"]["data"] == "digits"


def test_resuming_a_finished_run_makes_the_report_again(finished: Finished) -> None:
    folder, results, _ = finished
    (folder / "report.html").unlink()
    lines: list[str] = []
    again = run({"output": str(folder)}, resume=True, progress=Progress(lines.append))
    assert again == results and lines == [] and (folder / "report.html").is_file()
    with pytest.raises(UserError, match="holds another run"):
        run({"output": str(folder), "epochs": 7}, resume=True)


def test_a_run_that_lost_its_last_parts_does_only_those(finished: Finished, tmp_path: Path) -> None:
    folder, results, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "results.json").unlink()
    (copy / "seed-1" / "ascending" / "part.json").unlink()
    lines: list[str] = []
    again = run({"output": str(copy)}, resume=True, progress=Progress(lines.append))
    assert [line.partition(":")[0] for line in lines if "epoch" in line] == []  # its training was over
    for one, other in zip(parts_of(again), parts_of(results), strict=True):
        pruned = [{**part[2]["pruned"], "selection": None} for part in (one, other)]  # which holds a latency
        assert pruned[0] == pruned[1] and one[2]["gated"] == other[2]["gated"]
    assert again["test_looks"] == results["test_looks"]


def test_the_published_method_alone(tmp_path: Path) -> None:
    given = {"image_size": 8, "train_samples": 64, "epochs": 1, "batch_size": 32, "device": "cpu", "threads": 1}
    given["methods"] = ("mixed",)
    asked = {"margin": 99.0, "class_weights": True, "terminate": False, "static": ("0.5",)}
    results = run({**given, **asked, "output": str(tmp_path / "run")})
    method = results["summary"]["methods"]["mixed"]
    assert method["smallest"]["exits"] == [[0]] and method["smallest"]["non_inferiority"]["non_inferior"]
    assert len(results["data"]["class_weight"]) == 10 and results["calibration"] is method["gated"] is None
    assert results["delivered"]["kind"] == "pruned" and results["test_looks"] == 0
    kept = load(tmp_path / "run")
    assert (
        list(kept.exit_ids)
        == results["delivered"]["exits"]
        == results["seeds"][0]["methods"]["mixed"]["pruned"]["exits"]
    )
    static = results["static"][0]
    small = load(tmp_path / "run" / "seed-0" / "static" / "resnet_small@0.5" / "full")
    assert (static["name"], static["network"]) == ("resnet_small at width 0.5", "resnet_small@0.5")
    assert static["macs"] == count_macs(small, (1, 8, 8)) < results["summary"]["baseline"]["macs"]["mean"] / 2
    later = calibrate_run(tmp_path / "run", {"objective": "published"})
    files = later["delivered"].pop("files")
    expected = {**results["delivered"], "notice": "", "files": 0}
    assert later["test_looks"] == 1 and later["delivered"] | {"files": 0} == expected
    assert files.keys() - results["delivered"]["files"].keys() == {"examples.npz"}
    assert later["seeds"][0]["methods"]["mixed"]["gated"]["agreement"]["differing_elsewhere"] == 0
    assert later["static"] == results["static"]


def test_jpeg_archive_as_data(archive: Path, tmp_path: Path) -> None:
    given = {"image_size": 8, "epochs": 1, "batch_size": 16, "device": "cpu", "threads": 1, "terminate": False}
    results = run({**given, "output": str(tmp_path / "run"), "data": str(archive)})
    assert results["config"]["data"] == "images.npz" and results["data"]["spec"] == "images.npz"
    assert str(tmp_path) not in (tmp_path / "run" / "results.json").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "&lt;ship&gt;" in page and "<ship>" not in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": "resnet9000"}, "no such network: 'resnet9000' \\("),
        ({"network": "torchvision/resnet9000"}, "no such network|needs torchvision|torchvision"),
        ({"weights": "DEFAULT"}, "^resnet_small: has no pretrained weights"),
        ({"data": "nowhere/at-all"}, "no such data: nowhere/at-all"),
        (
            {"network": "vgg16", "image_size": 8},
            "vgg16 cannot take images of 8 pixels, try another image size|needs torchvision|torchvision",
        ),
        ({"classes": 4}, "fewer classes than labels: 4 classes asked for"),
    ],
)
def test_errors_leave_no_folder(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run({"output": str(tmp_path / "run"), "device": "cpu", **given})
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    options = {"image_size": 8, "train_samples": 96, "batch_size": 32, "device": "cpu", "threads": 1, "epochs": 4}
    whole = run({**options, "output": str(tmp_path / "whole")})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    given = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "aep_ext", "run", "--output", str(tmp_path / "killed"), *given]
    checkpoint = tmp_path / "killed" / "checkpoints" / "seed-0" / "best.ckpt"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        began = time.monotonic()
        while not checkpoint.is_file() and process.poll() is None and time.monotonic() - began < 120:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1]
    assert checkpoint.is_file(), errors
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "results.json").exists()
    lines: list[str] = []
    resumed = run({"output": str(tmp_path / "killed")}, resume=True, progress=Progress(lines.append))
    epochs = [line for line in lines if ": epoch " in line]
    assert 0 < len(epochs) < 4 and all(line.startswith("best: ") for line in lines)

    def comparable(results: dict[str, Any]) -> list[Any]:
        part = results["seeds"][0]
        rows = [part["baseline"], part["methods"]["best"]]
        histories = [[{**epoch, "seconds": 0} for epoch in row["training"]["history"]] for row in rows]
        return [
            histories,
            rows[0]["full"],
            *(rows[1][key] for key in ("full", "gated")),
            {**rows[1]["pruned"], "selection": None},  # holds a latency
            rows[1]["scores"]["counts"],
        ]

    assert comparable(resumed) == comparable(whole)
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
