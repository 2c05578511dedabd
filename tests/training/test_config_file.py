"""``aep run --config FILE``: YAML and a run's own ``config.json``; what is wrong with a file is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="the training needs lightning")
pytest.importorskip("yaml", reason="configuration files need PyYAML")

from aep_ext import cli
from aep_ext.training import RunConfig, UserError
from aep_ext.training.folder import begin, open_run, read_config

TEXT = """
# photographs
data: photos/
recipe: cifar
epochs: 5
lr: 1e-3            # a text to YAML 1.1
weight-decay: 0.01
methods: [best, mixed]
seeds: 3
augment: flip
class_weights: no
patience:
"""


def test_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(TEXT)
    found = read_config(tmp_path / "run.yaml")
    assert found == {
        "data": "photos/",
        "recipe": "cifar",
        "epochs": 5,
        "lr": 1e-3,
        "weight_decay": 0.01,
        "methods": ("best", "mixed"),
        "seeds": (3,),
        "augment": ("flip",),
        "class_weights": False,
        "patience": None,
    }
    config = RunConfig.from_dict(found).resolved()
    assert (config.augment, config.seeds, config.optimizer, config.patience) == (("flip",), (3,), "sgd", 0)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_config(tmp_path / "empty.yaml") == {}


def test_a_run_s_own_configuration(tmp_path: Path) -> None:
    given = {"recipe": "cifar", "epochs": 3, "lr": 1e-5, "methods": ("mixed",), "augment": ("crop", "cutout")}
    config, folder = open_run({**given, "output": str(tmp_path / "run")})
    with begin(config, folder):
        pass
    found = RunConfig.from_dict({**read_config(folder.config), "output": config.output}).resolved()
    assert found == config and found.lr == 1e-5
    again = {**read_config(folder.config), "output": config.output}
    assert open_run(again, resume=True)[0] == config  # the same run, lists and all


def test_a_configuration_of_an_earlier_release(tmp_path: Path) -> None:
    """What it does not name is as runs did then, not as the recipe says today."""
    old = {"version": 2, "recipe": "cifar", "exit_weights": ["mixed"], "precision": "32-true", "files": {}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = RunConfig.from_dict(read_config(tmp_path / "config.json")).resolved()
    assert (config.methods, config.augment, config.ema, config.channels_last) == (("mixed",), (), 0.0, False)
    assert (config.resize, config.precision, config.mixup, config.label_smoothing) == ("squash", "32-true", 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "colour: blue\nepoch: 3", "unknown entries: colour, epoch"),
        ("a.yaml", "epochs: many", "epochs must be of type int | None, got 'many'"),
        ("a.yaml", "lr: fast", "lr must be of type float | None, got 'fast'"),
        ("a.yaml", "lr: [1, 2]", "lr must be of type float | None, got (1, 2)"),
        ("a.yaml", "seeds: [a]", "seeds must be of type"),
        ("a.yaml", "- epochs\n- 3", "must hold names and values, got list"),
        ("a.yaml", "epochs", "must hold names and values, got str"),
        ("a.yaml", "epochs: [3", "is not a YAML file: while parsing"),
        ("a.yaml", "data: !!python/object/apply:os.getcwd []", "is not a YAML file: could not determine a constructor"),
        ("a.yaml", "data: \udcff", "is not a YAML file"),
        ("a.json", "{epochs: 3}", "is not a JSON file"),
        ("a.json", '{"version": 1}', "is of a run of version 1; this aep_ext reads version 2"),
        ("a.json", "[]", "must hold names and values, got list"),
        ("absent.yaml", None, "cannot read"),
    ],
)
def test_what_is_refused(
    name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert cli.main(["run", "--config", str(path), "--output", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert message.split(":")[0] in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_options_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aep_ext import report, training

    seen: list[Any] = []
    monkeypatch.setattr(training, "run", lambda given, **_: seen.append(given) or {"output": str(tmp_path)})
    monkeypatch.setattr(report, "text_table", lambda results: "")
    (tmp_path / "run.yaml").write_text("epochs: 5\nlr: 0.1\naugment: [flip]\noutput: there\n")
    assert cli.main(["run", "--config", str(tmp_path / "run.yaml"), "--epochs", "7", "--augment", "none"]) == 0
    assert seen == [{"epochs": 7, "lr": 0.1, "augment": (), "output": "there"}]
    assert RunConfig.from_dict(seen[0]).resolved().training().augment == ()


def test_the_file_of_the_documentation(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "training.md"
    text = page.read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "run.yaml").write_text(text)
    config = RunConfig.from_dict(read_config(tmp_path / "run.yaml")).resolved()
    assert (config.augment, config.methods, config.epochs) == (("flip", "crop"), ("best", "mixed"), 20)
