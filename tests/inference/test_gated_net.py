"""GatedNet on living networks: what it accepts, keeps, notices and leaves alone."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from replay import gate, numbered, replay_net
from torch import nn

from aep_ext import ExitPolicy, ExitWeights, GatedNet, MultiExitNet, _load, prune
from aep_ext.inference import simulate
from aep_ext.surgery.heads import PooledLinearHead
from aep_ext.surgery.networks import build


@pytest.fixture(scope="module")
def net() -> MultiExitNet:
    """Untrained, but with BatchNorm statistics and heads whose answers differ in confidence."""
    torch.manual_seed(0)
    net = build("resnet_small", 5, in_channels=1)
    net.set_exit_weights(ExitWeights.mixed(4))
    net(torch.randn(32, 1, 12, 12))
    with torch.no_grad():
        for head in net.exits:
            head.linear.weight.mul_(20)
    return net.eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(33, 1, 12, 12)


def medians(net: MultiExitNet, x: torch.Tensor, criterion: str = "confidence") -> list[float]:
    """For each exit a threshold midway between the two values in the middle of those judged, nobody having left."""
    column = {"confidence": 0, "entropy": 1, "margin": 2}[criterion]
    logits, weights, found = net.exit_logits(x).detach(), net.output_weights, []
    for e in range(net.num_exits - 1):
        judged = (logits[: e + 1] * weights[: e + 1, None, None]).sum(0) / weights[: e + 1].sum()
        p = torch.softmax(judged.float(), -1)
        top = p.topk(2).values
        values = (top[:, 0], torch.special.entr(p).sum(-1), top[:, 0] - top[:, 1])[column].sort().values
        middle = len(values) // 2
        found.append(float(values[middle - 1 : middle + 1].mean()))
    return found


def agrees(gated: GatedNet, x: torch.Tensor, atol: float = 1e-4) -> None:
    """With the simulator on the same network's logits, except for samples near a threshold."""
    with torch.no_grad():
        logits = gated.net.exit_logits(x)
    expected, output = gated.simulate(logits), gated(x)
    sure = ~gated.near_threshold(logits)
    assert sure.sum() >= len(x) - 2
    assert torch.equal(output.exit[sure], expected.exit[sure])
    torch.testing.assert_close(output.confidence[sure], expected.confidence[sure], rtol=0, atol=atol)
    torch.testing.assert_close(output.logits[sure], expected.logits[sure], rtol=1e-3, atol=10 * atol)


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin"])
def test_live_network_and_simulator_agree(net, x, criterion):
    gated = gate(net, criterion, medians(net, x, criterion))
    assert len(gated(x).exit.unique()) > 2
    for n in (0, 1, 7, 33):
        agrees(gated, x[:n])
    output = gated.predict_all(x.split(5), capacity=8)
    assert torch.equal(output.exit, gated(x).exit)
    torch.testing.assert_close(output.logits, gated(x).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("criterion", "on"), [("patience", "exit"), ("vote", "ensemble"), ("margin", "exit")])
def test_criteria_with_a_memory_on_a_live_network(net, x, criterion, on):
    thresholds = 0.5 if criterion == "margin" else 2
    agrees(gate(net, criterion, thresholds, criterion_on=on, temperatures=[1.0, 2.0, 0.5, 1.0]), x)


@pytest.mark.parametrize("n", [0, 1, 7, 33])
@pytest.mark.parametrize("fused", [True, False])
def test_with_every_gate_off_it_is_the_network(net, x, n, fused):
    net = copy.deepcopy(net)
    net.fused = fused
    by_flag = gate(net, "entropy", math.inf, enabled=False)
    for gated in (by_flag, gate(net, "confidence", 1.1)):
        with torch.no_grad():
            torch.testing.assert_close(gated(x[:n]).logits, net(x[:n]))
        assert gated(x[:n]).exit.eq(3).all() and torch.equal(gated(x[:n]).logits, by_flag(x[:n]).logits)
    if n:
        assert torch.equal(next(iter(by_flag.predict([x[:n]]))).logits, by_flag(x[:n]).logits)


