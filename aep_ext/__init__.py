"""Early exits for CNNs: anticipate (add), ensemble (train, sum), prune (keep the best subset), terminate (stop early).

The face of the package. Each name's home is the room it is imported from:

- ``anticipate``, ``MultiExitNet``: :mod:`aep_ext.surgery`
- ``ExitWeights``, ``JointCrossEntropy``: :mod:`aep_ext.ensemble`
- ``score_subsets``, ``prune``: :mod:`aep_ext.pruning`
- ``ExitPolicy``, ``GatedNet``, ``compile``: :mod:`aep_ext.inference`
- ``terminate``: :mod:`aep_ext.calibration`
- ``save``, ``load``, ``predict``: :mod:`aep_ext.export`
- ``fit``, ``accelerate``: :mod:`aep_ext.training`, which is imported when they are asked for, and needs the extra
  ``train``
- ``build_info``: what was built, what runs, what is missing and why

Importing raises ImportError if the native module was built for another torch, unless ``AEP_FORCE_REFERENCE=1``; without
a native module everything works on the pure-torch reference, with one warning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aep_ext._build_info import build_info
from aep_ext._version import __version__
from aep_ext.calibration import terminate
from aep_ext.ensemble import ExitWeights, JointCrossEntropy
from aep_ext.export import load, predict, save
from aep_ext.inference import ExitPolicy, GatedNet, compile
from aep_ext.pruning import prune, score_subsets
from aep_ext.surgery import MultiExitNet, anticipate

if TYPE_CHECKING:
    from aep_ext.training import accelerate as accelerate
    from aep_ext.training import fit as fit

__all__ = [
    "ExitPolicy",
    "ExitWeights",
    "GatedNet",
    "JointCrossEntropy",
    "MultiExitNet",
    "__version__",
    "anticipate",
    "build_info",
    "compile",
    "load",
    "predict",
    "prune",
    "save",
    "score_subsets",
    "terminate",
]


def __getattr__(name: str) -> Any:
    # They alone need Lightning: they are no part of `from aep_ext import *`.
    if name in ("fit", "accelerate"):
        from aep_ext import training

        return getattr(training, name)
    raise AttributeError(f"module 'aep_ext' has no attribute {name!r}")
