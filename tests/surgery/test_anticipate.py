"""anticipate() on models as users write them: torch alone."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aep_ext
from aep_ext import ExitWeights, anticipate, score_subsets
from aep_ext.pruning import count_macs, exit_costs, prune, single_exit
from aep_ext.surgery.measure import pattern
from aep_ext.surgery.rescale import _channel_dim


class LeNet(nn.Module):
    """One size only, a pool used twice, a view with a fixed width, functional dropout."""

    shape = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.dropout(F.relu(self.fc1(x)), 0.3, self.training)
        return self.fc3(F.relu(self.fc2(x), inplace=True))


class Functional(nn.Module):
    """A list of layers, a parameter and a buffer used directly, the batch's size read at the top, something unused."""

    shape = (1, 24, 24)

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 8, 3, 1, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 20, 3, 2, 1)])
        self.scale = nn.Parameter(torch.ones(1) * 1.5)
        self.register_buffer("mean", torch.tensor(0.3))
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(20, 7)

    def forward(self, x: Tensor, maps_only: bool = False) -> Tensor:
        n = x.shape[0]
        x = x - self.mean
        for conv in self.convs:
            x = torch.relu(conv(x)) * self.scale
        if maps_only:
            return x
        return self.head(x.mean([2, 3]).view(n, -1))


class Chain(nn.Module):
    """torch.fx cannot follow the check, but the modules run in order."""

    shape = (3, 33, 33)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(True))
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(True), nn.Dropout(0.2))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("three channels, please")
        return self.fc(self.pool(self.second(self.first(x))).flatten(1))


class WrappedChain(nn.Module):
    """A chain inside a model that torch.fx cannot follow."""

    shape = Chain.shape

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.isnan().any():
            raise ValueError("images, please")
        return self.chain(x)


class Branching(nn.Module):
    """Python that reads sizes: checks, branches, a loop, a pool of the map's own size."""

    shape = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or len(x.shape) != 4:
            raise ValueError("images, please")
        x = torch.relu(self.a(x))
        if x.shape[2] > 7:
            x = F.dropout(torch.relu(self.b(x)), 0.1, self.training)
        else:
            x = torch.cat([x, x[:, :4]], 1)
        for _ in range(x.shape[3] // 16):
            x = x + 1
        x = self.c(x)
        return self.fc(F.avg_pool2d(x, tuple(x.shape[2:])).flatten(1))


class Normalising(nn.Module):
    """Its forward makes tensors of numbers."""

    shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = torch.tensor([0.4, 0.5, 0.6]).view(1, -1, 1, 1), torch.tensor(0.25)
        x = torch.relu(self.a((x - mean) / std))
        return self.fc(torch.relu(self.b(x)).mean((2, 3)) * torch.tensor(2.0))


class Noisy(Normalising):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn(1))


