"""Damaged archives and folders of images: a line that names them, or images; no memory, and nothing is executed.

``python tests/campaign/test_damaged_data.py FIRST COUNT FOLDER`` runs some of the cases in a process of its own.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightning", reason="the training needs lightning")
Image = pytest.importorskip("PIL.Image", reason="images need Pillow")

LIMIT = 1 << 30
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
Random = np.random.Generator


def encoded(random: Random, kind: str, mode: str = "RGB") -> bytes:
    shape = (20, 24) if mode == "L" else (20, 24, 3)
    image = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
    image.getexif()[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"exif": image.getexif()} if kind in ("PNG", "JPEG", "WEBP") else {}))
    return buffer.getvalue()


def whole_arrays(random: Random) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {"classes": np.array(["cat", "dog"])}
    for split, count in (("train", 30), ("test", 10)):
        files = [encoded(random, FORMATS[number % len(FORMATS)]) for number in range(count)]
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = np.arange(count) % 2
    return arrays


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def truncated(random: Random, data: bytes) -> bytes:
    return data[: random.integers(0, len(data))]


def flipped(random: Random, data: bytes) -> bytes:
    """Some bits; near the beginning or the end, where headers and directories are, more often than elsewhere."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 9)):
        near = min(len(data), 4096)
        where = random.choice([random.integers(0, len(data)), random.integers(0, near), -random.integers(1, near + 1)])
        changed[where] ^= 1 << random.integers(0, 8)
    return bytes(changed)


def without_a_part(random: Random, data: bytes) -> bytes:
    start, stop = sorted(random.integers(0, len(data), 2))
    return data[:start] + data[stop:]


def empty(random: Random, data: bytes) -> bytes:
    return b""


def noise(random: Random, data: bytes) -> bytes:
    return random.bytes(len(data))


def huge_header(random: Random, data: bytes) -> bytes:
    """A picture of 3,600 million pixels, as its first bytes say."""
    return random.choice([b"P6 60000 60000 255\n", b"P5 60000 60000 65535\n", b"Pf\n60000 60000\n1.0\n"]) + data


BYTES = (truncated, flipped, without_a_part, empty, noise)


class Evil:
    """What unpickling it would do: make a folder in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def other_dtype(random: Random, array: np.ndarray) -> np.ndarray:
    kind = random.choice(["f8", "f2", "i1", "c16", "S3", "U2", "?", "i2", "M8[s]", "O", "u8"])
    if kind == "O":
        return np.array([Evil()] * len(array), dtype=object)
    return np.resize(array.view(np.uint8), (len(array) * 16,)).astype("u1").astype(kind)[: len(array)]


def other_shape(random: Random, array: np.ndarray) -> np.ndarray:
    shape = [(-1, 1), (1, -1), (1, 1, -1), ()][random.integers(4)]
    return array.reshape(shape) if shape else array[0].reshape(())


def other_values(random: Random, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "U":
        return array[:1]
    values = np.array(array, np.int64)
    values[random.integers(0, len(values), 3)] = random.choice([-1, 1 << 40, -(1 << 62), 200, 0, 7])
    return values if random.integers(2) else random.permutation(values)


def emptied(random: Random, array: np.ndarray) -> np.ndarray:
    return array[: random.choice([0, 1, len(array) // 2])]


ARRAYS = (other_dtype, other_shape, other_values, emptied)


def lying_member(random: Random, data: bytes) -> bytes:
    """One member's header promises another shape or type, its content may be a pickle."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as target:
        chosen = random.choice(source.namelist())
        for name in source.namelist():
            content = source.read(name)
            if name == chosen:
                buffer = io.BytesIO()
                shape = [(1 << 40,), (3 << 29,), (1 << 20, 1 << 20), (), (0,), (-1,)][random.integers(6)]
                descr = str(random.choice(["|u1", "<i8", "|O", "<U9", "|V1000000000"]))
                np.lib.format.write_array_header_1_0(buffer, {"shape": shape, "fortran_order": False, "descr": descr})
                content = buffer.getvalue() + (pickle.dumps(Evil()) if random.integers(2) else content[128:])
            target.writestr(name, content)
    return result.getvalue()


