"""The comparison with earlyon: that it runs the same network, and that what it costs is counted right."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("earlyon", reason="the peer: pip install earlyon")

from aep_ext import ExitWeights, MultiExitNet
from aep_ext.pruning import count_macs, prune
from aep_ext.surgery import networks
from benchmarks import tables
from benchmarks.peers import earlyon as peer

SHAPE = (3, 16, 16)


@pytest.fixture
def net() -> MultiExitNet:
    """The default network, not trained; its BatchNorm has seen something."""
    net = networks.build("resnet_small", 4, weights=None)
    net.set_exit_weights(ExitWeights.mixed(4))
    net.train()
    for _ in range(3):
        net(torch.randn(16, *SHAPE))
    return net.eval()


@pytest.fixture
def images(net) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with the ensemble's own answers as labels, so that more exits are more often right."""
    x = torch.randn(60, *SHAPE)
    with torch.no_grad():
        return x, net(x).argmax(-1)


def configured(wrapper, thresholds, enabled=None):
    wrapper.config.confidence_thresholds = list(thresholds)
    wrapper.config.enabled_exits = [True] * len(thresholds) if enabled is None else list(enabled)
    return wrapper


@pytest.mark.parametrize("exits", [(0, 1, 2, 3), (0, 2), (1, 3)])
def test_the_same_logits_at_every_exit(net, images, exits):
    small = prune(net, exits).eval()
    wrapper = peer.wrap(small, SHAPE)
    peer.check_logits(small, wrapper, images[0])
    assert small.fused and not [module for module in small.modules() if module._forward_hooks]  # they hang on copies
    with torch.no_grad():
        next(wrapper.backbone.parameters()).mul_(1 + 1e-6)
    with pytest.raises(AssertionError, match="not the network's"):
        peer.check_logits(small, wrapper, images[0])
    with pytest.raises(ValueError, match="at least two exits, got 1"):
        peer.wrap(prune(net, (3,)), SHAPE)


class Routed(torch.nn.Module):
    """The wrapper as a module that gives logits, for the counter."""

    def __init__(self, wrapper):
        super().__init__()
        self.wrapper = wrapper
        _ = wrapper.flops_estimate  # it runs the backbone once, at first

    def forward(self, x):
        return self.wrapper(x, mode="inference").prediction


def test_costs_are_those_of_the_parts_that_run(net):
    """A disabled head is not run, the head of the exit taken is."""
    single = peer.exit_macs(net, SHAPE, [False, False, False])
    assert single == [count_macs(prune(net, (e,)), SHAPE) for e in range(4)]
    some = peer.exit_macs(net, SHAPE, [True, False, True])
    assert some[2] == count_macs(prune(net, (0, 2)), SHAPE) and some[3] == count_macs(prune(net, (0, 2, 3)), SHAPE)
    wrapper = configured(peer.wrap(net, SHAPE), [1.0, 1.0, 1.0], [True, False, True])
    assert count_macs(Routed(wrapper), torch.randn(1, *SHAPE)) == some[3]


def test_its_accuracy_and_cost_are_those_of_image_after_image(net, images):
    x, y = images
    wrapper = configured(peer.wrap(net, SHAPE), [0.6, 0.6, 0.6])
    found = peer.evaluate_earlyon(net, wrapper, images)
    macs, correct, spent, counts = peer.exit_macs(net, SHAPE, [True] * 3), 0, 0, [0] * 4
    for one, label in zip(x.split(1), y, strict=True):
        answer = wrapper(one)
        correct += int(answer.prediction.argmax() == label)
        spent += macs[answer.exit_taken]
        counts[answer.exit_taken] += 1
    assert found["top1"] == pytest.approx(correct / len(x)) and found["mean_macs"] == pytest.approx(spent / len(x))
    assert found["exit_shares"] == pytest.approx([count / len(x) for count in counts])
    assert found["ungated_macs"] == count_macs(prune(net, (3,)), SHAPE)
    one_by_one = peer.evaluate_batched(net, wrapper, images, 1)
    assert one_by_one == {"top1": pytest.approx(found["top1"]), "mean_macs": pytest.approx(found["mean_macs"])}


def test_its_calibration_keeps_the_budget(net, images):
    x, y = images
    wrapper = peer.wrap(net, SHAPE)
    result = peer.calibrate_earlyon(wrapper, (x[:20], y[:20]), (x[20:], y[20:]), 10.0)
    assert wrapper.config.confidence_thresholds == result.thresholds
    assert wrapper.config.enabled_exits == result.enabled_exits
    assert result.baseline_accuracy - result.final_accuracy <= 0.1 + 1e-9
    assert peer.evaluate_earlyon(net, wrapper, (x[20:], y[20:]))["top1"] == pytest.approx(result.final_accuracy)


def test_the_whole_comparison_on_a_small_run(tmp_path):
    pytest.importorskip("lightning", reason="runs need Lightning")
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    from aep_ext.training import run

    folder, output = tmp_path / "run", tmp_path / "peer.json"
    tiny = {"image_size": 8, "train_samples": 96, "epochs": 2, "batch_size": 32, "device": "cpu", "threads": 1}
    run({**tiny, "output": str(folder), "seeds": (0, 1)})
    arguments = ["--run", str(folder), "--output", str(output), "--samples", "8", "--seconds", "0", "--drop", "5"]
    peer.main([*arguments, "--backend", "eager"])
    found = json.loads(output.read_text())
    assert found["format"] == tables.PEER_FORMAT and str(tmp_path) not in str(found)
    assert [seed["seed"] for seed in found["seeds"]] == [0, 1] and found["exits"] == [0, 1, 2, 3]
    for name in ("aep_ext", "earlyon"):
        assert len(found["summary"][name]["top1"]["values"]) == 2
        for seed in found["seeds"]:
            assert sum(seed[name]["exit_shares"]) == pytest.approx(1)
            assert 0 < seed[name]["mean_macs"] <= seed[name]["ungated_macs"] * 1.01
    one, many = found["timed"]["rows"]
    assert set(one["times"]) == {"aep_ext", "aep_ext_on_engine", "ensemble", "last_exit", "earlyon_staged"}
    assert (one["batch"], many["batch"]) == (1, 64) and many["earlyon_batched"]["mean_macs"] > 0
    assert "earlyon 0.3" in tables.peer(found)