class TwoInputs(Branching):
    """The second one is needed by the first stage alone."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x * y.mean((1, 2, 3), keepdim=True))


class TwoInOne(nn.Module):
    """Its wrapper, as the refusal suggests it."""

    shape = (6, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.model = TwoInputs()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x[:, :3], x[:, 3:])


class Parallel(nn.Module):
    """HRNet in outline: behind the first stage two branches in a list, in which a module writes; one map at the end."""

    shape = (3, 32, 32)

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList([Block(8, 8, 1), Block(8, 8, 1)])

        def forward(self, maps: list[Tensor]) -> list[Tensor]:
            for i, branch in enumerate(self.branches):
                maps[i] = branch(maps[i])
            return maps

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer1 = nn.Conv2d(3, 8, 3, 2, 1), Block(8, 8, 2)
        self.down, self.stage2 = nn.Conv2d(8, 8, 3, 2, 1), Parallel.Stage()
        self.final, self.fc = Block(8, 12, 2), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem(x))
        maps = self.stage2([x, self.down(x)])
        x = self.final(maps[0] + F.interpolate(maps[1], scale_factor=2.0))
        return self.fc(x.mean((2, 3)))


class Wrapper(nn.Module):
    """The network is one module of another."""

    shape = Functional.shape

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Functional()

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class Block(nn.Module):
    """Pre-activation: it begins with an in-place operation on its input."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, stride, 1), nn.Conv2d(b, b, 3, 1, 1)
        self.skip = nn.Conv2d(a, b, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return self.conv2(torch.relu(self.conv1(x))) + self.skip(x)


class Residual(nn.Module):
    """Groups of blocks, two of them at one resolution; the head normalises, convolves and drops out."""

    shape = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.layer3 = nn.Sequential(Block(16, 24, 1), Block(24, 24, 1))
        self.head = nn.Sequential(
            nn.Dropout2d(0.1),
            nn.AdaptiveAvgPool2d(1),
            nn.GroupNorm(6, 24),
            nn.Conv2d(24, 48, 1, groups=2),
            nn.BatchNorm2d(48),
            nn.PReLU(48),
            nn.Conv2d(48, 48, 3, padding=1, groups=48),
            nn.Flatten(),
            nn.LayerNorm(48),
            nn.Linear(48, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer3(self.layer2(self.layer1(self.stem(x)))))


class LastBlock(nn.Module):
    """ConvNeXt's block on (N, H, W, C), as Swin's and MambaOut's stages hand them on."""

    def __init__(self, width: int, strided_from: int | None = None) -> None:
        super().__init__()
        self.down = nn.Identity() if strided_from is None else nn.Conv2d(strided_from, width, 2, 2)
        self.norm, self.conv = nn.LayerNorm(width), nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        h = self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        n, height, width, c = x.shape
        x = x.reshape(n, -1, c) + self.fc2(F.gelu(self.fc1(h.reshape(n, -1, c))))
        return x.reshape(n, height, width, c)


class ChannelsLast(nn.Module):
    """Feature maps (N, H, W, C) from the stem on, of 8 and 12 channels; the head's norm reads them so."""

    shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.stage1 = nn.Sequential(LastBlock(8), LastBlock(8))
        self.stage2 = nn.Sequential(LastBlock(12, strided_from=8), LastBlock(12))
        self.norm, self.pool, self.fc = nn.LayerNorm(12), nn.AdaptiveAvgPool2d(1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stage2(self.stage1(self.stem(x).permute(0, 2, 3, 1))))
        return self.fc(self.pool(x.permute(0, 3, 1, 2)).flatten(1))


class ChannelsLastOneSize(ChannelsLast):
    """For one image size: which axis holds the channels must be read off its layers."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[2] == 16, "images of 16 pixels, please")
        return self.fc(self.norm(self.stage2(self.stage1(self.stem(x).permute(0, 2, 3, 1)))).mean((1, 2)))


class ChannelsLastFlattened(ChannelsLastOneSize):
    """Its head takes one size: what lies in front of it is fitted to that."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.stage2(self.stage1(self.stem(x).permute(0, 2, 3, 1)))).flatten(1))


class ChannelsMove(ChannelsLast):
    """Channels last in the early stages alone."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Sequential(Block(12, 16, 2), Block(16, 16, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x).permute(0, 2, 3, 1)))
        return self.fc(self.pool(self.last(x.permute(0, 3, 1, 2))).flatten(1))


def sequential() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 6 * 6, 10),
    )
    model.shape = (1, 28, 28)
    return model


MODELS = {
    "LeNet": (LeNet, ["conv1+2"]),
    "Functional": (Functional, ["convs.0+2", "convs.1+2"]),
    "Chain": (Chain, ["first"]),
    "WrappedChain": (WrappedChain, ["chain.first"]),
    "Wrapper": (Wrapper, ["backbone.convs.0+2", "backbone.convs.1+2"]),
    "Residual": (Residual, ["layer1", "layer2"]),
    "sequential": (sequential, ["3"]),
    "Branching": (Branching, ["a+1", "b+2"]),
    "Normalising": (Normalising, ["a+1"]),
    "TwoInOne": (TwoInOne, ["model.a+1", "model.b+2"]),
    "Parallel": (Parallel, ["down+4"]),
    "ChannelsLast": (ChannelsLast, ["stage1"]),
    "ChannelsLastOneSize": (ChannelsLastOneSize, ["stage1"]),
    "ChannelsLastFlattened": (ChannelsLastFlattened, ["stage1"]),
    "ChannelsMove": (ChannelsMove, ["stage1", "stage2+1"]),
}


def images(model: nn.Module) -> Tensor:
    return torch.randn(3, *model.shape)


@pytest.mark.parametrize("placement", ["cost", "stages"])
@pytest.mark.parametrize("name", MODELS)
def test_plain_models(name: str, placement: str) -> None:
    make, cuts = MODELS[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    net = anticipate(model, example=model.shape, placement=placement)
    assert net.training and (net.origin["cuts"] == cuts or placement == "cost")
    costs = exit_costs(net, model.shape)
    assert 2 <= net.num_exits <= 4 and all(b - a > 0.03 * costs[-1] for a, b in pairwise(costs)), costs
    x = images(model)
    assert net(x).shape == (net.num_exits, 3, net.num_classes)
    again = anticipate(model.eval(), example=model.shape, placement=placement)
    net.load_state_dict(again.state_dict(), strict=False)
    net = anticipate(model, example=model.shape, placement=placement)
    assert not any(module.training for module in net.modules())
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(net.exit_logits(x)[-1], expected)
        net.fused = False
        assert torch.equal(net.exit_logits(x)[-1], expected)
        maps = net.features(x)
        kept = [feature.clone() for feature in maps]
        for head, feature in zip(net.exits, maps, strict=True):
            head(feature)
        assert all(torch.equal(a, b) for a, b in zip(maps, kept, strict=True))  # heads leave the feature maps alone
    # The user's model is as it was, and comes back out.
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fresh = make()
    fresh.load_state_dict(net.original_state_dict(), strict=True)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_rebuilds(name: str) -> None:
    model = MODELS[name][0]().eval()
    net = anticipate(model, example=model.shape)
    x = images(model)
    # How deploy.load rebuilds it: the same cuts, then the weights.
    again = anticipate(MODELS[name][0]().eval(), cuts=net.origin["cuts"], example=net.origin["example"])
    again.load_state_dict(net.state_dict(), strict=True)
    with torch.no_grad():
        expected = net(x)
        for twin in (
            copy.deepcopy(net),
            pickle.loads(pickle.dumps(net)),
            again,
            pickle.loads(pickle.dumps(copy.deepcopy(again))),
        ):
            assert torch.equal(twin(x), expected)
            assert twin.state_dict().keys() == net.state_dict().keys()
            assert twin._fused_plans == net._fused_plans


def test_training_mode_matters() -> None:
    model = LeNet().train()
    net = anticipate(model)
    x = images(model)
    assert not torch.equal(net(x), net(x))  # the functional dropout became a module
    net.eval()
    assert torch.equal(net(x), net(x))


class Modal(nn.Module):
    """Functions that are told the training mode, by keyword and by position; ways to ask for the batch's size."""

    def __init__(self, size: object) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 8, 3, 2), nn.Linear(8, 5)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        n = self.size(x)
        x = F.rrelu(self.a(x), 0.1, 0.3, self.training)
        x = F.alpha_dropout(self.b(x), p=0.2, training=self.training)
        return self.fc(torch.reshape(x.mean((2, 3)), (n, -1)))


@pytest.mark.parametrize(
    "size", [lambda x: x.size(0), lambda x: x.size()[0], lambda x: x.shape[0], lambda x: x.size(dim=0)]
)
def test_functions_that_depend_on_the_mode(size: object) -> None:
    model = Modal(size).eval()
    net = anticipate(model, fused=False, example=(3, 16, 16))
    x = torch.randn(3, 3, 16, 16)
    assert net.origin["cuts"] == ["a+1"] and net.num_exits == 2
    assert "training" in repr(net.stages[0])
    assert torch.equal(net.exit_logits(x)[-1], model(x))
    torch.manual_seed(5)
    expected = model.train()(x)
    torch.manual_seed(5)
    assert torch.equal(net.train()(x)[-1], expected)
    if size(torch.zeros(3, 1)) == 3:
        twin = pickle.loads(pickle.dumps(net)).eval()
        assert torch.equal(twin(x), net.eval()(x))


def test_a_branch_on_the_shape_is_taken_as_the_example_takes_it_and_guarded() -> None:
    model = Branching().eval()
    small, large = anticipate(model, example=(3, 12, 12)).eval(), anticipate(model, example=(3, 32, 32)).eval()
    assert small.origin["cuts"] == ["a+3"]
    with torch.no_grad():
        for net, size, others in ((small, 12, (32,)), (large, 32, (12, 128))):
            x = torch.randn(1, 3, size, size)
            torch.testing.assert_close(net.exit_logits(x)[-1], model(x))
            for other in others:
                with pytest.raises(ValueError, match=r"was cut for images of shape \[3, \d+, \d+\].* cut it anew with"):
                    net(torch.randn(1, 3, other, other))
    torch._dynamo.reset()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(large, backend="aot_eager", fullgraph=True)(x), large(x))


