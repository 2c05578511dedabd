"""From an operator's case to its figures: compare, time in graphs and as calls, memory, launches, bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import clock
from benchmarks.gpu.clock import Contestant
from benchmarks.gpu.operators import Case, Setup, bytes_of, setup

# Of the value, and of the largest value in its tensor: gradients of a mean over many rows are small all over.
TOLERANCE = {
    "float32": (2e-3, 5e-4),  # products of 1024 rows in another order
    "bfloat16": (6e-2, 3e-2),  # rivals also add up in bfloat16
}


def contestants(found: Setup, compile_too: bool = True) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Ours first, then eager ones, ``inductor`` and ``liger``; and who is left out, with the reason."""
    all_of_them, left_out = {"fused": found.fused, **found.eager}, {}
    if compile_too:
        torch._dynamo.reset()
        all_of_them["inductor"] = found.around(torch.compile(found.compiled, dynamic=False))
    if found.liger is not None:
        try:
            all_of_them["liger"] = found.liger()
        except ImportError as error:
            left_out["liger"] = f"not installed: {error}"[:200]
    return all_of_them, left_out


def compared(
    case: Case, found: Setup, running: dict[str, Contestant], arguments: tuple[Any, ...]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those whose result is the best eager one's, and rivals that raised, with their error.

    Raises:
        AssertionError: a result differs; it names the contestant. Ours may not raise either.
    """
    oracle = next(iter(found.eager.values()))
    expected, kept, broken = found.comparable(oracle(*arguments)), {}, {}
    for name, function in running.items():
        try:
            got = function(*arguments)
        except Exception as error:
            if name == "fused":
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            broken[name] = f"{type(error).__name__}: {first}"[:200]
            continue
        _close(_flat(found.comparable(got)), _flat(expected), case.dtype, f"{case.id}: {name}")
        kept[name] = function
    return kept, broken


def _flat(result: Any) -> list[torch.Tensor]:
    return [result.detach()] if isinstance(result, torch.Tensor) else [x for entry in result for x in _flat(entry)]


def _close(got: list[torch.Tensor], expected: list[torch.Tensor], dtype: str, who: str) -> None:
    rtol, share = TOLERANCE[dtype]
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        inexact = other.is_floating_point()
        largest = float(other.abs().max()) if inexact and other.numel() else 0.0
        torch.testing.assert_close(
            one,
            other,
            rtol=rtol if inexact else 0,
            atol=share * largest,
            check_dtype=False,
            check_stride=False,
            msg=lambda text, i=i: f"{who}: result {i}: {text}",
        )


def ratios(times: dict[str, dict[str, Any]], eager: list[str]) -> dict[str, float]:
    """How many times as long as ours the others take: the best eager one, torch.compile, Liger.

    Only of those that were timed in the same way: who cannot be captured has no ratio in graphs.
    """
    own = times["fused"]["median"]
    times = {name: entry for name, entry in times.items() if entry.get("way") == times["fused"].get("way")}
    found = {name: times[name]["median"] / own for name in ("inductor", "liger") if name in times}
    known = [times[name]["median"] for name in eager if name in times]
    if known:
        found["best_eager"] = min(known) / own
    return {name: round(value, 3) for name, value in found.items()}


def measure(case: Case, copy_gb_per_s: Callable[[], float]) -> dict[str, Any]:
    """All figures of a case, as they go into the result file. Needs a GPU.

    ``copy_gb_per_s``: the copy bandwidth measured on this machine.
    """
    torch.manual_seed(0)
    found = setup(case, "cuda")
    first = found.make()
    sets = clock.input_sets(bytes_of(first), clock.l2_bytes())
    inputs = [first, *(found.make() for _ in range(sets - 1))]
    running, left_out = contestants(found)
    running, broken = compared(case, found, running, first)
    result: dict[str, Any] = {
        "case": {"operator": case.operator, "size": list(case.size), "dtype": case.dtype, "layout": case.layout},
        "input_sets": sets,
        "input_bytes": bytes_of(first),
        "left_out": left_out | broken,
    }
    eager = list(found.eager)
    result["peak_bytes"] = {name: clock.peak_bytes(function, first) for name, function in running.items()}
    result["launches"] = {name: clock.launches(function, first) for name, function in running.items()}
    result["result_bytes"] = bytes_of(running["fused"](*first))
    own = result["peak_bytes"]["fused"]
    known = [result["peak_bytes"][name] for name in eager if name in running]
    result["peak_over_eager"] = round(own / max(1, min(known)), 4)
    beyond = [max(0, peak - result["result_bytes"]) for peak in (own, min(known))]
    result["peak_over_eager_beyond_result"] = round(beyond[0] / max(1, beyond[1]), 4)
    # Graphs last: a capture that fails leaves torch's allocator unfit for the rest.
    as_calls, in_graphs = clock.race(running, inputs, graph=False), clock.race(running, inputs, graph=True)
    result["graph_us"], result["call_us"] = in_graphs, as_calls
    result["ratio"] = {"graph": ratios(in_graphs, eager), "call": ratios(as_calls, eager)}
    copy = copy_gb_per_s()
    gb_per_s = found.bytes_moved / in_graphs["fused"]["median"] * 1e-3
    result["bytes_moved"], result["gb_per_s"] = found.bytes_moved, round(gb_per_s, 1)
    result["copy_gb_per_s"], result["fraction_of_copy"] = copy, round(gb_per_s / copy, 4)
    return result
