"""The command ``aep``: parses, calls, prints. ``aep run``, ``aep report``, ``aep info``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

EPILOG = """examples:
  aep run                                             the handwritten digits: minutes on a CPU
  aep run --data CIFAR10 --network resnet50 --recipe paper
  aep run --data photos/ --network torchvision/resnet18 --weights DEFAULT --image-size 224 --output runs/photos
  aep run --seeds 0,1,2 --exit-weights mixed,descending
  aep run --output runs/photos --resume               after a kill
"""


def _list_of(kind: type) -> object:
    def parse(text: str) -> tuple:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

    parse.__name__ = f"comma-separated {kind.__name__}s"
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aep",
        description="Give a CNN early exits, train them jointly, keep the best subset.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")

    run = commands.add_parser(
        "run",
        parents=[debug],
        argument_default=argparse.SUPPRESS,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="train the baseline and the multi-exit network, prune, test, report",
        description="Train the single-exit baseline and the multi-exit network, score every subset of the exits on the "
        "validation images, keep the best, test once, and write a run folder with a report.",
    )
    what = run.add_argument_group("what")
    what.add_argument(
        "--data",
        metavar="DATA",
        help="digits (default); PATH.npz or cifar10-jpeg:PATH; a folder of images; the name of a torchvision data set",
    )
    what.add_argument(
        "--data-root", metavar="DIR", help="where torchvision's data sets lie or are downloaded to (default: data)"
    )
    what.add_argument(
        "--network",
        metavar="NAME",
        help="resnet_small (default), resnet50, vgg16, densenet169, mobilenet_v3_small, efficientnet_b5, "
        "their _full variants, torchvision/NAME or timm/NAME",
    )
    what.add_argument("--weights", metavar="NAME", help="pretrained weights, for example DEFAULT (default: none)")
    what.add_argument("--classes", type=int, metavar="K", help="number of classes (default: as many as the data has)")
    what.add_argument(
        "--exit-weights",
        type=_list_of(str),
        metavar="NAMES",
        help="mixed (default), descending, ascending, uniform, or several with "
        "commas: each is compared with the one baseline",
    )
    how = run.add_argument_group("how")
    how.add_argument("--recipe", metavar="NAME", help="quick (default), cifar-small, or paper: the published protocol")
    how.add_argument("--image-size", type=int, metavar="PIXELS", help="side to which images are resized")
    how.add_argument("--epochs", type=int, metavar="N", help="at most so many epochs")
    how.add_argument(
        "--patience", type=int, metavar="N", help="stop after N epochs without a better joint validation loss; 0: never"
    )
    how.add_argument("--batch-size", type=int, metavar="N")
    how.add_argument("--lr", type=float, metavar="RATE", help="learning rate")
    how.add_argument("--weight-decay", type=float, metavar="RATE")
    how.add_argument("--optimizer", metavar="NAME", help="adam, adamw, sgd or rmsprop")
    how.add_argument("--schedule", metavar="NAME", help="constant or cosine")
    how.add_argument("--train-samples", type=int, metavar="N", help="learn from so many images only")
    how.add_argument(
        "--class-weights",
        action=argparse.BooleanOptionalAction,
        help="weight the classes in the training loss (default: where the data is unbalanced)",
    )
    how.add_argument(
        "--precision", metavar="NAME", help="32-true (default), 16-mixed or bf16-mixed"
    )
    how.add_argument(
        "--margin",
        type=float,
        metavar="POINTS",
        help="non-inferiority margin for the smallest subset (default: 1 point)",
    )
    seeds = how.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, dest="seeds", metavar="N", help="one seed (default: the recipe's)")
    seeds.add_argument(
        "--seeds", type=_list_of(int), metavar="N,N,...", help="several seeds: means and spreads in the report"
    )
    where = run.add_argument_group("where")
    where.add_argument("--output", metavar="DIR", help="the run folder (default: a new one under runs/)")
    where.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on in a folder that holds this run; without --output, in the last one begun",
    )
    where.add_argument("--device", metavar="NAME", help="auto (default), cpu, cuda or cuda:1")
    where.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: as torch chooses; 1 for small networks)"
    )
    where.add_argument(
        "--workers", type=int, metavar="N", help="processes that load images (default: 0; images in memory need none)"
    )
    where.add_argument("--quiet", action="store_true", default=False, help="print nothing but the outcome")

    report = commands.add_parser(
        "report", parents=[debug], help="make the report of a run folder again, from its results.json"
    )
    report.add_argument("folder", metavar="DIR")

    info = commands.add_parser(
        "info", parents=[debug], help="version, build, instruction sets, what is missing and why"
    )
    info.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _run(options: argparse.Namespace) -> None:
    from .report import text_table
    from .training import run

    given = {
        name: value for name, value in vars(options).items() if name not in ("command", "debug", "resume", "quiet")
    }
    if isinstance(given.get("seeds"), int):
        given["seeds"] = (given["seeds"],)
    began = time.monotonic()
    results = run(given, resume=options.resume, write=None if options.quiet else lambda line: print(line, flush=True))
    report = os.path.join(results["output"], "report.html")
    print(f"\n{text_table(results)}\n\nreport: {report} ({time.monotonic() - began:.0f} s)")


def _report(options: argparse.Namespace) -> None:
    from .report import write_report

    print(f"report: {write_report(options.folder)}")


def _info(options: argparse.Namespace) -> None:
    from . import build_info

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
        {"run": _run, "report": _report, "info": _info}[options.command](options)
        return 0
    except KeyboardInterrupt:
        print("aep: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from .report.files import UserError

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
