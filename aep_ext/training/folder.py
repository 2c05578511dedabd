"""The run folder: which run it holds, where its files lie, whether this run may go on in it."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from aep_ext._config import RunConfig, is_a
from aep_ext._io import check_files, read_arrays, read_json, read_record, sync_folder, umask, write_record
from aep_ext._utils import FileError, UserError, require
from aep_ext.export import load
from aep_ext.report import read_results

try:
    import fcntl
except ImportError:  # not a POSIX system: there is no lock
    fcntl = None  # type: ignore[assignment]

VERSION = 2
"""Of what a run folder holds."""
DEFAULT_PARENT = Path("runs")
BASELINE = "baseline"
STATIC = "static/"
"""Begins the name of a trained static network."""
MODEL_FILES = ("model.safetensors", "model.json")
_ENTRIES = (
    *("config.json", "results.json", "report.html", "figures", "examples.npz", *MODEL_FILES),
    *("full", "pruned", BASELINE, "checkpoints", "logs"),
)


# What runs did whose configuration does not say it yet.
_BEFORE = {
    "resize": "squash",
    "momentum": 0.9,
    "warmup": 0.05,
    "augment": [],
    "mixup": 0.0,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "channels_last": False,
}


class RunFolder:
    """Paths inside a run folder.

    ::

        config.json                       the run
        results.json, report.html, figures/   the outcome; examples.npz: images that the report shows
        model.safetensors, model.json     the network that is delivered; full/, pruned/ and baseline/ beside it
        checkpoints/seed-0/mixed.ckpt     Lightning's state, replaced after every epoch
        seed-0/mixed/part.json            a trained model; there as soon as, and only when, it is finished; with the
                                          SHA-256 of its files and its own, as gated.json
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

    def network(self, path: str) -> nn.Module:
        """A network that was saved under ``path``, in eval mode.

        Raises:
            UserError: it is not there or damaged.
        """
        try:
            return load(self.path / path)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder is this process's alone inside the block; what a killed one left half written is removed.

        Raises:
            UserError: another process has it.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise FileError(f"cannot open {self.path}: {error.strerror}") from error
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise UserError(
                        f"{self.path} is in use by another aep: wait until it is done, or choose another --output"
                    ) from error
                except OSError:  # a file system without locks
                    pass
            for left in self.path.rglob(".*.part"):
                left.unlink(missing_ok=True)
            yield
        finally:
            if fcntl is not None:  # now, even if a worker process still holds a copy of the descriptor
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def check_delivered(self, results: Mapping[str, Any]) -> None:
        """An error unless what was delivered is as it was written.

        Raises:
            UserError: a file was changed or is not there.
        """
        remedy = f"delete {self.results} and deliver it again (aep run --output {self.path} --resume)"
        check_files(self.path, results["delivered"].get("files", {}), remedy)

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
        """The run that this folder holds, resolved.

        Raises:
            UserError: its ``config.json`` is damaged or of another version.
        """
        values = read_json(self.config)
        if not isinstance(values, dict):
            raise UserError(f"{self.config} is not a run's configuration")
        version = values.get("version", 1)
        if version != VERSION:
            raise UserError(
                f"{self.path} holds a run of version {version}, whose files have other names; this aep_ext reads "
                f"version {VERSION}: run it again into another --output"
            )
        values = read_record(self.config, "run it again with --overwrite")
        values = _of_today(values)
        try:
            return replace(RunConfig.from_dict(values), output=str(self.path)).resolved()
        except UserError as error:
            raise UserError(f"{self.config}: {error}") from error


