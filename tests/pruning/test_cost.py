from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from aep_ext import MultiExitNet, prune
from aep_ext.pruning import (
    Latency,
    count_macs,
    count_parameters,
    exit_costs,
    exits_of_mask,
    measure_latency,
    subset_costs,
)
from aep_ext.surgery.heads import PooledLinearHead


def test_parameters_are_counted_once_and_only_trainable_ones():
    layer = nn.Linear(4, 3)
    twice = nn.Sequential(layer, layer, nn.BatchNorm1d(3))
    assert count_parameters(twice) == 15 + 6
    layer.weight.requires_grad_(False)
    assert count_parameters(twice) == 9 and count_parameters(twice, trainable_only=False) == 21


def test_macs_of_known_layers():
    conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
    assert count_macs(conv, (3, 10, 12)) == 10 * 12 * 8 * 3 * 9
    assert count_macs(nn.Conv2d(8, 8, 3, groups=8), torch.zeros(5, 8, 6, 6)) == 4 * 4 * 8 * 9
    net = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    assert count_macs(net, (3, 10, 12)) == 10 * 12 * 8 * 3 * 9 + 40


def test_counting_does_not_disturb_the_network(net):
    net.stages[1].eval()
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    macs = count_macs(net, torch.randn(2, 3, 16, 16, generator=torch.Generator()))
    subset_costs(net, (3, 16, 16))
    measure_latency(net, (3, 16, 16), warmup=0, repeats=1)
    assert macs > 0 and modes == [module.training for module in net.modules()]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and torch.equal(random, torch.get_rng_state())


def test_fused_and_plain_heads_count_alike_and_so_does_meta(net):
    fused = count_macs(net, (3, 16, 16))
    assert count_macs(copy.deepcopy(net).to("meta"), (3, 16, 16)) == fused
    net.fused = False
    assert count_macs(net, (3, 16, 16)) == fused
    assert count_macs(copy.deepcopy(net).to("meta"), (3, 16, 16)) == fused


def test_subset_costs_are_those_of_the_extracted_network(net):
    net.stages[0].requires_grad_(False)
    costs = subset_costs(net, (3, 16, 16))
    for mask in range(1, 16):
        pruned = prune(net, exits_of_mask(mask))
        assert costs.parameters[mask - 1] == count_parameters(pruned)
        assert costs.macs[mask - 1] == count_macs(pruned, (3, 16, 16))


def test_exit_costs_are_those_of_the_prefixes(net):
    costs = exit_costs(net, (3, 16, 16))
    assert costs == tuple(count_macs(prune(net, range(e + 1)), (3, 16, 16)) for e in range(4))


def test_subset_costs_count_shared_parameters_once():
    stages = [nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6, 6)]
    heads = [PooledLinearHead(6, 6) for _ in range(3)]
    stages[3].weight = stages[1].weight
    heads[2].linear.weight = heads[0].linear.weight
    stages[2].bias = heads[0].linear.bias
    net = MultiExitNet(stages, heads, exit_stages=[0, 2, 3], num_classes=6)
    costs = subset_costs(net, (3, 8, 8))
    for mask in range(1, 8):
        pruned = prune(net, exits_of_mask(mask))
        assert costs.parameters[mask - 1] == count_parameters(pruned)
        assert costs.macs[mask - 1] == count_macs(pruned, (3, 8, 8))


def test_latency_percentiles():
    latency = measure_latency(nn.Conv2d(3, 4, 3), (3, 8, 8), warmup=1, repeats=20, batch_size=2)
    assert 0 < latency.p5 <= latency.median <= latency.p95 <= latency.p99 and latency.repeats == 20
    assert Latency(**latency.to_dict()) == latency


def test_latency_runs_the_module_as_often_as_asked():
    class Counter(nn.Module):
        calls = 0

        def forward(self, x):
            assert x.shape == (3, 1, 2, 2) and not self.training and torch.is_inference_mode_enabled()
            Counter.calls += 1
            return x

    module = Counter()
    measure_latency(module, torch.ones(4, 1, 2, 2), warmup=2, repeats=5, batch_size=3)
    assert Counter.calls == 7 and module.training


@pytest.mark.gpu
def test_latency_on_cuda(net):
    latency = measure_latency(net.cuda(), (3, 16, 16), warmup=3, repeats=10)
    assert 0 < latency.median <= latency.p99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure_latency(nn.Identity(), (3, 8, 8), repeats=0), "repeats and batch_size >= 1, got 10, 0 and 1"),
        (lambda: measure_latency(nn.Identity(), (3, 8, 8), warmup=-1), "warmup must be >= 0"),
        (lambda: measure_latency(nn.Linear(1, 1).to("meta"), (1, 1, 1)), "must be on a real device, got meta"),
        (lambda: count_macs(nn.Identity(), (3, 8)), r"a shape \(C, H, W\), got \(3, 8\)"),
        (lambda: count_macs(nn.Identity(), (3, 0, 8)), r"a shape \(C, H, W\), got \(3, 0, 8\)"),
        (lambda: count_macs(nn.Identity(), torch.zeros(0, 3, 8, 8)), "at least one sample, got shape"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_more_than_sixteen_exits_need_masks():
    net = MultiExitNet([nn.Identity() for _ in range(17)], [PooledLinearHead(1, 2) for _ in range(17)], num_classes=2)
    with pytest.raises(ValueError, match="at most 16 exits where no subsets are given, got 17"):
        subset_costs(net, (1, 2, 2))
    assert subset_costs(net, (1, 2, 2), [1, 1 << 16 | 1]).parameters == (4, 8)
    assert len(exit_costs(net, (1, 2, 2))) == 17
