"""Surgery: gives a CNN early exits (:func:`anticipate`) and builds the paper's networks
(:mod:`aep_ext.surgery.networks`)."""

from __future__ import annotations

from aep_ext.surgery import networks
from aep_ext.surgery.anticipation import anticipate
from aep_ext.surgery.multi_exit import MultiExitNet

__all__ = ["MultiExitNet", "anticipate", "networks"]
