"""The main job: what a run folder holds, that its figures agree with its models, and that a kill costs one epoch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the training needs lightning")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from aep_ext import deploy
from aep_ext.pruning import SubsetScores, count_macs, count_parameters, prune
from aep_ext.training import ImageDataModule, UserError, run
from aep_ext.training.callbacks import best_weights
from aep_ext.training.summary import spread

Finished = tuple[Path, dict[str, Any], list[str]]
ROOT = Path(__file__).parents[2]


def test_files_of_the_contract(finished: Finished) -> None:
    folder, results, _ = finished
    wanted = ["config.json", "results.json", "report.html", "model.safetensors", "model.json", "full/model.safetensors"]
    wanted += ["baseline/model.json", "checkpoints/seed-1/mixed.ckpt", "seed-0/ascending/pruned/model.json"]
    assert [name for name in wanted if not (folder / name).is_file()] == []
    assert {path.name for path in (folder / "figures").iterdir()} == {"tradeoff.png", "curves.png", "accuracy.png"}
    assert [path for path in folder.rglob("*") if path.name.startswith(".") or "lightning_logs" in path.name] == []
    assert json.loads((folder / "results.json").read_text()) == {k: v for k, v in results.items() if k != "output"}


def test_progress_is_a_line_an_epoch(finished: Finished) -> None:
    assert len(finished[2]) == 2 * 3 * 2
    assert finished[2][0].startswith("seed 0 / baseline: epoch 1/2, validation loss ")


def test_every_seed_trains_one_baseline_and_every_family(finished: Finished) -> None:
    _, results, _ = finished
    assert [seed["seed"] for seed in results["seeds"]] == [0, 1]
    assert all(list(seed["methods"]) == ["mixed", "ascending"] for seed in results["seeds"])
    weights = results["summary"]["methods"]["mixed"]["exit_weights"]
    assert weights["loss"] == pytest.approx([0.4, 0.3, 0.2, 0.1]) and weights["output"] == weights["loss"][::-1]


def test_summary_is_of_the_seeds(finished: Finished) -> None:
    _, results, _ = finished
    for family, method in results["summary"]["methods"].items():
        for kind in ("full", "pruned"):
            values = [seed["methods"][family][kind]["report"]["top1"] for seed in results["seeds"]]
            assert method[kind]["top1"] == spread(values)
            assert method[kind]["top1"]["std"] == pytest.approx(np.std(values, ddof=1))
            baseline = results["summary"]["baseline"]["top1"]["mean"]
            assert method[kind]["verdict"]["difference"] == pytest.approx(np.mean(values) - baseline)
            assert method[kind]["verdict"]["samples"] == 540 and method[kind]["verdict"]["seeds"] == 2
        assert len(method["subsets"]) == 15
        assert all(row["latency_ms"] > 0 for row in method["subsets"])
    assert results["summary"]["baseline"]["latency"]["ratio"] == 1.0


def test_pruning_follows_the_scores(finished: Finished) -> None:
    _, results, _ = finished
    for seed in results["seeds"]:
        for part in seed["methods"].values():
            best = SubsetScores.from_dict(part["scores"]).best()
            pruned = part["pruned"]
            assert pruned["exits"] == list(best.exits)
            assert (pruned["parameters"], pruned["macs"]) == (best.parameters, best.macs)
            assert pruned["select"]["correct1"] == best.correct1 and pruned["select"]["correct5"] == best.correct5
            assert part["full"]["select"]["correct1"] == part["scores"]["counts"][-1][0]


def test_stored_answers_and_models_agree_with_the_figures(finished: Finished) -> None:
    folder, results, _ = finished
    data = ImageDataModule("digits", image_size=8, train_samples=96)
    images, labels = data.dataset("report").__getitems__(list(range(540)))
    for seed in results["seeds"]:
        number = seed["seed"]
        for name, kinds in (("baseline", ("full",)), ("mixed", ("full", "pruned")), ("ascending", ("full", "pruned"))):
            part = seed["baseline"] if name == "baseline" else seed["methods"][name]
            stored = np.load(folder / f"seed-{number}" / name / "predictions.npz")
            assert (stored["report_labels"] == labels.numpy()).all()
            for kind in kinds:
                figures = part if name == "baseline" else part[kind]
                right = stored[f"report_right_{kind}"]
                assert int(right.sum()) == figures["report"]["correct1"] and right.dtype == bool
                place = folder / f"seed-{number}" / name / ("" if name == "baseline" else kind)
                net = deploy.load(place).eval()
                with torch.no_grad():
                    answers = net(images).argmax(1) == labels
                assert int((answers.numpy() != right).sum()) <= 1  # batches of another size may round otherwise
                assert count_parameters(net) == figures["parameters"]
                assert count_macs(net, (1, 8, 8)) == figures["macs"]


def test_delivered_models(finished: Finished) -> None:
    folder, results, _ = finished
    chosen = results["delivered"]
    unit = folder / f"seed-{chosen['seed']}" / chosen["exit_weights"]
    for source, target in (
        (unit / "full", "full"),
        (unit / "pruned", "."),
        (folder / f"seed-{chosen['seed']}/baseline", "baseline"),
    ):
        for name in ("model.safetensors", "model.json"):
            assert (source / name).read_bytes() == (folder / target / name).read_bytes()
    best = max(part["pruned"]["select"]["top1"] for seed in results["seeds"] for part in seed["methods"].values())
    delivered = next(seed for seed in results["seeds"] if seed["seed"] == chosen["seed"])["methods"][
        chosen["exit_weights"]
    ]
    assert delivered["pruned"]["select"]["top1"] == best
    kept = deploy.load(folder)
    assert list(kept.exit_ids) == chosen["exits"] == delivered["pruned"]["exits"]
    metadata = deploy.describe(folder)["metadata"]
    assert (
        metadata["image_size"] == 8
        and len(metadata["classes"]) == 10
        and set(metadata["normalisation"]) == {"mean", "std"}
    )


def test_results_name_no_path(finished: Finished) -> None:
    folder, results, _ = finished
    assert str(folder) not in (folder / "results.json").read_text()
    assert results["data"]["roles"]["fit"]["samples"] == 96 and len(results["data"]["roles"]["report"]["sha256"]) == 64
    assert "output" not in results["config"] and results["config"]["data"] == "digits"


def test_resuming_a_finished_run_makes_the_report_again(finished: Finished) -> None:
    folder, results, _ = finished
    (folder / "report.html").unlink()
    lines: list[str] = []
    again = run({"output": str(folder)}, resume=True, write=lines.append)
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
    again = run({"output": str(copy)}, resume=True, write=lines.append)
    assert lines == []  # its training was over
    assert again["seeds"][0] == results["seeds"][0]
    assert again["seeds"][1]["methods"]["ascending"]["pruned"] == results["seeds"][1]["methods"]["ascending"]["pruned"]


def test_smallest_subset_within_a_wide_margin(tmp_path: Path) -> None:
    results = run(
        {
            "output": str(tmp_path / "run"),
            "image_size": 8,
            "train_samples": 64,
            "epochs": 1,
            "batch_size": 32,
            "device": "cpu",
            "margin": 99.0,
            "class_weights": True,
            "threads": 1,
        }
    )
    compact = results["summary"]["methods"]["mixed"]["compact"]
    assert compact["exits"] == [0] and compact["verdict"]["non_inferior"] and compact["latency"]["median"] > 0
    assert len(results["data"]["class_weight"]) == 10
    small = deploy.load(tmp_path / "run" / "compact")
    assert list(small.exit_ids) == [0] and count_macs(small, (1, 8, 8)) == compact["macs"]["mean"]
    full = deploy.load(tmp_path / "run" / "full")
    full.load_state_dict(best_weights(tmp_path / "run" / "checkpoints" / "seed-0" / "mixed.ckpt"))
    image = torch.randn(3, 1, 8, 8)
    assert torch.equal(prune(full.eval(), (0,))(image), small.eval()(image))


def test_jpeg_archive_as_data(archive: Path, tmp_path: Path) -> None:
    results = run(
        {
            "output": str(tmp_path / "run"),
            "data": str(archive),
            "image_size": 8,
            "epochs": 1,
            "batch_size": 16,
            "device": "cpu",
            "threads": 1,
        }
    )
    assert results["config"]["data"] == "images.npz" and results["data"]["spec"] == "images.npz"
    assert str(tmp_path) not in (tmp_path / "run" / "results.json").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "&lt;ship&gt;" in page and "<ship>" not in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": "resnet9000"}, "no such network: 'resnet9000' .*resnet_small"),
        ({"network": "torchvision/resnet9000"}, "no such network|needs torchvision|torchvision"),
        ({"weights": "DEFAULT"}, "no such network: resnet_small: has no pretrained weights"),
        ({"data": "nowhere/at-all"}, "no such data: nowhere/at-all"),
        ({"network": "vgg16", "image_size": 8}, "vgg16 cannot take images of 8 pixels|needs torchvision|torchvision"),
        ({"classes": 4}, "fewer classes than labels: 4 classes asked for"),
    ],
)
def test_errors_leave_no_folder(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run({"output": str(tmp_path / "run"), "device": "cpu", **given})
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    given = [
        "--image-size",
        "8",
        "--train-samples",
        "96",
        "--batch-size",
        "32",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--epochs",
        "4",
    ]
    options = {"image_size": 8, "train_samples": 96, "batch_size": 32, "device": "cpu", "threads": 1, "epochs": 4}
    whole = run({**options, "output": str(tmp_path / "whole")})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "aep_ext", "run", "--output", str(tmp_path / "killed"), *given]
    checkpoint = tmp_path / "killed" / "checkpoints" / "seed-0" / "mixed.ckpt"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        began = time.monotonic()
        while not checkpoint.is_file() and process.poll() is None and time.monotonic() - began < 120:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1]
    assert checkpoint.is_file(), errors
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "results.json").exists()
    lines: list[str] = []
    resumed = run({"output": str(tmp_path / "killed")}, resume=True, write=lines.append)
    assert 0 < len(lines) < 4 and all(line.startswith("mixed: ") for line in lines)

    def comparable(results: dict[str, Any]) -> list[Any]:
        part = results["seeds"][0]
        rows = [part["baseline"], part["methods"]["mixed"]]
        histories = [[{**epoch, "seconds": 0} for epoch in row["fit"]["history"]] for row in rows]
        return [histories, rows[0]["report"], rows[1]["full"], rows[1]["pruned"], rows[1]["scores"]["counts"]]

    assert comparable(resumed) == comparable(whole)
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
