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

Training loss, validation loss and validation accuracy are the script's own figures, from its ``summary.csv``. Exit
status 1 if the fused curve is not within the allowed distance at every epoch, or if the wrong weight passes.
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
from dataclasses import dataclass
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
FACTOR = 3.0  # how much further than the yardsticks a curve may lie
WEIGHTS = (0.125, 0.1875, 0.25, 0.4375)  # exact in float32, the type in which the fused loss keeps them
WRONG_WEIGHTS = (0.125, 0.1875, 0.25, 0.48125)
YARDSTICKS = ("written_out", "float64")
Curve = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Case:
    """How one comparison trains.

    Attributes:
        options: of the script.
        model: arguments of :func:`benchmarks.external.timm_run.aep_resnet18`.
        floor: distance of a loss that is always allowed.
    """

    options: tuple[str, ...]
    model: tuple[str, ...]
    floor: float

    @property
    def smoothing(self) -> bool:
        """Whether labels are smoothed: the script makes its loss on another line then."""
        return self.options[self.options.index("--smoothing") + 1] != "0"


CASES = {
    "float32": Case(("--smoothing", "0"), ("smooth=True",), 1e-5),
    "label smoothing": Case(("--smoothing", "0.1"), ("smooth=True",), 1e-5),  # the script's default
    "float64": Case(("--smoothing", "0"), ("dtype='float64'",), 1e-11),  # resnet18 as it is
    "bfloat16 autocast": Case(("--smoothing", "0", "--amp", "--amp-dtype", "bfloat16"), ("smooth=True",), 1e-3),
}


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
    reference: Curve, yardsticks: Sequence[Curve], candidate: Curve, *, floor: float, validation_images: int
) -> list[dict[str, Any]]:
    """Distance of ``candidate`` from ``reference``, epoch by epoch, and whether it is of the size of rounding.

    Rounding differences grow from step to step, so the yardstick of an epoch is the largest distance of any of the
    ``yardsticks`` from the reference so far. Allowed is ``max(FACTOR * yardstick, floor)``.

    Args:
        reference, candidate: curves as :func:`read_curve` gives them.
        yardsticks: curves of the same training, rounded differently.
        floor: distance of a loss that is always allowed. That of the accuracy, in percent, is one validation image.
        validation_images: how many images the accuracy is of.

    Returns:
        For each epoch and metric a dict of "epoch", "metric", "distance", "yardstick", "allowed", "agrees". A distance
        or a yardstick that is not finite does not agree.

    Raises:
        ValueError: the curves are not of the same epochs, or there is no yardstick.
    """
    if not yardsticks:
        raise ValueError("compare: needs at least one yardstick, got none")
    epochs = [row["epoch"] for row in reference]
    for curve in (*yardsticks, candidate):
        if [row["epoch"] for row in curve] != epochs:
            raise ValueError(
                f"compare: curves must be of the same epochs, got {epochs} and {[row['epoch'] for row in curve]}"
            )
    floors = {name: floor for name in METRICS} | {"eval_top1": 100.0 / validation_images * (1 + 1e-9)}
    rows = []
    for name in METRICS:
        yardstick = 0.0
        for index, epoch in enumerate(epochs):
            expected = reference[index][name]
            moved = [abs(curve[index][name] - expected) for curve in yardsticks]
            # max() would pass over what is not a number.
            yardstick = max(yardstick, *moved) if all(map(math.isfinite, moved)) else math.inf
            distance = abs(candidate[index][name] - expected)
            allowed = max(FACTOR * yardstick, floors[name])
            rows.append(
                {
                    "epoch": epoch,
                    "metric": name,
                    "distance": distance,
                    "yardstick": yardstick,
                    "allowed": allowed,
                    "agrees": math.isfinite(allowed) and distance <= allowed,
                }
            )
    return rows