def test_a_single_exit_always_answers(net, x):
    gated = gate(prune(net, (2,)), "confidence", [])
    for part in (x, x[:1], x[:0]):
        output = gated(part)
        assert output.exit.eq(0).all() and torch.equal(output.logits, gated.net(part))
        assert output.confidence.shape == (len(part),) and output.confidence.dtype == torch.float32
    assert torch.equal(gated.predict_all([x, x]).logits, torch.cat([gated.net(x)] * 2))


def test_channels_last_stays(net, x):
    net, seen = copy.deepcopy(net).to(memory_format=torch.channels_last), []
    x = x.contiguous(memory_format=torch.channels_last)

    def note(module, arguments):
        seen.append(len(arguments[0]) < 2 or arguments[0].is_contiguous(memory_format=torch.channels_last))

    for stage in net.stages[1:]:
        stage.register_forward_pre_hook(note)
    gated = gate(net, "confidence", medians(net, x))
    agrees(gated, x)
    gated.predict_all(x.split(5), capacity=8)
    assert len(seen) > 6 and all(seen)


@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16(net, x, fused):
    net, x = copy.deepcopy(net).bfloat16(), x.bfloat16()
    net.fused = fused
    gated = gate(net, "confidence", medians(net, x))
    assert gated.thresholds.dtype == gated.temperatures.dtype == torch.float64
    output = gated(x)
    assert output.logits.dtype == torch.bfloat16 and output.confidence.dtype == torch.float32
    whole, one = gated.simulate(net.exit_logits(x)), torch.cat([gated(row[None]).exit for row in x])
    assert (output.exit == whole.exit).float().mean() > 0.9 and (one == whole.exit).float().mean() > 0.9
    torch.testing.assert_close(gate(net, "confidence", 2.0)(x).logits, net(x), rtol=2e-2, atol=2e-2)


