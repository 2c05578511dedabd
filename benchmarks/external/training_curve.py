"""The fused loss inside timm's own training script: the same curve as plain cross entropies summed?

    python benchmarks/external/training_curve.py --script PATH/train.py

The script, which is not part of this project (github.com/huggingface/pytorch-image-models), is copied to a temporary
folder and one line of the copy is replaced, the one that makes the loss. The same multi-exit network is then trained on
the same batches with

- ``plain``: ``sum_e a_e * F.cross_entropy(logits[e], target)``, the reference;
- ``written_out`` and ``float64``: the same sum with the cross entropy written out, and with its arithmetic in float64.
  They differ from ``plain`` by rounding alone: the yardsticks;
- ``fused``: ``aep_ext.JointCrossEntropy``, which may lie three times as far from ``plain`` as the yardsticks do;
- ``wrong_weight``: the fused loss with one weight off by a tenth, which must NOT pass.

Training loss, validation loss and validation accuracy are the script's own, from its ``summary.csv``. Exit status 1 if
the fused curve is not within the allowed distance at every epoch, or if the wrong weight passes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if __package__ in (None, ""):  # started as a file: its own folder is on the path, the project's is not
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import aep_ext  # noqa: E402
from aep_ext._io import write_json  # noqa: E402
from aep_ext._utils import UserError, require  # noqa: E402
from aep_ext.training import sources  # noqa: E402
from benchmarks.external import timm_run  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "external-training-curve.json"
METRICS = ("train_loss", "eval_loss", "eval_top1")
FACTOR, FLOOR = 3.0, 1e-5  # how much further than the yardsticks a curve may lie; a loss may always be so far off
WEIGHTS = (0.125, 0.1875, 0.25, 0.4375)  # exact in float32, the type in which the fused loss keeps them
WRONG_WEIGHTS = (0.125, 0.1875, 0.25, 0.48125)
YARDSTICKS = ("written_out", "float64")
LOSS_LINE = "train_loss_fn = nn.CrossEntropyLoss()"  # of timm's script, without label smoothing
_PLAIN = "from benchmarks.external import timm_run; train_loss_fn = timm_run."
LOSSES = {
    "plain": f"{_PLAIN}SummedCrossEntropy({WEIGHTS})",
    "written_out": f"{_PLAIN}WrittenOutCrossEntropy({WEIGHTS})",
    "float64": f"{_PLAIN}SummedCrossEntropy({WEIGHTS}, dtype=torch.float64)",
    "fused": f"import aep_ext; train_loss_fn = aep_ext.JointCrossEntropy({WEIGHTS})",
    "wrong_weight": f"import aep_ext; train_loss_fn = aep_ext.JointCrossEntropy({WRONG_WEIGHTS})",
}
Curve = Sequence[Mapping[str, float]]


def read_curve(path: Path) -> list[dict[str, float]]:
    """timm's ``summary.csv``: one dict per epoch with "epoch" and the :data:`METRICS`.

    Raises:
        ValueError: the file has no epochs, or lacks a column.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in ("epoch", *METRICS) if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"read_curve: {path.name} must have epochs and the columns {missing}, got {len(rows)} epochs")
    return [{"epoch": int(row["epoch"]), **{name: float(row[name]) for name in METRICS}} for row in rows]


def compare(
    reference: Curve, yardsticks: Sequence[Curve], candidate: Curve, *, validation_images: int
) -> list[dict[str, Any]]:
    """Distance of ``candidate`` from ``reference``, epoch by epoch, and whether it is of the size of rounding.

    Rounding differences grow from step to step, so the yardstick of an epoch is the largest distance of any of the
    ``yardsticks`` from the reference so far. Allowed is ``max(FACTOR * yardstick, FLOOR)``; for the accuracy, in
    percent, the floor is one of ``validation_images``. All curves are of the same epochs, as :func:`read_curve` gives
    them.

    Returns:
        For each epoch and metric a dict of "epoch", "metric", "distance", "yardstick", "allowed", "agrees". A distance
        or a yardstick that is not finite does not agree.
    """
    rows = []
    for name in METRICS:
        floor = 100.0 / validation_images * (1 + 1e-9) if name == "eval_top1" else FLOOR
        yardstick = 0.0
        for expected, own, *others in zip(reference, candidate, *yardsticks, strict=True):
            moved = [abs(other[name] - expected[name]) for other in others]
            # max() would pass over what is not a number.
            yardstick = max(yardstick, *moved) if all(map(math.isfinite, moved)) else math.inf
            distance, allowed = abs(own[name] - expected[name]), max(FACTOR * yardstick, floor)
            agrees = math.isfinite(allowed) and distance <= allowed
            row = {"epoch": expected["epoch"], "metric": name, "distance": distance, "yardstick": yardstick}
            rows.append(row | {"allowed": allowed, "agrees": agrees})
    return rows


