"""Ungated networks, and gated ones whose host reads the counts. Has not run on a GPU."""

from __future__ import annotations

import pytest
import torch

from aep_ext.termination import GatedNet
from benchmarks.gpu import clock
from benchmarks.gpu.end_to_end import NEVER, PlainGraph, all_cases, build, close, leaving, scenarios


@pytest.mark.gpu
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.id)
def test_ungated_and_gated(figures, case):
    """``torch.compile(mode="max-autotune")`` is the ungated network's, whose autotuning takes minutes."""
    pytest.importorskip("torchvision")
    net, xs = build(case, "cuda")
    inputs, left_out = [(x,) for x in xs], {}
    with torch.no_grad():
        expected = net(xs[0])
        contestants = {"eager": net, "graph": PlainGraph(net, xs[0])}
        try:
            compiled = torch.compile(net, mode="max-autotune", dynamic=False)
            compiled(xs[0])
            contestants["max_autotune"] = compiled
        except Exception as error:
            left_out["max_autotune"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]
        for name, function in contestants.items():
            close(function(xs[0]).clone(), expected, name)
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
        figures(found | {"left_out": left_out}, again)