def test_seed_makes_new_heads_repeatable_and_the_generator_is_used_for_nothing_else() -> None:
    model = Residual()
    torch.manual_seed(3)
    one = anticipate(model)
    torch.manual_seed(3)
    two = anticipate(model)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    state = torch.get_rng_state()
    anticipate(model, cuts=[])  # no new head
    assert torch.equal(torch.get_rng_state(), state)


def test_widths_of_the_heads_are_in_proportion() -> None:
    net = anticipate(Residual().eval())
    third = net.exits[0].head  # 8 of 24 channels
    assert (third.get_submodule("2").num_groups, third.get_submodule("2").num_channels) == (2, 8)
    conv = third.get_submodule("3")
    assert (conv.in_channels, conv.out_channels, conv.groups) == (8, 16, 2)
    assert third.get_submodule("4").num_features == third.get_submodule("5").num_parameters == 16
    assert third.get_submodule("6").groups == 16 and third.get_submodule("8").normalized_shape == (16,)
    assert (third.get_submodule("9").in_features, third.get_submodule("9").out_features) == (16, 10)
    lenet = anticipate(LeNet()).exits[0]
    assert [(m.in_features, m.out_features) for m in (lenet.fc1, lenet.fc2, lenet.fc3)] == [
        (150, 45),
        (45, 32),
        (32, 10),
    ]