def damaged_archive(random: Random, folder: Path, damage: Callable[..., Any]) -> str:
    arrays = whole_arrays(random)
    if damage in ARRAYS:
        name = str(random.choice(list(arrays)))
        arrays[name] = damage(random, arrays[name])
        data = npz(arrays)
    else:
        data = damage(random, npz(arrays))
    (folder / "damaged.npz").write_bytes(data)
    return str(folder / "damaged.npz")


def damaged_files(random: Random, folder: Path, damage: Callable[..., Any]) -> str:
    """A folder of images of all formats; a few of them damaged."""
    root = folder / "damaged"
    for split, count in (("train", 14), ("test", 7)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                kind = FORMATS[number % len(FORMATS)]
                data = encoded(random, kind, "L" if random.integers(2) else "RGB")
                if random.random() < 0.2:
                    data = damage(random, data)
                (root / split / name / f"{number}.{kind.lower()}").write_bytes(data)
    return str(root)


def damaged_tree(random: Random, folder: Path, damage: None) -> str:
    """Folders where files should be, links that lead nowhere, classes and splits without images."""
    root = Path(damaged_files(random, folder, truncated if random.integers(2) else lambda random, data: data))
    for what in random.choice(5, 2, replace=False):
        files = sorted(root.rglob("*.*"))
        file = files[random.integers(len(files))]
        if what == 0:
            file.unlink()
            file.mkdir()
        elif what == 1:
            file.unlink()
            file.symlink_to("nowhere")
        elif what == 2:
            for other in list(file.parent.iterdir()):
                other.rename(other.with_suffix(".txt"))
        elif what == 3:
            file.rename(file.parent.parent / file.name)
        else:
            (root / "test").rename(root / "validation")
    return str(root)


KINDS: list[tuple[Callable[..., str], Callable[..., Any] | None]] = [
    *((damaged_archive, damage) for damage in (*BYTES, *ARRAYS, *ARRAYS, lying_member, lying_member)),
    *((damaged_files, damage) for damage in (*BYTES, huge_header, flipped, flipped)),
    (damaged_tree, None),
    (damaged_tree, None),
]


def outcome(number: int, folder: Path) -> dict[str, Any]:
    """One case: the message that a user sees, "" where all images could be read, or what should not have been."""
    from aep_ext.training import ImageDataModule, UserError

    random = np.random.default_rng(number)
    make, damage = KINDS[number % len(KINDS)]
    folder.mkdir()
    spec = make(random, folder, damage)
    message, wrong = "", ""
    try:
        data = ImageDataModule(spec, image_size=8, skip_bad_images=bool(number // len(KINDS) % 2))
        data.warnings()
        next(iter(data.train_dataloader()))
    except UserError as error:
        message = str(error)
        if "\n" in message or "damaged" not in message:
            wrong = "names nothing, or in several lines"
        if "llocat" in message or "emory" in message:
            wrong = "more memory was asked for than there is"
    except BaseException as error:
        wrong = f"{type(error).__name__}: {error}"
    kind = f"{make.__name__}, {damage.__name__ if damage else ''}"
    return {"number": number, "kind": kind, "message": message, "wrong": wrong}


def main(first: int, count: int, folder: Path) -> None:
    from aep_ext.training import ImageDataModule

    os.chdir(folder)
    ImageDataModule("digits").warnings()  # everything is imported now
    sizes = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(sizes["VmSize"].split()[0]) + LIMIT,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = [outcome(number, folder / str(number)) for number in range(first, first + count)]
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    (folder / "rows.json").write_text(json.dumps({"rows": rows, "grown": grown}))


def check(first: int, count: int, folder: Path) -> None:
    command = [sys.executable, __file__, str(first), str(count), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((folder / "rows.json").read_text())
    assert len(found["rows"]) == count
    wrong = [row for row in found["rows"] if row["wrong"]]
    assert not wrong, "\n".join(map(str, wrong[:20]))
    assert sum(bool(row["message"]) for row in found["rows"]) > count // 2, "hardly anything was damaged"
    assert found["grown"] < LIMIT
    assert not list(folder.rglob("executed"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sample(tmp_path: Path) -> None:
    check(0, len(KINDS) + 7, tmp_path)


@pytest.mark.campaign
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thousand(tmp_path: Path) -> None:
    check(0, 1000, tmp_path)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
