"""The run's configuration and its folder."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="the training needs lightning")

from aep_ext.training import METHODS, RECIPES, RunConfig, UserError
from aep_ext.training.folder import RunFolder, begin, open_run


def test_recipe_fills_in_what_is_not_given() -> None:
    config = RunConfig(recipe="paper", epochs=3).resolved()
    assert (config.optimizer, config.lr, config.batch_size, config.patience) == ("adam", 1e-4, 64, 12)
    assert (config.image_size, config.seeds, config.epochs, config.schedule) == (64, (420,), 3, "constant")
    assert config.resolved() == config and RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.training() == replace(RECIPES["paper"], epochs=3)
    assert [RunConfig(recipe=name).resolved().network for name in RECIPES] == [
        "resnet_cifar" if name in ("cifar", "best") else "resnet_small" for name in RECIPES
    ]
    assert RunConfig(recipe="cifar", network="resnet50").resolved().network == "resnet50"
    for none in ((), ("none",)):  # the second as a file of settings may say it
        assert RunConfig(recipe="cifar", augment=none).resolved().training().augment == ()
    assert RunConfig(recipe="cifar").resolved().precision in ("32-true", "bf16-mixed")  # no "auto" that a resume reads
    assert RunConfig(recipe="paper", patience=0).resolved().training().patience is None


def test_the_paper_s_protocol() -> None:
    paper = RECIPES["paper"]
    assert (paper.optimizer, paper.lr, paper.batch_size, paper.epochs) == ("adam", 1e-4, 64, 100)
    assert (paper.patience, paper.seed, paper.weight_decay, paper.image_size) == (12, 420, 0.0, 64)
    assert (paper.schedule, paper.augment, paper.label_smoothing, paper.ema) == ("constant", (), 0.0, 0.0)
    assert (paper.channels_last, paper.precision) == (False, "32-true")
    assert all(recipe.method in METHODS for recipe in RECIPES.values()) and RECIPES["best"].method == "best"
    assert all(recipe.description and recipe.name == name for name, recipe in RECIPES.items())


def test_methods_have_one_spelling() -> None:
    assert RunConfig(methods=("MIX", "DESC", "unif")).resolved().methods == ("mixed", "descending", "uniform")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "soup"}, "no such recipe: 'soup' .*paper"),
        ({"methods": ("heavy",)}, "no such method: 'heavy'"),
        ({"methods": ("mix", "mixed")}, "methods must be different from one another"),
        ({"methods": ()}, "methods must be .* at least one"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"seeds": (-1,)}, "seeds must be within 0"),
        ({"optimizer": "lion"}, "no such optimizer: 'lion'"),
        ({"schedule": "steps"}, "no such schedule: 'steps'"),
        ({"device": "tpu"}, "no such device: 'tpu'"),
        ({"device": "cpu:1"}, "no such device"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"train_samples": 1}, "train-samples must be at least 2, got 1"),
        ({"batch_size": 1}, "batch-size must be at least 2"),
        ({"lr": 0.0}, "greater than 0"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"lr": float("inf")}, "lr must be finite, got inf"),
        ({"augment": ("flip", "spin")}, "augment must be one of flip, .*, got 'spin'"),
        ({"ema": 1.0}, "^ema must be at least 0 and less than 1, got 1.0"),
        ({"label_smoothing": 2.0}, "^label-smoothing must be within 0..1, got 2.0"),
        ({"precision": "zz"}, "no such precision: 'zz' \\(there are: 32-true, 16-mixed, bf16-mixed, auto\\)"),
        ({"margin": 0.0}, "greater than 0"),
        ({"criterion": "luck"}, "no such criterion: 'luck' .*patience"),
        ({"criterion_on": "all"}, "no such criterion-on: 'all'"),
        ({"objective": "best"}, "no such objective: 'best'"),
        ({"reference": "nobody"}, "no such reference: 'nobody'"),
        ({"output_weights": "mine"}, "no such output-weights: 'mine'"),
        ({"budget": 101.0}, "budget must be points within -100..100, got 101"),
        ({"risk": 2.0}, "risk must be a fraction within 0..1, got 2.0"),
        ({"delta": 0.0}, "delta must be a fraction"),
        ({"num_std_errors": -1.0}, "num-std-errors must be at least 0"),
        ({"calibration_samples": -1}, "calibration-samples must be at least 0"),
    ],
)
def test_values_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig(**given).resolved()


def test_unknown_entries() -> None:
    with pytest.raises(UserError, match="unknown entries: colour"):
        RunConfig.from_dict({"colour": "blue"})


def test_a_run_begins_in_a_new_or_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        config, folder = open_run({"output": str(tmp_path / name), "epochs": 3})
        assert not folder.config.exists()
        with begin(config, folder):
            pass
        stored = json.loads(folder.config.read_text())
        assert stored["epochs"] == 3 and stored["lr"] == RECIPES["quick"].lr and "output" not in stored


def test_a_folder_with_a_run(tmp_path: Path) -> None:
    given = {"output": str(tmp_path / "run"), "epochs": 3, "methods": ("mixed",)}
    with begin(*open_run(given)):
        pass
    with pytest.raises(UserError, match="holds this run already; go on with it by --resume"):
        open_run(given)
    with pytest.raises(UserError, match=r"holds another run \(epochs: 3, 4\); choose another --output"):
        open_run({**given, "epochs": 4})
    with pytest.raises(UserError, match="holds another run"):
        open_run({**given, "lr": 0.5}, resume=True)
    config, _ = open_run({"output": given["output"], "threads": 1, "data_root": "moved"}, resume=True)
    assert (config.epochs, config.threads, config.data_root) == (3, 1, "moved")
    assert open_run({**given, "methods": ("MIX",)}, resume=True)[0].methods == ("mixed",)


def test_a_folder_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match="is not empty and holds no run"):
            open_run({"output": str(tmp_path)}, resume=resume)
    with pytest.raises(UserError, match="is not a folder"):
        open_run({"output": str(tmp_path / "notes.txt")})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not a run's configuration"):
        open_run({"output": str(tmp_path)})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not a JSON file"):
        open_run({"output": str(tmp_path)})


def test_runs_of_before_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"data": "digits", "epochs": 3}))
    for resume in (False, True):
        with pytest.raises(UserError, match="holds a run of version 1, .* this aep_ext reads version 2: run it again"):
            open_run({"output": str(tmp_path)}, resume=resume)


def test_folders_that_nobody_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run to resume under runs"):
        open_run({}, resume=True)
    first, folder = open_run({})
    assert folder.path == Path("runs/digits-resnet_small")
    with begin(first, folder):
        pass
    second, again = open_run({"data": "digits"})
    assert again.path == Path("runs/digits-resnet_small-2")
    with begin(second, again):
        pass
    os.utime(folder.config, (1, 1))
    assert open_run({}, resume=True)[1].path == again.path
    assert open_run({"data": "some/where/birds.npz", "network": "timm/resnet26"})[1].path == Path(
        "runs/birds-timm-resnet26"
    )


def test_paths_of_a_run() -> None:
    folder = RunFolder("x")
    assert folder.checkpoint(3, "mixed") == Path("x/checkpoints/seed-3/mixed.ckpt")
    assert folder.model(3, "mixed") == Path("x/seed-3/mixed")
