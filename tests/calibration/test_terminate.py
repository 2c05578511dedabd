"""terminate(): from a network and labelled data to a gated network, in one call."""

from __future__ import annotations

import pytest
import torch

import aep_ext
from aep_ext.calibration import AccuracyBudget, CachedLogits, CostBudget
from aep_ext.inference import GatedNet, collect_logits, near_threshold, simulate
from aep_ext.pruning import subset_costs
from aep_ext.surgery.networks import build


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


@pytest.mark.parametrize("budget", [5.0, AccuracyBudget(5.0), CostBudget(fraction=0.8)])
def test_the_network_does_what_was_calibrated(net, loader, budget):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gated = aep_ext.terminate(net, loader, budget=budget, folds=4)
    found = gated.calibration
    assert isinstance(gated, GatedNet) and not gated.training and found.feasible
    assert found.full_cost == subset_costs(net, (3, 16, 16)).macs[-1]
    x, y = torch.cat([x for x, _ in loader]), torch.cat([y for _, y in loader])
    logits, _ = collect_logits(gated.net, loader)
    seen = simulate(logits, found.policy, target=y, costs=found.costs)
    assert int(seen.correct.sum()) == found.correct and seen.mean_cost == pytest.approx(found.mean_cost)
    near = near_threshold(logits, found.policy, 1e-4)
    with torch.no_grad():
        assert torch.equal(gated(x).exit[~near], seen.exit[~near])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    macs = subset_costs(gated.net, (3, 16, 16)).macs
    assert found.costs == tuple(macs[(1 << e + 1) - 2] for e in range(gated.num_exits))


def test_the_reference_is_the_network_or_any_right_answers(net, loader):
    y = torch.cat([y for _, y in loader])
    with pytest.warns(UserWarning, match="terminate: no policy keeps within 0.5 points"):
        own = aep_ext.terminate(net, loader, exits=[3], output_weights=[1.0] * 4, folds=2).calibration
    with torch.no_grad():
        right = torch.cat([net(x).argmax(1) for x, _ in loader]) == y
    assert own.reference_correct == int(right.sum())
    other = aep_ext.terminate(net, loader, exits=[3], reference=torch.zeros_like(right), folds=2).calibration
    assert other.reference_correct == 0 and other.feasible and other.drop_points < 0


def test_a_pruned_network_keeps_its_exits_numbers(net, loader):
    some = aep_ext.prune(net, (0, 2, 3))
    gated = aep_ext.terminate(some, loader, exits=[0, 2], folds=2, budget=100.0)
    assert gated.calibration.policy.exits == gated.net.exit_ids == (0, 3)
    logits = CachedLogits(*collect_logits(net, loader), role="test")
    with pytest.raises(ValueError, match="got 128 of 128 that are the same"):
        gated.calibration.evaluate(logits)


def test_what_cannot_be_kept_is_said(net, loader):
    with pytest.warns(UserWarning, match="terminate: no policy keeps a mean cost of 1"):
        gated = aep_ext.terminate(net, loader, budget=CostBudget(mean=1.0), folds=2)
    assert not gated.calibration.feasible and gated.calibration.policy.exits == (0,)


def test_what_is_refused(net, loader):
    with pytest.raises(TypeError, match="terminate: net must be a MultiExitNet, got Linear"):
        aep_ext.terminate(torch.nn.Linear(2, 2), loader)
    with pytest.raises(
        ValueError, match="terminate: reference must be 'ensemble', 'last' or right answers, got 'baseline'"
    ):
        aep_ext.terminate(net, loader, reference="baseline")
    with pytest.raises(ValueError, match="calibrate: criterion must be one of .*, got my_rule"):
        aep_ext.terminate(net, loader, criterion=my_rule)


def my_rule(state):
    return state.stats[:, 0] > 0.5
