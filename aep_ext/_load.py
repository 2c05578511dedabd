"""Loads the native module ``_C`` once and says why where it cannot.

Three cases: the module is there and fits: it is used. It is absent: the pure-torch reference runs, with one warning. It
was built for another torch: ``import aep_ext`` raises, because such a module can crash or compute nonsense.
``AEP_FORCE_REFERENCE=1`` chooses the reference on purpose and silences both.

Beside ``_C.<SOABI>.so`` lies ``_build.<SOABI>.json``, written by the build: for which torch, with what, with which
notices. It is read before the module is opened: the loader's own complaint about a foreign torch names neither version.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parent
_REMEDY = (
    "Build it again beside this torch (`pip install --no-build-isolation --no-deps --force-reinstall .` in its "
    "source folder), or set AEP_FORCE_REFERENCE=1 to run without the native module."
)
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX") or ".so"  # as in .cpython-311-x86_64-linux-gnu.so

MODULE_PATH = _FOLDER / f"_C{_SUFFIX}"
RECORD_PATH = _FOLDER / f"_build{os.path.splitext(_SUFFIX)[0]}.json"


def read_record(path: Path = RECORD_PATH) -> dict[str, Any]:
    """The build's record, or an empty dict where the package was never built for this Python."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return found
    except (OSError, ValueError) as error:
        return {"notices": [f"{path.name} cannot be read ({error}); build again"]}


def mismatch(record: dict[str, Any], running: str) -> str | None:
    """The error message if the module was not built for the running torch, else None.

    Args:
        record: the build's record (:func:`read_record`); its ``torch`` is the version built for.
        running: ``torch.__version__`` of this process.
    """
    built = record.get("torch")
    if built == running:
        return None
    return (
        f"aep_ext was built for torch {built or '(unknown: no build record)'}, but torch {running} is running. "
        f"{_REMEDY}"
    )


def switched_on(name: str) -> bool:
    """True where the environment variable ``name`` says so: 1, true, yes or on."""
    return os.environ.get(name, "").strip().lower() in {"1", "true", "yes", "on"}


def reference_forced() -> bool:
    """True where the environment variable ``AEP_FORCE_REFERENCE`` asks for the pure-torch reference."""
    return switched_on("AEP_FORCE_REFERENCE")


def only_asks_for_info(argv: list[str]) -> bool:
    """True for ``aep info`` and ``python -m aep_ext info``: they must also work where importing is refused.

    While ``python -m`` imports the package, ``argv[0]`` is still "-m" and the module's own arguments follow.
    """
    return argv[1:2] == ["info"] and os.path.basename(argv[0]) in {"aep", "-m"}


def _load() -> tuple[ModuleType | None, str | None]:
    """The module or None, and the reason where there is none."""
    if reference_forced():
        return None, "AEP_FORCE_REFERENCE=1 chose the pure-torch reference"
    if not MODULE_PATH.is_file():
        why = "; ".join(record.get("notices", ())) or "the native module was not built for this Python"
        if record.get("kind") in ("cpu", "cuda"):  # its notices are about something else
            why = f"{MODULE_PATH.name} was built, but is not there any more; build again"
        if not only_asks_for_info(sys.argv):
            warnings.warn(
                f"aep_ext runs on its pure-torch reference, which is correct but slower: {why} (more: `aep info`)",
                RuntimeWarning,
                stacklevel=2,
            )
        return None, why
    message = mismatch(record, torch.__version__)
    if message is None:
        try:
            return importlib.import_module("aep_ext._C"), None
        except ImportError as error:  # a library of CUDA that is gone, a sanitizer that is not preloaded, half a file
            message = f"aep_ext's native module cannot be loaded: {error}. {_REMEDY}"
    if only_asks_for_info(sys.argv):
        return None, message
    raise ImportError(message)


record: dict[str, Any] = read_record()
extension, reason = _load()