def test_heads_of_channels_last_maps_read_the_channels() -> None:
    for make in (ChannelsLast, ChannelsLastOneSize):
        early, last = anticipate(make().eval(), example=(3, 16, 16), placement="stages").exits
        assert early.norm.normalized_shape == (8,) and last.norm.normalized_shape == (12,)
        assert early.fc.in_features == 8 and early(torch.randn(2, 9, 7, 8)).shape == (2, 5)
    early = anticipate(ChannelsLastFlattened().eval(), example=(3, 16, 16)).exits[0]
    assert early.fit.output_size == (4, 4) and early.fc.in_features == 8 * 16
    maps = anticipate(ChannelsMove().eval(), example=(3, 16, 16), placement="stages")
    assert [head.fc.in_features for head in maps.exits] == [8, 12, 16]
    x = torch.randn(2, 8, 8, 8)  # rows and columns are pooled: their order does not matter, that of the channels does
    shuffled = torch.arange(8).flip(0)
    with torch.no_grad():
        expected = maps.exits[0](x)
        torch.testing.assert_close(maps.exits[0](x[:, shuffled]), expected)
        torch.testing.assert_close(maps.exits[0](x[:, :, shuffled]), expected)
        assert not torch.allclose(maps.exits[0](x[..., shuffled]), expected)


@pytest.mark.parametrize("head", ["linear", "conv", "pooled4", "auto"])
def test_heads_by_name_read_the_channels_of_channels_last_maps(head: str) -> None:
    for make in (ChannelsLast, ChannelsLastOneSize, ChannelsLastFlattened, ChannelsMove):
        model = make().eval()
        net = anticipate(model, example=(3, 16, 16), head=head).eval()
        x = torch.randn(2, 3, 16, 16)
        assert net.exit_logits(x).shape == (net.num_exits, 2, 5)
        assert net.exits[0].in_channels == 8 and torch.equal(net.exits[-1](net.features(x)[-1]), model(x))


