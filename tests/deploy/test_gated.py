"""Gates between units: the simulator's decisions, on features that shrink as samples leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from aep_ext import MultiExitNet
from aep_ext.deploy import PreparedNet, prepare
from aep_ext.inference._old_criteria import POLICIES as KINDS
from aep_ext.termination import simulate

THRESHOLDS = {"confidence": 0.5, "entropy": 1.1, "margin": 0.25, "patience": 2, "vote": 2}


@pytest.mark.parametrize("n", (0, 1, 7, 64))
@pytest.mark.parametrize("on", ("ensemble", "exit"))
@pytest.mark.parametrize("policy", THRESHOLDS)
def test_as_simulated(prepared: PreparedNet, policy: str, on: str, n: int) -> None:
    x = torch.randn(n, 3, 16, 16) + 2 * torch.randn(n, 3, 1, 1)
    rule = KINDS[policy](on)
    found = prepared.gated(x, rule, THRESHOLDS[policy], temperatures=[0.9, 1.0, 1.1, 1.2])
    wanted = simulate(
        prepared.exit_logits(x), prepared.output_weights, rule, THRESHOLDS[policy], temperatures=[0.9, 1.0, 1.1, 1.2]
    )
    assert torch.equal(found.exit, wanted.exits)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.confidence, wanted.confidences, rtol=1e-4, atol=1e-4)
    assert found.exit.dtype == torch.int64 and found.confidence.dtype == torch.float32
    assert found.logits.shape == (n, 5) and found.exit.shape == found.confidence.shape == (n,)
    if n == 64:
        assert len(found.exit.unique()) > 1  # or the test tests nothing


@pytest.mark.parametrize("n", (1, 7, 20))
def test_everybody_and_nobody(prepared: PreparedNet, n: int) -> None:
    x = torch.randn(n, 3, 16, 16)
    logits = prepared.exit_logits(x)
    first = prepared.gated(x, "confidence", 0.0)
    assert (first.exit == 0).all()
    torch.testing.assert_close(first.logits, 0.1 * logits[0])
    never = prepared.gated(x, "confidence", 2.0)
    assert (never.exit == 3).all()
    torch.testing.assert_close(never.logits, prepared(x), rtol=1e-4, atol=1e-4)


def test_one_at_each_exit(prepared: PreparedNet) -> None:
    """Thresholds put between the confidences of few samples, so that every gate lets go of some and keeps some."""
    x = torch.randn(12, 3, 16, 16)
    logits = prepared.exit_logits(x)
    weights = prepared.output_weights
    running = torch.cumsum(logits * weights[:, None, None], 0) / weights.cumsum(0)[:, None, None]
    confidence = running.softmax(-1).amax(-1)
    here, thresholds = torch.arange(12), []
    for exit in range(3):
        ordered = confidence[exit, here].sort().values
        limit = float((ordered[-3] + ordered[-4]) / 2)
        thresholds.append(limit)
        here = here[confidence[exit, here] < limit]
    found = prepared.gated(x, "confidence", thresholds)
    assert found.exit.bincount().tolist() == [3, 3, 3, 3]
    wanted = simulate(logits, weights, "confidence", thresholds)
    assert torch.equal(found.exit, wanted.exits)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)


def test_disabled_exits(prepared: PreparedNet) -> None:
    x = torch.randn(9, 3, 16, 16)
    found = prepared.gated(x, "confidence", 0.0, enabled=[False, True, True])
    assert (found.exit == 1).all()
    assert (prepared.gated(x[:1], "confidence", 0.0, enabled=torch.zeros(3, dtype=torch.bool)).exit == 3).all()


@pytest.mark.parametrize("n", (1, 7))
def test_nan_never_leaves(prepared: PreparedNet, net: MultiExitNet, n: int) -> None:
    """As from the network's own logits; on OpenVINO, whose ReLU maps NaN to 0, they may be finite."""
    x = torch.randn(n, 3, 16, 16)
    x[n // 2] = float("nan")
    with torch.no_grad():
        wanted = simulate(net.exit_logits(x), net.output_weights, "confidence", 0.0)
    assert wanted.exits[n // 2] == 3 and wanted.logits[n // 2].isnan().all()
    ours = prepared.exit_logits(x)
    finite = ours[:, n // 2].isfinite().all(-1)
    told = [notice for notice in prepared.notices if "NaN gives finite logits" in notice]
    assert bool(finite.any()) == bool(told)
    if prepared.backend == "openvino":
        wanted = simulate(ours, net.output_weights, "confidence", 0.0)
    else:
        assert not finite.any()
    found = prepared.gated(x, "confidence", 0.0)
    assert torch.equal(found.exit, wanted.exits)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_gates_checked_once(prepared: PreparedNet) -> None:
    x = torch.randn(7, 3, 16, 16)
    gates = prepared.gates("margin", [0.2, 0.3, 0.4], temperatures=1.5, enabled=True)
    a, b = prepared.gated(x, gates), prepared.gated(x, "margin", torch.tensor([0.2, 0.3, 0.4]), temperatures=1.5)
    assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))
    with pytest.raises(ValueError, match="Gates hold all numbers already"):
        prepared.gated(x, gates, 0.5)
    with pytest.raises(ValueError, match="thresholds must be given"):
        prepared.gated(x, "margin")


def test_gates_of_another_network(prepared_on: Callable[[str], PreparedNet], net: MultiExitNet) -> None:
    x = torch.randn(2, 3, 16, 16)
    prepared = prepared_on("eager")
    net.output_weights.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    other = prepare(net, x, "eager")
    with pytest.raises(ValueError, match=r"PreparedNet.gated: gates must be of this network \(output weights .*0.4"):
        prepared.gated(x, other.gates("margin", 0.5))
    gates = prepared.gates("margin", 0.5)
    with pytest.raises(ValueError, match="gates must be of this network"):
        prepared.gated(x, replace(gates, weights=gates.weights[:2]))
    prepared.output_weights.zero_()  # a copy
    assert prepared.gates("margin", 0.5) == gates
    with pytest.raises(AttributeError):
        prepared.output_weights = torch.zeros(4)


def test_kinds_of_numbers(prepared_on: Callable[[str], PreparedNet]) -> None:
    prepared = prepared_on("eager")
    wanted = prepared.gates("margin", [0.5, 0.5, 0.5], enabled=[True, True, False])
    for numbers in (
        0.5,
        np.float32(0.5),
        np.full(3, 0.5),
        torch.full((3,), 0.5),
        torch.tensor(0.5),
        [np.float64(0.5)] * 3,
    ):
        for flags in (np.array([True, True, False]), torch.tensor([True, True, False]), [np.True_, True, np.False_]):
            assert prepared.gates("margin", numbers, enabled=flags) == wanted
    assert prepared.gates("margin", 0.5, enabled=np.bool_(True)).enabled == (True, True, True, False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"thresholds": "abc"}, TypeError, "thresholds must be numbers, one or 3 of them, got 'abc'"),
        ({"thresholds": None}, TypeError, "thresholds must be numbers, one or 3 of them, got None"),
        ({"thresholds": True}, TypeError, "thresholds must be numbers, one or 3 of them, got True"),
        ({"thresholds": [0.1, "a", 0.2]}, TypeError, "thresholds must be numbers, got 'a' at position 1"),
        ({"thresholds": torch.tensor([True] * 3)}, TypeError, "thresholds must be numbers, got True at position 0"),
        ({"thresholds": torch.zeros(1, 3)}, ValueError, r"thresholds must have shape \[3\], got \[1, 3\]"),
        ({"thresholds": np.zeros((1, 3))}, ValueError, r"thresholds must have shape \[3\], got \[1, 3\]"),
        ({"thresholds": [[0.1, 0.2, 0.3]]}, TypeError, r"thresholds must be numbers, got \[0.1.* at position 0"),
        (
            {"thresholds": 0.5, "temperatures": "1"},
            TypeError,
            "temperatures must be numbers, one or 4 of them, got '1'",
        ),
        ({"thresholds": 0.5, "enabled": 1}, TypeError, "enabled must be bools, one or 3 of them, got 1"),
        ({"thresholds": 0.5, "enabled": [True, 1, True]}, TypeError, "enabled must be bools, got 1 at position 1"),
        ({"thresholds": 0.5, "enabled": "yes"}, TypeError, "enabled must be bools, one or 3 of them, got 'yes'"),
    ],
)
def test_wrong_kinds(
    prepared_on: Callable[[str], PreparedNet], arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^PreparedNet.gates: {message}"):
        prepared_on("eager").gates("margin", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "confidence", "thresholds": [0.5]}, "thresholds must have 3 entries, got 1"),
        ({"policy": "confidence", "thresholds": float("nan")}, "thresholds must not be NaN, got NaN at position 0"),
        (
            {"policy": "confidence", "thresholds": 0.5, "temperatures": [1, 0, 1, 1]},
            "temperatures must be positive and finite, got 0.0 at position 1",
        ),
        ({"policy": "confidence", "thresholds": 0.5, "enabled": [True]}, "enabled must have 3 entries, got 1"),
        ({"policy": "nonsense", "thresholds": 0.5}, "policy must be one of"),
    ],
)
def test_wrong_gates(prepared: PreparedNet, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared.gates(**arguments)


def test_own_rule(prepared: PreparedNet) -> None:
    def rule(judged: object) -> torch.Tensor:
        return judged.indices % 2 == judged.exit_index % 2

    x = torch.randn(7, 3, 16, 16)
    if prepared.backend == "eager":
        found = prepared.gated(x, rule, 0.0)
        assert found.exit.tolist() == [0, 1] * 3 + [0]
        assert prepared.gated(x[:1], rule, 0.0).exit.tolist() == [0]
    else:
        with pytest.raises(ValueError, match=f"backend '{prepared.backend}' takes the built-in policies, got.*custom"):
            prepared.gated(x, rule, 0.0)
