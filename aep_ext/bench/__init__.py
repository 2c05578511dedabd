"""Bench: what a run's gates save on the machine at hand, against the network without them.

Needs the extra ``train``: ``pip install 'aep_ext[train]'``.
"""

from __future__ import annotations

from aep_ext.training.bench import bench_run

__all__ = ["bench_run"]
