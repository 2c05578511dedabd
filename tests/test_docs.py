"""README and docs: every block of code runs, every command parses, every figure comes from a result file."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aep_ext.cli import _parser, main
from aep_ext.surgery import networks

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONAL = {
    "torchvision": r"^import .*\btorchvision\b",
    "onnxruntime": r"^import onnxruntime\b",
    "lightning": r"^(import|from) lightning\b|aep_ext\.(fit|accelerate)\(",
}


def blocks(path: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the documents take as given: small loaders and images, and a working folder for what is written."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if importlib.util.find_spec("torchvision"):
        import torchvision

        for name in ("resnet18", "mobilenet_v3_small"):  # without the download of pretrained weights
            build = getattr(torchvision.models, name)
            monkeypatch.setattr(torchvision.models, name, lambda weights=None, build=build, **options: build(**options))
    with torch.no_grad():
        teacher = networks.resnet_small(10).eval()
        x = torch.randn(6, 16, 3, 32, 32)
        loader = [(batch, teacher(batch).argmax(1)) for batch in x]
    loader = torch.utils.data.DataLoader(loader, batch_size=None)  # Lightning takes a list for several loaders
    given = {f"{role}_loader": loader for role in ("train", "val", "test")}
    given["calibration_loader"] = [(batch.flip(3), y) for batch, y in loader]
    return {**given, "images": x[0], "labels": next(iter(loader))[1]}


@named([path for path in DOCUMENTS if blocks(path, "python")])
@pytest.mark.filterwarnings("ignore::UserWarning")  # random labels keep no budget, and terminate says so
def test_python_runs(path: Path, names: dict[str, Any]) -> None:
    """Every block, in order, in one namespace, word for word."""
    code = blocks(path, "python")
    for package, use in OPTIONAL.items():
        if any(re.search(use, block, re.MULTILINE) for block in code):
            pytest.importorskip(package, reason=f"{path.name} uses it")
    for number, block in enumerate(code):
        exec(compile(block, f"{path.name}, block {number + 1}", "exec"), names)


def commands(path: Path) -> Iterator[list[str]]:
    """Every command of the shell blocks as words; joined lines and chains taken apart."""
    for block in blocks(path, "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set(";&|"):
                    if words:
                        yield words
                    words = []
                else:
                    words.append(word)


SHELL = {"python3", "python", "pip", ".", "cmake", "ninja", "ctest", "git", "sphinx-build", "ruff", "export"}


@named(DOCUMENTS)
def test_commands_parse(path: Path) -> None:
    """Commands of ours have these options; the files that others are given exist."""
    for words in commands(path):
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if not words:
            continue
        program = Path(words[0]).name if words[0] != "." else "."
        if program == "aep":
            _parser().parse_args(words[1:])
        elif program == "pytest":
            paths = [word for word in words[1:] if word.startswith(("tests", "benchmarks"))]
            assert all((ROOT / word).exists() for word in paths), words
        elif program == "gpu_check.sh":
            assert (ROOT / words[0]).is_file(), words
        else:
            assert program in SHELL, f"{path.name}: unknown command {words}"
            if program in ("python", "python3"):
                script = next((word for word in words[1:] if word.endswith(".py")), None)
                assert script is None or (ROOT / script).is_file(), words
                if words[1:2] == ["-m"] and words[2].startswith("benchmarks"):
                    assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), words


@pytest.mark.slow
def test_the_commands_for_photographs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block of that section, word for word, on a few images."""
    for package in ("lightning", "PIL", "safetensors", "matplotlib"):
        pytest.importorskip(package, reason="aep run needs the extra [train]")
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for level, name in ((60, "night"), (180, "day")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(level, level + 60, (14, 18, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{number}.jpg")
    page = (ROOT / "docs" / "own_model.md").read_text(encoding="utf-8")
    page = page[page.index("## Your own photographs") :]
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    block = blocks(tmp_path / "page.md", "sh")[0]
    for line in block.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    assert (tmp_path / "runs" / "photos" / "report.html").is_file()


@named(DOCUMENTS)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for target in targets:
        if not re.match(r"https?:|mailto:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_readme_fits_and_has_what_ci_reads() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    for marker in ("run", "tests"):
        inside = re.search(rf"<!-- {marker} -->\n```sh\n(.+)\n```\n<!-- /{marker} -->", text)
        assert inside and "\n" not in inside[1]


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_figures_in_sentences_are_those_of_the_files() -> None:
    """README's numbers that stand in no generated table."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    digits, cifar = result("digits"), result("cifar10-best")
    gated, photos = digits["summary"]["methods"]["best"]["gated"], cifar["summary"]
    against = gated["non_inferiority"]
    below, low, high = -100 * against["difference"], f"{100 * against['low']:+.2f}", f"{100 * against['high']:+.2f}"
    assert f"digits: {below:.2f} points below the single-exit network, interval {low} to {high}" in readme
    best, mixed = (photos["methods"][name]["gated"]["top1"]["mean"] for name in ("best", "mixed"))
    single = photos["baseline"]["top1"]["mean"]
    assert f"{100 * best:.1f} % against {100 * single:.1f} %, where the paper's MIX has {100 * mixed:.1f} %" in readme
    for start, saved in (("digits: ", gated["saving"]), ("one seed: ", photos["methods"]["best"]["gated"]["saving"])):
        assert f"{start}{100 * saved['mean']:.0f} % fewer" in readme
    for start, summary in (("digits ", digits["summary"]), ("one seed, ", photos)):
        less = 1 - summary["methods"]["best"]["gated"]["latency"]["ratio"]
        assert f"{start}{100 * less:.0f} % less" in readme


def test_tables_come_from_the_result_files() -> None:
    pytest.importorskip("matplotlib", reason="aep_ext.report needs the extra [train]")
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in report["documents"]()}
    assert "<!-- results: " in texts[ROOT / "README.md"]
    for text in texts.values():
        assert report["rendered"](text) == text
    assert not list(report["unexplained"]("".join(texts.values())))
    results = texts[ROOT / "docs" / "results.md"]
    doctored = re.sub(r"\d\d\.\d\d ±", "12.34 ±", results, count=1)
    assert doctored != results and report["rendered"](doctored) == results


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="the site needs the extra [docs]")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "early exits" in (tmp_path / "index.html").read_text(encoding="utf-8").lower()
