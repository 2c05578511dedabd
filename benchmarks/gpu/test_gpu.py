"""The benchmarks of a GPU: operators, networks, and gated networks as one graph launch. Has not run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.gpu import cases
from benchmarks.gpu.cases import PlainGraph, assert_near, assert_simulated, build, gated, leaving, prefix, scenarios
from benchmarks.gpu.measure import latency, measure, paired_times

pytestmark = pytest.mark.gpu


def _waited(function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    """A call that waits for the device: for pytest-benchmark's own columns."""

    def call() -> None:
        function(*arguments)
        torch.cuda.synchronize()

    return call


@pytest.mark.parametrize("case", list(cases.operator_cases()), ids=lambda case: case.id)
def test_operator(record, copy_gb_per_s, case):
    """Against plain torch, torch.compile and Liger-Kernel."""
    torch.manual_seed(0)
    comparison = case.comparison("cuda")
    found = measure(case.id, case.case.dtype, comparison, copy_gb_per_s)
    record({"operator": case.operator} | found, _waited(comparison.fused, *comparison.make()))


@pytest.mark.parametrize("case", list(cases.network_cases()), ids=lambda case: case.id)
def test_graphed(record, case):
    """A gated network as one graph launch, each scenario beside the plain graph that does as much, in turn."""
    from aep_ext.inference.cuda_graph import CudaGraphGatedNet

    pytest.importorskip("torchvision")
    net, xs = build(case, "cuda")
    inputs = [(x,) for x in xs]
    with torch.no_grad():
        gates = gated(net)
        graphed = CudaGraphGatedNet(gates, xs[0])
        run, whole = partial(graphed, copy=False), PlainGraph(net, xs[0])
        prefixes = [PlainGraph(prefix(net, e), xs[0]) for e in range(net.num_exits - 1)]
        stream, late, shares = {}, {}, {}
        for name, e, share in scenarios(net.num_exits):
            gates.thresholds.copy_(torch.tensor(leaving(net, xs, e, share)))
            exits = []
            for x in xs:
                answer = graphed(x)
                assert_simulated(gates, answer, x)
                exits.append(answer.exit)
            shares[name] = torch.cat(exits).bincount(minlength=net.num_exits).div(len(xs) * case.batch).tolist()
            beside = {"graphed": run, "whole": whole} | ({"prefix": prefixes[e]} if share == 1 else {})
            stream[name] = paired_times(beside, inputs, graph=False)
            late[name] = {who: latency(function, inputs) for who, function in beside.items()}
        nobody, everybody = stream["0%"], stream["100% at exit 0"]
        found = {
            "stream_us": stream,
            "latency_us": late,
            "left_at": shares,
            "nobody_over_whole": round(nobody["graphed"]["median"] / nobody["whole"]["median"], 4),
            "first_exit_minus_prefix_us": round(everybody["graphed"]["median"] - everybody["prefix"]["median"], 3),
        }
        record(found, _waited(run, xs[0]))


@pytest.mark.parametrize("case", list(cases.network_cases()), ids=lambda case: case.id)
def test_ungated_and_gated(record, case):
    """Eager, as one CUDA graph, and gated by a host that reads the counts, with so many leaving at each exit."""
    pytest.importorskip("torchvision")
    net, xs = build(case, "cuda")
    inputs = [(x,) for x in xs]
    with torch.no_grad():
        functions = {"eager": net, "graph": PlainGraph(net, xs[0])}
        assert_near(functions["graph"](xs[0]).clone(), net(xs[0]), "graph")
        gates = gated(net)
        times = paired_times(functions, inputs, graph=False)
        late = {name: latency(function, inputs) for name, function in functions.items()}
        for name, e, share in scenarios(net.num_exits):
            gates.thresholds.copy_(torch.tensor(leaving(net, xs, e, share)))
            times[f"gated {name}"] = paired_times({"gated": gates}, inputs, graph=False)["gated"]
            late[f"gated {name}"] = latency(gates, inputs)
        record({"stream_us": times, "latency_us": late}, _waited(net, xs[0]))


@pytest.mark.parametrize("case", list(cases.network_cases()), ids=lambda case: f"{case.id}-max-autotune")
def test_compiled(record, case):
    """``torch.compile(mode="max-autotune")`` of the ungated network beside its graph.

    Apart from the others and after them: autotuning takes minutes. Stopped in the middle, it goes on from inductor's
    cache next time.
    """
    pytest.importorskip("torchvision")
    net, xs = build(case, "cuda")
    inputs = [(x,) for x in xs]
    with torch.no_grad():
        graph = PlainGraph(net, xs[0])
        compiled = torch.compile(net, mode="max-autotune", dynamic=False)
        try:
            compiled(xs[0])
        except Exception as error:  # a baseline's own trouble
            pytest.skip(f"torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:200])
        for _ in range(2):  # it has warmed up; it captures, it replays
            assert_near(compiled(xs[0]).clone(), net(xs[0]), "max_autotune")
        functions = {"graph": graph, "max_autotune": compiled}
        times = paired_times(functions, inputs, graph=False)
        late = {name: latency(function, inputs) for name, function in functions.items()}
        record({"stream_us": times, "latency_us": late}, _waited(compiled, xs[0]))
