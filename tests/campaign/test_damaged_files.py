"""The fault campaign: files that were damaged, forged or swapped. What is read must be right or refused in one line.

Every case is drawn from its own seed. CI runs a fixed sample; ``-m campaign`` runs all of them.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("safetensors", reason="the files are safetensors")

from aep_ext import ExitPolicy, GatedNet, MultiExitNet, anticipate, load, prune, save
from aep_ext.surgery.networks import build

resource = pytest.importorskip("resource", reason="memory is limited by POSIX's setrlimit")

GIGABYTE = 1 << 30
MODEL_CASES = 1000
SAMPLE = 40
GATES = {"thresholds", "temperatures", "enabled"}
"""Of these the description holds the numbers; others are as good as those that were there."""

Files = dict[str, bytes]


@contextmanager
def at_most_a_gigabyte() -> Iterator[None]:
    """Whoever asks for a gigabyte more than the process has now gets none."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIGABYTE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def one_line_of(error: BaseException, name: str) -> str:
    """The message, which must be one line that names the file, and not be of memory that was asked for."""
    text, causes, cause = str(error), [], error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    assert "\n" not in text and len(text) < 2000, text
    assert name in text, text
    assert not any(isinstance(one, MemoryError) or "alloc" in str(one) for one in causes), causes
    return text


# JSON -------------------------------------------------------------------------------------------------------------

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(10**6, 20_000_000, 2**31, 2**63, 10**30),
    *("", "x", "0", "a" * 5000, "\ud800", "../../x"),
    *("resnet50", "vgg16_full", "torchvision/vit_h_14", "resnet_small@8"),
    *([], {}, [[]], [0], [1, 0], [-1], [0, 1, 2, 3, 4, 5], ["a"], [None], [[["a"]]], [10**9] * 3),
    *({"a": 1}, {"kind": "network"}),
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every entry of a JSON value lies, however deep."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, inner in items for found in paths_of(inner, (*path, key))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a cut, a hole, noise."""
    place, length = rng.randrange(len(data)), rng.choice((1, 8, 100, 10_000))
    return rng.choice(
        (
            lambda: flipped(data, rng),
            lambda: flipped(flipped(data, rng), rng),
            lambda: data[:place],
            lambda: b"",
            lambda: data[:place] + data[place + length :],
            lambda: data[:place] + bytes(length) + data[place + length :],
            lambda: data[:place] + rng.randbytes(length) + data[place:],
            lambda: data + data[:length],
            lambda: rng.randbytes(len(data)),
        )
    )()


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """An entry of another value or kind, twice, elsewhere, gone; nesting that no parser should follow; other bytes."""
    tree = json.loads(data)
    *way, key = rng.choice(paths_of(tree))
    if rng.random() < 0.5:  # the long lists of numbers would take all the damage
        *way, key = [rng.choice(list(tree))]
    parent = tree
    for step in way:
        parent = parent[step]
    kind = rng.choice(("value", "value", "value", "gone", "list", "deep", "twice", "name", "nested", "bytes"))
    if kind == "bytes":
        return damaged_bytes(data, rng)
    if kind == "nested":
        return rng.choice((b"[", b'{"a":')) * 100_000
    if kind == "value":
        parent[key] = rng.choice(STRANGE)
    elif kind == "gone":
        del parent[key]
    elif kind == "list":
        parent[key] = rng.choice(([parent[key]], [parent[key]] * 2, {"a": parent[key]}, str(parent[key])))
    elif kind == "deep":
        parent[key] = "DEEP"
    elif kind == "name" and isinstance(parent, dict):
        parent[f"{key}_"] = parent.pop(key)
    text = json.dumps(tree)
    if kind == "twice" and tree:
        text = text[:-1] + f', "{rng.choice(list(tree))}": {json.dumps(rng.choice(STRANGE))}}}'
    depth = rng.choice((10, 900, 100_000))
    return text.replace('"DEEP"', "[" * depth + "]" * depth).encode()


# Models -----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


