"""Do two training curves agree as far as rounding lets them? The measure is what rounding does to a third."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["FACTOR", "METRICS", "compare", "largest", "read_curve"]

METRICS = ("train_loss", "eval_loss", "eval_top1")
FACTOR = 3.0  # how much further than the yardsticks a curve may lie

Curve = Sequence[Mapping[str, float]]


def read_curve(path: Path) -> list[dict[str, float]]:
    """timm's ``summary.csv``: one dict per epoch with "epoch" and the :data:`METRICS`.

    Raises:
        ValueError: the file has no epochs, or lacks a column.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in ("epoch", *METRICS) if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"read_curve: {path.name} must have epochs and the columns {missing}, got {len(rows)} epochs")
    return [{"epoch": int(row["epoch"]), **{name: float(row[name]) for name in METRICS}} for row in rows]


def compare(
    reference: Curve, yardsticks: Sequence[Curve], candidate: Curve, *, floor: float, validation_images: int
) -> list[dict[str, Any]]:
    """Distance of ``candidate`` from ``reference``, epoch by epoch, and whether it is of the size of rounding.

    Rounding differences grow from step to step, so the yardstick of an epoch is the largest distance of any of the
    ``yardsticks`` from the reference so far. Allowed is ``max(FACTOR * yardstick, floor)``.

    Args:
        reference, candidate: curves as :func:`read_curve` gives them.
        yardsticks: curves of the same training, rounded differently.
        floor: distance of a loss that is always allowed. That of the accuracy, in percent, is one validation image.
        validation_images: how many images the accuracy is of.

    Returns:
        For each epoch and metric a dict of "epoch", "metric", "distance", "yardstick", "allowed", "agrees". A distance
        or a yardstick that is not finite does not agree.

    Raises:
        ValueError: the curves are not of the same epochs, or there is no yardstick.
    """
    if not yardsticks:
        raise ValueError("compare: needs at least one yardstick, got none")
    epochs = [row["epoch"] for row in reference]
    for curve in (*yardsticks, candidate):
        if [row["epoch"] for row in curve] != epochs:
            raise ValueError(
                f"compare: curves must be of the same epochs, got {epochs} and {[row['epoch'] for row in curve]}"
            )
    floors = {name: floor for name in METRICS} | {"eval_top1": 100.0 / validation_images * (1 + 1e-9)}
    rows = []
    for name in METRICS:
        yardstick = 0.0
        for index, epoch in enumerate(epochs):
            expected = reference[index][name]
            moved = [abs(curve[index][name] - expected) for curve in yardsticks]
            # max() would pass over what is not a number.
            yardstick = max(yardstick, *moved) if all(map(math.isfinite, moved)) else math.inf
            distance = abs(candidate[index][name] - expected)
            allowed = max(FACTOR * yardstick, floors[name])
            rows.append(
                {
                    "epoch": epoch,
                    "metric": name,
                    "distance": distance,
                    "yardstick": yardstick,
                    "allowed": allowed,
                    "agrees": math.isfinite(allowed) and distance <= allowed,
                }
            )
    return rows


def largest(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each metric the largest distance over all epochs, and the largest of the yardsticks."""
    return {
        name: {key: max(row[key] for row in rows if row["metric"] == name) for key in ("distance", "yardstick")}
        for name in METRICS
    }
