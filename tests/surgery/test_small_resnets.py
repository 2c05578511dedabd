"""The networks that need torch alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from aep_ext.pruning import count_macs, prune, single_exit
from aep_ext.surgery.networks import available, build, scalable, weight_channels


def test_resnet_cifar_has_its_exits_at_the_shares_it_says() -> None:
    net = build("resnet_cifar", 10)
    whole = count_macs(single_exit(net), (3, 32, 32))
    assert whole == 54_929_920
    shares = [count_macs(prune(net, [e]), (3, 32, 32)) / whole for e in range(4)]
    assert [round(100 * share) for share in shares] == [18, 41, 70, 100]
    assert [tuple(x.shape[1:]) for x in net.features(torch.zeros(1, 3, 32, 32))] == [
        (32, 16, 16),
        (96, 8, 8),
        (192, 4, 4),
        (256, 4, 4),
    ]


def test_resnet_cifar_against_plain_layers() -> None:
    net = build("resnet_cifar", 10, in_channels=1, head="auto").eval()
    x = torch.randn(2, 1, 32, 32)
    block = net.stages[0].layer1
    stem = net.stages[0].stem(x)
    conv, pool, norm, relu = block.down
    assert isinstance(pool, nn.MaxPool2d)
    down = relu(norm(pool(conv(stem))))
    assert torch.equal(net.features(x)[0], down + block.residual(down))
    assert net.origin["heads"] == ["conv@128", "conv@192", "conv@384"]


@pytest.mark.parametrize("name", ["resnet_small", "resnet_cifar"])
def test_widths(name: str) -> None:
    assert name in available() and scalable(name)
    whole, half = build(name, 10), build(f"{name}@0.5", 10)
    assert half.origin["name"] == f"{name}@0.5" and 2 * half.exits[3].in_channels == whole.exits[3].in_channels
    assert half(torch.randn(2, 3, 8, 8)).shape == (4, 2, 10)  # eight pixels suffice
    for wrong, message in ((f"{name}@9", r"width must be within \(0, 8\], got 9"), (f"{name}@x", "must be a number")):
        with pytest.raises(ValueError, match=message):
            build(wrong, 10)
    with pytest.raises(ValueError, match=f"{name}: has no pretrained weights"):
        build(name, 10, weights="DEFAULT")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_a_file(tmp_path: Path, suffix: str) -> None:
    """By the keys of the single-exit network; the head is new where the file has another number of classes."""
    source, path = build("resnet_small", 10), str(tmp_path / f"weights{suffix}")
    state = {key: value.clone() for key, value in source.original_state_dict().items()}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch", reason="the file is safetensors'").save_file(state, path)
    same, other = build("resnet_small", 10, weights=path), build("resnet_small", 7, weights=path, head="auto")
    for key, value in same.original_state_dict().items():
        assert torch.equal(value, state[key])
        assert key.startswith("fc.") or torch.equal(other.original_state_dict()[key], state[key])
    assert other.origin["heads"] and other.exits[-1].linear.out_features == 7
    with pytest.raises(ValueError, match=r"lack 40 of the network's 56 tensors, first 'layer1.down.0.weight'"):
        build("resnet_cifar", 10, weights=path)
    with pytest.raises(ValueError, match=r"stem.0.weight must have shape \[16, 1, 3, 3\], got \[16, 3, 3, 3\]"):
        build("resnet_small", 10, 1, weights=path)
    assert weight_channels(path) == 3 and weight_channels(None) is None and weight_channels("DEFAULT") == 3
    with pytest.raises(ValueError, match="cannot be read"):
        build("resnet_small", 10, weights=str(tmp_path / "gone.pth"))
