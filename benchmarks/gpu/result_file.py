"""The result file of the GPU check: one JSON, replaced whole after every part, so that a kill loses nothing known."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FORMAT, VERSION = "aep_ext.gpu_check", 1
FINISHED = ("passed", "failed", "left out")
BEGUN = "begun, and not ended"
_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".cmake", ".txt", ".toml", ".sh"}


def read(path: Path) -> dict[str, Any]:
    """The file's content, or that of a new one.

    Raises:
        ValueError: the file is another's.
    """
    if not path.is_file():
        return {"format": FORMAT, "version": VERSION, "machine": {}, "stages": {}}
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("format") != FORMAT or data.get("version") != VERSION:
        raise ValueError(f"gpu check: {path} must have format {FORMAT}, version {VERSION}")
    return data


def write(path: Path, data: dict[str, Any]) -> None:
    """Replaces the file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def record(path: Path, stage: str, part: str, source: str, status: str, seconds: float, note: str = "", **more: Any):
    """Writes down one part: ``status`` is one of :data:`FINISHED` or "unfinished"."""
    data = read(path)
    entry = {"status": status, "seconds": round(seconds, 1), "note": note, "source": source, **more}
    data["stages"].setdefault(stage, {})[part] = entry
    write(path, data)


def finished(path: Path, stage: str, source: str, *, retry: bool = False) -> dict[str, str]:
    """The parts of a stage that need no second run on this source, with their status; with ``retry`` the failed do."""
    kept = FINISHED if not retry else ("passed", "left out")
    entries = read(path)["stages"].get(stage, {})
    return {part: e["status"] for part, e in entries.items() if e["source"] == source and e["status"] in kept}


def fail_begun(path: Path, stage: str, source: str, why: str) -> None:
    """Marks parts that were begun and never ended as failed: their process ended under them."""
    data = read(path)
    for entry in data["stages"].get(stage, {}).values():
        if entry["source"] == source and entry["note"] == BEGUN:
            entry |= {"status": "failed", "note": why}
    write(path, data)


def forget(path: Path, stage: str, *, only_failed: bool) -> None:
    """Drops what is known of a stage, or of its failed parts, so that they run again."""
    data = read(path)
    entries = data["stages"].get(stage, {})
    data["stages"][stage] = {part: e for part, e in entries.items() if only_failed and e["status"] != "failed"}
    write(path, data)


def source_hash(root: Path, folders: Iterable[str], *more: str) -> str:
    """Of the sources under ``folders`` as they lie there, committed or not, and of ``more``."""
    digest = hashlib.sha256("\n".join(more).encode())
    for folder in folders:
        place = root / folder
        files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.suffix in _SUFFIXES)
        for file in files:
            if file.is_file():
                digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartile range of raw times, and the times themselves."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "median": round(statistics.median(ordered), 4),
        "iqr": round(quartiles[2] - quartiles[0], 4),
        "raw": [round(value, 4) for value in values],
    }
