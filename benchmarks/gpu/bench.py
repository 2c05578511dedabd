"""The benchmarks of a GPU: operators, networks, and gated networks as one graph launch. Has not run on a GPU.

    python3 -m benchmarks.gpu.bench STAGE

Runs the cases of one stage of the GPU check ("ops", "graphed", "e2e") that are not finished. Each is written down as
soon as it is known; a case that fails ends the process, since it may have broken the device for the others.
``benchmarks.gpu.check`` says by environment where to (AEP_GPU_RESULT, AEP_GPU_SOURCE) and until when (AEP_GPU_END,
seconds since the epoch). Exit status: 0 all are finished, 1 a case failed, 4 the time was up.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cases, measure, result_file
from benchmarks.gpu.cases import (
    NetworkCase,
    OperatorCase,
    PlainGraph,
    assert_near,
    assert_simulated,
    build,
    gated,
    leaving,
    prefix,
    scenarios,
)
from benchmarks.gpu.measure import latency, paired_times

DONE, FAILED, TIME_IS_UP = 0, 1, 4


class LeftOut(Exception):
    """A case cannot be measured here; the message says why."""


def copy_gb_per_s(path: Path) -> float:
    """The copy bandwidth: from the check's ceilings where they are known, else measured."""
    stages = result_file.read(path)["stages"]
    table = stages.get("ceilings", {}).get("ceilings", {}).get("details", {}).get("copy_gb_per_s")
    return max(size["median"] for size in (table or measure.copy_bandwidth()).values())


def operator(case: OperatorCase, copy: Callable[[], float]) -> dict[str, Any]:
    """Against plain torch, torch.compile and Liger-Kernel."""
    torch.manual_seed(0)
    found = measure.measure(case.id, case.case.dtype, case.comparison("cuda"), copy)
    return {"operator": case.operator} | found


def graphed(case: NetworkCase) -> dict[str, Any]:
    """A gated network as one graph launch, each scenario beside the plain graph that does as much, in turn."""
    from aep_ext.inference.cuda_graph import CudaGraphGatedNet

    net, xs = build(case, "cuda")
    inputs, gates = [(x,) for x in xs], gated(net)
    graph = CudaGraphGatedNet(gates, xs[0])
    run, whole = partial(graph, copy=False), PlainGraph(net, xs[0])
    prefixes = [PlainGraph(prefix(net, e), xs[0]) for e in range(net.num_exits - 1)]
    stream, late, shares = {}, {}, {}
    for name, e, share in scenarios(net.num_exits):
        gates.thresholds.copy_(torch.tensor(leaving(net, xs, e, share)))
        exits = []
        for x in xs:
            answer = graph(x)
            assert_simulated(gates, answer, x)
            exits.append(answer.exit)
        shares[name] = torch.cat(exits).bincount(minlength=net.num_exits).div(len(xs) * case.batch).tolist()
        beside = {"graphed": run, "whole": whole} | ({"prefix": prefixes[e]} if share == 1 else {})
        stream[name] = paired_times(beside, inputs, graph=False)
        late[name] = {who: latency(function, inputs) for who, function in beside.items()}
    nobody, everybody = stream["0%"], stream["100% at exit 0"]
    return {
        "stream_us": stream,
        "latency_us": late,
        "left_at": shares,
        "nobody_over_whole": round(nobody["graphed"]["median"] / nobody["whole"]["median"], 4),
        "first_exit_minus_prefix_us": round(everybody["graphed"]["median"] - everybody["prefix"]["median"], 3),
    }


