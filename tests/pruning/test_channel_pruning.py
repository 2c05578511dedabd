"""Channels pruned by Torch-Pruning first, then the four verbs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import aep_ext
from aep_ext.pruning import count_macs, count_parameters

torch_pruning = pytest.importorskip("torch_pruning", reason="prunes channels with Torch-Pruning")
torchvision = pytest.importorskip("torchvision", reason="the network is torchvision's ResNet")

SHAPE = (3, 32, 32)


def pruned_resnet() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A ResNet of four blocks before and after half of its channels were taken out."""
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4).eval()
    wide = copy.deepcopy(model)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.zeros(1, *SHAPE),
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
    )
    pruner.step()
    return wide, model


def loader(samples: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images whose mean colour says their class."""
    target = torch.arange(samples) % 4
    images = 0.5 * torch.randn(samples, *SHAPE) + torch.eye(4)[target][:, :3, None, None]
    return list(zip(images.split(16), target.split(16), strict=True))


@pytest.mark.slow
def test_channel_pruning_then_the_four_verbs(tmp_path: Path) -> None:
    wide, model = pruned_resnet()
    assert count_macs(model, SHAPE) < 0.35 * count_macs(wide, SHAPE) and model.layer2[0].conv1.out_channels == 64
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        expected = model(x)

    net = aep_ext.anticipate(model, example=SHAPE, fused=False)
    assert net.num_exits >= 3
    with torch.no_grad():
        assert torch.equal(net.eval().exit_logits(x)[-1], expected)

    batches, loss = loader(), aep_ext.JointCrossEntropy(aep_ext.ExitWeights.uniform(net.num_exits))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for images, target in batches * 4:
        value = loss(net.train()(images), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])

    scores = aep_ext.score_subsets(net, batches, split="val")
    small = aep_ext.prune(net, scores, objective="macs", constraints={"macs": "90%"})
    best = scores[tuple(small.selection["exits"])]
    assert count_macs(small, SHAPE) == best.macs < 0.9 * scores[scores.num_subsets].macs
    assert count_parameters(small) == best.parameters < count_parameters(model)

    gated = aep_ext.terminate(net, batches, budget=5.0, num_std_errors=0.0)
    answer = gated(batches[0][0])
    assert answer.logits.shape == (16, 4) and int(answer.exit.max()) < net.num_exits

    # The pruned widths are the model's: with it the file is read again.
    aep_ext.save(gated, tmp_path)
    again = aep_ext.load(tmp_path, model=pruned_resnet()[1])
    assert torch.equal(again(batches[0][0]).logits, answer.logits)
