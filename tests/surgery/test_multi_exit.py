"""MultiExitNet: what it returns, what it checks, and that it survives what users do to modules."""

from __future__ import annotations

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aep_ext import ops, prune
from aep_ext.surgery.exit_weights import ExitWeights
from aep_ext.surgery.heads import PooledLinearHead
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.surgery.networks import build, resnet_small


def small(**kwargs: object) -> MultiExitNet:
    """Three stages of 4, 6 and 8 channels, an exit after each; K = 5."""
    widths = [3, 4, 6, 8]
    stages = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in zip(widths, widths[1:], strict=False)
    ]
    return MultiExitNet(stages, [PooledLinearHead(width, 5) for width in widths[1:]], num_classes=5, **kwargs)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16)


def test_training_gives_exit_logits_and_eval_their_weighted_sum(images: Tensor) -> None:
    net = small(output_weights=[0.2, 0.3, 0.1])
    assert net(images).shape == (3, 2, 5)
    net.eval()
    with torch.no_grad():
        logits = net.exit_logits(images)
        assert torch.equal(net(images), ops.ensemble(logits, net.output_weights))
        # Raw and not renormalised: the weights sum to 0.6 here.
        torch.testing.assert_close(net(images), 0.2 * logits[0] + 0.3 * logits[1] + 0.1 * logits[2])


def test_fused_and_plain_paths_agree(images: Tensor) -> None:
    net = small().eval()
    with torch.no_grad():
        fused = net.exit_logits(images)
        net.fused = False
        torch.testing.assert_close(fused, net.exit_logits(images))


def test_gradients_reach_every_parameter_on_both_paths(images: Tensor) -> None:
    for fused in (True, False):
        net = small(fused=fused)
        net(images).square().sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())


def test_an_active_dropout_in_a_head_is_applied(images: Tensor) -> None:
    net = MultiExitNet([nn.Conv2d(3, 4, 3)], [PooledLinearHead(4, 2, dropout=0.5)], num_classes=2)
    assert not torch.equal(net(images), net(images))
    net.eval()
    with torch.no_grad():
        plain = net.exits[0](net.features(images)[0])
        torch.testing.assert_close(net(images), plain)


def test_a_replaced_linear_layer_is_used(images: Tensor) -> None:
    net = small().eval()

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with torch.no_grad():
        before = net.exit_logits(images)[0]
        doubled = Doubled(4, 5)
        doubled.load_state_dict(net.exits[0].linear.state_dict())
        net.exits[0].linear = doubled
        torch.testing.assert_close(net.exit_logits(images)[0], 2 * before)


def test_stages_without_an_exit(images: Tensor) -> None:
    full = small()
    net = MultiExitNet(full.stages, [full.exits[1], full.exits[2]], exit_stages=(1, 2), exit_ids=(1, 2), num_classes=5)
    assert [tuple(feature.shape[1:]) for feature in net.features(images)] == [(6, 4, 4), (8, 2, 2)]
    assert net.exit_ids == (1, 2) and net.exit_stages == (1, 2) and net.num_exits == 2


def test_parameter_groups_cover_all_once() -> None:
    net = small()
    backbone, exits = list(net.backbone_parameters()), list(net.exit_parameters())
    assert {id(p) for p in backbone}.isdisjoint({id(p) for p in exits})
    assert len(backbone) + len(exits) == len(list(net.parameters()))


def test_a_shared_parameter_is_in_one_group() -> None:
    net = small()
    net.exits[0].extra = net.stages[0]
    assert len(list(net.exit_parameters())) == 6


def test_weights_are_buffers_and_stay_float32() -> None:
    net = small()
    net.set_exit_weights(ExitWeights(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), [0.1, 0.2, 0.7]))
    assert {"output_weights", "loss_weights"} <= set(net.state_dict())
    for dtype in (torch.bfloat16, torch.float64):
        net.to(dtype)
        assert net.output_weights.dtype == net.loss_weights.dtype == torch.float32
        assert torch.equal(net.output_weights, torch.tensor([0.1, 0.2, 0.7]))
        assert net.exits[0].linear.weight.dtype == net.exits[0].linear.bias.dtype == dtype
    assert net.to("meta").output_weights.is_meta


def test_original_state_dict_and_what_is_lost_by_pruning() -> None:
    net = small()
    state = net.original_state_dict()
    assert set(state) == {key for key in nn.Sequential(*net.stages[0]).state_dict()} | {"linear.weight", "linear.bias"}
    early = MultiExitNet(net.stages[:2], net.exits[:2], exit_ids=(0, 1), num_classes=5, origin=net.origin)
    with pytest.raises(
        RuntimeError, match=r"exit 2, which holds the original head, was pruned away.*kept exits: \(0, 1\)"
    ):
        early.original_state_dict()
    last = MultiExitNet(net.stages, [net.exits[2]], exit_stages=(2,), exit_ids=(2,), num_classes=5, origin=net.origin)
    assert last.original_state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit_stages": (0, 1)}, r"exit_stages must have 3 entries, got 2"),
        ({"exit_stages": (0, 2, 1)}, r"strictly ascending, got \(0, 2, 1\)"),
        ({"exit_ids": (-1, 0, 1)}, r"non-negative"),
        ({"output_weights": [1.0]}, r"output_weights must have 3 entries, got 1"),
        ({"output_weights": [1.0, 0.0, 1.0]}, r"output_weights must be positive and finite, got 0.0 at position 1"),
        ({"output_weights": torch.tensor([1, -2, 1])}, r"output_weights must be positive and finite, got -2.0 at"),
        ({"output_weights": [1e-60, 1.0, 1.0]}, r"output_weights must be positive and finite, got 1e-60 at position 0"),
        ({"output_weights": np.array([1, 1e60, 1])}, r"output_weights must be positive and finite, got 1e\+60 at"),
        ({"output_weights": torch.tensor([1, 0, 1], dtype=torch.bfloat16)}, r"output_weights must be .* got 0.0 at"),
        ({"output_weights": [1.0, 1.0, float("inf")]}, r"output_weights must be positive and finite, got inf at"),
        (
            {"loss_weights": [1.0, float("nan"), 1.0]},
            r"loss_weights must be positive and finite, got nan at",
        ),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="MultiExitNet: .*" + message):
        small(**arguments)