def ungated_and_gated(case: NetworkCase) -> dict[str, Any]:
    """Eager, as one CUDA graph, and gated by a host that reads the counts, with so many leaving at each exit."""
    net, xs = build(case, "cuda")
    inputs, gates = [(x,) for x in xs], gated(net)
    functions = {"eager": net, "graph": PlainGraph(net, xs[0])}
    assert_near(functions["graph"](xs[0]).clone(), net(xs[0]), "graph")
    times = paired_times(functions, inputs, graph=False)
    late = {name: latency(function, inputs) for name, function in functions.items()}
    for name, e, share in scenarios(net.num_exits):
        gates.thresholds.copy_(torch.tensor(leaving(net, xs, e, share)))
        times[f"gated {name}"] = paired_times({"gated": gates}, inputs, graph=False)["gated"]
        late[f"gated {name}"] = latency(gates, inputs)
    return {"stream_us": times, "latency_us": late}


def compiled(case: NetworkCase) -> dict[str, Any]:
    """``torch.compile(mode="max-autotune")`` of the ungated network beside its graph.

    Apart from the others and after them: autotuning takes minutes. Stopped in the middle, it goes on from inductor's
    cache next time.
    """
    net, xs = build(case, "cuda")
    inputs, functions = [(x,) for x in xs], {"graph": PlainGraph(net, xs[0])}
    functions["max_autotune"] = torch.compile(net, mode="max-autotune", dynamic=False)
    try:
        functions["max_autotune"](xs[0])
    except Exception as error:  # a baseline's own trouble
        raise LeftOut(f"torch.compile: {type(error).__name__}: {error}"[:200]) from error
    for _ in range(2):  # it has warmed up; it captures, it replays
        assert_near(functions["max_autotune"](xs[0]).clone(), net(xs[0]), "max_autotune")
    times = paired_times(functions, inputs, graph=False)
    return {"stream_us": times, "latency_us": {name: latency(f, inputs) for name, f in functions.items()}}


def _on_networks(function: Callable[[NetworkCase], dict[str, Any]], suffix: str = "") -> Iterator[tuple[str, Any]]:
    def measured(case: NetworkCase) -> dict[str, Any]:
        if case.network != "resnet_small" and find_spec("torchvision") is None:
            raise LeftOut("torchvision is not installed")
        with torch.no_grad():
            return function(case)

    for case in cases.network_cases():
        yield case.id + suffix, partial(measured, case)


def parts(stage: str, path: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and measurement of every case of a stage."""
    if stage == "ops":
        for case in cases.operator_cases():
            yield case.id, partial(operator, case, partial(copy_gb_per_s, path))
    elif stage == "graphed":
        yield from _on_networks(graphed)
    else:
        yield from _on_networks(ungated_and_gated)
        yield from _on_networks(compiled, "-max-autotune")


def run(stage: str, measurements: Iterable[tuple[str, Callable[[], dict[str, Any]]]], path: Path) -> int:
    """Runs what is not finished, up to the first failure; returns the exit status."""
    source, end = os.environ["AEP_GPU_SOURCE"], float(os.environ.get("AEP_GPU_END", "inf"))
    done = result_file.finished(path, stage, source)
    for name, function in measurements:
        if name in done:
            continue
        if time.time() > end:
            return TIME_IS_UP
        # If this process is ended under it, the case is known by this.
        result_file.record(path, stage, name, source, "unfinished", 0.0, result_file.BEGUN)
        start, status, note, more = time.monotonic(), "passed", "", {}
        try:
            more["details"] = function()
        except LeftOut as error:
            status, note = "left out", str(error)
        except Exception as error:
            status, note = "failed", measure.in_a_line(error)
        result_file.record(path, stage, name, source, status, time.monotonic() - start, note, **more)
        print(f"gpu_check: {stage}: {name}: {status}" + (f" ({note})" if note else ""), flush=True)
        if status == "failed" or measure.broken_captures:  # torch does not get over the latter in this process
            return FAILED
        torch._dynamo.reset()  # every case starts without another's memory
        torch.cuda.empty_cache()
    return DONE


if __name__ == "__main__":
    result = Path(os.environ["AEP_GPU_RESULT"])
    sys.exit(run(sys.argv[1], parts(sys.argv[1], result), result))