class RowsMixed(nn.Module):
    """One size; linear layers read its rows, its columns and its channels: nothing tells which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rows, self.fc = nn.Conv2d(3, 4, 2, 2), nn.Linear(8, 8), nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[2] == 16, "images of 16 pixels, please")
        return self.fc(self.rows(self.stem(x)).flatten(1))


def test_a_map_whose_channels_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match=r"which axis of the tensor behind 'rows' holds the channels .*\[2, 4, 8, 8\]"):
        anticipate(RowsMixed(), cuts=["stem"], example=(3, 16, 16))


def test_channels_last_maps_go_the_whole_way(tmp_path: Path) -> None:
    net = anticipate(ChannelsLast().eval(), exits=2, example=(3, 16, 16), exit_weights="mixed").eval()
    x, y = torch.randn(40, 3, 16, 16), torch.arange(40) % 5
    loader = [(x[:20], y[:20]), (x[20:], y[20:])]
    assert score_subsets(net, loader).best().exits
    assert count_macs(single_exit(net), (3, 16, 16)) == count_macs(ChannelsLast(), (3, 16, 16))
    aep_ext.save(net, tmp_path)
    with torch.no_grad():
        assert torch.equal(aep_ext.load(tmp_path, model=ChannelsLast())(x), net(x))
        assert torch.equal(prune(net, [0])(x), net.exit_logits(x)[0])
    gated = aep_ext.terminate(net, loader, budget=100.0)
    answer = gated(x)
    assert answer.logits.shape == (40, 5) and set(answer.exit.tolist()) <= {0, 1}
    compiled = aep_ext.compile(gated, x[:4], backend="eager")
    torch.testing.assert_close(compiled(x[:4]).logits, gated(x[:4]).logits)


def test_a_stage_that_writes_into_its_input_is_tamed() -> None:
    model = Residual().eval()
    net = anticipate(model, cuts=["stem", "layer1.0"]).eval()
    with torch.no_grad():
        for stage, feature in zip(net.stages[1:], net.features(images(model)), strict=False):
            before = feature.clone()
            stage(feature)
            assert torch.equal(feature, before)


def test_number_of_exits() -> None:
    model = Residual()
    assert anticipate(model, exits=1).num_exits == 1
    two = anticipate(model, exits=2, placement="stages")
    assert two.origin["cuts"] in (["layer1"], ["layer2"])
    six = anticipate(model, exits=6, placement="stages")  # more than the stages: the ends of blocks serve
    assert six.num_exits == 6 and set(six.origin["cuts"]) < {
        "stem",
        "layer1.0",
        "layer1",
        "layer2.0",
        "layer2",
        "layer3.0",
    }
    with pytest.raises(
        ValueError, match=r"anticipate: exits must be within 1..7, got 8 \(places found: stem, layer1.0, layer1"
    ):
        anticipate(model, exits=8)
    with pytest.raises(ValueError, match="exits must be within 1..3, got 0"):
        anticipate(model, exits=0, placement="stages")


def test_named_cuts() -> None:
    net = anticipate(Residual(), cuts=["layer2", "layer1.0", "layer3"])  # any order; the network's end may be named
    assert net.origin["cuts"] == ["layer1.0", "layer2"] and net.num_exits == 3
    assert anticipate(Wrapper(), cuts=["backbone.convs.1"], example=(1, 24, 24)).origin["cuts"] == ["backbone.convs.1"]
    assert anticipate(sequential(), cuts=["0", "4"], example=(1, 28, 28)).num_exits == 3


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (
            ["layer2.1.conv1"],
            r"cannot cut after 'layer2.1.conv1': 2 tensors are alive there .*'layer2.1.conv1'.* inside a branch",
        ),
        (["layer9"], r"cut point 'layer9': Residual has no module 'layer9' \(at its top: stem, layer1"),
        (["layer1.1.skip"], r"2 tensors are alive there .*inside a branch"),
        (["head.3"], r"cannot cut after 'head.3': it lies in the head, which begins after 'layer3'"),
        (["head.9"], r"cannot cut after 'head.9'"),
        (["layer1", "layer1.1"], r"'layer1' and 'layer1.1' are the same place"),
        (["layer1+x"], r"what follows '\+' must be a number"),
        (["layer1+99"], r"behind the end of the network"),
    ],
)
def test_bad_cuts_are_refused(cuts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="anticipate: .*(" + message + ")"):
        anticipate(Residual(), cuts=cuts)


def test_a_module_run_twice_or_never_is_no_cut_point() -> None:
    with pytest.raises(ValueError, match="'pool' must be run exactly once by the forward, it is run 2 times"):
        anticipate(LeNet(), cuts=["pool"])
    with pytest.raises(ValueError, match="'unused' must be run exactly once by the forward, it is run not"):
        anticipate(Functional(), cuts=["unused"])


def test_num_classes_and_exit_weights() -> None:
    net = anticipate(LeNet(), num_classes=3, exit_weights="mixed")
    assert net.num_classes == 3 and net(torch.randn(2, 3, 32, 32)).shape == (2, 2, 3)
    torch.testing.assert_close(net.output_weights, torch.tensor([1 / 3, 2 / 3]))
    torch.testing.assert_close(net.loss_weights, torch.tensor([2 / 3, 1 / 3]))
    given = anticipate(LeNet(), exit_weights=ExitWeights.ascending(2))
    torch.testing.assert_close(given.loss_weights, torch.tensor([1 / 3, 2 / 3]))
    assert anticipate(LeNet()).output_weights.tolist() == [0.5, 0.5]


def test_frozen_parts_stay_frozen_and_new_heads_learn() -> None:
    model = Residual()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head[4].eval()
    net = anticipate(model)
    assert not any(parameter.requires_grad for parameter in net.backbone_parameters())
    assert all(parameter.requires_grad for parameter in net.exits[0].parameters())
    assert not net.exits[-1].get_submodule("head.4").training and net.exits[-1].training


def test_a_pruned_net_cannot_give_the_original_back() -> None:
    net = anticipate(Residual(), exits=3)
    with pytest.raises(
        RuntimeError, match="original_state_dict: exit 2, which holds the original head, was pruned away"
    ):
        prune(net, [0, 1]).original_state_dict()
    assert prune(net, [0, 2]).original_state_dict().keys() == net.original_state_dict().keys()


class TwoBranches(nn.Module):
    """No place where one feature map carries everything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.cat([self.a(x).mean((2, 3)), self.b(x).mean((2, 3))], 1))


class OneStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x).mean((2, 3)))


class DataDependent(OneStage):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = 2 * x
        return self.fc(self.a(x).mean((2, 3)))


class Distilled(nn.Module):
    """Two classifiers in one module, whose mean is the answer, and a scale of one number."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.full((1,), 1.5))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.a, self.b = Distilled.Scale(), nn.Linear(16, 5), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.scale(x)
            return (self.a(x) + self.b(x)) / 2

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 16, 3, 2), Distilled.Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)).mean((2, 3)))


def test_two_classifiers_side_by_side_and_a_scalar() -> None:
    net = anticipate(Distilled().eval(), num_classes=3)
    for head, channels in zip(net.exits, (8, 16), strict=True):
        assert [(m.in_features, m.out_features) for m in (head.head.a, head.head.b)] == [(channels, 3)] * 2
        assert head.head.scale.factor.item() == 1.5
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 3)


class Auxiliary(OneStage):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x = torch.tanh(x)
        return self.fc(x.mean((2, 3)))


class WrappedAuxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Auxiliary()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ModalStage(nn.Module):
    """Takes another path in training mode: it can be no more than a whole stage."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x = torch.tanh(x)
        return self.b(x)


def test_a_stage_with_another_path_in_training_mode_stays_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), ModalStage(), nn.Conv2d(12, 16, 3, 2, 1))
    model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)])
    net, x = anticipate(model, example=(3, 64, 64), fused=False), torch.randn(2, 3, 64, 64)
    assert "1" in net.origin["cuts"]
    for training in (True, False):
        assert torch.equal(net.train(training).exit_logits(x)[-1], model.train(training)(x))


class ChainInMode(Chain):
    """A chain, but for something in training mode that is no module."""

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("images, please")
        x = self.second(self.first(x))
        if self.training:
            x = torch.tanh(x)
        return self.fc(self.pool(x).flatten(1))


CORNER = float(pattern((2, 3, 224, 224), nn.Linear(1, 1))[0, 0, 0, 0])


class ChainByContent(Chain):
    """A chain for images like the example alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if x[0, 0, 0, 0] * CORNER > 0 else 2 * x
        return self.fc(self.pool(self.second(self.first(x))).flatten(1))


class ByBatch(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 1 else super().forward(2 * x)


class Maps(OneStage):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class Constant(OneStage):
    """Draws in training mode with another probability."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(self.a(x), 0.5 if self.training else 0.0, True).mean((2, 3)))


class Crossed(OneStage):
    """No chain: the second layer is not given what the first returns."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e30:
            return x
        return self.fc(torch.tanh(self.a(x)).mean((2, 3)) + 1)


class Reordered(Chain):
    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError
        x = self.second(self.first(x))
        return self.fc(self.pool(self.pool(x) if self.training else x).flatten(1))


class Changed(WrappedChain):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scaled(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(20))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(x.mean([2, 3]) * self.gain)


class OddScale(nn.Module):
    """A layer of the user's own with a parameter that nobody knows how to rescale."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class OddHead(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.odd = OddScale()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.odd(self.pool(self.second(self.first(x))).flatten(1)))


