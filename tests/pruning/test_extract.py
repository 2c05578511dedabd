from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from aep_ext import MultiExitNet, anticipate, ops, prune, score_subsets
from aep_ext.pruning import count_parameters, exits_of_mask, single_exit

SUBSETS = [exits_of_mask(mask) for mask in range(1, 16)]


def published(net: MultiExitNet, x: torch.Tensor, exits: tuple[int, ...]) -> torch.Tensor:
    """The ensemble of some exits, in the full network."""
    index = list(exits)
    return ops.ensemble(net.exit_logits(x)[index], net.output_weights[index])


def normalized(net: MultiExitNet, x: torch.Tensor, exits: tuple[int, ...]) -> torch.Tensor:
    """The same with the weights divided by their sum."""
    weights = net.output_weights[list(exits)]
    return ops.ensemble(net.exit_logits(x)[list(exits)], weights / weights.sum())


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_a_net_with_one_exit_answers_with_its_logits_bit_for_bit(net, fused):
    net.fused = fused
    net.eval()
    x = torch.randn(9, 3, 16, 16)
    for exit_index in range(4):
        pruned = prune(net, (exit_index,))
        assert pruned.output_weights.tolist() == [1.0]
        assert torch.equal(pruned(x), net.exit_logits(x)[exit_index])


@torch.no_grad()
def test_kept_weights_are_divided_by_their_sum(net):
    net.eval()
    x = torch.randn(9, 3, 16, 16)
    for exits in SUBSETS:
        pruned = prune(net, exits)
        assert pruned.output_weights.sum().item() == pytest.approx(1, abs=1e-6)
        assert torch.equal(pruned(x), normalized(net, x, exits))


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_not_normalized_logits_equal_the_published_ensemble_bit_for_bit(net, fused):
    net.fused = fused
    net.eval()
    x = torch.randn(9, 3, 16, 16)
    for exits in SUBSETS:
        pruned = prune(net, exits, normalize=False)
        assert torch.equal(pruned.output_weights, net.output_weights[list(exits)])
        assert torch.equal(pruned(x), published(net, x, exits))
        assert torch.equal(pruned.exit_logits(x), net.exit_logits(x)[list(exits)])
    zero_weights = torch.tensor([0.0, 1, 0, 1]) * net.output_weights
    assert torch.equal(prune(net, (1, 3), normalize=False)(x), ops.ensemble(net.exit_logits(x), zero_weights))


@torch.no_grad()
def test_pruning_twice_keeps_the_original_numbers(net):
    net.eval()
    x = torch.randn(4, 3, 16, 16)
    for exits in ((0, 1, 2, 3), (0, 2, 3), (1, 3), (2,)):
        once = prune(net, exits)
        assert once.exit_ids == exits
        for size in range(1, len(exits) + 1):
            for kept in itertools.combinations(range(len(exits)), size):
                twice = prune(once, kept)
                original = tuple(exits[e] for e in kept)
                assert twice.exit_ids == original
                torch.testing.assert_close(twice(x), normalized(net, x, original))
                assert len(twice.stages) == original[-1] + 1


@torch.no_grad()
def test_the_result_is_smaller_and_independent(net):
    before = copy.deepcopy(net.state_dict())
    pruned = prune(net, [2, 0])
    assert type(pruned) is MultiExitNet and pruned.num_exits == 2 and len(pruned.stages) == 3
    assert count_parameters(pruned) < count_parameters(net)
    assert not {id(p) for p in pruned.parameters()} & {id(p) for p in net.parameters()}
    assert not {t.data_ptr() for t in pruned.state_dict().values()} & {t.data_ptr() for t in net.state_dict().values()}
    for tensor in pruned.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net.output_weights[[0, 2]], before["output_weights"][[0, 2]])


def test_weights_modes_and_origin_are_kept(net):
    net.stages[0].eval()
    net.stages[1].requires_grad_(False)
    pruned = prune(net, (1, 2))
    assert torch.equal(pruned.loss_weights, net.loss_weights[1:3])
    assert pruned.training and not pruned.stages[0].training and pruned.stages[1].training
    assert not any(p.requires_grad for p in pruned.stages[1].parameters())
    assert pruned.origin == net.origin and pruned.origin is not net.origin
    assert pruned(torch.randn(2, 3, 16, 16)).shape == (2, 2, 7)