def test_stages_and_exits_must_fit() -> None:
    head, stage = PooledLinearHead(4, 5), nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="at least one stage and one exit, got 1 and 0"):
        MultiExitNet([stage], [], num_classes=5)
    with pytest.raises(ValueError, match="one exit per stage, got 2 stages, 1 exits"):
        MultiExitNet([stage, stage], [head], num_classes=5)
    with pytest.raises(ValueError, match=r"last exit must sit after the last stage \(1\), got stage 0"):
        MultiExitNet([stage, stage], [head], exit_stages=[0], num_classes=5)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        MultiExitNet([stage], [head], num_classes=0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (ExitWeights.mixed(2), "MultiExitNet.set_exit_weights: output must have 3 entries, got 2"),
        ("best", "ExitWeights.named: name must be one of uniform, ascending, descending, mixed"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(weights: object, message: str) -> None:
    net = small(output_weights=[0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match=message):
        net.set_exit_weights(weights)
    assert torch.equal(net.output_weights, torch.tensor([0.2, 0.3, 0.5]))
    net.set_exit_weights("mixed")
    assert torch.equal(net.output_weights, torch.tensor(ExitWeights.mixed(3).output))
    assert torch.equal(net.loss_weights, ExitWeights.mixed(3).loss_tensor())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_prune_refuses_weights_that_were_written_into_the_buffers(bad: float) -> None:
    net = small()
    net.output_weights[1] = bad
    with pytest.raises(ValueError, match=r"prune: output_weights must be positive and finite, got .* at position 1"):
        prune(net, [0, 1])
    assert prune(net, [0, 2]).output_weights.tolist() == [0.5, 0.5]


def test_prune_refuses_weights_whose_sum_overflows() -> None:
    net = small(output_weights=[3e38, 3e38, 1.0])
    with pytest.raises(ValueError, match=r"prune: output_weights divided by their sum must be positive and finite"):
        prune(net, [0, 1])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
def test_a_state_dict_with_bad_weights_is_refused_before_anything_is_loaded(bad: float) -> None:
    net, state = small(), small().state_dict()
    before = copy.deepcopy(net.state_dict())
    state["output_weights"][1] = bad
    with pytest.raises(ValueError, match=r"load_state_dict: output_weights must be positive and finite, got .* 1$"):
        net.load_state_dict(state)
    with pytest.raises(ValueError, match="load_state_dict: output_weights must be positive"):
        nn.ModuleDict({"net": net}).load_state_dict({f"net.{key}": value for key, value in state.items()})
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_deepcopy_pickle_and_state_dict(images: Tensor) -> None:
    net = small(output_weights=[0.2, 0.3, 0.5], loss_weights=[3, 2, 1]).eval()
    with torch.no_grad():
        expected = net(images)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(images), expected)
        file = io.BytesIO()
        torch.save(net.state_dict(), file)
        file.seek(0)
        other = small().eval()
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(images), expected)


def test_channels_last_and_autocast(images: Tensor) -> None:
    net = small().eval()
    with torch.no_grad():
        expected = net(images)
        torch.testing.assert_close(
            net.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)), expected
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = net.exit_logits(images)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(net.output_weights @ logits.float().flatten(1), expected.flatten(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("fused", [True, False])
def test_torch_compile_captures_it_whole(images: Tensor, fused: bool) -> None:
    net = small(fused=fused)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    logits = compiled(images)
    torch.testing.assert_close(logits, net(images))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), net(images))


def test_distributed_data_parallel(images: Tensor, tmp_path: object) -> None:
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch.distributed has no gloo here")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        net = small()
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
        parallel(images).square().mean().backward()
        net(images).square().mean().backward()
        for ours, theirs in zip(net.parameters(), parallel.module.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    finally:
        dist.destroy_process_group()


def test_export_of_the_ensemble(images: Tensor) -> None:
    net = small().eval()
    program = torch.export.export(net, (images,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), net(images))


def test_resnet_small() -> None:
    net = resnet_small(7, in_channels=1)
    assert net.origin["name"] == "resnet_small" and net.num_exits == 4 and net.num_classes == 7
    shapes = [tuple(feature.shape[1:]) for feature in net.features(torch.randn(2, 1, 32, 32))]
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4)]
    assert net.eval()(torch.randn(2, 1, 8, 8)).shape == (2, 7)
    assert {key for key in net.original_state_dict() if key.startswith("fc.")} == {"fc.weight", "fc.bias"}
    with pytest.raises(ValueError, match="weights must be None, got 'DEFAULT'"):
        build("resnet_small", 7, weights="DEFAULT")


def test_in_a_notebook_it_is_a_table():
    net = build("resnet_small", 7)
    net.set_exit_weights("ascending")
    found = net._repr_html_()
    assert found.count("<tr>") == net.num_exits + 1 and "MultiExitNet, 7 classes" in found
    cells = [int(cell.replace(",", "")) for cell in re.findall(r"<td>([\d,]+)</td>", found)]
    assert sum(n for n in cells if n > 100) == sum(p.numel() for p in net.parameters())
    assert f"<td>{net.output_weights[-1]:.4g}</td></tr>" in found