def replace_line(source: str, new: str) -> str:
    """``source`` with the one line that reads :data:`LOSS_LINE` replaced by the line ``new``, at its indentation.

    Raises:
        ValueError: the line is not there exactly once.
    """
    lines = source.splitlines(keepends=True)
    found = [number for number, line in enumerate(lines) if line.strip() == LOSS_LINE]
    if len(found) != 1:
        raise ValueError(
            f"replace_line: the script must have the line {LOSS_LINE!r} exactly once, found {len(found)} times"
        )
    lines[found[0]] = lines[found[0]].replace(LOSS_LINE, new, 1)
    return "".join(lines)


def write_images(root: Path, data: str, *, train: int, validation: int, size: int, seed: int = 0) -> dict[str, Any]:
    """Writes a small data set as reference training scripts read it, ROOT/{train,validation}/CLASS/N.png.

    Args:
        root: an empty folder, or one that will be made.
        data: ``digits`` (scikit-learn's), or an ``.npz`` of encoded images
            (:func:`aep_ext.training.sources.jpeg_archive`).
        train, validation: how many images of each; both are drawn by ``seed``.
        size: pixels of a side.

    Returns:
        What was written, for the result file.

    Raises:
        ValueError: there are not as many images.
    """
    generator = torch.Generator().manual_seed(seed)
    if data == "digits":
        title, digits = "handwritten digits (scikit-learn)", sources.digits()
        order = torch.randperm(len(digits), generator=generator)
        parts = {"train": (digits, order[validation:]), "validation": (digits, order[:validation])}
    else:
        title, found = "CIFAR-10 (JPEG copy)", sources.jpeg_archive(Path(data).expanduser())
        parts = {
            split: (found[name], torch.randperm(len(found[name]), generator=generator))
            for split, name in (("train", "train"), ("validation", "test"))
        }
    for split, wanted in (("train", train), ("validation", validation)):
        source, indices = parts[split]
        if not 0 < wanted <= len(indices):
            raise ValueError(f"write_images: {split} must be within 1..{len(indices)}, got {wanted}")
        for name in source.classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
        for number, index in enumerate(indices[:wanted].tolist()):
            image = source.image(index).convert("RGB").resize((size, size))
            image.save(root / split / source.classes[int(source.labels[index])] / f"{number:05d}.png")
    return {"name": title, "train": train, "validation": validation, "pixels": size, "seed": seed}


def train(script: str, options: Sequence[str], images: Path, folder: Path) -> tuple[list[dict[str, float]], float]:
    """Run a script's text with its options in a process of its own.

    Returns:
        Its curve, and the seconds it took.

    Raises:
        UserError: it ended with an error; the message has its last lines.
    """
    folder.mkdir(parents=True)
    copy = folder / "train.py"
    copy.write_text(script, encoding="utf-8", newline="")
    # By the script's own file of options, since not all its versions have --device.
    (folder / "options.yaml").write_text("device: cpu\n", encoding="utf-8")
    command = [sys.executable, str(Path(timm_run.__file__)), str(copy), "--config", "options.yaml"]
    command += ["--data-dir", str(images), "--output", str(folder), "--experiment", "run", *options]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, text=True, check=False, **pipes)
    seconds = time.perf_counter() - start
    summary = folder / "run" / "summary.csv"
    if done.returncode != 0 or not summary.is_file():
        last = "\n".join(done.stdout.splitlines()[-15:])
        raise UserError(f"training_curve: the script ended with status {done.returncode}:\n{last}")
    return read_curve(summary), seconds


