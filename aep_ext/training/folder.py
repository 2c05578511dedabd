"""The run folder: which run it holds, where its files lie, whether this run may go on in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aep_ext._config import RunConfig
from aep_ext._io import read_arrays, read_json, write_json
from aep_ext._utils import UserError
from aep_ext.report import read_results

VERSION = 2
"""Of what a run folder holds."""
DEFAULT_PARENT = Path("runs")
BASELINE = "baseline"
STATIC = "static/"
"""Begins the name of a trained static network."""
MODEL_FILES = ("model.safetensors", "model.json")


class RunFolder:
    """Paths inside a run folder.

    ::

        config.json                       the run
        results.json, report.html, figures/   the outcome; examples.npz: images that the report shows
        model.safetensors, model.json     the network that is delivered; full/, pruned/ and baseline/ beside it
        checkpoints/seed-0/mixed.ckpt     Lightning's state, replaced after every epoch
        seed-0/mixed/part.json            a trained model; there as soon as, and only when, it is finished
        seed-0/mixed/predictions.npz      its exit logits on the validation, calibration and test images
        seed-0/mixed/gated.json           its calibration
        seed-0/mixed/{full,pruned,gated}/ its networks
        seed-0/static/NAME/               a smaller static network
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    def checkpoint(self, seed: int, name: str) -> Path:
        """Where the training of a model ("baseline" or a family of exit weights) is saved after every epoch."""
        return self.path / "checkpoints" / f"seed-{seed}" / f"{name}.ckpt"

    def model(self, seed: int, name: str) -> Path:
        """The folder of a trained model."""
        return self.path / f"seed-{seed}" / name

    def file(self, seed: int, name: str, file: str) -> Path:
        """A file of a trained model.

        Raises:
            UserError: it is not there.
        """
        path = self.model(seed, name) / file
        if not path.is_file():
            raise UserError(f"{path} is not there: the run is unfinished, or its folder has lost a file")
        return path

    def predictions(self, seed: int, name: str) -> dict[str, Tensor]:
        """A trained model's ``<split>_logits`` (E, N, K), ``<split>_labels`` (N,) and ``test_correct_<network>`` (N,).

        Raises:
            UserError: they are not there.
        """
        arrays = read_arrays(self.file(seed, name, "predictions.npz"))
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    def finished(self) -> dict[str, Any]:
        """The results of the run that this folder holds.

        Raises:
            UserError: it holds none, an unfinished one, or one of an earlier version.
        """
        if not self.config.is_file():
            raise UserError(f"no such run: {self.path} holds none")
        if not self.results.is_file():
            raise UserError(
                f"the run in {self.path} is unfinished; go on with it: aep run --output {self.path} --resume"
            )
        return read_results(self.results)

    def stored(self) -> RunConfig:
        """The run that this folder holds."""
        values = read_json(self.config)
        if not isinstance(values, dict):
            raise UserError(f"{self.config} is not a run's configuration")
        version = values.pop("version", 1)
        if version != VERSION:
            raise UserError(
                f"{self.path} holds a run of version {version}, whose files have other names; this aep_ext reads "
                f"version {VERSION}: run it again into another --output"
            )
        values.setdefault("resize", "squash")  # as runs that name none did
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
        values = {name: value for name, value in config.to_dict().items() if name != "output"}
        write_json(folder.config, {"version": VERSION, **values})


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
