"""A rehearsal of the GPU check without a GPU: pretend_cuda, and cases so small that a CPU is through in seconds.

PYTHONPATH=.:tests/support python -m rehearse -m benchmarks.gpu.bench ops
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pretend_cuda

from benchmarks.cases import Case

SIZES = {
    "global_avg_pool": Case((2, 8, 5), "forward"),
    "multi_exit_linear_head": Case((1, 64)),
    "ensemble": Case((3, 4, 11)),
    "ensemble_stats": Case((3, 4, 11)),
    "joint_cross_entropy": Case((3, 4, 11), dtype="bfloat16"),
    "linear_joint_cross_entropy": Case((2, 4, 11)),
    "subset_correct": Case((3, 20, 11)),
    "gate": Case((6,)),
}


def shrink() -> None:
    """Small cases, few rounds."""
    from benchmarks.gpu import cases, measure

    assert {case.operator for case in cases.operator_cases()} == set(SIZES)

    def operators() -> Iterator[cases.OperatorCase]:
        for operator, case in SIZES.items():
            yield cases.OperatorCase(operator, case)

    def networks() -> Iterator[cases.NetworkCase]:
        yield cases.NetworkCase("resnet_small", 2)

    cases.operator_cases, cases.network_cases = operators, networks
    cases.PIXELS, cases.CLASSES, cases.SETS = 16, 7, 4
    measure.COPY_MEGABYTES, measure.NODES, measure.MAX_SETS = (1,), (1, 3), 4
    measure.ROUND_MS, measure.ROUNDS, measure.LATENCY_CALLS = 0.01, 2, 2


if __name__ == "__main__":
    shrink()
    if sys.argv[1:3] == ["-m", "benchmarks.gpu.measure"]:  # run as a script it would have its own sizes again
        from benchmarks.gpu import measure

        pretend_cuda.install()
        measure.measure_ceilings(Path(sys.argv[3]))
    else:
        pretend_cuda.main()
