"""A backend for GraphedGatedNet without a GPU: the pass is recorded as nodes and replayed on the CPU.

Its exit is what the CUDA kernel is to compute: the gate operator on all rows, of which those under way are changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.inference.cuda_graph_backend import Walk


def run_exit(walk: Walk, e: int, exit_logits: Tensor, may_leave: bool) -> None:
    """Exit e on the tensors of the pass."""
    t = walk.tensors
    rows, last, acc = len(t["exit"]), e == len(t["temperatures"]) - 1, t["running"].dtype
    if e == 0:
        t["exit"].fill_(-1)
        t["running"].zero_()
        t["state"].zero_()
        if walk.policy == "patience":
            t["state"][:, 0] = -1
    factors = [torch.tensor(w, dtype=acc) for w in t["weights"].tolist()]
    before = torch.zeros((), dtype=acc)
    for factor in factors[:e]:
        before = before + factor
    live = not last and may_leave and bool(t["enabled"][e])
    result = ops.gate(
        t["running"].new_empty(rows, 0),
        t["running"].clone(),
        before,
        torch.arange(rows),
        t["state"].clone(),
        exit_logits,
        weight=factors[e],
        threshold=0.0 if last else float(t["thresholds"][e]),
        temperature=float(t["temperatures"][e]),
        policy=walk.policy,
        on=walk.on,
        enabled=live,
    )
    stay = 0 if last else int(result.count)
    for place, row in enumerate(result.indices.tolist()):
        if t["exit"][row] >= 0:
            continue
        t["running"][row], t["state"][row] = result.running[place], result.state[place]
        if place >= stay:
            t["exit"][row] = e
            t["logits"][row] = result.running[place].to(t["logits"].dtype)
            t["confidence"][row] = result.stats[place, 0]
    t["remaining"][e] = int((t["exit"] < 0).sum())


@dataclass
class FakeBuilt:
    walk: Walk
    path: str
    reason: str = ""
    ran: list[int] = field(default_factory=list)

    def launch(self) -> None:
        self.ran.clear()
        features = self.walk.input
        for e, may_leave in self.walk.plan:
            features, logits = self.walk.run(e, features)
            self.ran.append(e)
            run_exit(self.walk, e, logits, may_leave)
            if may_leave and not self.walk.tensors["remaining"][e]:
                return


class FakeBackend:
    """Runs on the CPU; keeps what was asked of it."""

    device_type = "cpu"

    def __init__(self, refuses: str = "") -> None:
        self.refuses, self.warmed, self.built = refuses, 0, []

    def check(self) -> None:
        pass

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def warm_up(self, once: Callable[[], list[Tensor]], times: int, x: Tensor) -> list[Tensor]:
        for _ in range(times):
            self.warmed += 1
            found = once()
        return found

    def build(self, walk: Walk, path: str) -> FakeBuilt:
        taken = "graph per stage" if self.refuses or path == "graph per stage" else "one graph"
        self.built.append(FakeBuilt(walk, taken, self.refuses))
        return self.built[-1]
