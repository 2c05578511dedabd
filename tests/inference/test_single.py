"""One image at a time on the CPU: the path in place answers as the general one, and keeps nothing between calls."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from replay import gate, numbered, replay_net

from aep_ext.inference import GatedNet, GatedOutput
from aep_ext.inference.executor import Executor

WEIGHTS = [0.1, 0.2, 0.3, 0.4]
THRESHOLDS = {"confidence": 0.5, "entropy": 1.0, "margin": 0.3}


def made(criterion: str, on: str = "ensemble", dtype: torch.dtype = torch.float32, classes: int = 5) -> GatedNet:
    torch.manual_seed(3)
    logits = torch.randn(4, 24, classes).mul(2).to(dtype)
    logits[1, 5, 0], logits[2, 6, 1], logits[0, 7, 2] = math.nan, math.inf, -math.inf
    options = {"criterion_on": on, "temperatures": [0.9, 1.0, 1.3, 0.7], "enabled": [True, False, True]}
    return gate(replay_net(logits, WEIGHTS), criterion, THRESHOLDS[criterion], **options)


def singles(gated: GatedNet) -> list[GatedOutput]:
    return [gated(x) for x in numbered(0, 24).split(1)]


def equal(ours: list[GatedOutput], theirs: list[GatedOutput]) -> bool:
    pairs = [(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)]
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, 0, 0, True) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("on", ["ensemble", "exit"])
@pytest.mark.parametrize("criterion", THRESHOLDS)
def test_as_the_general_path_and_the_simulator_bit_for_bit(criterion, on, dtype, monkeypatch):
    gated, calls, single = made(criterion, on, dtype), [], Executor._single
    monkeypatch.setattr(Executor, "_single", lambda *args: calls.append(1) or single(*args))
    ours = singles(gated)
    assert len(calls) == 24 and len({o.exit.item() for o in ours}) == 3  # exit 1 is closed
    monkeypatch.setattr(Executor, "_single", Executor._batch)
    assert equal(ours, singles(gated))
    simulated = gated.simulate(torch.stack([head.logits for head in gated.net.exits]))
    assert torch.equal(torch.cat([o.exit for o in ours]), simulated.exit)
    torch.testing.assert_close(torch.cat([o.logits for o in ours]), simulated.logits, rtol=0, atol=0, equal_nan=True)


def test_earlier_answers_stay_and_may_be_written_on():
    gated = made("confidence")
    first = singles(gated)
    kept = [GatedOutput(*(t.clone() for t in output)) for output in first]
    second = singles(gated)
    assert equal(first, kept) and equal(second, kept)
    for output in first:
        for tensor in output:
            tensor.zero_()
    assert equal(second, kept) and equal(singles(gated), kept)


def test_threads_do_not_meet():
    gated = made("margin", classes=1000)
    alone = singles(gated)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: singles(gated), range(12)):
            assert equal(found, alone)


def test_changed_numbers_are_seen():
    gated, x = made("confidence"), numbered(0, 1)
    for threshold, exit in ((0.0, 0), (2.0, 3), (0.0, 0)):
        gated.thresholds.fill_(threshold)
        assert gated(x).exit.item() == exit


def test_default_device_and_dtype_are_not_asked():
    gated, x = made("confidence"), numbered(0, 1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            output = gated(x)
    finally:
        torch.set_default_dtype(before)
    assert equal([output], [gated(x)]) and output.confidence.device.type == "cpu"
