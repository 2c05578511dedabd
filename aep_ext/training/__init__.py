"""Training: Lightning modules, data modules, recipes, and the main job that uses them all.

Needs the extra ``train``: ``pip install 'aep_ext[train]'``.
"""

from __future__ import annotations

from aep_ext._config import RunConfig
from aep_ext._progress import Progress
from aep_ext._recipes import METHODS, RECIPES, Method, Recipe
from aep_ext._utils import UserError
from aep_ext.training.accelerate import Acceleration, accelerate
from aep_ext.training.callbacks import JointEarlyStopping, RunCheckpoint
from aep_ext.training.data import ImageDataModule
from aep_ext.training.fit import FitResult, fit
from aep_ext.training.module import JointLightningModule
from aep_ext.training.run import calibrate_run, run

__all__ = [
    "Acceleration",
    "FitResult",
    "ImageDataModule",
    "JointEarlyStopping",
    "JointLightningModule",
    "METHODS",
    "Method",
    "Progress",
    "RECIPES",
    "Recipe",
    "RunCheckpoint",
    "RunConfig",
    "UserError",
    "accelerate",
    "calibrate_run",
    "fit",
    "run",
]
