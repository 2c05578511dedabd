"""Ungated networks, and gated ones whose host reads the counts. Has not run on a GPU."""

from __future__ import annotations

import pytest
import torch

from aep_ext.termination import GatedNet
from benchmarks.gpu import clock
from benchmarks.gpu.end_to_end import NEVER, PlainGraph, all_cases, build, close, leaving, scenarios


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(all_cases()), ids=lambda case: case.id)
def test_ungated_and_gated(figures, case):
    """Eager, as one CUDA graph, and gated with so many leaving at each exit."""
    pytest.importorskip("torchvision")
    net, xs = build(case, "cuda")
    inputs = [(x,) for x in xs]
    with torch.no_grad():
        contestants = {"eager": net, "graph": PlainGraph(net, xs[0])}
        close(contestants["graph"](xs[0]).clone(), net(xs[0]), "graph")
        gated = GatedNet(net, "confidence", NEVER)
        times = clock.race(contestants, inputs, graph=False)
        late = {name: clock.latency(function, inputs) for name, function in contestants.items()}
        for name, e, share in scenarios(net.num_exits):
            gated.thresholds.copy_(torch.tensor(leaving(net, xs, e, share)))
            times[f"gated {name}"] = clock.race({"gated": gated}, inputs, graph=False)["gated"]
            late[f"gated {name}"] = clock.latency(gated, inputs)

        def again() -> None:
            net(xs[0])
            torch.cuda.synchronize()

        found = {"case": {"network": case.network, "batch": case.batch}, "stream_us": times, "latency_us": late}
        figures(found, again)


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(all_cases()), ids=lambda case: f"{case.id}-max-autotune")
def test_compiled(figures, case):
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
        except Exception as error:  # a rival's own trouble
            pytest.skip(f"torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:200])
        for _ in range(2):  # it has warmed up; it captures, it replays
            close(compiled(xs[0]).clone(), net(xs[0]), "max_autotune")
        contestants = {"graph": graph, "max_autotune": compiled}
        times = clock.race(contestants, inputs, graph=False)
        late = {name: clock.latency(function, inputs) for name, function in contestants.items()}

        def again() -> None:
            compiled(xs[0])
            torch.cuda.synchronize()

        found = {"case": {"network": case.network, "batch": case.batch}, "stream_us": times, "latency_us": late}
        figures(found, again)
