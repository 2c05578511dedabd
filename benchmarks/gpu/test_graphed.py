"""A gated network as one graph launch, beside plain graphs of the whole and of its prefixes. Has not run on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from aep_ext.termination import GatedNet, GraphedGatedNet
from benchmarks.gpu import clock
from benchmarks.gpu.end_to_end import NEVER, PlainGraph, agree, all_cases, build, leaving, prefix, scenarios


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(all_cases()), ids=lambda case: case.id)
def test_graphed(figures, case):
    """Each scenario beside the plain graph that does as much, in turn."""
    pytest.importorskip("torchvision")
    net, xs = build(case, "cuda")
    inputs = [(x,) for x in xs]
    with torch.no_grad():
        gated = GatedNet(net, "confidence", NEVER)
        graphed = GraphedGatedNet(gated, xs[0])
        run = partial(graphed, copy=False)
        whole = PlainGraph(net, xs[0])
        prefixes = [PlainGraph(prefix(net, e), xs[0]) for e in range(net.num_exits - 1)]
        stream, late, shares = {}, {}, {}
        for name, e, share in scenarios(net.num_exits):
            gated.thresholds.copy_(torch.tensor(leaving(net, xs, e, share)))
            exits = []
            for x in xs:
                answer = graphed(x)
                agree(gated, answer, x)
                exits.append(answer.exit)
            shares[name] = torch.cat(exits).bincount(minlength=net.num_exits).div(len(xs) * case.batch).tolist()
            beside = {"graphed": run, "whole": whole} | ({"prefix": prefixes[e]} if share == 1 else {})
            stream[name] = clock.race(beside, inputs, graph=False)
            late[name] = {who: clock.latency(function, inputs) for who, function in beside.items()}
        nobody, everybody = stream["0%"], stream["100% at exit 0"]
        found = {
            "case": {"network": case.network, "batch": case.batch},
            "path": graphed.path,
            "reason": graphed.reason,
            "stream_us": stream,
            "latency_us": late,
            "left_at": shares,
            "nobody_over_whole": round(nobody["graphed"]["median"] / nobody["whole"]["median"], 4),
            "first_exit_minus_prefix_us": round(everybody["graphed"]["median"] - everybody["prefix"]["median"], 3),
        }

        def again() -> None:
            run(xs[0])
            torch.cuda.synchronize()

        figures(found, again)