class Tokens(nn.Module):
    """A vision transformer in outline: patches, then blocks on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class ClassToken(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens[:, :1].expand(n, -1, -1), tokens], 1)
        return self.fc(self.blocks(tokens)[:, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (TwoBranches, r"TwoBranches cannot be cut: nowhere before its classifier .* \(after 'a' there are 2 tensors: "),
        (OneStage, r"OneStage has no block or layer before its head \(after 'a'\)"),
        (DataDependent, r"torch.fx cannot follow its forward \(TraceError.* no plain chain of modules \('fc' is given"),
        (Auxiliary, r"takes another path in training mode .*aux_logits=False"),
        (Constant, r"computes something else in training mode, at .*dropout"),
        (Crossed, r"no plain chain of modules \('fc' is given a tensor that the module before it did not return"),
        (Reordered, r"its modules run in another order in training mode"),
        (Changed, r"its modules, run in order, do not give its output"),
        (WrappedAuxiliary, r"WrappedAuxiliary.forward takes another path in training mode .*aux_logits=False"),
        (ChainInMode, r"its modules, run in order, do not give its output in training mode"),
        (ChainByContent, r"its modules, run in order, do not give its output for another image"),
        (ByBatch, r"its forward takes another path for one image than for two"),
        (Noisy, r"its forward makes a tensor that is another one each time"),
        (TwoInputs, r"more than one input \(x, y\), .* take one tensor: wrap it in a module .*return self.model"),
        (Maps, r"Maps must return logits of shape \[N, K\], got \[2, 4"),
        (Scaled, r"the head's parameter 'gain' is used outside a layer"),
        (
            OddHead,
            r"the head's (layer 'odd' \(OddScale\) cannot be rescaled|parameter 'odd.gain' is used outside a layer)",
        ),
        (Tokens, r"Tokens cannot be cut: from 'blocks.0' on it works on token sequences \(\[2, 12544, 8\]\)"),
        (ClassToken, r"ClassToken cannot be cut: from 'blocks.0' on it works on token sequences"),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 3, 2),
                nn.Conv2d(8, 8, 3, 2),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.utils.parametrizations.weight_norm(nn.Linear(8, 2)),
            ),
            r"the head's layer '4' .* is parametrized and cannot be rescaled",
        ),
        (lambda: nn.Linear(3, 3), r"Linear holds no Conv2d"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2)),
            r"does not take images of shape \[3, 224, 224\] \(.*\), nor of 11 other shapes; give example=\(C, H, W\)$",
        ),
        (lambda: 3, r"model must be an nn.Module, got int"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_says_why(make: type, message: str) -> None:
    with pytest.raises(ValueError, match="anticipate: .*" + message) as refusal:
        anticipate(make())
    assert "\n" not in str(refusal.value)
    assert refusal.value.__cause__ is None  # no traceback of torch.fx


def cheap_stages() -> nn.Sequential:
    """Two places between which next to nothing is computed, before a pool and before the head."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 2, 1), nn.MaxPool2d(2), nn.Conv2d(16, 4, 1), nn.MaxPool2d(2)
    )
    model.extend([nn.Conv2d(4, 64, 3, 1, 1), nn.MaxPool2d(2), nn.Conv2d(64, 64, 1), nn.AdaptiveAvgPool2d(1)])
    model.extend([nn.Flatten(), nn.Linear(64, 5)])
    return model


def test_exits_that_nearly_coincide_in_cost_are_dropped() -> None:
    model = cheap_stages()
    net = anticipate(model, example=(3, 32, 32), placement="stages")
    costs = exit_costs(net, (3, 32, 32))
    assert all(b - a > 0.03 * costs[-1] for a, b in pairwise(costs)), costs
    assert net.origin["cuts"] == ["0", "4"]
    by_cost = anticipate(model, example=(3, 32, 32))
    costs = exit_costs(by_cost, (3, 32, 32))
    assert all(b - a > 0.03 * costs[-1] for a, b in pairwise(costs)), costs
    assert anticipate(model, cuts=["0", "2", "4"], example=(3, 32, 32)).num_exits == 4  # named, as in saved networks


class Grouped(nn.Module):
    """MobileNetV4 in outline: groups of single layers in one list with the groups of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        singles = [[nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)], [nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 12, 1)]]
        blocks = [[Block(12, 16, 2), *(Block(16, 16, 1) for _ in range(6))]]
        self.blocks = nn.Sequential(*(nn.Sequential(*group) for group in singles + blocks))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def test_groups_of_single_layers_beside_groups_of_blocks_are_stages() -> None:
    net = anticipate(Grouped(), example=(3, 64, 64), placement="stages")
    assert net.origin["cuts"] == ["blocks.0", "blocks.1"]


class Stage(nn.Module):
    """A stage that is a module of its own, as ConvNeXt's, and begins with an operation without a module."""

    def __init__(self, before: int, width: int, depth: int) -> None:
        super().__init__()
        self.down = Block(before, width, 2)
        self.blocks = nn.Sequential(*(Block(width, width, 1) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.down(2 * x))


class Staged(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1),
            Stage(8, 12, 1),
            Stage(12, 16, 7),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        )


