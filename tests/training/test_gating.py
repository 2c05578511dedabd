"""``aep calibrate``: what it writes agrees with what the run stored, and it goes on after a kill."""

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

from aep_ext import deploy, ops
from aep_ext._io import write_json
from aep_ext.report import UserError
from aep_ext.termination import ExitCache, GatedNet, exit_costs, exit_metrics, simulate
from aep_ext.training import ImageDataModule, run
from aep_ext.training.gating import CalibrationSettings, calibrate_run, gates_table
from aep_ext.training.gating import job as job_module

TINY = {"image_size": 8, "train_samples": 300, "epochs": 4, "batch_size": 32, "device": "cpu", "threads": 1}
WIDE = CalibrationSettings(budget=8.0, images="select")
Gated = tuple[Path, dict[str, Any], dict[str, Any], list[str]]


@pytest.fixture(autouse=True)
def _quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report's figures take longer than the calibration, and have tests of their own."""
    monkeypatch.setattr(job_module, "write_report", lambda folder: (folder / "report.html").write_text("made"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two seeds, without a gate."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run({**TINY, "output": str(folder), "seeds": (0, 1)})
    return folder


@pytest.fixture(scope="module")
def gated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Gated:
    """The same with a gate: folder, results, gates, lines printed."""
    folder = tmp_path_factory.mktemp("gated") / "run"
    shutil.copytree(trained, folder)
    lines: list[str] = []
    gates = calibrate_run(folder, WIDE, write=lines.append)
    return folder, json.loads((folder / "results.json").read_text()), gates, lines


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """The run without a gate, to write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def units(gates: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, method in gates["methods"].items():
        for part in method["seeds"]:
            yield name, part


def cache_of(folder: Path, name: str, part: dict[str, Any], role: str) -> ExitCache:
    """The stored logits of the gate's exits, read without the code under test."""
    arrays = np.load(folder / f"seed-{part['seed']}" / name / "predictions.npz")
    logits = torch.from_numpy(arrays[f"{role}_logits"])[part["exits"]]
    return ExitCache.from_logits(
        logits, torch.from_numpy(arrays[f"{role}_labels"]), part["output_weights"], role=role, exit_ids=part["exits"]
    )


def simulated(cache: ExitCache, part: dict[str, Any]) -> Any:
    return simulate(
        cache.logits,
        cache.weights,
        part["policy"]["name"],
        part["thresholds"],
        temperatures=part["temperatures"],
        enabled=part["enabled"],
        target=cache.target,
        costs=part["costs"],
        on=part["policy"]["on"],
    )


def test_files_and_lines(gated: Gated) -> None:
    folder, _, gates, lines = gated
    assert json.loads((folder / "gates.json").read_text()) == gates
    assert (gates["format"], gates["version"]) == ("aep_ext.gates", 1)
    assert gates["settings"]["budget"] == {"kind": "accuracy", "points": 8.0}
    assert [line.partition(":")[0] for line in lines] == ["seed 0 / mixed", "seed 1 / mixed"]
    assert (folder / "seed-1" / "mixed" / "gates.json").is_file() and (folder / "report.html").is_file()
    assert [path for path in folder.rglob("*") if path.name.startswith(".")] == []
    assert str(folder) not in (folder / "gates.json").read_text()


def test_the_gate_is_cheaper_and_a_run_of_before_is_enough(gated: Gated, trained: Path) -> None:
    folder, results, gates, _ = gated
    parts = [part for _, part in units(gates)]
    assert any(part["gated"] for part in parts)  # or the tests below show little
    for part in parts:
        if part["gated"]:
            assert part["choice"]["keeps"] and part["choice"]["mean_macs"] < part["report"]["pruned"]["macs"]
            assert len(part["exits"]) >= 2
    # The run itself is as it was: nothing of it was trained, scored or written again.
    assert (folder / "results.json").read_bytes() == (trained / "results.json").read_bytes()
    assert results["delivered"] == json.loads((trained / "results.json").read_text())["delivered"]


def test_figures_are_those_of_the_stored_logits(gated: Gated) -> None:
    folder, results, gates, _ = gated
    for name, part in units(gates):
        cache = cache_of(folder, name, part, "report")
        outcome, report = simulated(cache, part), part["report"]
        arrays = np.load(folder / f"seed-{part['seed']}" / name / "predictions.npz")
        right = outcome.correct.numpy()
        assert report["gated"]["top1"] == right.mean() and report["n"] == len(right) == 540
        assert report["gated"]["mean_macs"] == outcome.mean_cost
        assert report["gated"]["exit_counts"] == outcome.counts.tolist()
        pruned = arrays["report_right_pruned"]
        assert (
            report["pruned"]["top1"] == pruned.mean() and report["full"]["top1"] == arrays["report_right_full"].mean()
        )
        assert report["drop_points"] == pytest.approx(100 * (right.mean() - pruned.mean()))
        low, high = report["drop_interval"]
        assert low <= report["drop_points"] <= high
        assert np.array(part["per_class"]).sum(axis=0).tolist() == outcome.counts.tolist()
        labels = cache.target.numpy()
        assert (
            part["per_class"][3]
            == np.bincount(outcome.exits.numpy()[labels == 3], minlength=len(part["exits"])).tolist()
        )
        assert [row[1] for row in part["right_by_exit"]] == [
            int(right[outcome.exits.numpy() == e].sum()) for e in range(len(part["exits"]))
        ]
        for k, row in enumerate(part["calibration"]):
            before = exit_metrics(cache, 1.0)[k].to_dict()
            after = exit_metrics(cache, part["temperatures"])[k].to_dict()
            assert row["exit"] == part["exits"][k] and row["temperature"] == part["temperatures"][k]
            assert all(row["before"][key] == before[key] and row["after"][key] == after[key] for key in row["before"])
        seed = next(seed for seed in results["seeds"] if seed["seed"] == part["seed"])
        assert report["baseline"]["top1"] == seed["baseline"]["report"]["top1"]
        assert part["pruned_exits"] == seed["methods"][name]["pruned"]["exits"]
        full = deploy.load(folder / f"seed-{part['seed']}" / name / "full")
        assert (
            part["costs"] == list(exit_costs(deploy.load(folder / "gated").net, (1, 8, 8)))
            or part["seed"] != (gates["delivered"]["seed"])
        )
        assert min(part["output_weights"]) > 0  # fitted, but those of the run where nothing is gated
        if not part["gated"]:
            assert part["output_weights"] == full.output_weights[part["exits"]].tolist()


def test_curve_is_that_of_the_images_of_both_roles(gated: Gated) -> None:
    _, _, gates, _ = gated
    for _, part in units(gates):
        curve = part["curve"]
        assert 2 <= len(curve) <= 101
        select = [point["select_macs"] for point in curve]
        assert select == sorted(select) and all(0 <= point["report_top1"] <= 1 for point in curve)
        assert [point["select_top1"] for point in curve] == sorted(point["select_top1"] for point in curve)


def test_summary_is_of_the_seeds(gated: Gated) -> None:
    _, _, gates, _ = gated
    method = gates["methods"]["mixed"]
    reports = [part["report"] for part in method["seeds"]]
    summary = method["summary"]
    assert summary["gated_top1"]["values"] == [report["gated"]["top1"] for report in reports]
    assert summary["saving"]["values"] == pytest.approx(
        [1 - report["gated"]["mean_macs"] / report["pruned"]["macs"] for report in reports]
    )
    assert summary["drop_points"]["mean"] == pytest.approx(np.mean([report["drop_points"] for report in reports]))


def test_live_network_agrees_with_the_simulator(gated: Gated) -> None:
    _, _, gates, lines = gated
    for _, part in units(gates):
        found = part["agreement"]
        assert (found["n"], found["single"]["n"], found["tolerance"]) == (540, 256, 1e-5)
        assert found["differing_elsewhere"] == found["single"]["differing_elsewhere"] == 0
        assert found["differing"] <= found["near_threshold"] and found["max_confidence_difference"] < 1e-4
    assert not any("WARNING" in line for line in lines)


def test_a_live_network_that_parts_is_said_loudly(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = job_module.gated_network

    def wrong(full: Any, gate: Any) -> GatedNet:
        net = real(full, gate)
        with torch.no_grad():
            for parameter in net.net.exits[-1].parameters():
                parameter.neg_()
        return net

    monkeypatch.setattr(job_module, "gated_network", wrong)
    lines: list[str] = []
    gates = calibrate_run(copy, WIDE, write=lines.append)
    assert sum("WARNING" in line for line in lines) == 2 and gates_table(gates).count("WARNING") == 2


def test_delivered_network_loads_and_answers_as_simulated(gated: Gated) -> None:
    folder, results, gates, _ = gated
    chosen = gates["delivered"]
    part = next(p for name, p in units(gates) if (p["seed"], name) == (chosen["seed"], chosen["exit_weights"]))
    net = deploy.load(folder / chosen["folder"])
    assert isinstance(net, GatedNet) and list(net.net.exit_ids) == part["exits"] and part["gated"]
    images, _ = ImageDataModule("digits", image_size=8, train_samples=300).dataset("report").__getitems__(range(540))
    answer, outcome = net(images), simulated(cache_of(folder, chosen["exit_weights"], part, "report"), part)
    near = net.near_threshold(cache_of(folder, chosen["exit_weights"], part, "report").logits)
    assert bool(((answer.exit == outcome.exits) | near).all())
    assert deploy.describe(folder / "gated")["metadata"]["image_size"] == 8


def test_examples_are_the_images_of_their_numbers(gated: Gated) -> None:
    folder, _, gates, _ = gated
    chosen = gates["delivered"]
    part = next(p for name, p in units(gates) if (p["seed"], name) == (chosen["seed"], chosen["exit_weights"]))
    first, last = part["examples"]["first"], part["examples"]["last"]
    images = np.load(folder / "gates_examples.npz")["images"]
    data = ImageDataModule("digits", image_size=8, train_samples=300).dataset("report")
    assert images.dtype == np.uint8 and images.shape == (len(first) + len(last), 8, 8, 1)
    outcome = simulated(cache_of(folder, chosen["exit_weights"], part, "report"), part)
    for image, one in zip(images, first + last, strict=True):
        assert np.array_equal(image, data.pixels([one["index"]])[0].permute(1, 2, 0).numpy())
        assert one["label"] == int(data.labels[one["index"]])
        assert one["predicted"] == int(outcome.predictions[one["index"]])
        assert one["exit"] == part["exits"][int(outcome.exits[one["index"]])]
    assert [one["confidence"] for one in last] == sorted(one["confidence"] for one in last)
    assert all(one["exit"] == part["exits"][-1] for one in last)
    assert all(one["exit"] < part["exits"][-1] for one in first)


def test_data_roles_are_disjoint_and_named(gated: Gated) -> None:
    _, results, gates, _ = gated
    data = gates["data"]
    assert (data["temperatures"]["samples"], data["thresholds"]["samples"]) == (72, 288)
    assert data["report"] == results["data"]["roles"]["report"] and data["shared"] is False
    assert data["temperatures"]["sha256"] != data["thresholds"]["sha256"] and data["judged"] == 1
    assert all(part["select"]["n"] == 288 for _, part in units(gates))


def test_the_same_call_looks_at_nothing_again_and_other_settings_are_counted(
    gated: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(gated[0], tmp_path / "run"))
    (folder / "report.html").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(job_module, "Job", None)  # no data is opened
        assert calibrate_run(folder, WIDE) == gated[2] and (folder / "report.html").is_file()
    other = calibrate_run(folder, CalibrationSettings(budget=10.0, policy="entropy", images="select"))
    assert other["data"]["judged"] == 2 and "looked at 2 times" in other["data"]["notices"][-1]
    assert "looked at 2 times" in gates_table(other)
    assert calibrate_run(folder, WIDE)["data"]["judged"] == 3


def test_after_a_kill_it_goes_on(copy: Path, gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = job_module.decide, []

    def killed(unit: Any, *rest: Any) -> Any:
        calls.append(unit.seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(unit, *rest)

    monkeypatch.setattr(job_module, "decide", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate_run(copy, WIDE)
    assert calls == [0, 1] and not (copy / "gates.json").exists()
    again = calibrate_run(copy, WIDE)
    assert calls == [0, 1, 1] and again == gated[2]  # seed 0 was finished; and nothing was looked at a second time


def test_nothing_cheaper_is_said_and_the_pruned_network_stays(copy: Path) -> None:
    gates = calibrate_run(copy, CalibrationSettings(budget=0.0, caution=10.0, images="select"))
    assert gates["delivered"] is None and not (copy / "gated").exists()
    for _, part in units(gates):
        report = part["report"]
        assert not part["gated"] and part["exits"] == part["pruned_exits"] and not any(part["enabled"])
        assert report["gated"]["top1"] == report["pruned"]["top1"] and report["drop_points"] == 0
        assert report["gated"]["mean_macs"] == report["pruned"]["macs"]
        assert "so it stays" in part["notice"] and part["notice"] in gates_table(gates)
    assert gates["methods"]["mixed"]["summary"]["saving"]["mean"] == 0


def test_a_budget_that_nothing_meets(copy: Path) -> None:
    with pytest.raises(UserError, match="the budget of -60 points cannot be met"):
        calibrate_run(copy, CalibrationSettings(budget=-60.0, images="select"))
    assert not (copy / "gates.json").exists()


def edited(folder: Path, change: Any) -> None:
    """The run with another pruned subset, as if that had been the best on the validation images."""
    for seed in (0, 1):
        path = folder / f"seed-{seed}" / "mixed" / "part.json"
        part = json.loads(path.read_text())
        change(folder / f"seed-{seed}" / "mixed", part)
        write_json(path, part)


@pytest.mark.parametrize("exits", [[3], [0], [1, 3]])
def test_whatever_was_pruned(copy: Path, exits: list[int]) -> None:
    """One exit alone cannot be gated; the gate is of a wider subset, or, below the first exit, of none."""

    def prune_to(place: Path, part: dict[str, Any]) -> None:
        arrays = dict(np.load(place / "predictions.npz"))
        weights = torch.tensor(part["exit_weights"]["output"])
        mask = sum(1 << e for e in exits)
        for role in ("select", "report"):
            together = ops.ensemble(torch.from_numpy(arrays[f"{role}_logits"])[exits].contiguous(), weights[exits])
            right = together.argmax(1).numpy() == arrays[f"{role}_labels"]
            figures = {"n": len(right), "correct1": int(right.sum()), "top1": float(right.mean()), "top5": 1.0}
            part["pruned"][role] = figures
            if role == "report":
                arrays["report_right_pruned"] = right
        part["pruned"] |= {"exits": exits, "macs": part["scores"]["macs"][mask - 1]}
        np.savez(place / "predictions.npz", **arrays)

    edited(copy, prune_to)
    gates = calibrate_run(copy, WIDE)
    for _, part in units(gates):
        assert part["pruned_exits"] == exits
        assert part["gated"] == (exits != [0]) or part["notice"]
        if exits == [0]:
            assert part["exits"] == [0] and part["thresholds"] == [] and "no other exit costs less" in part["notice"]
        assert part["agreement"]["differing_elsewhere"] == 0


def test_guarantee(copy: Path) -> None:
    gates = calibrate_run(copy, CalibrationSettings(risk=0.2, delta=0.2, caution=0.0, images="select"))
    assert gates["settings"]["budget"] == {
        "kind": "risk", "epsilon": 0.2, "delta": 0.2, "loss": "drop", "method": "ltt",
    }  # fmt: skip
    assert gates["data"]["test"]["samples"] == 180 and "guarantee was tested on 180" in gates["data"]["notices"][-1]
    promised = [part for _, part in units(gates) if part["gated"]]
    assert promised and all("with probability 0.8" in part["guarantee"]["text"] for part in promised)
    assert "with probability 0.8" in gates_table(gates)
    tight = calibrate_run(copy, CalibrationSettings(risk=0.001, images="select"))
    assert not any(part["gated"] for _, part in units(tight)) and "no step of the path" in gates_table(tight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "luck"}, "no such policy: 'luck'"),
        ({"judge": "jury"}, "judge must be ensemble or exit"),
        ({"budget": 1000.0}, "budget must be points"),
        ({"risk": 1.5}, "risk must be a fraction"),
        ({"delta": 0.0}, "delta must be"),
        ({"caution": -1.0}, "caution must be"),
        ({"images": "all"}, "images must be auto, select or spare"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, trained: Path) -> None:
    with pytest.raises(UserError, match=message):
        calibrate_run(trained, CalibrationSettings(**settings))


def test_no_run_an_unfinished_one_and_one_exit(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        calibrate_run(tmp_path / "nothing")
    results = json.loads((copy / "results.json").read_text())
    write_json(copy / "results.json", {**results, "network": {"name": "toy", "exits": 1}})
    with pytest.raises(UserError, match="toy has one exit"):
        calibrate_run(copy)
    (copy / "results.json").unlink()
    with pytest.raises(UserError, match="is unfinished; go on with it"):
        calibrate_run(copy)
    write_json(copy / "results.json", results)
    (copy / "seed-1" / "mixed" / "predictions.npz").unlink()
    with pytest.raises(UserError, match="predictions.npz is not there"):
        calibrate_run(copy)


def test_other_images_are_refused(copy: Path, tree: Any, tmp_path: Path) -> None:
    root = tree(tmp_path / "images", {"": 40}, classes=tuple("abcdefghij"))
    with pytest.raises(UserError, match="are not those of the run"):
        calibrate_run(copy, WIDE, data=str(root))


def test_spare_images_are_passed_over_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CalibrationSettings(budget=8.0)  # 897 - 300 images were left aside, more than the 360 to select on
    gates = calibrate_run(copy, settings)
    data = ImageDataModule("digits", image_size=8, train_samples=300)
    assert gates["data"]["images"] == "spare" and "left aside" in gates["data"]["notices"][0]
    assert gates["data"]["temperatures"]["samples"] + gates["data"]["thresholds"]["samples"] == 597
    learned = set(data.roles.parts["fit"][1].tolist())
    assert len(data.spare[1]) == 597 and not learned & set(data.spare[1].tolist())
    kept = np.load(copy / "seed-0" / "mixed" / "spare.npz")
    images, labels = data.dataset("spare").__getitems__(list(range(597)))
    assert np.array_equal(kept["labels"], labels.numpy())
    full = deploy.load(copy / "seed-0" / "mixed" / "full")
    with torch.no_grad():
        assert np.allclose(kept["logits"], full.exit_logits(images).numpy(), atol=1e-4)
    monkeypatch.setattr(job_module, "collect", None)
    again = calibrate_run(copy, CalibrationSettings(budget=9.0))
    assert again["data"]["judged"] == 2 and again["data"]["images"] == "spare"


def test_static_rivals_are_trained_once_and_after_a_kill_go_on(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aep_ext.training.gating import static as static_module

    real, trained = static_module.fit, []

    def killed(net: Any, *rest: Any, **options: Any) -> Any:
        trained.append(options["title"])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(net, *rest, **options)

    monkeypatch.setattr(static_module, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate_run(copy, WIDE, static=("0.25",))
    assert not (copy / "gates.json").exists()
    gates = calibrate_run(copy, WIDE, static=("0.25",))
    width = "resnet_small at width 0.25"
    assert trained == [f"seed 0 / {width}", f"seed 1 / {width}", f"seed 1 / {width}"]
    (entry,) = gates["static"]
    assert entry["name"] == width and [row["seed"] for row in entry["seeds"]] == [0, 1]
    assert gates["data"]["judged"] == 1 and width in gates_table(gates)
    net = deploy.load(copy / "static" / "resnet_small@0.25" / "seed-1")
    assert net.num_exits == 1 and net.exits[0].linear.in_features == 32
    assert entry["macs"] < gates["methods"]["mixed"]["seeds"][0]["report"]["baseline"]["macs"] / 10
    gated = gates["methods"]["mixed"]["summary"]["gated_top1"]["mean"]
    assert gates["matched"] == (0 if entry["top1"]["mean"] >= gated else None)
    # Finished rivals are shown by every later calibration.
    other = calibrate_run(copy, CalibrationSettings(budget=9.0, images="select"))
    assert other["static"] == gates["static"] and len(trained) == 3


def test_static_names() -> None:
    from aep_ext.training.gating.static import matched, static_names

    assert static_names("resnet_small", None) == ([], "")
    assert static_names("resnet_small", ("auto",)) == (["resnet_small@0.5", "resnet_small@0.75"], "")
    names, notice = static_names("resnet50", ("auto",))
    assert names == [] and "resnet50 has no widths" in notice
    assert static_names("resnet50", ("mobilenet_v3_small", "resnet_small"))[0] == ["mobilenet_v3_small", "resnet_small"]
    with pytest.raises(UserError, match="resnet50 has no widths"):
        static_names("resnet50", ("0.5",))
    with pytest.raises(UserError, match="no such static network: 'soup'"):
        static_names("resnet50", ("soup",))
    rows = [{"macs": m, "top1": {"mean": t}} for m, t in ((30, 0.9), (20, 0.8), (10, 0.7))]
    assert [matched(rows, top1) for top1 in (0.6, 0.75, 0.85, 0.95)] == [2, 1, 0, None]


def test_widths_of_resnet_small(tmp_path: Path) -> None:
    from aep_ext.pruning import count_macs
    from aep_ext.surgery import networks

    full, half = (networks.build(name, 10, 1) for name in ("resnet_small", "resnet_small@0.5"))
    assert [head.linear.in_features for head in half.exits] == [8, 16, 32, 64]
    assert 3 < count_macs(full, (1, 16, 16)) / count_macs(half, (1, 16, 16)) < 4.1
    assert half.origin["name"] == "resnet_small@0.5" and full.origin["name"] == "resnet_small"
    image = torch.randn(2, 1, 16, 16)
    deploy.save(half.eval(), tmp_path)
    assert torch.equal(deploy.load(tmp_path)(image), half(image))
    for name in ("resnet_small@0", "resnet_small@wide", "resnet_small@nan", "resnet50@0.5"):
        with pytest.raises(ValueError, match="width|scaled"):
            networks.build(name, 10)
    assert networks.known("resnet_small@2") and networks.known("timm/x") and not networks.known("resnet9000")
