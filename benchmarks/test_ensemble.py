"""The ensemble's weighted sum, and the sum with its statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks import rivals
from benchmarks.cases import cases, logits_sets
from benchmarks.memory import peak

HUGE = (4, 1024, 21841)
SIZES = [(4, 1, 10), (4, 64, 100), (4, 256, 1000), (7, 256, 200)]


@pytest.mark.parametrize(
    "case",
    cases(
        SIZES,
        huge=[HUGE],
        variants=("plain", "out"),
        quick=("4x1x10", "4x64x100", "4x256x1000", "4x256x1000-bfloat16", "4x1x10-out"),
    ),
)
def test_ensemble(race, device, case):
    inputs = [(logits, weights) for logits, weights, _ in logits_sets(case, device)]
    fused = ops.ensemble
    if case.variant == "out":
        out = torch.empty_like(ops.ensemble(*inputs[0]))

        def fused(logits: Tensor, weights: Tensor) -> Tensor:
            return ops.ensemble(logits, weights, out=out)

    logits = inputs[0][0]
    race(
        fused,
        {
            "naive": rivals.ensemble_naive,
            "einsum": rivals.ensemble_einsum,
            "product": rivals.ensemble_product,
        },
        inputs=inputs,
        reference=reference.ensemble,
        inductor=rivals.ensemble_naive,
        bytes_moved=(logits.numel() + logits[0].numel()) * logits.element_size(),
        **case.tolerance,
    )


def _comparable(result: tuple[Tensor | None, Tensor, Tensor]) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The answer by its score: among equal scores (bfloat16) torch's top-k may name another class."""
    total, stats, answer = result
    return total, stats.float(), None if total is None else total.gather(1, answer[:, None])


@pytest.mark.parametrize(
    "case",
    cases(
        SIZES,
        huge=[HUGE],
        variants=("plain", "out", "alone"),
        goal=("4x1x10", "4x64x100", "4x256x1000", "7x256x200", "4x1024x21841", "4x1024x21841-alone"),
        quick=(
            "4x1x10", "4x64x100", "4x256x1000", "7x256x200", "4x256x1000-bfloat16", "4x256x1000-strided",
            "4x256x1000-allthreads", "4x1x10-out", "4x256x1000-alone",
        ),
    ),
)  # fmt: skip
def test_ensemble_stats(race, device, case):
    """``out``: into tensors that are there already; ``alone``: statistics without the (N, K) sum."""
    inputs = [(logits, weights) for logits, weights, _ in logits_sets(case, device)]
    fused = ops.ensemble_stats
    if case.variant != "plain":
        total, stats, answer = ops.ensemble_stats(*inputs[0])
        out = (None if case.variant == "alone" else torch.empty_like(total), stats.clone(), answer.clone())

        def fused(logits: Tensor, weights: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
            return ops.ensemble_stats(logits, weights, out=out)

    for arguments in inputs:  # equal scores have one answer here, which the rivals need not share
        assert torch.equal(fused(*arguments)[2], reference.ensemble_stats(*arguments).argmax)
    alone = case.variant == "alone"
    logits = inputs[0][0]
    if case.size == HUGE and device == "cpu":
        output = logits[0].numel() * logits.element_size() + logits.shape[1] * (3 * 4 + 8)
        race.benchmark.extra_info["peak_over_outputs"] = peak(lambda: fused(*inputs[0])).peak / output
        race.benchmark.extra_info["peak_over_outputs_eager"] = (
            peak(lambda: rivals.stats_eager(*inputs[0])).peak / output
        )
    race(
        lambda *arguments: tuple(fused(*arguments)),
        {"naive": rivals.stats_naive, "eager": rivals.stats_eager},
        inputs=inputs,
        reference=lambda *arguments: tuple(reference.ensemble_stats(*arguments)),
        inductor=rivals.stats_fusable,
        comparable=(lambda result: result[1].float()) if alone else _comparable,
        bytes_moved=(logits.numel() + (0 if alone else logits[0].numel())) * logits.element_size(),
        **case.tolerance,
    )
