"""GatedNet over a prepared network: the same walk, on the engine's own memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aep_ext.deploy import PreparedNet
from aep_ext.termination import POLICIES, Custom, GatedNet, as_policy

BACKENDS = ("openvino", "onnxruntime", "eager")


def images(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=generator) + 2 * torch.randn(n, 3, 1, 1, generator=generator)


def agrees(gated: GatedNet, x: torch.Tensor) -> None:
    """With the simulator on the same network's logits, except for samples near a threshold."""
    logits = gated.net.exit_logits(x)
    output, expected = gated(x), gated.simulate(logits)
    sure = torch.ones(len(x), dtype=torch.bool)
    if gated.policy.built_in:
        sure = ~gated.near_threshold(logits, tolerance=1e-4)
    assert sure.sum() >= 0.9 * len(x)
    assert torch.equal(output.exit[sure], expected.exits[sure])
    torch.testing.assert_close(output.confidence[sure], expected.confidences[sure], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.logits[sure], expected.logits[sure], rtol=1e-3, atol=1e-3)
    assert output.logits.shape == (len(x), 5) and output.exit.shape == output.confidence.shape == (len(x),)


@st.composite
def gates(draw):
    """Everything that GatedNet is given, for four exits."""
    name = draw(st.sampled_from([*POLICIES, "custom"]))
    on = draw(st.sampled_from(["ensemble", "exit"]))
    policy = Custom(on, lambda judged: judged.indices % 3 == judged.exit_index) if name == "custom" else name
    limit = st.integers(1, 3).map(float) if name in ("patience", "vote") else st.floats(0.05, 1.05)
    return {
        "policy": as_policy(policy, on),
        "thresholds": draw(st.lists(limit, min_size=3, max_size=3)),
        "temperatures": draw(st.lists(st.sampled_from([0.7, 1.0, 1.3]), min_size=4, max_size=4)),
        "enabled": draw(st.lists(st.sampled_from([True, True, False]), min_size=3, max_size=3)),
        "mode": draw(st.lists(st.sampled_from(["compact", "mask", "auto", "off"]), min_size=3, max_size=3)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=15)
@given(gates(), st.sampled_from([0, 1, 1, 7, 7, 64]), st.integers(0, 1000))
def test_as_simulated(
    prepared_on: Callable[[str], PreparedNet], backend: str, arguments: dict, n: int, seed: int
) -> None:
    agrees(GatedNet(prepared_on(backend), **arguments), images(n, seed))


@pytest.mark.parametrize("policy", ["confidence", "vote"])
@pytest.mark.parametrize("mode", ["compact", "mask"])
def test_a_large_batch(prepared: PreparedNet, policy: str, mode: str) -> None:
    gated = GatedNet(prepared, policy, 2 if policy == "vote" else 0.5, mode=mode)
    x = images(257)
    agrees(gated, x)
    assert len(gated(x).exit.unique()) > 1


@pytest.mark.parametrize("n", (0, 1, 7, 12))
def test_as_the_networks_own_method(prepared: PreparedNet, n: int) -> None:
    """Bit for bit: it is the same walk."""
    x = images(n)
    for policy, threshold in (("confidence", 0.6), ("patience", 2.0), ("margin", 3.0)):
        own = prepared.gated(x, policy, threshold, temperatures=1.5, enabled=[True, False, True])
        net = GatedNet(prepared, policy, threshold, 1.5, [True, False, True], mode="compact")
        assert all(torch.equal(a, b) for a, b in zip(own, net(x), strict=True))


def test_no_copies_and_one_reading_of_the_numbers(prepared: PreparedNet, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = GatedNet(prepared, "confidence", 2.0)
    assert gated.settings() is gated.settings()  # the network's weights are a new copy each time they are asked for

    def refuse(*arguments: object) -> None:
        raise AssertionError("units copy; a walk does not use them")

    monkeypatch.setattr("aep_ext.inference.compiled_net.Unit.__call__", refuse)
    for n in (1, 7, 9):
        assert gated(images(n)).exit.eq(3).all()


def test_results_are_the_callers(prepared: PreparedNet) -> None:
    gated = GatedNet(prepared, "confidence", 0.5)
    for n in (1, 4, 7):
        result = gated(images(n))
        kept = [part.clone() for part in result]
        gated(images(n, 1))
        assert all(torch.equal(a, b) for a, b in zip(result, kept, strict=True))


def test_nobody_leaves_and_all_is_the_ensemble(prepared: PreparedNet) -> None:
    for n in (1, 7, 12):
        x = images(n)
        for gated in (GatedNet(prepared, "confidence", 2.0), GatedNet(prepared, "vote", 1.0, mode="off")):
            torch.testing.assert_close(gated(x).logits, prepared(x), rtol=1e-5, atol=1e-5)


def test_pooled(prepared: PreparedNet) -> None:
    """Pools hold features for long, so they are given copies."""
    gated, x = GatedNet(prepared, "confidence", 0.5), images(40)
    sure = ~gated.near_threshold(prepared.exit_logits(x), tolerance=1e-4)
    for capacity in (3, 7, 16):
        pooled = gated.predict_all(x.split(7), capacity=capacity)
        assert torch.equal(pooled.exit[sure], gated(x).exit[sure])
        torch.testing.assert_close(pooled.logits[sure], gated(x).logits[sure], rtol=1e-3, atol=1e-3)


def test_measured(prepared: PreparedNet) -> None:
    gated, x = GatedNet(prepared, "confidence", 0.5), images(9)
    kept = x.clone()
    costs = gated.measure(x, repeats=2)
    assert costs.sizes == (1, 2, 4, 8, 9) and torch.equal(x, kept)
    assert all(value > 0 for table in (costs.stages, costs.gates, costs.copies) for row in table for value in row)
    whole = costs.predicted([0, 0, 0, 1])
    assert abs(whole - costs.ungated(1)) < 1e-9 and costs.predicted([1, 1, 1, 1]) < whole
    agrees(gated, x)


def test_a_failed_call_leaves_the_network_free(prepared: PreparedNet) -> None:
    gated, x = GatedNet(prepared, "confidence", 0.5), images(3)
    for wrong in (torch.zeros(3, 3, 8, 8), torch.zeros(2, 3, 16, 16, dtype=torch.float64)):
        with pytest.raises((ValueError, TypeError), match="PreparedNet: x must"):
            gated(wrong)

    def rule(judged: object) -> torch.Tensor:
        return prepared(x).argmax(-1) >= 0  # would wait for itself

    with pytest.raises(RuntimeError, match="PreparedNet: must not be called while it is at work on a batch"):
        GatedNet(prepared, rule, 0.0)(x)
    assert gated(x).exit.shape == (3,) and prepared(x).shape == (3, 5)


def test_threads_take_turns(prepared: PreparedNet) -> None:
    gated = GatedNet(prepared, "confidence", 0.5)
    inputs = [images(n, seed) for seed, n in enumerate((1, 1, 7, 9))]
    wanted, failures = [gated(x) for x in inputs], []

    def work(x: torch.Tensor, expected: tuple[torch.Tensor, ...]) -> None:
        try:
            for _ in range(15):
                for a, b in zip(gated(x), expected, strict=True):
                    assert torch.equal(a, b)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_autocast_and_any_strides(prepared_on: Callable[[str], PreparedNet]) -> None:
    gated, x = GatedNet(prepared_on("eager"), "confidence", 0.5), images(33)
    wanted = gated(x)
    for given_x in (x.contiguous(memory_format=torch.channels_last), x.flip(0).contiguous().flip(0)):
        assert (gated(given_x).exit == wanted.exit).float().mean() > 0.95
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, logits = gated(x), gated.net.exit_logits(x)
        one = gated(x[:1])
    assert found.logits.dtype == one.logits.dtype == logits.dtype == torch.bfloat16
    assert (found.exit == gated.simulate(logits).exits).float().mean() > 0.9