def test_the_single_exit_network(net):
    net.eval()
    single = single_exit(net)
    x = torch.randn(3, 3, 16, 16)
    assert single.exit_ids == (3,) and single.output_weights.tolist() == single.loss_weights.tolist() == [1.0]
    assert torch.equal(single(x), net.exit_logits(x)[3])
    assert net.output_weights.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_choice_made_from_the_scores(net, batches):
    scores = score_subsets(net, batches)
    best = scores.best()
    for pruned in (prune(net, scores), prune(net, best), prune(net, best.exits)):
        assert pruned.exit_ids == best.exit_ids
    once = prune(net, (1, 3))
    again = score_subsets(once, batches)
    assert again.exit_ids == (1, 3) and again[(1,)].exit_ids == (3,)
    assert prune(once, again[(1,)]).exit_ids == (3,)
    with pytest.raises(ValueError, match="scores must be of this network"):
        prune(net, again[(1,)])
    with pytest.raises(ValueError, match="scores must be of this network"):
        prune(once, scores[(3,)])


@pytest.mark.parametrize(
    ("exits", "kind", "message"),
    [
        ((), ValueError, "prune: exits must name at least one exit, got none"),
        ((7,), ValueError, r"prune: exits must be within 0\.\.3, got 7"),
        ((-1,), ValueError, r"prune: exits must be within 0\.\.3, got -1"),
        ((1, 1), ValueError, "prune: exits must be distinct, got 1 twice"),
        ((1.0,), TypeError, "prune: exits must be integers, got 1.0"),
        ((True,), TypeError, "prune: exits must be integers, got True"),
        (3, TypeError, "prune: exits must be an iterable of exit indices, got 3"),
        ("best", TypeError, "prune: exits must be an iterable of exit indices, got 'best'"),
    ],
)
def test_bad_exits_are_refused(net, exits, kind, message):
    with pytest.raises(kind, match=message):
        prune(net, exits)


def test_other_networks_are_refused():
    with pytest.raises(TypeError, match="prune: net must be a MultiExitNet, got Linear"):
        prune(nn.Linear(2, 2), (0,))


class _Twice(nn.Module):
    """A head that the fused operator cannot run."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.amax((2, 3))) * 2


@torch.no_grad()
def test_mixed_heads_shared_parameters_and_skipped_stages():
    from aep_ext.surgery.heads import PooledLinearHead

    stages = [
        nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU())
        for c, d in ((3, 6), (6, 6), (6, 6), (6, 6))
    ]
    heads = [PooledLinearHead(6, 4), _Twice(6), PooledLinearHead(6, 4)]
    heads[2].linear.weight = heads[0].linear.weight
    stages[2][0].weight = stages[1][0].weight
    net = MultiExitNet(stages, heads, exit_stages=[0, 2, 3], num_classes=4, output_weights=[0.2, 0.3, 0.5]).eval()
    x = torch.randn(5, 3, 8, 8)
    for mask in range(1, 8):
        exits = exits_of_mask(mask)
        pruned = prune(net, exits)
        assert torch.equal(pruned(x), normalized(net, x, exits))
        assert len(pruned.stages) == (1, 3, 4)[exits[-1]]
    both = prune(net, (0, 2))
    assert both.exits[0].linear.weight is both.exits[1].linear.weight
    assert both.stages[2][0].weight is both.stages[1][0].weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_dtypes_and_channels_last(net, dtype):
    net = net.to(dtype=dtype, memory_format=torch.channels_last).eval()
    x = torch.randn(3, 3, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for exits in ((0,), (1, 2), (0, 3)):
        pruned = prune(net, exits)
        assert pruned.output_weights.dtype == net.output_weights.dtype
        assert torch.equal(pruned(x), normalized(net, x, exits))


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_anticipated_networks(fused):
    model = nn.Sequential()
    for name, (c, d) in {"a": (3, 8), "b": (8, 12), "c": (12, 16)}.items():
        model.add_module(name, nn.Sequential(nn.Conv2d(c, d, 3, 2, 1), nn.BatchNorm2d(d), nn.ReLU()))
    model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)))
    net = anticipate(model.eval(), cuts=["a", "b"], example=(3, 16, 16), exit_weights="mixed", fused=fused)
    x = torch.randn(4, 3, 16, 16)
    for mask in range(1, 8):
        exits = exits_of_mask(mask)
        assert torch.equal(prune(net, exits)(x), normalized(net, x, exits))
    if not fused:
        assert torch.equal(single_exit(net)(x), model(x))
