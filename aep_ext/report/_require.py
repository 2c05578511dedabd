"""Optional packages: one clear line where one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from .files import UserError


class MissingPackage(UserError, ImportError):
    """An optional package is not installed; the message names it and the extra that brings it."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or say which extra of aep_ext brings it.

    Args:
        module: dotted name, for example ``"lightning.pytorch"``.
        extra: the extra's name, for example ``"train"``.
        purpose: what needs it, for the message.

    Raises:
        MissingPackage: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"{purpose} needs {module.split('.')[0]}: pip install 'aep_ext[{extra}]' ({error})"
        ) from error