Model = tuple[Path, MultiExitNet | GatedNet, Callable[[], nn.Module | None]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    """Saved networks of every kind: by name, pruned, gated, of a user's model."""
    torch.manual_seed(0)
    full = build("resnet_small@0.25", 5, in_channels=1).eval()
    gated = GatedNet(full, ExitPolicy(output_weights=full.output_weights, thresholds=0.9))
    gated.calibration = {"drop_points": 0.2, "candidates": [{"exits": [0], "target": None}]}
    own = anticipate(Small(), cuts=["layer1"], example=(3, 8, 8)).eval()
    nets: list[tuple[Any, Callable[[], nn.Module | None]]] = [
        (full.to(memory_format=torch.channels_last), lambda: None),
        (prune(full, (0, 2)), lambda: None),
        (gated, lambda: None),
        (own, Small),
    ]
    folders = [tmp_path_factory.mktemp("models") / str(number) for number in range(len(nets))]
    for folder, (net, _) in zip(folders, nets, strict=True):
        save(net, folder, metadata={"classes": ["a", "b", "c", "d", "e"], "more": {"size": 8}})
    return [(folder, *net) for folder, net in zip(folders, nets, strict=True)]


def forged(files: Files) -> Files:
    """The description made to name the tensor file as it now is."""
    described = json.loads(files["model.json"])
    described["sha256"] = hashlib.sha256(files["model.safetensors"]).hexdigest()
    return {**files, "model.json": json.dumps(described).encode()}


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def payload(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker))


def damaged_model(files: Files, other: Files, marker: Path, rng: random.Random) -> Files:
    """The two files of a network after something happened to them."""
    tensors = files["model.safetensors"]
    size = int.from_bytes(tensors[:8], "little")
    kind = rng.choice(("json", "json", "json", "json", "bytes", "size", "header", "swapped", "pickle", "gone", "kept"))
    if kind == "json":
        return {**files, "model.json": damaged_json(files["model.json"], rng)}
    if kind == "gone":
        left = rng.choice(list(files))
        return {left: files[left]}
    if kind == "swapped":
        swapped = {**files, (name := rng.choice(list(files))): other[name]}
        return forged(swapped) if rng.random() < 0.5 else swapped
    if kind == "bytes":
        tensors = damaged_bytes(tensors, rng)
    elif kind == "size":
        tensors = (
            rng.choice((2**60, 2**63, 2**64 - 1, size + 1, size - 1, 0, 100_000_000)).to_bytes(8, "little")
            + tensors[8:]
        )
    elif kind == "header":
        header = damaged_json(tensors[8 : 8 + size], rng)
        tensors = len(header).to_bytes(8, "little") + header + tensors[8 + size :]
    elif kind == "pickle":
        tensors = payload(marker)
    return (
        forged({**files, "model.safetensors": tensors})
        if rng.random() < 0.7
        else {**files, "model.safetensors": tensors}
    )


def contents(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def laid(files: Files, folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "cases",
    [pytest.param(range(SAMPLE), id="sample"), pytest.param(range(MODEL_CASES), id="all", marks=pytest.mark.campaign)],
)
def test_damaged_models_load_as_they_were_or_are_refused(models: list[Model], tmp_path: Path, cases: range) -> None:
    stored, marker, refused = [contents(folder) for folder, *_ in models], tmp_path / "executed", 0
    for case in cases:
        rng = random.Random(case)
        number = rng.randrange(len(models))
        _, net, model = models[number]
        folder = tmp_path / str(case)
        laid(damaged_model(stored[number], stored[number - 1], marker, rng), folder)
        before = contents(folder)
        try:
            with at_most_a_gigabyte():
                found = load(folder, model=model())
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            one_line_of(error, str(folder))
        else:
            # Tensors that were forged along with their digest are what their forger wants.
            if (folder / "model.safetensors").read_bytes() == stored[number]["model.safetensors"]:
                ours = {name.removeprefix("net."): tensor for name, tensor in net.state_dict().items()}
                theirs = {name.removeprefix("net."): tensor for name, tensor in found.state_dict().items()}
                assert ours.keys() - GATES == theirs.keys() - GATES, case
                assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items() if name not in GATES), (
                    case
                )
        assert contents(folder) == before and not marker.exists(), case
        shutil.rmtree(folder)
    assert refused > len(cases) / 2


