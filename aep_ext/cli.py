"""The command ``aep``: parses, calls, prints. ``aep run``, ``calibrate``, ``predict``, ``bench``, ``report``,
``info``."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from aep_ext._config import LOGGERS, OF_RECIPE, RunConfig
from aep_ext._recipes import AUGMENTATIONS, METHODS, OPTIMIZERS, PRECISIONS, RECIPES, SCHEDULES
from aep_ext._version import __version__

EPILOG = """examples:
  aep run                                             the handwritten digits: minutes on a CPU
  aep run --data CIFAR10 --network resnet50 --recipe paper
  aep run --data photos/ --network torchvision/resnet18 --weights DEFAULT --output runs/photos
  aep run --seeds 0,1,2 --methods best,mixed           and the paper's own method beside it
  aep run --output runs/photos --resume               after a kill
  aep run --objective macs --constraints top1=-0.5    the cheapest ungated subset within half a point
  aep run --config run.yaml --seed 1                  options from a file
  aep run --no-terminate                              without gates: the published method alone
"""
CALIBRATE_EPILOG = """examples:
  aep calibrate runs/photos --budget 1                at most one point below the single-exit baseline
  aep calibrate runs/photos --reference ensemble --criterion entropy
  aep calibrate runs/photos --risk 0.01 --delta 0.1   with a guarantee: at most 1 point, with probability 0.9
  aep calibrate runs/photos --static 0.5,0.75         and train smaller static networks beside it
"""
ACCELERATE_EPILOG = """examples:
  aep accelerate runs/digits/baseline --data digits --budget 1
  aep accelerate torchvision/resnet18 --weights resnet18.pth --data photos/ --output fast
  aep accelerate mypackage.models:net --weights net.safetensors --data photos/ --risk 0.02
"""
PREDICT_EPILOG = """examples:
  aep predict runs/photos cat.jpg dog.jpg
  aep predict runs/photos new/ --format csv --output answers.csv
"""
_ASIDE = ("command", "debug", "resume", "overwrite", "quiet", "folder")
"""Options that are no fields of a run's configuration."""


def _list_of(kind: type) -> Callable[[str], tuple]:
    def parse(text: str) -> tuple:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

    parse.__name__ = f"comma-separated {kind.__name__}s"
    return parse


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text if text.startswith("examples:") else partial(argparse.HelpFormatter._fill_text, self)
        return fill(text, width, indent)


def _show_defaults(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """Ends the help of an option with its default, as a user types it; ``defaults`` go before the parser's own."""
    for action in parser._actions:
        value = defaults.get(action.dest, action.default)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        text = f"{value:g}" if isinstance(value, float) else text
        if action.help and text not in ("", "None", "True", "False", argparse.SUPPRESS):
            action.help += f" (default: {text})"


def _run_defaults() -> dict[str, Any]:
    """Of the options of ``aep run``: the configuration's; where that leaves them to the recipe, the recipe's."""
    config = RunConfig()
    found = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "seeds"}
    recipe = RECIPES[config.recipe]
    found["methods"] = f"{recipe.method} with {recipe.name}"
    found["network"] = f"{recipe.network} with {recipe.name}"
    for name in ("patience", *OF_RECIPE):
        value = getattr(recipe, name)
        text = f"{value:g}" if isinstance(value, float) else str(value or 0)
        if isinstance(value, (tuple, bool)):
            text = (",".join(value) or "none") if isinstance(value, tuple) else "yes" if value else "no"
        found[name] = None if value is None and name != "patience" else f"{text} with {recipe.name}"
    return found