def compare_losses(
    source: str, options: Sequence[str], images: Path, folder: Path, validation_images: int
) -> dict[str, Any]:
    """All trainings, compared; prints their curves and the largest distances."""
    # All copies are made before the first training: a line that is not there shows at once.
    scripts = {name: replace_line(source, line) for name, line in LOSSES.items()}
    runs: dict[str, Any] = {}
    for name, script in scripts.items():
        curve, seconds = train(script, options, images, folder / name)
        runs[name] = {"loss_line": LOSSES[name], "seconds": round(seconds, 1), "curve": curve}
        print(f"{name}: " + " ".join(f"{row['train_loss']:.6f}" for row in curve), flush=True)
    yardsticks, compared = [runs[name]["curve"] for name in YARDSTICKS], {}
    for name in ("fused", "wrong_weight"):
        rows = compare(runs["plain"]["curve"], yardsticks, runs[name]["curve"], validation_images=validation_images)
        largest = {
            metric: {key: max(row[key] for row in rows if row["metric"] == metric) for key in ("distance", "yardstick")}
            for metric in METRICS
        }
        agrees = all(row["agrees"] for row in rows)
        compared[name] = {"agrees": agrees, "largest": largest, "epochs": rows}
        distances = ", ".join(
            f"{metric} {entry['distance']:.2g} (rounding {entry['yardstick']:.2g})" for metric, entry in largest.items()
        )
        print(f"{name} {'agrees' if agrees else 'does not agree'}: largest distance {distances}", flush=True)
    return {
        "options": list(options),
        "floor": FLOOR,
        "replaced_line": LOSS_LINE,
        "runs": runs,
        "compared_with_plain": compared,
        "passed": compared["fused"]["agrees"] and not compared["wrong_weight"]["agrees"],
    }


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything, and write the result file."""
    try:
        text = arguments.script.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {arguments.script}: {error.strerror or error}") from error
    pixels = str(arguments.pixels)
    options = ["--model", timm_run.MODEL, "--num-classes", "10", "--workers", "0", "--warmup-epochs", "0"]
    options += ["--input-size", "3", pixels, pixels, "--epochs", str(arguments.epochs), "--smoothing", "0"]
    options += ["--batch-size", str(arguments.batch_size), "--lr", str(arguments.lr), "--seed", str(arguments.seed)]
    options += ["--checkpoint-hist", "1", "--model-kwargs", "smooth=True"]
    with tempfile.TemporaryDirectory(prefix="training-curve-") as temporary:
        images = Path(temporary, "images")
        counts = {"train": arguments.train, "validation": arguments.validation, "size": arguments.pixels}
        data = write_images(images, arguments.data, **counts)
        found = compare_losses(text.decode("utf-8"), options, images, Path(temporary, "runs"), arguments.validation)
    info = aep_ext.build_info()
    result: dict[str, Any] = {
        "what": "one line of the script replaced; the same network, batches and options in every run; on the CPU, one "
        "thread; without a GPU the script's calls of torch.cuda.synchronize do nothing",
        "script": {
            "name": arguments.script.name,
            "sha256": hashlib.sha256(text).hexdigest(),
            "bytes": len(text),
            "package": "timm",
            "package_version": require("timm", "models", "training_curve").__version__,
            "source": arguments.script_source,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": info.torch,
            "aep_ext": info.version,
            "backend": info.backend,
            "instruction_set": info.isa_in_use,
            "machine": platform.machine(),
        },
        "rule": f"distance <= max({FACTOR:g} * yardstick, floor), the accuracy's floor being one validation image; the "
        f"yardstick is the larger distance of the runs {' and '.join(YARDSTICKS)} from plain, over all epochs so far",
        "weights": list(WEIGHTS),
        "cases": {"float32": found},
        "data": data,
        "passed": found["passed"],
    }
    write_json(arguments.result, result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 passed, 1 failed, 2 could not be done."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--script", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--script-source", default="", help="where it is from, for the result file")
    parser.add_argument("--data", default="digits", help="digits, or an .npz of encoded images")
    parser.add_argument("--train", type=int, default=1024, help="training images")
    parser.add_argument("--validation", type=int, default=512, help="validation images")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=42, help="the script's seed")
    parser.add_argument("--result", type=Path, default=RESULT, help="result file")
    arguments = parser.parse_args(argv)
    try:
        result = check(arguments)
    except (UserError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("passed" if result["passed"] else "FAILED")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
