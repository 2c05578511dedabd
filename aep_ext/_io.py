"""Reading and writing result files: every file appears whole or not at all, and is on the disk when it does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aep_ext._utils import FileError, UserError


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Let ``write`` fill a temporary file in the same folder, then move it over ``path``.

    A kill at any moment, or a failing power supply, leaves either the old file or the new one. The folder is made if it
    is not there.

    Raises:
        FileError: there is no space, no permission or the like.
    """
    path, temporary = Path(path), ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp gives 0600, which would hide a report from its readers
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, FileError):
            raise FileError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    sync_folder(path.parent)
    return path


def sync_folder(folder: str | Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: str | Path, data: bytes | bytearray) -> Path:
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
        FileError: it cannot be read.
        UserError: it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` written by :func:`write_arrays`.

    Raises:
        FileError: it cannot be read.
        UserError: it is damaged.
    """
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no archive")  # numpy would speak of pickles
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, zlib and numpy have a dozen kinds for it
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits.

    Raises:
        FileError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def write_record(path: str | Path, values: Mapping[str, Any], files: Iterable[str] = ()) -> Path:
    """Write ``values`` as JSON to ``path``, with the SHA-256 of files beside it (``files``) and of all this."""
    path = Path(path)
    record = {**_plain(dict(values)), "files": {name: sha256(path.parent / name) for name in files}}
    return write_json(path, {**record, "sha256": _digest(record)})


def read_record(path: str | Path, remedy: str) -> dict[str, Any]:
    """What :func:`write_record` wrote; ``files`` among it.

    Args:
        remedy: what helps if the file, or one of those beside it, is not as it was written.

    Raises:
        UserError: it is not, or cannot be read.
    """
    path, record = Path(path), read_json(path)
    if isinstance(record, dict) and record and not {"sha256", "files"} & record.keys():
        return {"files": {}, **record}  # written by a version that knew neither
    if not isinstance(record, dict) or record.pop("sha256", None) != _digest(record):
        raise UserError(f"{path} was changed since it was written: {remedy}, or restore the file")
    check_files(path.parent, record["files"], remedy)
    return record


def check_files(folder: Path, files: Mapping[str, str], remedy: str) -> None:
    """An error unless files in a folder have the SHA-256 that is known of them.

    Raises:
        UserError: one was changed or is not there.
    """
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is not there: {remedy}, or restore the file")
        if sha256(path) != digest:
            raise UserError(f"{path} was changed since it was written: {remedy}, or restore the file")


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


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