def _of_today(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a run from its ``config.json``, which an earlier version may have written."""
    values = {name: value for name, value in values.items() if name not in ("version", "files", "sha256")}
    if "exit_weights" in values:  # as methods were called
        values["methods"] = values.pop("exit_weights")
    return {**_BEFORE, **values}


def read_config(path: str | Path) -> dict[str, Any]:
    """The fields of :class:`RunConfig` that a file names: YAML, or a run's ``config.json``.

    Names may have hyphens as the options of ``aep run`` do; one value may stand for a list of one.

    Raises:
        UserError: the file cannot be read, or an entry is unknown or of another type.
    """
    path = Path(path)
    if path.suffix == ".json":
        values = read_json(path)
    else:
        yaml = require("yaml", "train", "a configuration file")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold names and values, got {type(values).__name__}")
    if values.get("version", VERSION) != VERSION:
        raise UserError(f"{path} is of a run of version {values['version']}; this aep_ext reads version {VERSION}")
    values = _of_today(values) if "version" in values else values
    types, found = get_type_hints(RunConfig), {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        kind = types.get(name, str)
        if isinstance(value, str) and is_a(0.5, kind):
            with suppress(ValueError):  # 1e-3 is a text in YAML 1.1
                value = float(value)
        listed = is_a((), kind) and value is not None
        found[name] = tuple(value if isinstance(value, list) else [value]) if listed else value
    try:
        RunConfig.from_dict(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return found


def open_run(given: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> tuple[RunConfig, RunFolder]:
    """Begin a run in its folder, or go on with the one that is there.

    Args:
        given: the fields of :class:`RunConfig` that the user named; ``output`` may be left out: a new folder under
            ``runs/`` is taken, or, to resume, the one there that was begun last.
        resume: go on if the folder holds a run. What is not given is then as that run has it; what is given must be the
            same.
        overwrite: a run that the folder holds is to be replaced.

    Returns:
        The resolved configuration and its folder.

    Raises:
        UserError: the folder holds another run, or something else, or (without ``resume``) this run already; to
            overwrite: something beside a run.
    """
    wanted = RunConfig.from_dict(given)
    if resume and overwrite:
        raise UserError("a run is resumed or overwritten, not both")
    if wanted.output is None:
        folder = RunFolder(_latest() if resume else _unused(wanted.resolved()))
    else:
        folder = RunFolder(wanted.output)
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path} is not a folder")
    if overwrite and folder.config.is_file():
        names = sorted(path.name for path in folder.path.iterdir())
        strange = [name for name in names if name not in _ENTRIES and not name.startswith(("seed-", "."))]
        try:
            if b'"network"' not in folder.config.read_bytes():
                strange = ["config.json"]
        except OSError as error:
            raise FileError(f"cannot read {folder.config}: {error.strerror}") from error
        if strange:
            raise UserError(f"{folder.path} holds more than a run ({strange[0]}): it is not overwritten")
    elif folder.config.is_file():
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
                "choose another --output or --overwrite it"
            )
        if not resume:
            raise UserError(
                f"{folder.path} holds this run already; go on with it by --resume, --overwrite it, or choose another "
                "--output"
            )
        return asked, folder
    elif folder.path.is_dir() and any(path for path in folder.path.iterdir() if not _temporary(path)):
        raise UserError(f"{folder.path} is not empty and holds no run; choose another --output")
    config = replace(wanted, output=str(folder.path)).resolved()
    return config, folder


@contextmanager
def begin(config: RunConfig, folder: RunFolder, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """The folder holds this run, and is this process's alone inside the block.

    A new folder appears with ``config.json`` in it, or not at all; to overwrite, it takes the place of the old one.

    Args:
        resume: the run is there.
        overwrite: the folder may hold a run, which is removed.

    Raises:
        UserError: another process works in the folder, or it cannot be made.
    """
    values = {name: value for name, value in config.to_dict().items() if name != "output"} | {"version": VERSION}
    path, replaced = folder.path, overwrite and folder.config.is_file()
    if replaced or not path.exists():
        made = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
                shutil.rmtree(left)
            made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
            os.chmod(made, 0o777 & ~umask())
            write_record(made / "config.json", values)
            if replaced:
                with folder.locked():
                    old = path.rename(made.with_name(f"{made.name}.part"))
                    made.rename(path)
                shutil.rmtree(old)
            else:
                made.rename(path)
            sync_folder(path.parent)
        except FileError:
            raise
        except OSError as error:
            raise FileError(f"cannot make {path}: {error.strerror or error}") from error
        finally:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
        resume = True
    with folder.locked():
        if folder.config.is_file() and not resume:
            raise UserError(f"{path} was taken by another run meanwhile; choose another --output")
        if not folder.config.is_file():  # an empty folder of the user's
            write_record(folder.config, values)
        yield


def _temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".part")


def _unused(config: RunConfig) -> Path:
    data = Path(config.data.rpartition(":")[2]).stem if any(c in config.data for c in "/:.") else config.data
    base = DEFAULT_PARENT / f"{data}-{config.network.replace('/', '-')}".lower()
    number, path = 1, base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def _latest() -> Path:
    found = (path for path in DEFAULT_PARENT.glob("*/config.json") if not _temporary(path.parent))
    configs = sorted(found, key=lambda path: path.stat().st_mtime)
    if not configs:
        raise UserError(f"there is no run to resume under {DEFAULT_PARENT}; name it: --output FOLDER --resume")
    return configs[-1].parent