def test_autocast(net, x):
    net = copy.deepcopy(net)
    net.fused = _load.extension is not None  # the reference of the fused heads takes no mixed dtypes
    gated = gate(net, "confidence", medians(net, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, logits = gated(x), net.exit_logits(x)
        torch.testing.assert_close(gate(net, "confidence", 2.0)(x).logits, net(x), rtol=2e-2, atol=2e-2)
    assert output.logits.dtype == logits.dtype
    assert (output.exit == gated.simulate(logits).exit).float().mean() > 0.9


@pytest.mark.slow  # imports the compiler
def test_compiled_stages(net, x):
    eager = gate(net, "confidence", medians(net, x))
    net = copy.deepcopy(net)
    gated = gate(net, "confidence", eager.thresholds)
    calls = []

    def backend(graph, example):
        calls.append(graph)
        return graph.forward

    for i in range(len(net.stages)):
        net.stages[i] = torch.compile(net.stages[i], backend=backend, dynamic=True)
    for n in (33, 7, 1):
        assert torch.equal(gated(x[:n]).exit, eager(x[:n]).exit)
    assert calls
    torch._dynamo.reset()


class Hungry(nn.Module):
    """A head that writes on its input."""

    def forward(self, features):
        return features.relu_().mean((2, 3))[:, :3]


@pytest.mark.parametrize("inference", [False, True])
def test_heads_that_write_on_their_input_do_not_spoil_the_next_stage(inference):
    net = MultiExitNet([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)], [Hungry(), Hungry()], num_classes=3).eval()
    gated, x = gate(net, "confidence", 2.0), torch.randn(6, 3, 9, 9)
    with torch.inference_mode(inference):
        for part in (x, x, x[:1]):
            torch.testing.assert_close(gated(part).logits, net(part))


def test_fused_heads_with_an_activation_before_the_pool(x):
    heads = [PooledLinearHead(4, 3, pre=nn.ReLU(inplace=inplace)) for inplace in (True, False, True)]
    stages = [nn.Conv2d(c, 4, 3) for c in (1, 4, 4)]
    net = MultiExitNet(stages, heads, num_classes=3).eval()
    with torch.no_grad():
        apart = torch.stack([head(f.clone()) for head, f in zip(heads, net.features(x), strict=True)])
    for _ in range(2):
        output = gate(net, "confidence", 2.0)(x)
        torch.testing.assert_close(output.logits, apart.mean(0))


def test_buffers_are_read_again_where_they_change(net, x):
    gated = gate(net, "confidence", 2.0)
    assert gated.policy is gated.policy
    assert gated(x).exit.eq(3).all()
    gated.thresholds[1] = 0.0
    assert gated(x).exit.eq(1).all()
    gated.enabled[1] = False
    assert gated(x).exit.eq(3).all()
    gated.thresholds = torch.zeros(3)
    assert gated(x).exit.eq(0).all()
    gated.thresholds.data = torch.full((3,), 2.0)
    assert gated(x).exit.eq(3).all()
    with torch.inference_mode():
        gated.thresholds.zero_()
        assert gated(x).exit.eq(0).all()
    gated.load_state_dict(gate(net, "confidence", [2.0, 2.0, 0.0]).state_dict())
    assert gated(x).exit.eq(2).all()
    before = gated(x).confidence
    gated.temperatures.fill_(3.0)
    assert not torch.equal(before, gated(x).confidence)
    with torch.inference_mode():
        made_there = gate(copy.deepcopy(net), "confidence", 0.0)
        assert made_there(x).exit.eq(0).all()
        made_there.thresholds.fill_(2.0)
        assert made_there(x).exit.eq(3).all()
    gated.temperatures[0] = 0.0
    with pytest.raises(ValueError, match="temperatures must be positive and finite, got 0.0 at position 0"):
        gated(x)


def test_state_moves_and_survives(net, x):
    gated = gate(net, "confidence", medians(net, x), temperatures=[1.0, 1.1, 0.9, 1.0], enabled=[True, False, True])
    names = set(gated.state_dict())
    assert {"thresholds", "temperatures", "enabled"} | {f"net.{name}" for name in net.state_dict()} == names
    for other in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        for a, b in zip(gated(x), other(x), strict=True):
            assert torch.equal(a, b)
        other.thresholds.fill_(0.0)
        assert other(x).exit.eq(0).all() and not gated(x).exit.eq(0).all()
    twice = copy.deepcopy(gated).double()
    assert twice(x.double()).logits.dtype == torch.float64
    assert copy.deepcopy(gated).half().thresholds.dtype == torch.float64
    assert copy.deepcopy(gated).to("meta").thresholds.device.type == "meta"
    assert gated.thresholds.tolist() == medians(net, x)  # not rounded


def test_the_network_may_be_replaced_by_one_of_its_form(net, x):
    gated, other = gate(net, "confidence", 2.0), copy.deepcopy(net)
    with torch.no_grad():
        other.exits[3].linear.weight.mul_(2)
    gated.net = other
    for part in (x, x[:1]):
        with torch.no_grad():
            torch.testing.assert_close(gated(part).logits, other(part))
    gated.net = prune(net, (0, 1))
    with pytest.raises(ValueError, match="thresholds must have 1 entries, got 3"):
        gated(x)


def test_training_mode_is_refused(net, x):
    net = copy.deepcopy(net)
    gated = gate(net, "confidence", 0.5)
    assert not gated.training and not gated(x).logits.requires_grad
    gated.train()
    for use in (lambda: gated(x), lambda: gated.predict([x]), lambda: gated.batcher(), lambda: gated.measure(x)):
        with pytest.raises(RuntimeError, match="GatedNet: must be in eval mode, got training mode; call eval"):
            use()
    gated.eval()(x)
    net.train()
    with pytest.raises(RuntimeError, match="must be in eval mode"):
        gated(x)
    assert gate(net, "confidence", 0.5).training


def test_the_policy_is_read_back(net, x):
    policy = ExitPolicy(
        output_weights=net.output_weights,
        thresholds=[0.1, 0.2, 0.3],
        temperatures=[1.0, 2.0, 3.0, 4.0],
        enabled=[True, False, True],
        criterion="margin",
    )
    gated = GatedNet(net, policy)
    assert gated.policy == policy
    assert "margin of the ensemble" in repr(gated)
    assert "GatedNet, 5 classes: margin of the ensemble" in gated._repr_html_()
    logits = net.exit_logits(x).detach()
    assert torch.equal(gated.simulate(logits).exit, simulate(logits, policy).exit)


def test_a_full_network_is_pruned_to_the_policy(net, x):
    policy = ExitPolicy(output_weights=[0.25, 0.75], thresholds=0.5, exits=(1, 3))
    gated = GatedNet.from_policy(net, policy)
    assert gated.policy == policy and gated.net.exit_ids == (1, 3) and not gated.training
    assert gated.net.output_weights.tolist() == [0.25, 0.75] and net.num_exits == 4
    logits = net.exit_logits(x).detach()[[1, 3]]
    assert torch.equal(gated.simulate(logits).exit, gated(x).exit)
    again = GatedNet.from_policy(gated.net, ExitPolicy(output_weights=[2.0], exits=(3,)))
    assert again.net.exit_ids == (3,) and again(x).exit.eq(0).all()
    torch.testing.assert_close(again(x).logits, logits[1])
    with pytest.raises(ValueError, match=r"full_net must have the exits \[1, 3\], got \[3\]"):
        GatedNet.from_policy(again.net, policy)
    with pytest.raises(TypeError, match="full_net must be a MultiExitNet, got Linear"):
        GatedNet.from_policy(nn.Linear(2, 2), policy)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"net": nn.Linear(2, 2)}, TypeError, "net must be a MultiExitNet or a CompiledNet, got Linear"),
        ({"policy": "confidence"}, TypeError, "policy must be an ExitPolicy, got str"),
        ({"policy": ExitPolicy(output_weights=[0.5, 0.5])}, ValueError, r"network's exits \[0, 1, 2, 3\], got exits"),
        ({"policy": ExitPolicy(output_weights=[1] * 4, exits=(0, 1, 2, 5))}, ValueError, "got exits .*, 5"),
        ({"policy": ExitPolicy(output_weights=[0.25] * 4)}, ValueError, "network's output weights .*from_policy sets"),
    ],
)
def test_bad_arguments_are_refused(net, change, error, message):
    with pytest.raises(error, match=f"GatedNet: .*{message}"):
        GatedNet(**({"net": net, "policy": ExitPolicy(output_weights=net.output_weights)} | change))


def test_weights_that_cannot_be_normalised_are_refused(net):
    net = copy.deepcopy(net)
    gated = gate(net, "confidence", 0.5)
    net.output_weights[1] = 0.0
    with pytest.raises(ValueError, match="output_weights must be positive and finite, got 0.0 at position 1"):
        gated(torch.randn(1, 1, 12, 12))


@pytest.mark.gpu
@pytest.mark.parametrize("criterion", ["confidence", "patience", "vote"])
def test_on_a_gpu_executor_and_simulator_agree(net, x, criterion):
    logits = torch.randn(4, 65, 5) * 2
    net = replay_net(logits, net.output_weights.tolist()).to("cuda")
    gated = gate(net, criterion, 0.6 if criterion == "confidence" else 2)
    expected = gated.simulate(logits.cuda())
    for n in (0, 1, 65):
        for output in (gated(numbered(0, n).cuda()), gated.predict_all(numbered(0, n).split(9), capacity=16)):
            assert output.exit.is_cuda and torch.equal(output.exit, expected.exit[:n])
            assert torch.equal(output.confidence, expected.confidence[:n])
            assert torch.equal(output.logits, expected.logits[:n])
