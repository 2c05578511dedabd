"""The run folder: which run it holds, where its files lie, whether this run may go on in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aep_ext._io import read_json, write_json
from aep_ext._utils import UserError
from aep_ext.training.config import RunConfig

DEFAULT_PARENT = Path("runs")
BASELINE = "baseline"
MODEL_FILES = ("model.safetensors", "model.json")


class RunFolder:
    """Paths inside a run folder.

    ::

        config.json                       the run
        results.json, report.html, figures/   the outcome
        model.safetensors, model.json     the pruned network that is delivered; full/ and baseline/ beside it
        checkpoints/seed-0/mixed.ckpt     Lightning's state, replaced after every epoch
        seed-0/mixed/part.json            a finished part; there as soon as, and only when, the part is finished
        seed-0/mixed/predictions.npz      exit logits on the images to select and to report on
        seed-0/mixed/{full,pruned}/       its models
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    def checkpoint(self, seed: int, unit: str) -> Path:
        """Where the training of a unit ("baseline" or a family of exit weights) is saved after every epoch."""
        return self.path / "checkpoints" / f"seed-{seed}" / f"{unit}.ckpt"

    def unit(self, seed: int, unit: str) -> Path:
        """The folder of a unit's outcome."""
        return self.path / f"seed-{seed}" / unit

    def part(self, seed: int, unit: str) -> Path:
        """The file that says that a unit is finished."""
        return self.unit(seed, unit) / "part.json"

    def stored(self) -> RunConfig:
        """The run that this folder holds."""
        values = read_json(self.config)
        if not isinstance(values, dict):
            raise UserError(f"{self.config} is not a run's configuration")
        return replace(RunConfig.from_dict(values), output=str(self.path))


def open_run(given: Mapping[str, Any], *, resume: bool = False) -> tuple[RunConfig, RunFolder]:
    """Begin a run in its folder, or go on with the one that is there.

    Args:
        given: the fields of :class:`RunConfig` that the user named; ``output`` may be left out: a new folder under
            ``runs/`` is taken, or, to resume, the one there that was begun last.
        resume: go on if the folder holds a run. What is not given is then as that run has it; what is given must be the
            same.

    Returns:
        The resolved configuration and its folder, in which ``config.json`` is written.

    Raises:
        UserError: the folder holds another run, or something else, or (without ``resume``) this run already.
    """
    wanted = RunConfig.from_dict(given)
    if wanted.output is None:
        folder = RunFolder(_latest() if resume else _unused(wanted))
    else:
        folder = RunFolder(wanted.output)
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path} is not a folder")
    if folder.config.is_file():
        stored = folder.stored()
        asked = (
            replace(stored, **{**given, "output": str(folder.path)})
            if resume
            else replace(wanted, output=str(folder.path))
        )
        asked = asked.resolved()
        differing = stored.differences(asked)
        if differing:
            raise UserError(
                f"{folder.path} holds another run ({'; '.join(differing[:3])}{'; ...' if len(differing) > 3 else ''}); "
                "choose another --output"
            )
        if not resume:
            raise UserError(
                f"{folder.path} holds this run already; go on with it by --resume, or choose another --output"
            )
        return asked, folder
    if folder.path.is_dir() and any(folder.path.iterdir()):
        raise UserError(f"{folder.path} is not empty and holds no run; choose another --output")
    config = replace(wanted, output=str(folder.path)).resolved()
    return config, folder


def begin(config: RunConfig, folder: RunFolder) -> None:
    """Write ``config.json`` unless it is there: from now on the folder holds this run."""
    if not folder.config.is_file():
        write_json(folder.config, {name: value for name, value in config.to_dict().items() if name != "output"})


def _unused(config: RunConfig) -> Path:
    data = Path(config.data.rpartition(":")[2]).stem if any(c in config.data for c in "/:.") else config.data
    base = DEFAULT_PARENT / f"{data}-{config.network.replace('/', '-')}".lower()
    number, path = 1, base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def _latest() -> Path:
    configs = sorted(DEFAULT_PARENT.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise UserError(f"there is no run to resume under {DEFAULT_PARENT}; name it: --output FOLDER --resume")
    return configs[-1].parent