def largest(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each metric the largest distance over all epochs, and the largest of the yardsticks."""
    return {
        name: {key: max(row[key] for row in rows if row["metric"] == name) for key in ("distance", "yardstick")}
        for name in METRICS
    }


def replace_line(source: str, old: str, new: str) -> str:
    """``source`` with the one line that reads ``old`` replaced by ``new``; everything else stays byte for byte.

    Args:
        source: text of a script.
        old: the line to be found, without its indentation and line ending; the whole line must read so.
        new: what takes its place, at the same indentation; one line.

    Raises:
        ValueError: the line is not there exactly once, or ``new`` is not one line.
    """
    if not new.strip() or len(new.splitlines()) != 1:
        raise ValueError(f"replace_line: the new line must be one line, got {new!r}")
    lines = source.splitlines(keepends=True)
    found = [number for number, line in enumerate(lines) if line.strip() == old]
    if len(found) != 1:
        where = f" (lines {', '.join(str(number + 1) for number in found)})" if found else ""
        raise ValueError(
            f"replace_line: the script must have the line {old!r} exactly once, found {len(found)} times{where}"
        )
    lines[found[0]] = lines[found[0]].replace(old, new.strip(), 1)
    return "".join(lines)


def write_images(root: Path, data: str, *, train: int, validation: int, size: int, seed: int = 0) -> dict[str, Any]:
    """Write the images and say what was written.

    Args:
        root: an empty folder, or one that will be made.
        data: ``digits`` (scikit-learn's), or an ``.npz`` of encoded images
            (:func:`aep_ext.training.sources.jpeg_archive`).
        train, validation: how many images of each; both are drawn by ``seed``.
        size: pixels of a side.

    Raises:
        ValueError: there are not as many images.
    """
    if data == "digits":
        title, digits = "handwritten digits (scikit-learn)", sources.digits()
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
        # Whoever asks for more than there are is told so below.
        parts = {"train": (digits, order[validation:]), "validation": (digits, order[:validation])}
    else:
        title, found = "CIFAR-10 (JPEG copy)", sources.jpeg_archive(Path(data).expanduser())
        generator = torch.Generator().manual_seed(seed)
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


def loss_lines(smoothing: bool, memory: Sequence[str] = ()) -> tuple[str, dict[str, str]]:
    """The line of timm's script that makes the loss, and what each run has in its place.

    Args:
        smoothing: whether the script is run with label smoothing.
        memory: memory modes of the fused loss to be run beside its default.
    """
    old = "train_loss_fn = nn.CrossEntropyLoss()"
    smooth = ""
    if smoothing:
        old = "train_loss_fn = LabelSmoothingCrossEntropy(smoothing=args.smoothing)"
        smooth = ", label_smoothing=args.smoothing"
    plain = "from benchmarks.external import timm_run; train_loss_fn = timm_run."
    fused = "import aep_ext; train_loss_fn = aep_ext.JointCrossEntropy("
    lines = {
        "plain": f"{plain}SummedCrossEntropy({WEIGHTS}{smooth})",
        "written_out": f"{plain}WrittenOutCrossEntropy({WEIGHTS}{smooth})",
        "float64": f"{plain}SummedCrossEntropy({WEIGHTS}{smooth}, dtype=torch.float64)",
        "fused": f"{fused}{WEIGHTS}{smooth})",
        "wrong_weight": f"{fused}{WRONG_WEIGHTS}{smooth})",
    }
    lines |= {f"fused, {mode}": f"{fused}{WEIGHTS}{smooth}, memory={mode!r})" for mode in memory}
    return old, lines


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
    command = [sys.executable, str(Path(__file__).parent / "timm_run.py"), str(copy), "--config", "options.yaml"]
    command += ["--data-dir", str(images), "--output", str(folder), "--experiment", "run", *options]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.perf_counter() - start
    summary = folder / "run" / "summary.csv"
    if done.returncode != 0 or not summary.is_file():
        last = "\n".join(done.stdout.splitlines()[-15:])
        raise UserError(f"training_curve: the script ended with status {done.returncode}:\n{last}")
    return read_curve(summary), seconds


def run_case(
    source: str,
    case: str,
    options: Sequence[str],
    images: Path,
    folder: Path,
    validation_images: int,
    memory: Sequence[str] = (),
) -> dict[str, Any]:
    """All runs of one case, compared."""
    setting = CASES[case]
    options = [*options, *setting.options, "--model-kwargs", *setting.model]
    old, lines = loss_lines(setting.smoothing, memory)
    # All copies are made before the first training: a line that is not there shows at once.
    scripts = {name: replace_line(source, old, new) for name, new in lines.items()}
    runs: dict[str, Any] = {}
    for name, script in scripts.items():
        curve, seconds = train(script, options, images, folder / name.replace(" ", ""))
        runs[name] = {"loss_line": lines[name], "seconds": round(seconds, 1), "curve": curve}
        print(f"{case}, {name}: " + " ".join(f"{row['train_loss']:.6f}" for row in curve), flush=True)
    reference, yardsticks = runs["plain"]["curve"], [runs[name]["curve"] for name in YARDSTICKS]
    compared = {}
    for name, run in runs.items():
        if name == "plain" or name in YARDSTICKS:
            continue
        rows = compare(reference, yardsticks, run["curve"], floor=setting.floor, validation_images=validation_images)
        agrees = all(row["agrees"] for row in rows)
        compared[name] = {"agrees": agrees, "largest": largest(rows), "epochs": rows}
    return {
        "options": options,
        "floor": setting.floor,
        "replaced_line": old,
        "runs": runs,
        "compared_with_plain": compared,
        "passed": all(found["agrees"] == (name != "wrong_weight") for name, found in compared.items()),
    }


def report(case: str, result: dict[str, Any]) -> str:
    """Largest distances of one case, in lines of text."""
    lines = [f"{case}: {'passed' if result['passed'] else 'FAILED'}"]
    for name, found in result["compared_with_plain"].items():
        distances = ", ".join(
            f"{metric} {entry['distance']:.2g} (rounding {entry['yardstick']:.2g})"
            for metric, entry in found["largest"].items()
        )
        lines.append(f"  {name} {'agrees' if found['agrees'] else 'does not agree'}: largest distance {distances}")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--script", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--script-source", default="", help="where it is from, for the result file")
    parser.add_argument("--case", action="append", choices=list(CASES), help="may be repeated (default: float32)")
    parser.add_argument(
        "--memory", action="append", default=[], help="a memory mode of the fused loss, run in addition"
    )
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
    arguments.case = list(dict.fromkeys(arguments.case or ["float32"]))
    return arguments


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything that was asked for, and write the result file."""
    try:
        text = arguments.script.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {arguments.script}: {error.strerror or error}") from error
    options = ["--model", timm_run.MODEL, "--num-classes", "10", "--workers", "0", "--warmup-epochs", "0"]
    options += ["--input-size", "3", str(arguments.pixels), str(arguments.pixels), "--epochs", str(arguments.epochs)]
    options += ["--batch-size", str(arguments.batch_size), "--lr", str(arguments.lr), "--seed", str(arguments.seed)]
    options += ["--checkpoint-hist", "1"]
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
        "rule": f"distance <= max({FACTOR:g} * yardstick, floor), the accuracy's floor being one validation "
        "image; the yardstick is the larger distance of the runs "
        f"{' and '.join(YARDSTICKS)} from plain, over all epochs so far",
        "weights": list(WEIGHTS),
        "cases": {},
    }
    with tempfile.TemporaryDirectory(prefix="training-curve-") as temporary:
        images = Path(temporary) / "images"
        result["data"] = write_images(
            images, arguments.data, train=arguments.train, validation=arguments.validation, size=arguments.pixels
        )
        for case in arguments.case:
            found = run_case(
                text.decode("utf-8"),
                case,
                options,
                images,
                Path(temporary) / case.replace(" ", "-"),
                arguments.validation,
                arguments.memory,
            )
            print(report(case, found), flush=True)
            result["cases"][case] = found
            result["passed"] = all(done["passed"] for done in result["cases"].values())
            write_json(arguments.result, result)  # after every case: what was found stays if a later one is stopped
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 passed, 1 failed, 2 could not be done."""
    arguments = _arguments(argv)
    try:
        result = check(arguments)
    except (UserError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("passed" if result["passed"] else "FAILED")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
