"""A run that delivers a subset chosen for an objective under constraints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="the training needs lightning")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from aep_ext import load
from aep_ext.export import describe
from aep_ext.pruning import SubsetScores, pareto_front
from aep_ext.training import RunConfig, UserError, calibrate_run, run

TINY = {
    "image_size": 8,
    "train_samples": 200,
    "epochs": 1,
    "batch_size": 32,
    "device": "cpu",
    "threads": 1,
    "methods": ("mixed",),
}


@pytest.mark.slow
def test_the_cheapest_subset_inside_constraints(tmp_path: Path) -> None:
    asked = {"objective": "macs", "constraints": ("top1=-30", "macs=90%"), "terminate": False}
    results = run({**TINY, **asked, "output": str(tmp_path / "run")})
    part, baseline = (results["seeds"][0][name] for name in ("methods", "baseline"))
    part, chosen = part["mixed"], results["delivered"]["selection"]
    assert results["delivered"]["kind"] == "selected" and part["selected"]["selection"] == chosen
    # The choice: by hand, from the stored scores.
    scores, single = SubsetScores.from_dict(part["scores"]), baseline["full"]
    inside = [one for one in scores if one.top1 >= single["val"]["top1"] - 0.3 and one.macs <= 0.9 * single["macs"]]
    assert chosen["macs"] == min(one.macs for one in inside) < single["macs"]
    assert chosen["limits"] == {"top1": pytest.approx(single["val"]["top1"] - 0.3), "macs": 0.9 * single["macs"]}
    assert (chosen["split"], chosen["images"], chosen["exhaustive"]) == ("val", single["val"]["n"], True)
    assert chosen["reference"]["exits"] == [3] and chosen["reference"]["top1"] == single["val"]["top1"]
    # What is delivered says how it was chosen.
    net = load(tmp_path / "run")
    assert list(net.exit_ids) == chosen["exits"] == results["delivered"]["exits"] and net.selection == chosen
    said = describe(tmp_path / "run" / "pruned")["metadata"]["selection"]
    assert said["objective"] == "published" and said == part["pruned"]["selection"]
    # The front in the results, and the picture with the chosen subset.
    summary = results["summary"]["methods"]["mixed"]
    front = {tuple(row["exits"]) for row in summary["subsets"] if row["front"]}
    assert front == {score.exits for score in pareto_front(scores)}
    assert summary["selected"]["exits"] == [chosen["exits"]]
    assert summary["selected"]["latency"]["ratio"] > 0 and "non_inferiority" in summary["selected"]
    assert (tmp_path / "run" / "figures" / "subsets-mixed.png").is_file()
    assert "chosen for macs" in (tmp_path / "run" / "report.html").read_text()
    # No subset is that cheap: the published choice, and why.
    later = calibrate_run(tmp_path / "run", {"objective": "top1", "constraints": ("macs=1%",)})
    assert later["delivered"]["kind"] == "pruned" and later["delivered"]["selection"] == said
    assert "no subset meets the constraints" in later["delivered"]["notice"]
    assert any("no subset has macs at most" in line and "the nearest, exits" in line for line in later["notices"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["constraints"] == ["top1=-30", "macs=90%"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "speed"}, "no such objective: 'speed' .there are: gated, published, top1, top5, nll, macs"),
        ({"objective": "macs", "constraints": ("top1=90",)}, "the constraint on top1 must be a fraction"),
        ({"objective": "macs", "constraints": ("top1",)}, "a constraint must be MEASURE=LIMIT"),
        ({"constraints": ("macs=50%",)}, "constraints need another objective than gated"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig(**given).resolved()
