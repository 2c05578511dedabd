"""The command ``aep``: its options, its errors, its output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import aep_ext
from aep_ext import cli
from aep_ext._config import RunConfig

ROOT = Path(__file__).parents[2]
QUICK = [
    "--image-size",
    "8",
    "--train-samples",
    "64",
    "--epochs",
    "1",
    "--batch-size",
    "32",
    "--device",
    "cpu",
    "--threads",
    "1",
]


def aep(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """``python -m aep_ext`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "aep_ext", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert f"aep_ext {aep_ext.__version__}" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == aep_ext.build_info().to_dict()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"aep_ext {aep_ext.__version__}\n"


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="^0$"):
        cli.main([*command.split(), "--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["", "run", "calibrate", "accelerate", "predict", "bench", "report", "info"])
def test_help_is_written_for_users(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    assert not re.search(r"None|True|False|SUPPRESS|default: [(\['\"]|\(default\)", text), text
    parser = cli._parser()
    commands = next(action for action in parser._actions if action.dest == "command")
    chosen = commands.choices[command] if command else parser  # type: ignore[index]
    assert all(action.help for action in chosen._actions if action is not commands)


def test_help_shows_the_defaults_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """As a user types them: what is shown, given as an option, is what the configuration has anyway."""
    text, config = help_of("run", capsys), RunConfig().resolved()
    shown = re.findall(r"(--[a-z-]+) (?:[A-Z,.]+ )(?:(?! --[a-z]).)*?\(default: ([^ )]+)(?: with quick)?\)", text)
    found = {name: value for name, value in shown if value not in ("none", "all")}
    options = vars(cli._parser().parse_args(["run", *(word for pair in found.items() for word in pair)]))
    for name, value in found.items():
        field = name.removeprefix("--").replace("-", "_")
        assert options[field] == getattr(config, field), (name, value)
    assert {"--data", "--network", "--lr", "--epochs", "--patience", "--schedule", "--margin", "--delta"} <= set(found)
    assert found["--margin"] == "0.5" and found["--methods"] == "best" and found["--lr"] == "0.003"
    assert "batch sizes (default: 1,4,16,64,256)" in help_of("bench", capsys)


def test_python_dash_m() -> None:
    done = aep("info")
    assert done.returncode == 0 and aep_ext.__version__ in done.stdout


def test_run_and_report(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="aep run needs lightning")
    done = aep("run", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("baseline: epoch 1/1, validation loss ") and lines[1].startswith("best: epoch 1/1")
    assert "best, pruned" in done.stdout and "best, gated" in done.stdout
    assert lines[-1].startswith(f"report: {Path('runs/digits-resnet_small/report.html')} (")
    noise = [line for line in done.stderr.splitlines() if "aep_ext" not in line and "use_native" not in line]
    assert noise == []  # of Lightning: no greetings, no advice
    folder = tmp_path / "runs" / "digits-resnet_small"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"] and (folder / "model.safetensors").is_file()
    (folder / "report.html").unlink()
    assert cli.main(["report", str(folder)]) == 0 and (folder / "report.html").is_file()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed on standard error, which must be one line; nothing else may have been printed."""
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1 and err.startswith("aep: ")
    return err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere/at-all"], "no such data: nowhere/at-all"),
        (["--data", "absent.npz"], "no such data: absent.npz is not a file"),
        (["--network", "resnet9000"], "no such network: 'resnet9000'"),
        (["--classes", "5"], "fewer classes than labels: 5 classes"),
        (["--recipe", "soup"], "no such recipe: 'soup'"),
        (["--methods", "mixed,heavy"], "no such method: 'heavy'"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--resume"], "there is no run to resume under runs"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lightning", reason="aep run needs lightning")
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", *options]) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_a_library_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning", reason="aep run needs lightning")
    pytest.importorskip("torchvision", reason="the network is torchvision's")
    assert cli.main(["run", "--network", "resnet18"]) == 2
    assert one_line(capsys) == "aep: no such network: 'resnet18' (did you mean torchvision/resnet18?)\n"


def test_a_folder_that_holds_another_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="aep run needs lightning")
    (tmp_path / "config.json").write_text(json.dumps({"version": 2, "data": "digits", "epochs": 5}))
    assert cli.main(["run", "--output", str(tmp_path), "--epochs", "6"]) == 2
    assert "holds another run" in one_line(capsys)
    (tmp_path / "config.json").write_text(json.dumps({"data": "digits", "epochs": 5}))
    assert cli.main(["run", "--output", str(tmp_path), "--resume"]) == 2
    assert "holds a run of version 1" in one_line(capsys)
    (tmp_path / "config.json").unlink()
    (tmp_path / "precious.txt").write_text("")
    assert cli.main(["run", "--output", str(tmp_path), "--resume"]) == 2
    assert "is not empty and holds no run" in one_line(capsys)


def test_calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning", reason="aep run needs lightning")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", *QUICK, "--quiet", "--output", "r", "--margin", "20"]) == 0
    out = capsys.readouterr().out
    assert "best, gated" in out and "report: r/report.html" in out and "epoch" not in out
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    trained = results["seeds"][0]
    assert trained["methods"]["best"]["method"]["distillation"] == 0.2 and trained["baseline"]["method"] is None
    assert results["calibration"]["budget"] == {"kind": "accuracy", "points": 20.0} and results["static"] == []
    # Finished: nothing is done again.
    assert cli.main(["run", "--output", "r", "--resume"]) == 0
    assert json.loads((tmp_path / "r" / "results.json").read_text()) == results
    asked = ["--budget", "30", "--reference", "ensemble", "--criterion", "margin", "--criterion-on", "exit"]
    capsys.readouterr()
    assert cli.main(["calibrate", "r", *asked, "--quiet"]) == 0
    found = json.loads((tmp_path / "r" / "results.json").read_text())
    assert found["test_looks"] == 2 and found["calibration"]["reference"] == "ensemble"
    assert found["calibration"]["criterion"] == "margin" and found["calibration"]["criterion_on"] == "exit"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "nowhere"], "no such run: nowhere holds none"),
        (["bench", "nowhere"], "no such run: nowhere holds none"),
        (["run", "--criterion", "luck"], "no such criterion: 'luck'"),
        (["run", "--static", "resnet9000"], "no such static network: 'resnet9000'"),
        (["run", "--risk", "2"], "risk must be a fraction"),
    ],
)
def test_errors_of_calibrate(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lightning", reason="aep run needs lightning")
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_bench_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="aep bench needs lightning")
    from aep_ext.training import bench

    seen: list[Any] = []
    monkeypatch.setattr(bench, "bench_run", lambda folder, **options: seen.append((folder, options)))
    assert cli.main(["bench", "r"]) == 0
    asked = ["--batches", "1,2", "--backend", "openvino", "--threads", "2", "--seconds", "1"]
    assert cli.main(["bench", "r", *asked]) == 0
    (folder, first), (_, second) = seen
    assert folder == "r" and callable(first.pop("progress").write)
    assert first == {"batches": (1, 4, 16, 64, 256), "backend": "eager", "threads": 1, "samples": 512, "seconds": 10.0}
    assert second["batches"] == (1, 2) and second["backend"] == "openvino" and second["seconds"] == 1.0


def test_report_of_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no results" in one_line(capsys)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from aep_ext._utils import UserError

    with pytest.raises(UserError, match="holds no results"):
        cli.main(["report", str(tmp_path), "--debug"])


def test_other_errors_and_interrupts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(cli, "_info", broken)
    assert cli.main(["info"]) == 1
    assert one_line(capsys) == "aep: RuntimeError: out of memory (--debug shows where)\n"

    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupted)
    assert cli.main(["info"]) == 130
    assert one_line(capsys) == "aep: interrupted\n"


def test_options_become_fields_of_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="aep run needs lightning")
    from aep_ext import report, training

    seen: list[Any] = []
    monkeypatch.setattr(
        training, "run", lambda given, **options: seen.append((given, options)) or {"output": str(tmp_path)}
    )
    monkeypatch.setattr(report, "text_table", lambda results: "table")
    assert (
        cli.main(["run", "--seed", "7", "--methods", "MIX, DESC", "--lr", "0.1", "--no-class-weights", "--quiet"]) == 0
    )
    given, options = seen.pop()
    assert given == {"seeds": (7,), "methods": ("MIX", "DESC"), "lr": 0.1, "class_weights": False}
    assert options["resume"] is False and options["progress"].write is None
    gates = ["--no-terminate", "--static", "0.5,vgg16", "--calibration-samples", "100", "--num-std-errors", "1"]
    assert cli.main(["run", "--seeds", "0,1,2", "--resume", "--output", "x", *gates]) == 0
    given, options = seen.pop()
    asked = {"terminate": False, "static": ("0.5", "vgg16"), "calibration_samples": 100, "num_std_errors": 1.0}
    assert given == {"seeds": (0, 1, 2), "output": "x", **asked}
    assert options["resume"] and callable(options["progress"].write)
    assert training.RunConfig.from_dict(given).seeds == (0, 1, 2)


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["run", "--seeds", "a,b"], ["run", "--seed", "1", "--seeds", "1,2"]]
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and "usage: aep" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in ("--data", "--network", "--image-size", "--weights", "--epochs", "--seed", "--output", "--resume"):
        assert option in text
