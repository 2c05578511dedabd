"""One step of early stopping: running sum, decision, survivors moved to the front."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks import rivals
from benchmarks.cases import Case, cases, feature_map, input_sets

CHANNELS, HEIGHT, CLASSES, WEIGHT = 512, 8, 10, 0.7


def _inputs(case: Case, device: str) -> list[tuple[Tensor, ...]]:
    """Features, running sum, original indices, empty state, this exit's logits, the threshold."""
    rows = case.size[0]
    sets = []
    for _ in range(input_sets(rows * CHANNELS * HEIGHT**2 * case.torch_dtype.itemsize)):
        features = feature_map(rows, CHANNELS, HEIGHT, case, device)
        running, logits = (torch.randn(rows, CLASSES).to(device, case.torch_dtype) for _ in range(2))
        indices, state = torch.arange(rows, device=device), torch.zeros(rows, 0, dtype=torch.int64, device=device)
        sets.append((features, running, indices, state, logits, _threshold(case, running, logits)))
    return sets


def _threshold(case: Case, running: Tensor, logits: Tensor) -> float:
    """Half of the rows leave, or none does: midway between two rows, so that no rounding decides."""
    if case.variant == "stay" or case.size[0] == 1:
        return 2.0
    confidence = torch.softmax((running + WEIGHT * logits).double(), -1).amax(-1).sort().values
    return confidence[case.size[0] // 2 - 1 : case.size[0] // 2 + 1].mean().item()


@pytest.mark.parametrize(
    "case",
    cases(
        [(1,), (8,), (64,), (256,)],
        variants=("plain", "stay", "out"),
        dtypes=("float32", "float64"),
        layouts=("contiguous", "channels_last"),
        goal=("1", "8", "64", "256", "1-out", "8-out", "64-out", "256-out"),
        quick=("1", "64", "64-channels_last", "8-stay", "1-out", "64-out"),
    ),
)
def test_gate(race, device, case):
    """Features of 512 x 8 x 8; about half of the rows leave (``stay``: none, as with one row)."""
    inputs = _inputs(case, device)
    weight_sum = 1 - WEIGHT  # the weights so far add up to one: the softmax is that of the plain sum
    options = {}
    if case.variant == "out":
        f, running, indices, state, logits, threshold = inputs[0]
        options["out"] = ops.gate(f, running, weight_sum, indices, state, logits, weight=WEIGHT, threshold=threshold)

    def step(gate: object, options: dict[str, object], *arguments: object) -> tuple[Tensor, ...]:
        features, running, indices, state, logits, threshold = arguments
        r = gate(features, running, weight_sum, indices, state, logits, weight=WEIGHT, threshold=threshold, **options)
        count = int(r.count)
        return r.features[:count], r.running[:count], r.indices, r.stats

    def without_state(function: object) -> object:
        return lambda f, running, indices, _, logits, threshold: function(
            f, running, indices, logits, WEIGHT, threshold
        )

    rows = case.size[0]
    survivors = rows if rows == 1 or case.variant == "stay" else rows - rows // 2
    target = torch.empty_like(inputs[0][0])

    def copy(features: Tensor, *_: object) -> Tensor:
        return target[:survivors].copy_(features[:survivors])

    race(
        lambda *arguments: step(ops.gate, options, *arguments),
        {"naive": without_state(rivals.gate_naive), "eager": without_state(rivals.gate_eager)},
        inputs=inputs,
        reference=lambda *arguments: step(reference.gate, {}, *arguments),
        inductor=without_state(rivals.gate_eager),
        ceilings={"copy": copy},
        **case.tolerance,
    )
    info = race.benchmark.extra_info
    if "paired_ratio_copy" in info:
        info["over_copy"] = 1 / info["paired_ratio_copy"]