# Runs -------------------------------------------------------------------------------------------------------------

RUN_CASES = 200
RUN_SAMPLE = 10
RUN_FILES = ("config.json", "results.json", "model.json", "model.safetensors", "full/model.json", "examples.npz")
MODEL = "seed-0/mixed"
PART_FILES = ("part.json", "gated.json", "predictions.npz", "full/model.json", "pruned/model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A small finished run and its results; reports and timings, which are not tested here, are left out."""
    pytest.importorskip("lightning", reason="the training needs lightning")
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    from aep_ext.training import evaluate, gates, run

    job = __import__("sys").modules[run.__module__]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate, "SECONDS_A_NETWORK", 0.001)
        patched.setattr(gates, "SINGLES", 2)
        patched.setattr(gates, "calibrate", partial(gates.calibrate, folds=2))
        patched.setattr(job, "write_report", lambda folder: None)
        folder = tmp_path_factory.mktemp("finished") / "run"
        given = {"image_size": 8, "train_samples": 64, "epochs": 1, "batch_size": 32, "device": "cpu", "threads": 1}
        yield folder, run({**given, "margin": 90.0, "output": str(folder)})


def damaged_file(path: Path, marker: Path, rng: random.Random) -> None:
    """The file after something happened to it."""
    data, kind = path.read_bytes(), rng.choice(("bytes", "bytes", "format", "gone", "pickle", "folder"))
    if kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "pickle":
        path.write_bytes(payload(marker))
    elif kind == "format" and path.suffix == ".json":
        path.write_bytes(damaged_json(data, rng))
    elif kind == "format" and path.suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, val_logits=np.array([Bomb(marker)], dtype=object))
    elif kind == "format" and path.suffix == ".ckpt":
        from aep_ext.training.callbacks import SealedCheckpoints

        SealedCheckpoints().save_checkpoint({"callbacks": Bomb(marker)}, path)
    else:
        path.write_bytes(damaged_bytes(data, rng))


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(range(RUN_SAMPLE), id="sample"),
        pytest.param(range(RUN_CASES), id="all", marks=pytest.mark.campaign),
    ],
)
def test_damaged_runs_end_as_they_would_or_are_refused(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, cases: range
) -> None:
    from aep_ext.training import UserError, run

    origin, results = finished
    marker, refused = tmp_path / "executed", 0
    for case in cases:
        rng = random.Random(case)
        folder = Path(shutil.copytree(origin, tmp_path / str(case) / "run"))
        name = rng.choice((*RUN_FILES, *(f"{MODEL}/{file}" for file in PART_FILES), "checkpoints/seed-0/mixed.ckpt"))
        if name not in RUN_FILES or rng.random() < 0.2:
            (folder / "results.json").unlink(missing_ok=True)  # an unfinished run
        if name.endswith(".ckpt"):
            (folder / MODEL / "part.json").unlink()
        if (folder / name).is_file():
            damaged_file(folder / name, marker, rng)
        before = contents(folder)
        try:
            with at_most_a_gigabyte():
                found = run({"output": str(folder)}, resume=True)
        except UserError as error:
            refused += 1
            one_line_of(error, str(folder))
            assert contents(folder) == before, (case, name)
        else:
            # What could be made again was; results.json, which is there to be read, may say something else now.
            again = contents(folder)
            assert again["model.json"] == contents(origin)["model.json"] or name == "results.json", (case, name)
            assert found["delivered"] == results["delivered"] or name == "results.json", (case, name)
        assert not marker.exists(), (case, name)
        shutil.rmtree(folder.parent)
    assert refused > len(cases) / 3
