"""The calibration of a run: what it writes agrees with what the run stored, and it goes on after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the training needs lightning")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from aep_ext._io import read_json
from aep_ext.export import describe, load
from aep_ext.inference import ExitPolicy, GatedNet, near_threshold, simulate
from aep_ext.report import text_table
from aep_ext.training import ImageDataModule, Progress, RunConfig, UserError, calibrate_run, gates, run
from aep_ext.training import run as run_function

Finished = tuple[Path, dict[str, Any], list[str]]
job_module = __import__("sys").modules[run_function.__module__]
TINY = {
    "image_size": 8,
    "train_samples": 96,
    "epochs": 1,
    "batch_size": 32,
    "device": "cpu",
    "threads": 1,
    "methods": ("mixed",),
}


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report's plots take longer than the calibration, and have tests of their own."""
    monkeypatch.setattr(job_module, "write_report", lambda folder: (folder / "report.html").write_text("made"))


@pytest.fixture
def copy(finished: Finished, tmp_path: Path, quick_report: None) -> Path:
    """A copy of the finished run, to write into."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def gated_parts(results: dict[str, Any]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for entry in results["seeds"]:
        for name, part in entry["methods"].items():
            yield entry["seed"], name, part["gated"]


def predictions(folder: Path, seed: int, name: str) -> dict[str, torch.Tensor]:
    arrays = np.load(folder / f"seed-{seed}" / name / "predictions.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def delivered_part(results: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    chosen = results["delivered"]
    part = next(g for s, n, g in gated_parts(results) if (s, n) == (chosen["seed"], chosen["method"]))
    return chosen, part


def test_the_gates_keep_the_margin_at_less_cost(finished: Finished) -> None:
    _, results, _ = finished
    feasible = [(seed, name, gated) for seed, name, gated in gated_parts(results) if gated["feasible"]]
    assert feasible  # or the tests below show little
    macs = results["summary"]["baseline"]["macs"]["mean"]
    for _, _, gated in feasible:
        assert gated["calibration"]["drop_points"] <= 8.0 and gated["test"]["mean_macs"] < macs
    assert results["summary"]["methods"]["mixed"]["gated"]["feasible"] == sum(n == "mixed" for _, n, _ in feasible)
    asked = results["calibration"]
    assert asked["budget"] == {"kind": "accuracy", "points": 8.0} and asked["reference"] == "baseline"
    assert (asked["images"], asked["samples"]) == ("calibration", 597) and results["test_looks"] == 1
    chosen, said = results["delivered"], results["delivered"]["selection"]
    assert chosen["kind"] == said["objective"] == "gated" and said["exits"] == chosen["exits"]
    assert said["budget"]["points"] == 8.0 and said["data"]["n"] == 597
    assert (said["data"]["subsets"], said["data"]["screened"], said["data"]["cross_validated"]) == (15, 15, 15)


def test_figures_are_those_of_the_stored_logits(finished: Finished) -> None:
    folder, results, _ = finished
    for seed, name, gated in gated_parts(results):
        policy, stored = ExitPolicy.from_dict(gated["policy"]), predictions(folder, seed, name)
        rows = list(policy.exits)
        outcome = simulate(stored["test_logits"][rows], policy, target=stored["test_labels"], costs=gated["costs"])
        test, right = gated["test"], outcome.correct.numpy()
        assert test["correct1"] == right.sum() and test["top1"] == right.mean() and test["n"] == 540
        assert test["mean_macs"] == outcome.mean_cost and test["exit_counts"] == outcome.counts.tolist()
        assert np.array(gated["per_class"]).sum(axis=0).tolist() == outcome.counts.tolist()
        taken, labels = outcome.exit.numpy(), stored["test_labels"].numpy()
        assert gated["per_class"][3] == np.bincount(taken[labels == 3], minlength=len(rows)).tolist()
        assert [row[1] for row in gated["right_by_exit"]] == [int(right[taken == e].sum()) for e in range(len(rows))]
        seen = simulate(stored["calibration_logits"][rows], policy, target=stored["calibration_labels"])
        assert gated["val"]["correct1"] == int(seen.correct.sum()) and gated["val"]["n"] == 597
        full = load(folder / f"seed-{seed}" / name / "full")
        part = next(e for e in results["seeds"] if e["seed"] == seed)["methods"][name]
        if gated["feasible"]:
            assert [point["val_macs"] for point in gated["curve"]] == sorted(p["val_macs"] for p in gated["curve"])
        else:
            assert rows == part["pruned"]["exits"] and test["correct1"] == part["pruned"]["test"]["correct1"]
        assert [row["exit"] for row in gated["metrics"]] == rows and full.num_exits == 4


def test_live_network_agrees_with_the_simulator(finished: Finished) -> None:
    for _, _, gated in gated_parts(finished[1]):
        found = gated["agreement"]
        assert (found["n"], found["single"]["n"], found["tolerance"]) == (540, 32, 1e-5)
        assert found["differing_elsewhere"] == found["single"]["differing_elsewhere"] == 0
        assert found["differing"] <= found["near_threshold"] and found["max_confidence_difference"] < 1e-4
    assert not any("WARNING" in notice for notice in finished[1]["notices"])


def test_a_live_network_that_differs_is_said(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gates.agreement

    def wrong(net: GatedNet, *rest: Any) -> Any:
        with torch.no_grad():
            for parameter in net.net.exits[-1].parameters():
                parameter.neg_()
        return real(net, *rest)

    monkeypatch.setattr(job_module, "agreement", wrong)
    results = calibrate_run(copy, {"budget": 9.0})
    assert sum("WARNING" in notice for notice in results["notices"]) == 4


def test_delivered_network_loads_and_answers_as_simulated(finished: Finished) -> None:
    folder, results, _ = finished
    chosen, part = delivered_part(results)
    assert chosen["kind"] == "gated" and chosen["exits"] == part["policy"]["exits"]
    place = folder / f"seed-{chosen['seed']}" / chosen["method"]
    sources = (("full", "full"), ("pruned", "pruned"), ("gated", "."), ("../baseline/full", "baseline"))
    for source, target in sources:
        for file in ("model.safetensors", "model.json"):
            assert (place / source / file).read_bytes() == (folder / target / file).read_bytes()
    net = load(folder)
    assert isinstance(net, GatedNet) and list(net.net.exit_ids) == chosen["exits"]
    data = ImageDataModule("digits", image_size=8, train_samples=300).dataset("test")
    answer, logits = net(data.__getitems__(range(540))[0]), predictions(folder, chosen["seed"], chosen["method"])
    policy = ExitPolicy.from_dict(part["policy"])
    stored = logits["test_logits"][chosen["exits"]]
    near = near_threshold(stored, policy, 1e-5)
    assert bool(((answer.exit == simulate(stored, policy).exit) | near).all())
    assert describe(folder)["metadata"]["preprocessing"]["image_size"] == 8


def test_examples_are_the_images_of_their_numbers(finished: Finished) -> None:
    folder, results, _ = finished
    chosen, part = delivered_part(results)
    early, late = part["examples"]["early"], part["examples"]["late"]
    images = np.load(folder / "examples.npz")["images"]
    data = ImageDataModule("digits", image_size=8, train_samples=300).dataset("test")
    assert images.dtype == np.uint8 and images.shape == (len(early) + len(late), 8, 8, 1)
    for image, one in zip(images, early + late, strict=True):
        assert np.array_equal(image, data.pixels([one["index"]])[0].permute(1, 2, 0).numpy())
        assert one["label"] == int(data.labels[one["index"]])
    assert [one["confidence"] for one in late] == sorted(one["confidence"] for one in late)
    assert all(one["exit"] == part["policy"]["exits"][-1] for one in late)
    assert all(one["exit"] < part["policy"]["exits"][-1] for one in early)


def test_the_same_call_looks_at_nothing_again_and_others_are_counted(
    copy: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "report.html").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(job_module.Job, "run", None)
        again = calibrate_run(copy)
    assert {**again, "output": ""} == {**finished[1], "output": ""} and (copy / "report.html").is_file()
    lines: list[str] = []
    other = calibrate_run(copy, {"budget": 10.0, "criterion": "entropy"}, progress=Progress(lines.append))
    assert other["test_looks"] == 2 and other["notices"][-1].startswith("2 calibrations of this run have looked")
    assert other["calibration"]["criterion"] == "entropy" and len(lines) == 4
    assert other["config"] == finished[1]["config"] or other["config"]["budget"] == 10.0
    assert [e["baseline"] for e in other["seeds"]] == [e["baseline"] for e in finished[1]["seeds"]]
    assert calibrate_run(copy)["test_looks"] == 3


def test_after_a_kill_it_goes_on(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = job_module.calibrated, []

    def killed(config: Any, part: Any, *rest: Any) -> Any:
        calls.append((part["seed"], part["name"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(config, part, *rest)

    before = (copy / "results.json").read_bytes()
    monkeypatch.setattr(job_module, "calibrated", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate_run(copy, {"budget": 9.0})
    assert (copy / "results.json").read_bytes() == before
    again = calibrate_run(copy, {"budget": 9.0})
    assert calls == [(0, "mixed"), (0, "ascending"), (0, "ascending"), (1, "mixed"), (1, "ascending")]
    assert again["test_looks"] == 2


def test_nothing_that_keeps_the_budget_is_said_and_the_pruned_network_is_delivered(copy: Path) -> None:
    results = calibrate_run(copy, {"budget": -60.0})
    chosen, part = delivered_part(results)
    assert chosen["kind"] == "pruned" and "the published choice is delivered" in chosen["notice"]
    assert part["notice"] and text_table(results).count(part["notice"]) == 1
    assert not isinstance(load(copy), GatedNet)
    for entry in results["seeds"]:
        for name, one in entry["methods"].items():
            gated = one["gated"]
            assert not gated["feasible"] and gated["policy"]["exits"] == one["pruned"]["exits"]
            assert not any(gated["policy"]["enabled"]) and gated["agreement"]["differing_elsewhere"] == 0
            assert gated["test"]["correct1"] == one["pruned"]["test"]["correct1"]
            assert gated["test"]["mean_macs"] == one["pruned"]["macs"]
            assert any(line.startswith(f"seed {entry['seed']} / {name}: ") for line in results["notices"])
    assert results["summary"]["methods"]["mixed"]["gated"]["feasible"] == 0


def test_what_the_budget_is_held_against(finished: Finished) -> None:
    folder, results, _ = finished
    part = results["seeds"][0]["methods"]["mixed"]
    stored, baseline = predictions(folder, 0, "mixed"), predictions(folder, 0, "baseline")
    expected = {"baseline": "baseline", "pruned": "pruned", "ensemble": "full"}
    for reference, kind in expected.items():
        found = gates._reference(RunConfig(reference=reference), part, stored, baseline, "test")
        right = baseline["test_correct_full"] if kind == "baseline" else stored[f"test_correct_{kind}"]
        assert torch.equal(found, right)
    best = gates._reference(RunConfig(reference="best"), part, stored, baseline, "test")
    assert best.sum() == max(baseline["test_correct_full"].sum(), stored["test_correct_full"].sum())


def test_calibrated_on_the_validation_images_where_nothing_is_held_out(tmp_path: Path, quick_report: None) -> None:
    given = {**TINY, "train_samples": 800, "risk": 0.5, "output_weights": "run", "criterion_on": "exit"}
    results = run({**given, "output": str(tmp_path / "run")})
    asked, part = results["calibration"], results["seeds"][0]["methods"]["mixed"]
    assert (asked["images"], asked["samples"]) == ("val", 360)
    assert asked["budget"] == {"kind": "risk", "epsilon": 0.5, "delta": 0.1}
    assert part["gated"]["val"]["n"] == 360 and part["gated"]["policy"]["criterion_on"] == "exit"
    if part["gated"]["feasible"]:
        output = np.array(part["exit_weights"]["output"])[part["gated"]["policy"]["exits"]]
        found = np.array(part["gated"]["policy"]["output_weights"])
        assert found / found.sum() == pytest.approx(output / output.sum())
    later = calibrate_run(tmp_path / "run", {"budget": 3.0})
    assert later["calibration"]["budget"] == {"kind": "accuracy", "points": 3.0}


def test_errors(copy: Path, tmp_path: Path) -> None:
    for given, message in (
        ({"criterion": "luck"}, "no such criterion: 'luck'"),
        ({"static": ("resnet9000",)}, "no such static network: 'resnet9000'"),
    ):
        with pytest.raises(UserError, match=message):
            calibrate_run(copy, given)
    with pytest.raises(UserError, match="no such run: .* holds none"):
        calibrate_run(tmp_path / "nothing")
    results = read_json(copy / "results.json")
    (copy / "results.json").write_text(json.dumps({**results, "version": 1}))
    with pytest.raises(UserError, match="version"):
        calibrate_run(copy)
    (copy / "results.json").unlink()
    with pytest.raises(UserError, match="is unfinished; go on with it: aep run --output"):
        calibrate_run(copy)
    (copy / "results.json").write_text(json.dumps(results))
    (copy / "seed-0" / "baseline" / "predictions.npz").unlink()
    with pytest.raises(UserError, match="has lost a file"):
        calibrate_run(copy)