def _method_options(group: argparse._ArgumentGroup) -> None:
    """The methods of a run and what it changes in them."""
    group.add_argument(
        "--methods",
        type=_list_of(str),
        metavar="NAMES",
        help=f"{', '.join(METHODS)}, or several with commas: each is compared with the one baseline; the next options "
        "replace what the method says",
    )
    group.add_argument(
        "--head", metavar="NAME", help="early heads: copy (the network's own), linear, conv, pooled4, auto"
    )
    group.add_argument(
        "--prefix-weight",
        type=float,
        metavar="P",
        help="share of the loss for the ensembles of the first exits, 0 to 1",
    )
    group.add_argument(
        "--detach-prefix",
        action=argparse.BooleanOptionalAction,
        help="the loss of such an ensemble trains its last exit only",
    )
    group.add_argument(
        "--distillation", type=float, metavar="D", help="weight of the distillation from the ensemble to every exit"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="of the distillation")
    group.add_argument(
        "--gradient-equilibrium",
        action=argparse.BooleanOptionalAction,
        help="scale gradients so that every exit has the same say in the backbone",
    )
    group.add_argument("--learned-weights", metavar="FORM", help="learn the loss weights: uncertainty, softmax or no")
    group.add_argument(
        "--backbone-epochs",
        type=float,
        metavar="P",
        help="share of the epochs, 0 to 1, that train the backbone with its last exit alone first",
    )


