"""The comparison with earlyon: that it runs the same network, and that its figures are counted right."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("earlyon", reason="the peer: pip install earlyon")

from aep_ext.termination import GatedNet

from aep_ext import ExitWeights, MultiExitNet, deploy
from aep_ext.pruning import count_macs, prune
from aep_ext.surgery import networks
from aep_ext.training.folder import RunFolder
from benchmarks.peers import earlyon as comparison
from benchmarks.peers import earlyon_net as peer

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
    assert peer.check_logits(small, wrapper, images[0]) < 1e-4 and small.fused
    hooks = [module for module in small.modules() if module._forward_hooks]
    assert not hooks  # its hooks hang on copies


def test_other_logits_are_found_out(net, images):
    wrapper = peer.wrap(net, SHAPE)
    with torch.no_grad():
        next(wrapper.backbone.parameters()).mul_(1.001)
    with pytest.raises(AssertionError, match="not the network's"):
        peer.check_logits(net, wrapper, images[0])


def test_its_two_ways_take_the_same_exits(net, images):
    x = images[0]
    sure = torch.softmax(net.exit_logits(x)[0], -1).amax(-1).detach()
    wrapper = configured(peer.wrap(net, SHAPE), [float(sure.median()), 0.5, 0.5], [True, False, True])
    exits = peer.check_paths(wrapper, peer.staged(wrapper), x)
    assert [e == 0 for e in exits] == (sure >= sure.median()).tolist() and 1 not in exits


def test_costs_are_those_of_the_parts_that_run(net):
    """A disabled head is not run, the head of the exit taken is."""
    single = peer.exit_macs(net, SHAPE, [False, False, False])
    assert single == [count_macs(prune(net, (e,)), SHAPE) for e in range(4)]
    some = peer.exit_macs(net, SHAPE, [True, False, True])
    assert some[2] == count_macs(prune(net, (0, 2)), SHAPE) and some[3] == count_macs(prune(net, (0, 2, 3)), SHAPE)
    wrapper = configured(peer.wrap(net, SHAPE), [1.0, 1.0, 1.0], [True, False, True])
    assert count_macs(Routed(wrapper), torch.randn(1, *SHAPE)) == some[3]


class Routed(torch.nn.Module):
    """The wrapper as a module that gives logits, for the counter."""

    def __init__(self, wrapper):
        super().__init__()
        self.wrapper = wrapper
        _ = wrapper.flops_estimate  # it runs the backbone once, at first

    def forward(self, x):
        return self.wrapper(x, mode="inference").prediction


def test_its_figures_are_those_of_its_own_walk(net, images):
    """Accuracy, shares and mean cost by its simulator, against image after image through the wrapper."""
    x, y = images
    wrapper = configured(peer.wrap(net, SHAPE), [0.6, 0.6, 0.6])
    judged = peer.judge(net, wrapper, peer.loader(x, y), SHAPE)
    macs, right, spent, counts = peer.exit_macs(net, SHAPE, [True] * 3), 0, 0, [0] * 4
    for one, label in zip(x.split(1), y, strict=True):
        found = wrapper(one)
        right += int(found.prediction.argmax() == label)
        spent += macs[found.exit_taken]
        counts[found.exit_taken] += 1
    assert judged.top1 == pytest.approx(right / len(x)) and judged.mean_macs == pytest.approx(spent / len(x))
    assert judged.exit_shares == pytest.approx([count / len(x) for count in counts])
    assert judged.final_macs == count_macs(prune(net, (3,)), SHAPE)
    one_by_one = peer.judge_batched(net, wrapper, x, y, 1, SHAPE)
    assert one_by_one == {"top1": pytest.approx(judged.top1), "mean_macs": pytest.approx(judged.mean_macs)}
    assert peer.judge_batched(net, wrapper, x, y, 60, SHAPE)["mean_macs"] >= judged.mean_macs


def test_calibration_keeps_its_better_grid(net, images):
    x, y = images
    wrapper = peer.wrap(net, SHAPE)
    result = peer.calibrate(wrapper, peer.loader(x[:20], y[:20]), peer.loader(x[20:], y[20:]), 10.0)
    assert wrapper.config.confidence_thresholds == result.thresholds
    assert wrapper.config.enabled_exits == result.enabled_exits
    assert result.baseline_accuracy - result.final_accuracy <= 0.1 + 1e-9
    assert peer.judge(net, wrapper, peer.loader(x[20:], y[20:]), SHAPE).top1 == pytest.approx(result.final_accuracy)


def test_one_exit_is_no_early_exit(net):
    with pytest.raises(ValueError, match="at least two exits, got 1"):
        peer.wrap(prune(net, (3,)), SHAPE)


def test_the_roles_share_no_image(images):
    x, y = images
    parts, told = comparison.split_images((x, y), (x[:5], y[:5]))
    assert len(parts.temperatures[0]) == told["temperatures"]["samples"] == 12
    assert len(parts.thresholds[0]) == told["thresholds"]["samples"] == 48
    assert told["temperatures"]["sha256"] != told["thresholds"]["sha256"]
    together = torch.cat([parts.temperatures[0], parts.thresholds[0]]).flatten(1)
    assert torch.equal(together.sort(0).values, x.flatten(1).sort(0).values) and parts.shape == SHAPE


def test_the_whole_comparison_on_a_small_run(tmp_path):
    pytest.importorskip("lightning", reason="runs need Lightning")
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    from aep_ext.training import run

    folder, output = tmp_path / "run", tmp_path / "peer.json"
    tiny = {"image_size": 8, "train_samples": 96, "epochs": 2, "batch_size": 32, "device": "cpu", "threads": 1}
    run({**tiny, "output": str(folder), "seeds": (0, 1)})
    shutil.rmtree(folder / "checkpoints")  # not needed
    assert comparison.delivered_seed(RunFolder(folder), "mixed") is None
    gated = GatedNet(deploy.load(folder / "seed-1" / "mixed" / "full"), "confidence", 0.3).eval()
    deploy.save(gated, folder / "gated")  # as aep calibrate delivers it: not of the first seed
    part = {"exits": [0, 3], "report": {"gated": {"top1": 0.5, "mean_macs": 1.0}, "pruned": {"top1": 0.5, "macs": 2}}}
    named = {"seed": 1, "exit_weights": "mixed", "folder": "gated"}
    gates = {"methods": {"mixed": {"seeds": [{"seed": seed, **part} for seed in (0, 1)]}}, "delivered": named}
    (folder / "gates.json").write_text(json.dumps(gates))
    arguments = ["--run", str(folder), "--output", str(output), "--samples", "8", "--seconds", "0"]
    comparison.main([*arguments, "--drop", "5"])
    found = json.loads(output.read_text())
    assert found["format"] == "aep_ext.peer" and found["peer"]["name"] == "earlyon" and str(tmp_path) not in str(found)
    assert [seed["seed"] for seed in found["seeds"]] == [0, 1] and found["exits"] == [0, 1, 2, 3]
    for who in ("aep_ext", "earlyon"):
        assert len(found["summary"][who]["top1"]["values"]) == 2
        for seed in found["seeds"]:
            figures = seed[who]
            assert sum(figures["exit_shares"]) == pytest.approx(1)
            assert 0 < figures["mean_macs"] <= figures["ungated_macs"] * 1.01
    one, many = found["timed"]["rows"]
    assert found["timed"]["engine"] is None and found["timed"]["seed"] == 1
    assert found["summary"]["aep_calibrate"]["top1"]["mean"] == 0.5
    assert (one["batch"], many["batch"]) == (1, 64) and one["quickest_earlyon"].startswith("earlyon")
    contestants = {"aep_ext", "aep_calibrate", "ensemble", "last_exit", "earlyon_wrapper", "earlyon_staged"}
    assert contestants == set(one["times"])
    assert many["earlyon_batched"]["mean_macs"] > 0
