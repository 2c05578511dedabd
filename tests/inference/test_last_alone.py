"""Policies whose last exit answers alone: simulator, executors, files, calibration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from replay import gate, numbered, replay_net
from synthetic_exits import cached_logits

from aep_ext import ExitPolicy, GatedNet
from aep_ext.calibration import RiskBudget, calibrate
from aep_ext.calibration.metrics import exit_metrics
from aep_ext.calibration.thresholds import ExitTable
from aep_ext.inference import simulate

WEIGHTS = (0.25, 0.25, 0.5)


@pytest.mark.parametrize("criterion", ["confidence", "patience", "vote"])
@pytest.mark.parametrize("criterion_on", ["ensemble", "exit"])
def test_the_last_exit_forgets_the_others(criterion: str, criterion_on: str) -> None:
    logits = torch.randn(3, 40, 5)
    logits[2, 0] = 0.0  # not even a tiny part of the others' sum is left
    threshold = 0.6 if criterion == "confidence" else 2.0
    policy = ExitPolicy(
        output_weights=WEIGHTS, thresholds=threshold, criterion=criterion, criterion_on=criterion_on, last_alone=True
    )
    found, usual = simulate(logits, policy), simulate(logits, replace(policy, last_alone=False))
    last = found.exit == 2
    assert last.any() and not last.all() and torch.equal(found.exit, usual.exit)
    assert torch.equal(found.logits[last], logits[2, last]) and not torch.equal(usual.logits[last], logits[2, last])
    assert torch.equal(found.logits[~last], usual.logits[~last])
    torch.testing.assert_close(found.confidence[last], logits[2, last].softmax(-1).amax(-1))
    net = replay_net(logits, list(WEIGHTS))
    gated = GatedNet(net, policy).eval()
    assert gated.policy == policy
    x = numbered(0, 40)
    whole = gated(x)
    singles = [gated(x[row : row + 1]) for row in range(40)]
    pooled = gated.predict_all([x[:13], x[13:29], x[29:]], capacity=8)
    for one in (whole, pooled, type(whole)(*(torch.cat(column) for column in zip(*singles, strict=True)))):
        assert torch.equal(one.exit, found.exit) and torch.equal(one.logits, found.logits)
        torch.testing.assert_close(one.confidence, found.confidence)


def test_it_is_written_where_it_is_true_alone() -> None:
    policy = ExitPolicy(output_weights=WEIGHTS, last_alone=True)
    assert ExitPolicy.from_dict(policy.to_dict()) == policy and policy.to_dict()["last_alone"] is True
    assert "last_alone" not in replace(policy, last_alone=False).to_dict()
    assert "answers the rest alone" in str(policy)
    with pytest.raises(TypeError, match="ExitPolicy: last_alone must be True or False, got 1"):
        ExitPolicy(output_weights=WEIGHTS, last_alone=1)


@pytest.mark.parametrize("budget", [0.5, RiskBudget(0.1)])
def test_calibration_keeps_the_last_exit_and_its_answers(budget: object) -> None:
    logits = cached_logits(3, 1500)
    own = logits.logits[-1].argmax(1) == logits.target
    found = calibrate(logits, costs=[1.0, 2.0, 3.0], budget=budget, reference=own, last_alone=True)
    policy = found.policy
    assert found.feasible and policy.last_alone and policy.exits[-1] == 2 and len(policy.exits) > 1
    assert all(one.exits[-1] == 2 for one in found.candidates)
    part = logits.select_exits(policy.exits)
    assert (ExitTable.of(part, policy).correct[-1] == own.numpy()).all()
    shut = replace(policy, enabled=(False,) * (len(policy.exits) - 1))
    assert torch.equal(simulate(part.logits, shut).logits, part.logits[-1])
    assert found.mean_cost < 3.0 and (budget != 0.5 or found.drop_points < 0.5)
    last = exit_metrics(part.logits, part.target, policy)[-1]
    assert last.accuracy == own.double().mean().item()
    with pytest.raises(ValueError, match=r"exits must hold the last one, 2, with last_alone, got \(0, 1\)"):
        calibrate(logits, costs=[1.0, 2.0, 3.0], exits=(0, 1), last_alone=True)


def test_policies_without_it_are_as_they_were() -> None:
    gated = gate(replay_net(torch.randn(3, 10, 4), list(WEIGHTS)), "confidence", 0.5)
    assert gated.policy.last_alone is False
