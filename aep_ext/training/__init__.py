"""Training: Lightning modules, data modules, recipes, and the main job that uses them all.

Needs the extra ``train``: ``pip install 'aep_ext[train]'``.
"""

from __future__ import annotations

from ..report.files import UserError
from .callbacks import JointEarlyStopping, RunCheckpoint
from .config import RunConfig
from .data import ImageDataModule
from .fit import FitResult, fit
from .module import JointLightningModule
from .recipes import RECIPES, Recipe
from .run import run

__all__ = [
    "FitResult",
    "ImageDataModule",
    "JointEarlyStopping",
    "JointLightningModule",
    "RECIPES",
    "Recipe",
    "RunCheckpoint",
    "RunConfig",
    "UserError",
    "fit",
    "run",
]
