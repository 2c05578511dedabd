"""Gates between units: the simulator's decisions, on features that shrink as samples leave."""

from __future__ import annotations

import pytest
import torch

from aep_ext.deploy import PreparedNet
from aep_ext.termination import simulate
from aep_ext.termination.policies import POLICIES as KINDS

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


def test_nan_never_leaves(prepared: PreparedNet) -> None:
    x = torch.randn(7, 3, 16, 16)
    x[3] = float("nan")
    found = prepared.gated(x, "confidence", 0.0)
    finite = prepared.exit_logits(x)[0].isfinite().all(-1)
    assert (found.exit[finite] == 0).all()
    assert (found.exit[~finite] > 0).all()


def test_gates_checked_once(prepared: PreparedNet) -> None:
    x = torch.randn(7, 3, 16, 16)
    gates = prepared.gates("margin", [0.2, 0.3, 0.4], temperatures=1.5, enabled=True)
    a, b = prepared.gated(x, gates), prepared.gated(x, "margin", torch.tensor([0.2, 0.3, 0.4]), temperatures=1.5)
    assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))
    with pytest.raises(ValueError, match="Gates hold all numbers already"):
        prepared.gated(x, gates, 0.5)
    with pytest.raises(ValueError, match="thresholds must be given"):
        prepared.gated(x, "margin")


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
