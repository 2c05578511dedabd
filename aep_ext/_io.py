"""Reading and writing result files: every file appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aep_ext._utils import UserError


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Let ``write`` fill a temporary file in the same folder, then move it over ``path``.

    A kill at any moment leaves either the old file or the new one. The folder is made if it is not there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp gives 0600, which would hide a report from its readers
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write ``data`` to ``path`` atomically."""
    return write_atomically(path, lambda file: file.write(data))


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` as UTF-8 to ``path`` atomically."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, data: Any) -> Path:
    """Write ``data`` as JSON to ``path`` atomically; NaN and infinities, which JSON does not know, become null."""
    return write_text(path, json.dumps(_plain(data), indent=1, allow_nan=False) + "\n")


def write_arrays(path: str | Path, **arrays: np.ndarray) -> Path:
    """Write named arrays as a compressed ``.npz`` (no pickles) to ``path`` atomically."""
    # To mypy an array might be called allow_pickle.
    return write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` written by :func:`write_arrays`."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