def _gate_options(group: argparse._ArgumentGroup) -> None:
    """What a calibration is asked; of ``aep run`` and ``aep calibrate``."""
    group.add_argument(
        "--objective",
        metavar="NAME",
        help="what is delivered: gated, the cheapest gated subset within the margin; published, the pruned subset of "
        "the published rule; or the ungated subset that is best in top1, top5, nll, macs, parameters or latency",
    )
    group.add_argument(
        "--constraints",
        type=_list_of(str),
        metavar="LIST",
        help="on that ungated subset, against the baseline: top1=-0.5 (points), macs=50%%, latency=2.5 (ms), ...",
    )
    group.add_argument(
        "--criterion", metavar="NAME", help="when to stop: confidence, entropy, margin, patience or vote"
    )
    group.add_argument(
        "--criterion-on",
        metavar="WHAT",
        help="what the criterion looks at: ensemble, of all exits so far, or exit, the one at hand",
    )
    group.add_argument(
        "--num-std-errors",
        type=float,
        metavar="N",
        help="standard errors added to the cross-validated drop before it is held against the margin",
    )
    group.add_argument(
        "--output-weights",
        metavar="WHICH",
        help="of the gated exits: fitted, to the answers given at every exit, or run, as trained",
    )
    group.add_argument(
        "--risk",
        type=float,
        metavar="EPSILON",
        help="instead of the margin: a guarantee that at most this fraction of the answers is lost, see --delta",
    )
    group.add_argument("--delta", type=float, metavar="P", help="the guarantee fails with at most this probability")
    group.add_argument(
        "--static",
        type=_list_of(str),
        metavar="LIST",
        help="train smaller static networks beside: widths such as 0.5,0.75 of the run's network, or names of networks",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aep",
        description="Give a CNN early exits, train them jointly, keep the best subset, stop where the answer is sure.",
        epilog=EPILOG,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"aep_ext {__version__}", help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")

    run = commands.add_parser(
        "run",
        parents=[debug],
        argument_default=argparse.SUPPRESS,
        epilog=EPILOG,
        formatter_class=_Help,
        help="train the baseline and the multi-exit network, prune, calibrate gates, test, report",
        description="Train the single-exit baseline and the multi-exit network, score every subset of the exits on the "
        "validation images, calibrate gates, test once, deliver the cheapest gated subset that is not worse than the "
        "baseline beyond the margin, and write a run folder with a report.",
    )
    what = run.add_argument_group("what")
    what.add_argument(
        "--config",
        metavar="FILE",
        help="read these options from a YAML file, or from the config.json of a run; what is given beside it wins",
    )
    what.add_argument(
        "--data",
        metavar="DATA",
        help="digits; PATH.npz or cifar10-jpeg:PATH; a folder of images; the name of a torchvision data set",
    )
    what.add_argument("--data-root", metavar="DIR", help="where torchvision's data sets lie or are downloaded to")
    what.add_argument(
        "--network",
        metavar="NAME",
        help="resnet_small, resnet_cifar, resnet50, vgg16, densenet169, mobilenet_v3_small, efficientnet_b5, "
        "their _full variants, torchvision/NAME or timm/NAME",
    )
    what.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="leave out images that cannot be read, and list them in the report, instead of stopping at the first",
    )
    what.add_argument(
        "--normalize",
        metavar="HOW",
        help="mean and standard deviation of the channels: measured, imagenet, cifar10 and the like, or numbers such "
        "as 0.5/0.25 (default: the published data sets' own, else measured)",
    )
    what.add_argument(
        "--weights",
        metavar="NAME",
        help="pretrained weights, for example DEFAULT, or a file of them: FILE.safetensors or FILE.pth (default: none)",
    )
    what.add_argument("--classes", type=int, metavar="K", help="number of classes (default: as many as the data has)")
    how = run.add_argument_group("how")
    how.add_argument("--recipe", metavar="NAME", help=f"{', '.join(RECIPES)}; paper is the published protocol")
    how.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="the shorter side of images is resized to it, then the centre cut out (default: that of the recipe, of "
        "pretrained weights, or the median of the images, at most 224)",
    )
    how.add_argument("--epochs", type=int, metavar="N", help="at most so many epochs")
    how.add_argument(
        "--patience", type=int, metavar="N", help="stop after N epochs without a better joint validation loss; 0: never"
    )
    how.add_argument("--batch-size", type=int, metavar="N", help="images in a batch of the training")
    how.add_argument("--lr", type=float, metavar="RATE", help="learning rate")
    how.add_argument("--momentum", type=float, metavar="M", help="of sgd, Nesterov's")
    how.add_argument("--weight-decay", type=float, metavar="RATE", help="of weights, not of biases and norms")
    how.add_argument("--optimizer", metavar="NAME", help=_or(OPTIMIZERS))
    how.add_argument("--schedule", metavar="NAME", help=f"of the learning rate: {_or(SCHEDULES)}")
    how.add_argument(
        "--warmup", type=float, metavar="SHARE", help="share of the steps in which the learning rate grows"
    )
    how.add_argument(
        "--augment",
        type=lambda text: () if text == "none" else _list_of(str)(text),
        metavar="NAMES",
        help=f"what is done to training images: {_or(AUGMENTATIONS)}, or several with commas; or none",
    )
    how.add_argument(
        "--mixup", type=float, metavar="ALPHA", help="mix images and labels in pairs, for example 0.2; 0: do not"
    )
    how.add_argument("--label-smoothing", type=float, metavar="E", help="of the training loss, from 0 to 1")
    how.add_argument(
        "--ema", type=float, metavar="DECAY", help="keep a moving average of the weights, for example 0.999; 0: do not"
    )
    how.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="train in the channels-last memory format",
    )
    how.add_argument("--train-samples", type=int, metavar="N", help="learn from so many images only (default: all)")
    how.add_argument(
        "--calibration-samples", type=int, metavar="N", help="hold out so many training images for the calibration"
    )
    how.add_argument(
        "--class-weights",
        action=argparse.BooleanOptionalAction,
        help="weight the classes in the training loss (default: where the data is unbalanced)",
    )
    how.add_argument(
        "--precision", metavar="NAME", help=f"{_or(PRECISIONS)}: bf16-mixed where the hardware multiplies bfloat16"
    )
    how.add_argument(
        "--margin",
        type=float,
        metavar="POINTS",
        help="points of top-1 that what is delivered may lose against the baseline",
    )
    seeds = how.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=_list_of(int), dest="seeds", metavar="N", help="one seed (default: the recipe's)")
    seeds.add_argument(
        "--seeds", type=_list_of(int), metavar="N,N,...", help="several seeds: means and spreads in the report"
    )
    _method_options(run.add_argument_group("how the exits learn"))
    gate = run.add_argument_group("stopping early")
    gate.add_argument(
        "--no-terminate",
        action="store_false",
        dest="terminate",
        default=argparse.SUPPRESS,
        help="no gates: train, score and prune alone",
    )
    _gate_options(gate)
    where = run.add_argument_group("where")
    where.add_argument("--output", metavar="DIR", help="the run folder (default: a new one under runs/)")
    where.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on in a folder that holds this run; without --output, in the last one begun",
    )
    where.add_argument("--overwrite", action="store_true", default=False, help="replace the run that the folder holds")
    where.add_argument(
        "--logger",
        metavar="NAME",
        help=f"{_or(LOGGERS)}: the metrics of every epoch, under logs/ in the run folder (default: none)",
    )
    where.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:1")
    where.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: as torch chooses; 1 for small networks)"
    )
    where.add_argument(
        "--workers", type=int, metavar="N", help="processes that load images; images in memory need none"
    )
    where.add_argument("--quiet", action="store_true", default=False, help="print nothing but the outcome")

    _show_defaults(run, _run_defaults())

    calibrate = commands.add_parser(
        "calibrate",
        parents=[debug],
        argument_default=argparse.SUPPRESS,
        epilog=CALIBRATE_EPILOG,
        formatter_class=_Help,
        help="calibrate the gates of a finished run anew: another budget, reference or criterion",
        description="Choose the gated exits and their thresholds on the run's stored logits, evaluate them on the test "
        "images, and write the run's results.json, delivered network and report again. What is not given is as in the "
        "run.",
    )
    calibrate.add_argument("folder", metavar="RUN", help="the folder of a finished run")
    what = calibrate.add_argument_group("what")
    what.add_argument(
        "--budget",
        type=float,
        metavar="POINTS",
        help="top-1 that may be lost against --reference (default: the margin)",
    )
    what.add_argument(
        "--reference",
        metavar="WHICH",
        help="what the budget is held against: baseline, pruned, ensemble (of all exits), or best, the better of "
        "baseline and ensemble",
    )
    _gate_options(what)
    where = calibrate.add_argument_group("where")
    where.add_argument("--data", metavar="DATA", help="where the run's images lie now, if they moved")
    where.add_argument("--data-root", metavar="DIR", help="the same for torchvision's data sets")
    where.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:1 (default: as the run)")
    where.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as the run)")
    where.add_argument("--quiet", action="store_true", default=False, help="print nothing but the outcome")

    _show_defaults(calibrate, {"reference": RunConfig.reference})

    accelerate = commands.add_parser(
        "accelerate",
        parents=[debug],
        argument_default=argparse.SUPPRESS,
        epilog=ACCELERATE_EPILOG,
        formatter_class=_Help,
        help="give a trained network early exits in minutes, without retraining it",
        description="Train early exits on the feature maps of a trained network, which stays as it is, choose "
        "thresholds on the validation images, test once, and save the gated network. An image that takes no early exit "
        "gets the model's own answer.",
    )
    accelerate.add_argument(
        "model",
        metavar="MODEL",
        help="the folder of a saved network (such as RUN/baseline), a network's name as in aep run, or "
        "MODULE:FUNCTION, a function without arguments that gives the model",
    )
    what = accelerate.add_argument_group("what")
    what.add_argument("--data", required=True, metavar="DATA", help="as for aep run")
    what.add_argument("--data-root", metavar="DIR", help="where torchvision's data sets lie or are downloaded to")
    what.add_argument(
        "--weights",
        metavar="NAME",
        help="of a network by name or a function's model: FILE.safetensors, FILE.pth, or a name",
    )
    what.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (default: as for aep run)")
    what.add_argument(
        "--normalize",
        type=_list_of(float),
        metavar="N,N,...",
        help="mean and standard deviation of each channel that the model was trained with, means first (default: the "
        "saved network's, those of weights by name, or those of the training images)",
    )
    what.add_argument("--classes", type=int, metavar="K", help="number of classes (default: as many as the data has)")
    how = accelerate.add_argument_group("how")
    how.add_argument("--budget", type=float, default=0.5, metavar="POINTS", help="top-1 that may be lost")
    how.add_argument(
        "--risk", type=float, metavar="FRACTION", help="instead: top-1 lost at most, with probability 1 - delta"
    )
    how.add_argument("--delta", type=float, default=0.1, metavar="FRACTION", help="see --risk")
    how.add_argument("--exits", type=int, metavar="N", help="how many exits, the last included (default: four)")
    how.add_argument(
        "--head", default="auto", metavar="NAME", help="of early exits: auto, conv, linear, pooled4 or copy"
    )
    how.add_argument("--epochs", type=int, default=10, metavar="N", help="of the heads")
    how.add_argument("--lr", type=float, default=3e-3, metavar="RATE", help="learning rate of the heads")
    how.add_argument("--batch-size", type=int, metavar="N", help="training images in a batch (default: 128)")
    how.add_argument("--train-samples", type=int, metavar="N", help="learn from so many images only (default: all)")
    how.add_argument(
        "--calibration-samples", type=int, metavar="N", help="hold out so many training images for the calibration"
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the heads")
    where = accelerate.add_argument_group("where")
    where.add_argument("--output", default="accelerated", metavar="DIR", help="the folder to write")
    where.add_argument("--overwrite", action="store_true", default=False, help="replace what the folder holds")
    where.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:1")
    where.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as torch chooses)")
    where.add_argument("--quiet", action="store_true", default=False, help="print nothing but the outcome")

    _show_defaults(accelerate, {})

    predict = commands.add_parser(
        "predict",
        parents=[debug],
        epilog=PREDICT_EPILOG,
        formatter_class=_Help,
        help="classify images with the network of a run, or with a saved one",
        description="Classify images. Every answer has the file, the class, the confidence (from 0 to 1) and the exit "
        "taken, counted from 1 as in the report.",
    )
    predict.add_argument(
        "folder", metavar="RUN", help="a run's folder, or any folder that holds model.json and model.safetensors"
    )
    predict.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, and folders: all images inside, at any depth"
    )
    predict.add_argument("--format", default="table", choices=("table", "csv", "json"), help="how they are written")
    predict.add_argument("--output", metavar="FILE", help="write them to a file instead of printing them")
    predict.add_argument("--batch-size", type=int, default=64, metavar="N", help="so many images at a time")
    predict.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="leave out images that cannot be read, and list them on standard error, instead of stopping at the first",
    )

    _show_defaults(predict, {})

    bench = commands.add_parser(
        "bench",
        parents=[debug],
        help="measure a calibrated run's gated network against the ungated one",
        description="Latency and throughput of the gated network and of the same network ungated, taking turns on "
        "identical test images, at several batch sizes.",
    )
    bench.add_argument("folder", metavar="RUN", help="the folder of a run that was calibrated")
    bench.add_argument("--batches", type=_list_of(int), default="1,4,16,64,256", metavar="N,N,...", help="batch sizes")
    bench.add_argument(
        "--backend",
        default="eager",
        choices=("auto", "eager", "openvino", "onnxruntime", "inductor"),
        help="what runs the stages",
    )
    bench.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads")
    bench.add_argument("--samples", type=int, default=512, metavar="N", help="test images")
    bench.add_argument("--seconds", type=float, default=10.0, metavar="S", help="time for each batch size")

    _show_defaults(bench, {})

    report = commands.add_parser(
        "report",
        parents=[debug],
        help="make the report of a run folder again, from its results.json",
        description="Make the report of a run folder again, from its results.json.",
    )
    report.add_argument("folder", metavar="RUN", help="the folder of a finished run")

    info = commands.add_parser(
        "info",
        parents=[debug],
        help="version, build, instruction sets, what is missing and why",
        description="Print the version, the build, the instruction sets, and what is missing and why.",
    )
    info.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a run, a calibration or a benchmark, by the names that these take."""
    return {name: value for name, value in vars(options).items() if name not in _ASIDE}


def _outcome(results: dict[str, Any], began: float) -> None:
    from aep_ext.report import text_table

    report = os.path.join(results["output"], "report.html")
    print(f"\n{text_table(results)}\n\nreport: {report} ({time.monotonic() - began:.0f} s)")


def _run(options: argparse.Namespace) -> None:
    from aep_ext.training import Progress, run
    from aep_ext.training.folder import read_config

    given = _fields(options)
    if "config" in given:
        given = {**read_config(given.pop("config")), **given}
    began = time.monotonic()
    progress = Progress.of_terminal(options.quiet)
    asked = {"resume": options.resume, "overwrite": options.overwrite}
    _outcome(run(given, **asked, progress=progress), began)


def _calibrate(options: argparse.Namespace) -> None:
    from aep_ext.training import Progress, calibrate_run

    began = time.monotonic()
    progress = Progress.of_terminal(options.quiet)
    _outcome(calibrate_run(options.folder, _fields(options), progress=progress), began)


def _accelerate(options: argparse.Namespace) -> None:
    from aep_ext.training import Progress
    from aep_ext.training.accelerate import accelerate_command

    given = {name: value for name, value in vars(options).items() if name not in ("command", "debug", "quiet")}
    print(accelerate_command(**given, progress=Progress.of_terminal(options.quiet)))
    print(f"\nsaved: {options.output}")


def _predict(options: argparse.Namespace) -> None:
    from aep_ext import load
    from aep_ext._io import write_text
    from aep_ext._progress import Progress
    from aep_ext._utils import UserError
    from aep_ext.export.predict import image_files, predict

    files, bad = image_files(options.images), list[UserError]()
    try:
        net: Any = load(options.folder)
        with Progress.of_terminal(stderr=True).task("images", len(files)) as task:
            skip = bad.append if options.skip_bad_images else None
            found = predict(net, files, batch_size=options.batch_size, on_bad_image=skip, progress=task)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(str(error)) from error
    for left_out in bad:
        print(f"aep: {left_out}", file=sys.stderr)
    exit_ids = getattr(net, "net", net).exit_ids
    rows = [
        {
            "file": one.file,
            "class": str(one.label) if one.class_name is None else one.class_name,
            "confidence": round(one.confidence, 6) if math.isfinite(one.confidence) else None,
            "exit": exit_ids[one.exit] + 1,
        }
        for one in found
    ]
    text = _answers(rows, options.format)
    if options.output is None:
        print(text, end="")
    else:
        write_text(options.output, text)


def _answers(rows: list[dict[str, Any]], form: str) -> str:
    if form == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    head = ("file", "class", "confidence", "exit")
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, head, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
    from aep_ext._utils import aligned

    cells = [head, *([f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    return "\n".join(aligned(cells, left=len(head))) + "\n"


def _bench(options: argparse.Namespace) -> None:
    from aep_ext.training import Progress
    from aep_ext.training.bench import bench_run

    bench_run(options.folder, progress=Progress.of_terminal(), **_fields(options))


def _report(options: argparse.Namespace) -> None:
    from aep_ext.report import write_report

    print(f"report: {write_report(options.folder)}")


def _info(options: argparse.Namespace) -> None:
    from aep_ext import build_info

    found = build_info()
    print(json.dumps(found.to_dict(), indent=1) if options.json else found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The exit code: 0; 2 for something that the user can mend (one line on standard error); 1 for anything else; 130
            after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        commands = {
            "run": _run,
            "calibrate": _calibrate,
            "accelerate": _accelerate,
            "predict": _predict,
            "bench": _bench,
            "report": _report,
            "info": _info,
        }
        commands[options.command](options)
        return 0
    except KeyboardInterrupt:
        print("aep: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from aep_ext._utils import UserError

        if options.debug:
            raise
        known = isinstance(error, UserError)
        text = " ".join(str(error).split())
        print(
            f"aep: {text}" if known else f"aep: {type(error).__name__}: {text} (--debug shows where)", file=sys.stderr
        )
        return 2 if known else 1


if __name__ == "__main__":
    sys.exit(main())
