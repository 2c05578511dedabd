"""A backend for CudaGraphGatedNet without a GPU: the pass is recorded as nodes and replayed on the CPU.

Its exit is what the CUDA kernel is to compute: the gate operator on all rows, of which those under way are changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.inference.cuda_graph_capture import StaticPass


def run_exit(static: StaticPass, e: int, exit_logits: Tensor, may_leave: bool) -> None:
    """Exit e on the tensors of the pass."""
    t = static.tensors
    rows, last, acc = len(t["exit"]), e == len(t["temperatures"]) - 1, t["running"].dtype
    if e == 0:
        t["exit"].fill_(-1)
        t["running"].zero_()
        t["state"].zero_()
        if static.criterion == "patience":
            t["state"][:, 0] = -1
    factors = [torch.tensor(w, dtype=acc) for w in t["weights"].tolist()]
    before = torch.zeros((), dtype=acc)
    for factor in factors[:e]:
        before = before + factor
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
        criterion=static.criterion,
        criterion_on=static.criterion_on,
        enabled=not last and may_leave and bool(t["enabled"][e]),
        last=last,
    )
    stay = int(result.count)
    sums = t["running"] + exit_logits.to(acc) * factors[e]  # kept, also of rows that leave
    for place, row in enumerate(result.indices.tolist()):
        if t["exit"][row] >= 0:
            continue
        t["running"][row], t["state"][row] = sums[row], result.state[place]
        if place >= stay:
            t["exit"][row] = e
            t["logits"][row] = result.running[place].to(t["logits"].dtype)
            t["confidence"][row] = result.stats[place, 0]
    t["remaining"][e] = int((t["exit"] < 0).sum())


@dataclass
class FakeBuilt:
    static: StaticPass
    ran: list[int] = field(default_factory=list)

    def launch(self) -> None:
        self.ran.clear()
        features = self.static.input
        for e in range(self.static.num_exits):
            features, logits = self.static.run(e, features)
            self.ran.append(e)
            run_exit(self.static, e, logits, True)
            if not self.static.tensors["remaining"][e]:
                return


class FakeBackend:
    """Runs on the CPU; keeps what was asked of it."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.warmed, self.built = 0, []

    def check(self) -> None:
        pass

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def warm_up(self, once: Callable[[], list[Tensor]], times: int, x: Tensor) -> list[Tensor]:
        for _ in range(times):
            self.warmed += 1
            found = once()
        return found

    def build(self, static: StaticPass) -> Callable[[], None]:
        self.built.append(FakeBuilt(static))
        return self.built[-1].launch
