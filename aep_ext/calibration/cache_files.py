"""A cache on disk: tensors in a safetensors file, everything else in a JSON file beside it. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from aep_ext.calibration.cached_logits import ExitCache
from aep_ext.calibration.identity import DataIdentity

FORMAT = "aep_ext.exit_cache"
VERSION = 1


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("aep_ext.termination needs safetensors for files: pip install 'aep_ext[deploy]'") from error
    return safetensors.torch


def _paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    target = Path(path)
    if target.suffix == "":
        target = target.with_suffix(".safetensors")
    if target.suffix != ".safetensors":
        raise ValueError(f"ExitCache: the file's name must end in .safetensors, got {target.name!r}")
    return target, target.with_suffix(".json")


def save_cache(cache: ExitCache, path: str | os.PathLike[str], *, metadata: dict[str, Any] | None = None) -> Path:
    """Write a cache; earlier files of the same name are replaced.

    Args:
        cache: what to write.
        path: ends in .safetensors, which is added where there is no suffix; folders are made.
        metadata: JSON-able values of the user's own.

    Returns:
        The path of the tensor file.

    Raises:
        TypeError: the metadata cannot be written as JSON.
        ImportError: safetensors is missing.
    """
    from aep_ext._io import write_bytes

    library = _safetensors()
    tensor_file, description_file = _paths(path)
    data = library.save({"logits": cache.logits, "target": cache.target, "weights": cache.weights})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "identity": cache.identity.to_dict(),
        "exit_ids": list(cache.exit_ids),
        "shape": list(cache.logits.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
        "metadata": {} if metadata is None else metadata,
    }
    try:
        text = json.dumps(description, indent=1)
    except TypeError as error:
        raise TypeError(f"ExitCache.save: metadata must be JSON-able, got {error}") from error
    # The description last: it names the hash of the tensors, so a kill in between is found out by load.
    write_bytes(tensor_file, data)
    write_bytes(description_file, text.encode())
    return tensor_file


def load_cache(path: str | os.PathLike[str]) -> ExitCache:
    """Read a cache that :func:`save_cache` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are no cache, of another version, or do not belong together.
        ImportError: safetensors is missing.
    """
    library = _safetensors()
    tensor_file, description_file = _paths(path)
    for file in (tensor_file, description_file):
        if not file.is_file():
            raise FileNotFoundError(f"ExitCache.load: {file.name} must be in the folder, got none")
    try:
        description = json.loads(description_file.read_text())
    except ValueError as error:
        raise ValueError(f"ExitCache.load: {description_file.name} must be JSON, got {error}") from error
    found = (description.get("format"), description.get("version")) if isinstance(description, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"ExitCache.load: {description_file.name} must have format {FORMAT!r} and version {VERSION}, "
            f"got {found[0]!r} and {found[1]!r}"
        )
    data = tensor_file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != description.get("sha256"):
        raise ValueError(
            f"ExitCache.load: {tensor_file.name} must be the file that {description_file.name} names, "
            f"{str(description.get('sha256'))[:12]}, got {digest[:12]}"
        )
    tensors = library.load(data)
    try:
        return ExitCache.from_logits(
            tensors["logits"],
            tensors["target"],
            tensors["weights"],
            role=DataIdentity.from_dict(description["identity"]).role,
            exit_ids=description["exit_ids"],
            half=tensors["logits"].dtype == torch.float16,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"ExitCache.load: {description_file.name} must describe a cache, got {error!r}") from error