@pytest.mark.parametrize("exits", [None, 2, 3, 5])
def test_placement_by_cost_goes_inside_stages(tmp_path: Path, exits: int | None) -> None:
    """Near the shares (e - 0.2) / E, at ends of blocks, also of stages that are no plain Sequential; saved by name."""
    model = Staged().eval()
    net = anticipate(model, example=(3, 32, 32), exits=exits).eval()
    count = exits or 4
    total = count_macs(model, (3, 32, 32))
    shares = [count_macs(nn.Sequential(*net.stages[: e + 1]), (3, 32, 32)) / total for e in range(count)]
    assert [abs(share - (e - 0.2) / count) < 0.12 for e, share in enumerate(shares[:-1], start=1)] == [True] * (
        count - 1
    )
    assert any(cut.startswith("2.blocks.") for cut in net.origin["cuts"]) == (exits != 2)
    aep_ext.save(net, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(aep_ext.load(tmp_path, model=Staged())(x), net(x))
    net.fused = False
    assert torch.equal(net.exit_logits(x)[-1], model(x))


def test_one_place_gives_two_exits_and_stages_none() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    assert anticipate(model).origin["cuts"] == ["0"]
    with pytest.raises(
        ValueError, match="Sequential has no block or layer before its head .*cuts= or give a number of"
    ):
        anticipate(nn.Sequential(*model[1:]), example=(4, 9, 9))


def test_arguments_are_checked() -> None:
    model = LeNet()
    with pytest.raises(ValueError, match="give exits or cuts, not both"):
        anticipate(model, exits=2, cuts=["conv1"])
    with pytest.raises(ValueError, match="cuts must be a sequence of names, got the string 'conv1'"):
        anticipate(model, cuts="conv1")
    with pytest.raises(ValueError, match="placement must be one of cost, stages, got 'even'"):
        anticipate(model, placement="even")
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        anticipate(model, num_classes=0)
    with pytest.raises(ValueError, match=r"example must be images \[N, C, H, W\], got shape \[3, 32\]"):
        anticipate(model, example=torch.zeros(3, 32))
    with pytest.raises(ValueError, match=r"example must be a tensor or a shape"):
        anticipate(model, example=(32, 32))
    with pytest.raises(ValueError, match=r"LeNet is to take more than one input \(x\), .*wrap it"):
        anticipate(model, example=(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)))


def test_example_as_a_tensor_and_other_dtypes() -> None:
    model = Residual().double().eval()
    net = anticipate(model, example=torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    assert net(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_channels_first_layer_norm_is_understood() -> None:
    class LayerNorm2d(nn.LayerNorm):
        pass

    assert _channel_dim(LayerNorm2d(8), (2, 8, 1, 1)) == 1
    assert _channel_dim(nn.LayerNorm(8), (2, 8)) == 1 and _channel_dim(nn.LayerNorm(8), (2, 5, 5, 8)) == 3


def test_torch_compile() -> None:
    model = Functional().eval()
    net = anticipate(model, example=model.shape)
    x = images(model)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))


@pytest.mark.slow
def test_torch_compile_with_inductor() -> None:
    model = Residual().eval()
    net = anticipate(model, example=model.shape)
    x = images(model)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net)(x), net(x), rtol=1e-4, atol=1e-4)


def test_an_example_that_the_model_does_not_take() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for example in ((1, 32, 32), torch.zeros(1, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"Sequential does not take images of shape \[1, 32, 32\] \(.*\); give"):
            anticipate(model, example=example)


class LearnedInput(nn.Module):
    """A parameter is a module's input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 8, 3, 2)
        self.gain, self.gate, self.last = nn.Parameter(torch.randn(1, 4, 1, 1)), nn.Sigmoid(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x) * self.gate(self.gain.expand(x.shape[0], -1, -1, -1)))
        return self.last(x.mean((2, 3)))


def test_a_parameter_may_be_a_modules_input() -> None:
    model, x = LearnedInput().eval(), torch.randn(2, 3, 32, 32)
    net = anticipate(model, example=(3, 32, 32)).eval()
    assert net.num_exits == 2
    torch.testing.assert_close(net.exit_logits(x)[-1], model(x))
    assert count_macs(net, (3, 32, 32)) == 4 * 27 * 15**2 + 8 * 36 * 7**2 + 4 * 5 + 8 * 5
