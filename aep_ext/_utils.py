"""What every part of the package uses: errors for users, optional packages."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import nn


class UserError(Exception):
    """Something the user asked for cannot be done. The message is one line; the command `aep` prints it and exits with
    2."""


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


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """``module`` in eval mode inside the block; every submodule's own mode is restored afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
