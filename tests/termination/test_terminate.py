"""terminate(): from a network and labelled data to a gated network, in one call."""

from __future__ import annotations

import pytest
import torch

import aep_ext
from aep_ext.surgery.networks import build
from aep_ext.termination import (
    AccuracyBudget,
    CostBudget,
    ExitCache,
    GatedNet,
    calibrate,
    exit_costs,
    simulate,
)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return build("resnet_small", 10).eval()


@pytest.fixture(scope="module")
def loader(net):
    """Labels are the ensemble's own answers but for some: then early exits are often right and sometimes not."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(4):
        x = torch.randn(32, 3, 16, 16, generator=generator)
        with torch.no_grad():
            y = net(x).argmax(1)
        y[::7] = (y[::7] + 1) % 10
        batches.append((x, y))
    return batches


@pytest.mark.parametrize("budget", [1.0, AccuracyBudget(1.0), CostBudget(fraction=0.8)])
def test_from_a_loader(net, loader, budget):
    gated = aep_ext.terminate(net, loader, budget=budget)
    assert isinstance(gated, GatedNet) and not gated.training
    found = gated.calibration
    assert found.feasible and found.policy.name == "confidence"
    x = torch.cat([x for x, _ in loader])
    with torch.no_grad():
        logits = net.exit_logits(x)
    seen = simulate(
        logits, net.output_weights, found.policy, found.thresholds,
        temperatures=found.temperatures, enabled=found.enabled,
    )  # fmt: skip
    near = gated.near_threshold(logits)
    assert torch.equal(gated(x).exit[~near], seen.exits[~near])


def test_from_a_cache_and_from_a_calibration(net, loader):
    cache = ExitCache.collect(net, loader, role="calibration")
    costs = exit_costs(net, (3, 16, 16))
    gated = aep_ext.terminate(net, cache, budget=2.0, costs=costs, policy="entropy")
    again = aep_ext.terminate(net, calibrate(cache, costs=costs, budget=AccuracyBudget(2.0), policy="entropy"))
    assert torch.equal(gated.thresholds, again.thresholds) and torch.equal(gated.enabled, again.enabled)
    assert gated.policy == again.policy


def test_what_is_refused(net, loader):
    cache = ExitCache.collect(net, loader, role="calibration")
    with pytest.raises(ValueError, match="terminate: costs must be given with an ExitCache"):
        aep_ext.terminate(net, cache)
    with pytest.raises(ValueError, match="terminate: policy, budget and costs must be left out"):
        aep_ext.terminate(net, aep_ext.terminate(net, loader).calibration, budget=1.0)
    with pytest.raises(TypeError, match="terminate: pruned must be a MultiExitNet, got Linear"):
        aep_ext.terminate(torch.nn.Linear(2, 2), loader)
    with pytest.raises(ValueError, match="terminate: pruned must have at least two exits, got 1"):
        aep_ext.terminate(aep_ext.prune(net, (3,)), loader)
    some = aep_ext.prune(net, (0, 1, 3))
    found = calibrate(
        ExitCache.collect(some, loader, role="calibration"), costs=[1, 2, 3], budget=CostBudget(fraction=0.8)
    )
    with pytest.raises(ValueError, match=r"terminate: pruned must have the exits \[0, 1, 3\] .* got \[0, 2, 3\]"):
        aep_ext.terminate(aep_ext.prune(net, (0, 2, 3)), found)
    assert aep_ext.terminate(some, found).num_exits == 3
    with pytest.raises(RuntimeError, match="terminate: the budget .* cannot be met"):
        aep_ext.terminate(net, loader, budget=CostBudget(mean=1.0))
