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
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if __package__ in (None, ""):  # started as a file: its own folder is on the path, the project's is not
    sys.path.insert(0, str(ROOT))

import aep_ext  # noqa: E402
from aep_ext._io import write_json  # noqa: E402
from aep_ext._utils import UserError, require  # noqa: E402
from benchmarks.external import compare, exit_models, image_files, loss_line  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "external-training-curve.json"
WEIGHTS = (0.125, 0.1875, 0.25, 0.4375)  # exact in float32, the type in which the fused loss keeps them
WRONG_WEIGHTS = (0.125, 0.1875, 0.25, 0.48125)
YARDSTICKS = ("written_out", "float64")


@dataclass(frozen=True)
class Case:
    """How one comparison trains.

    Attributes:
        options: of the script.
        model: arguments of :func:`benchmarks.external.exit_models.aep_resnet18`.
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
    plain = "from benchmarks.external import plain_losses; train_loss_fn = plain_losses."
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
    command = [sys.executable, str(Path(__file__).parent / "start.py"), str(copy), "--config", "options.yaml"]
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
    return compare.read_curve(summary), seconds


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
    scripts = {name: loss_line.replace_line(source, old, new) for name, new in lines.items()}
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
        rows = compare.compare(
            reference, yardsticks, run["curve"], floor=setting.floor, validation_images=validation_images
        )
        agrees = all(row["agrees"] for row in rows)
        compared[name] = {"agrees": agrees, "largest": compare.largest(rows), "epochs": rows}
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
    options = ["--model", exit_models.MODEL, "--num-classes", "10", "--workers", "0", "--warmup-epochs", "0"]
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
        "rule": f"distance <= max({compare.FACTOR:g} * yardstick, floor), the accuracy's floor being one validation "
        "image; the yardstick is the larger distance of the runs "
        f"{' and '.join(YARDSTICKS)} from plain, over all epochs so far",
        "weights": list(WEIGHTS),
        "cases": {},
    }
    with tempfile.TemporaryDirectory(prefix="training-curve-") as temporary:
        images = Path(temporary) / "images"
        result["data"] = image_files.write_images(
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
