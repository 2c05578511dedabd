"""GatedNet on living networks: what it accepts, keeps, notices and leaves alone."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from replay import numbered, replay_net
from torch import nn

from aep_ext import ExitWeights, MultiExitNet, _load
from aep_ext.surgery.heads import PooledLinearHead
from aep_ext.surgery.networks import build
from aep_ext.termination import Custom, GatedNet, Margin, Patience, Vote, near_threshold, simulate


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


def medians(net: MultiExitNet, x: torch.Tensor, policy: str = "confidence") -> list[float]:
    """For each exit a threshold midway between the two values in the middle of those judged, nobody having left."""
    column = {"confidence": 0, "entropy": 1, "margin": 2}[policy]
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
    assert torch.equal(output.exit[sure], expected.exits[sure])
    torch.testing.assert_close(output.confidence[sure], expected.confidences[sure], rtol=0, atol=atol)
    torch.testing.assert_close(output.logits[sure], expected.logits[sure], rtol=1e-3, atol=10 * atol)


@pytest.mark.parametrize("policy", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("mode", ["compact", "mask", ["mask", "compact", "mask"]])
def test_live_network_and_simulator_agree(net, x, policy, mode):
    gated = GatedNet(net, policy, medians(net, x, policy), mode=mode)
    assert len(gated(x).exit.unique()) > 2
    for n in (0, 1, 7, 33):
        agrees(gated, x[:n])
    output = gated.predict_all(x.split(5), capacity=8)
    assert torch.equal(output.exit, gated(x).exit)
    torch.testing.assert_close(output.logits, gated(x).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("policy", [Patience("exit"), Vote(), Margin("exit")])
def test_policies_with_state_on_a_live_network(net, x, policy):
    gated = GatedNet(net, policy, 0.5 if policy.name == "margin" else 2, temperatures=[1.0, 2.0, 0.5, 1.0])
    agrees(gated, x)


@pytest.mark.parametrize("n", [0, 1, 7, 33])
@pytest.mark.parametrize("fused", [True, False])
def test_with_every_gate_off_it_is_the_network_bit_for_bit(net, x, n, fused):
    net = copy.deepcopy(net)
    net.fused = fused
    for gated in (GatedNet(net, "confidence", 0.0, mode="off"), GatedNet(net, "entropy", math.inf, enabled=False)):
        with torch.no_grad():
            assert torch.equal(gated(x[:n]).logits, net(x[:n]))
        assert gated(x[:n]).exit.eq(3).all() and gated.live == (False,) * 3
    if n:
        pooled = next(iter(gated.predict([x[:n]])))
        assert torch.equal(pooled.logits, gated(x[:n]).logits)
    nobody = GatedNet(net, "confidence", 1.1)
    assert torch.equal(nobody(x[:n]).logits, gated(x[:n]).logits)


def test_a_single_exit_always_answers(net, x):
    from aep_ext import prune

    gated = GatedNet(prune(net, (2,)), "confidence", [])
    for part in (x, x[:1], x[:0]):
        output = gated(part)
        assert output.exit.eq(0).all() and torch.equal(output.logits, gated.net(part))
        assert output.confidence.shape == (len(part),) and output.confidence.dtype == torch.float32
    assert torch.equal(gated.predict_all([x, x]).logits, torch.cat([gated.net(x)] * 2))


@pytest.mark.parametrize("mode", ["compact", "mask"])
def test_channels_last_stays(net, x, mode):
    net, seen = copy.deepcopy(net).to(memory_format=torch.channels_last), []
    x = x.contiguous(memory_format=torch.channels_last)

    def note(module, arguments):
        seen.append(len(arguments[0]) < 2 or arguments[0].is_contiguous(memory_format=torch.channels_last))

    for stage in net.stages[1:]:
        stage.register_forward_pre_hook(note)
    gated = GatedNet(net, "confidence", medians(net, x), mode=mode)
    agrees(gated, x)
    gated.predict_all(x.split(5), capacity=8)
    assert len(seen) > 6 and all(seen)


@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16(net, x, fused):
    net, x = copy.deepcopy(net).bfloat16(), x.bfloat16()
    net.fused = fused
    gated = GatedNet(net, "confidence", medians(net, x))
    assert gated.thresholds.dtype == gated.temperatures.dtype == torch.float64
    output = gated(x)
    assert output.logits.dtype == torch.bfloat16 and output.confidence.dtype == torch.float32
    whole, one = gated.simulate(net.exit_logits(x)), torch.cat([gated(row[None]).exit for row in x])
    assert (output.exit == whole.exits).float().mean() > 0.9 and (one == whole.exits).float().mean() > 0.9
    assert torch.equal(GatedNet(net, "confidence", 2.0)(x).logits, net(x))


def test_autocast(net, x):
    net = copy.deepcopy(net)
    net.fused = _load.extension is not None  # the reference of the fused heads takes no mixed dtypes
    gated = GatedNet(net, "confidence", medians(net, x), mode="compact")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, logits = gated(x), net.exit_logits(x)
        assert torch.equal(GatedNet(net, "confidence", 2.0)(x).logits, net(x))
    assert output.logits.dtype == logits.dtype
    assert (output.exit == gated.simulate(logits).exits).float().mean() > 0.9


@pytest.mark.slow  # imports the compiler
def test_compiled_stages(net, x):
    eager = GatedNet(net, "confidence", medians(net, x))
    net = copy.deepcopy(net)
    gated = GatedNet(net, "confidence", eager.thresholds)
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


class Prepared:
    """What a prepared network looks like: units and weights, no module."""

    def __init__(self, net: MultiExitNet) -> None:
        self.output_weights = net.output_weights.tolist()
        last = net.num_exits - 1
        self.stages = [self.unit(net, e, e == last) for e in range(last + 1)]

    @staticmethod
    def unit(net, e, last):
        def run(features):
            features = net.stages[e](features)
            return None if last else features, net.exits[e](features)

        return run


def test_anything_with_units_serves(net, x):
    net = copy.deepcopy(net)
    net.fused = False
    ours, theirs = (GatedNet(pruned, "confidence", medians(net, x)) for pruned in (net, Prepared(net)))
    for n in (0, 1, 33):
        for a, b in zip(ours(x[:n]), theirs(x[:n]), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(theirs.predict_all(x.split(4)).exit, ours(x).exit)


class Hungry(nn.Module):
    """A head that writes on its input."""

    def forward(self, features):
        return features.relu_().mean((2, 3))[:, :3]


@pytest.mark.parametrize("inference", [False, True])
def test_heads_that_write_on_their_input_do_not_spoil_the_next_stage(inference):
    net = MultiExitNet([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)], [Hungry(), Hungry()], num_classes=3).eval()
    gated, x = GatedNet(net, "confidence", 2.0), torch.randn(6, 3, 9, 9)
    with torch.inference_mode(inference):
        for part in (x, x, x[:1]):
            assert torch.equal(gated(part).logits, net(part))


def test_fused_heads_with_an_activation_before_the_pool(x):
    heads = [PooledLinearHead(4, 3, pre=nn.ReLU(inplace=inplace)) for inplace in (True, False, True)]
    stages = [nn.Conv2d(c, 4, 3) for c in (1, 4, 4)]
    net = MultiExitNet(stages, heads, num_classes=3).eval()
    with torch.no_grad():
        apart = torch.stack([head(f.clone()) for head, f in zip(heads, net.features(x), strict=True)])
    for _ in range(2):
        output = GatedNet(net, "confidence", 2.0)(x)
        torch.testing.assert_close(output.logits, apart.mean(0))


def test_buffers_are_read_again_where_they_change(net, x):
    gated = GatedNet(net, "confidence", 2.0)
    assert gated.settings() is gated.settings()
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
    gated.load_state_dict(GatedNet(net, "confidence", [2.0, 2.0, 0.0]).state_dict())
    assert gated(x).exit.eq(2).all()
    before = gated(x).confidence
    gated.temperatures.fill_(3.0)
    assert not torch.equal(before, gated(x).confidence)
    with torch.inference_mode():
        made_there = GatedNet(copy.deepcopy(net), "confidence", 0.0)
        assert made_there(x).exit.eq(0).all()
        made_there.thresholds.fill_(2.0)
        assert made_there(x).exit.eq(3).all()
    gated.temperatures[0] = 0.0
    with pytest.raises(ValueError, match="temperatures must be positive and finite, got 0.0 at position 0"):
        gated(x)


def test_state_moves_and_survives(net, x):
    gated = GatedNet(net, "confidence", medians(net, x), temperatures=[1.0, 1.1, 0.9, 1.0], enabled=[True, False, True])
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
    from aep_ext import prune

    gated, other = GatedNet(net, "confidence", 2.0), copy.deepcopy(net)
    with torch.no_grad():
        other.exits[3].linear.weight.mul_(2)
    gated.net = other
    for part in (x, x[:1]):
        with torch.no_grad():
            assert torch.equal(gated(part).logits, other(part))
    assert next(gated.net.parameters()) is next(other.parameters())
    with pytest.raises(ValueError, match="net must have 4 exits as before, got 2"):
        gated.net = prune(net, (0, 1))
    with pytest.raises(TypeError, match="pruned must be a MultiExitNet or have stages"):
        gated.net = nn.Linear(2, 2)
    assert gated.net is other and torch.equal(gated(x[:1]).logits, other(x[:1]))
    with pytest.raises(TypeError, match="must not be compiled as a whole"):
        GatedNet(SimpleNamespace(_orig_mod=net), "confidence", 0.5)


def test_training_mode_is_refused(net, x):
    net = copy.deepcopy(net)
    gated = GatedNet(net, "confidence", 0.5)
    assert not gated.training and not gated(x).logits.requires_grad
    gated.train()
    for use in (lambda: gated(x), lambda: gated.predict([x]), lambda: gated.refill(), lambda: gated.measure(x)):
        with pytest.raises(RuntimeError, match="GatedNet: must be in eval mode, got training mode; call eval"):
            use()
    gated.eval()(x)
    net.train()
    with pytest.raises(RuntimeError, match="must be in eval mode"):
        gated(x)
    assert GatedNet(net, "confidence", 0.5).training


def test_what_calibration_found(net, x):
    result = SimpleNamespace(
        policy=Margin(),
        thresholds=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
        temperatures=[1.0, 2.0, 3.0, 4.0],
        enabled=torch.tensor([True, False, True]),
    )
    gated = GatedNet.from_calibration(net, result, mode="mask")
    assert gated.policy == Margin() and gated.thresholds.tolist() == [0.1, 0.2, 0.3]
    assert gated.temperatures.tolist() == [1.0, 2.0, 3.0, 4.0] and gated.enabled.tolist() == [True, False, True]
    assert gated.mode == ("mask",) * 3 and gated.live == (True, False, True) and "Margin" in repr(gated)
    result.weights = net.output_weights.tolist()
    assert GatedNet.from_calibration(net, result).policy == Margin()
    for weights in (torch.tensor([0.25] * 4), [1.0]):
        result.weights = weights
        with pytest.raises(ValueError, match="net must have the output weights that were calibrated, .*got"):
            GatedNet.from_calibration(net, result)
    logits = net.exit_logits(x)
    theirs = simulate(
        logits,
        net.output_weights,
        Margin(),
        result.thresholds,
        temperatures=result.temperatures,
        enabled=result.enabled,
    )
    assert torch.equal(gated.simulate(logits).exits, theirs.exits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"thresholds": [0.5]}, ValueError, "GatedNet: thresholds must have 3 entries, got 1"),
        ({"thresholds": [0.5, math.nan, 0.5]}, ValueError, "thresholds must not be NaN, got NaN at position 1"),
        ({"thresholds": "high"}, TypeError, "thresholds must be numbers, got 'high'"),
        ({"thresholds": None}, TypeError, "thresholds must be numbers, got None"),
        ({"temperatures": [1.0] * 3}, ValueError, "temperatures must have 4 entries, got 3"),
        ({"temperatures": -1.0}, ValueError, "temperatures must be positive and finite, got -1.0 at position 0"),
        ({"enabled": [True]}, ValueError, "enabled must have 3 entries, got 1"),
        ({"enabled": [0.5, 1, 1]}, TypeError, "enabled must be True or False for each exit, got 0.5"),
        ({"mode": "fast"}, ValueError, "mode must be one of auto, compact, mask, off, got 'fast'"),
        ({"mode": ["mask", "no", "off"]}, ValueError, "mode must be one of auto, compact, mask, off, got 'no'"),
        ({"mode": ["mask"]}, ValueError, "mode must have 3 entries, got 1"),
        ({"policy": "luck"}, ValueError, "policy must be one of confidence"),
        ({"pruned": nn.Linear(2, 2)}, TypeError, "pruned must be a MultiExitNet or have stages, .*got Linear"),
        ({"pruned": SimpleNamespace(stages=[len])}, TypeError, "pruned must have output_weights, got SimpleNamespace"),
        (
            {"pruned": SimpleNamespace(stages=[len], output_weights=[0.5] * 4)},
            ValueError,
            "one stage for each of its 4 output_weights, got 1",
        ),
    ],
)
def test_bad_arguments_are_refused(net, arguments, error, message):
    with pytest.raises(error, match=message):
        GatedNet(**({"pruned": net, "policy": "confidence", "thresholds": 0.5} | arguments))


def test_weights_that_cannot_be_normalised_are_refused(net):
    net = copy.deepcopy(net)
    gated = GatedNet(net, "confidence", 0.5)
    net.output_weights[1] = 0.0
    with pytest.raises(ValueError, match="output_weights must be positive and finite, got 0.0 at position 1"):
        gated(torch.randn(1, 1, 12, 12))


def test_another_policy_may_take_its_place(net, x):
    gated = GatedNet(net, "confidence", 2.0)
    for policy, threshold, expected in ((Vote(), 1.0, 0), (Patience(), 2.0, None), (Margin(), 9.0, 3)):
        gated.policy = policy
        gated.thresholds.fill_(threshold)
        one = gated(x[:1]).exit
        assert torch.equal(one, gated(x[:2]).exit[:1]) and (expected is None or int(one) == expected)


def test_near_samples_are_counted():
    logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 0.0]])[None].repeat(2, 1, 1)
    confidence = float(torch.softmax(logits[0, 0], 0)[0])
    gated = GatedNet(replay_net(logits, [0.5, 0.5]), "confidence", confidence + 5e-6)
    assert gated.near_threshold(logits).tolist() == [True, False, False]
    assert gated.near_threshold(logits, tolerance=1e-7).tolist() == [False] * 3
    assert near_threshold(logits, [0.5, 0.5], "confidence", confidence + 5e-6).tolist() == [True, False, False]
    assert near_threshold(logits, [0.5, 0.5], "entropy", 0.0, temperatures=2.0).tolist() == [False] * 3
    gated.enabled.fill_(False)
    assert not gated.near_threshold(logits).any()
    # Who has left is not near a later threshold; counts are near where the judged class hangs on a hair.
    three = GatedNet(replay_net(logits[:1].repeat(3, 1, 1), [1.0] * 3), "confidence", [confidence - 0.1, confidence])
    assert three.near_threshold(logits[:1].repeat(3, 1, 1)).tolist() == [False] * 3
    votes = GatedNet(replay_net(logits, [0.5, 0.5]), "vote", 2)
    assert votes.near_threshold(logits).tolist() == [False, False, True]
    own = GatedNet(replay_net(logits, [0.5, 0.5]), Custom("exit", lambda judged: judged.stats[:, 0] > 0.5), 0.0)
    with pytest.raises(ValueError, match="near_threshold: policy must be built in, got 'custom'"):
        own.near_threshold(logits)
    assert own(numbered(0, 3)).exit.tolist() == [0, 0, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["confidence", "patience", "vote"])
@pytest.mark.parametrize("mode", ["compact", "mask"])
def test_on_a_gpu_executor_and_simulator_agree(net, x, policy, mode):
    logits = torch.randn(4, 65, 5) * 2
    net = replay_net(logits, net.output_weights.tolist()).to("cuda")
    gated = GatedNet(net, policy, 0.6 if policy == "confidence" else 2, mode=mode)
    expected = gated.simulate(logits.cuda())
    for n in (0, 1, 65):
        for output in (gated(numbered(0, n).cuda()), gated.predict_all(numbered(0, n).split(9), capacity=16)):
            assert output.exit.is_cuda and torch.equal(output.exit, expected.exits[:n])
            assert torch.equal(output.confidence, expected.confidences[:n])
            assert torch.equal(output.logits, expected.logits[:n])
