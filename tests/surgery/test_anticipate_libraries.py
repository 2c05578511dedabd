"""anticipate() on the networks of torchvision and timm: the last exit is the original network."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import aep_ext
from aep_ext import MultiExitNet, anticipate, prune

torchvision = pytest.importorskip("torchvision", reason="the list is torchvision's and timm's networks")

# What the automatic cut finds: names of the early exits' places.
TORCHVISION = {
    "resnet18": ["layer1", "layer2", "layer3"],
    "resnet50": ["layer1", "layer2", "layer3"],
    "vgg16": ["features.4", "features.9", "features.16", "features.23"],
    "vgg16_bn": ["features.6", "features.13", "features.23", "features.33"],
    "densenet121": ["features.transition1", "features.transition2", "features.transition3"],
    "densenet169": ["features.transition1", "features.transition2", "features.transition3"],
    "mobilenet_v2": ["features.1", "features.3", "features.6", "features.13"],
    "mobilenet_v3_small": ["features.1", "features.3", "features.8"],
    "mobilenet_v3_large": ["features.1", "features.3", "features.6", "features.12"],
    "efficientnet_b0": [f"features.{number}" for number in range(1, 7)],
    "efficientnet_b5": [f"features.{number}" for number in range(1, 7)],
    "convnext_tiny": ["features.1", "features.3", "features.5"],
    "regnet_y_400mf": ["trunk_output.block1", "trunk_output.block2", "trunk_output.block3"],
    "shufflenet_v2_x1_0": ["stage2", "stage3"],
    "squeezenet1_1": ["features.5", "features.8"],
    "googlenet": ["maxpool3", "maxpool4"],
}
TIMM = {
    "resnet26": ["layer1", "layer2", "layer3"],
    "mobilenetv3_small_100": ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
    "efficientnet_b0": [f"blocks.{number}" for number in range(6)],
    "mobilenetv4_conv_small": ["blocks.0", "blocks.1", "blocks.2"],
    "ese_vovnet19b_dw": ["stem", "stages.0", "stages.1", "stages.2"],  # not stem.1, a hundredth of the cost before
    "hrnet_w18_small": ["act1", "layer1"],  # from there to its end three branches go side by side
}


def is_the_original_on_its_last_exit(model: nn.Module, cuts: list[str]) -> MultiExitNet:
    model.eval()
    net = anticipate(model, placement="stages")
    assert net.origin["cuts"] == cuts
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        fused = net.exit_logits(x)
        net.fused = False
        plain = net.exit_logits(x)
        assert torch.equal(plain[-1], expected)
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
        logits = net.train()(x)
    assert logits.shape == (len(cuts) + 1, 2, net.num_classes)
    state, original = net.original_state_dict(), model.state_dict()
    assert state.keys() == original.keys()
    return net


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, num_classes=10, **options)
    is_the_original_on_its_last_exit(model, TORCHVISION[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nfnet_f0", "dm_nfnet_f0"])
def test_exits_that_nearly_coincide_in_cost(name: str) -> None:
    net = anticipate(
        build(f"timm/{name}").eval(), placement="stages"
    )  # not stem.act4 and stages, a fortieth of the cost before the next
    assert net.origin["cuts"] == ["stem", "stages.0", "stages.1", "stages.2"]


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm's networks are part of the list")
    is_the_original_on_its_last_exit(timm.create_model(name, num_classes=10), TIMM[name])


def build(name: str) -> nn.Module:
    library, _, inner = name.partition("/")
    if library == "torchvision":
        return torchvision.models.get_model(inner, weights=None, num_classes=10)
    timm = pytest.importorskip("timm", reason="timm's networks are part of the list")
    size = {"img_size": 64} if "swin" in inner else {}
    return timm.create_model(inner, num_classes=10, **size)


CHANNELS_LAST = {  # the early exits' places, and the widths that the first layer of each head reads
    "torchvision/swin_t": (["features.1", "features.3", "features.5"], [96, 192, 384, 768]),
    "torchvision/swin_v2_t": (["features.1", "features.3", "features.5"], [96, 192, 384, 768]),
    "timm/swin_tiny_patch4_window7_224": (["layers.0", "layers.1", "layers.2"], [96, 192, 384, 768]),  # one size only
    "timm/mambaout_femto": (["stages.0", "stages.1", "stages.2"], [48, 96, 192, 288]),
}


@pytest.mark.parametrize("name", CHANNELS_LAST)
def test_channels_last_feature_maps(name: str, tmp_path: Path) -> None:
    cuts, widths = CHANNELS_LAST[name]
    model = build(name).eval()
    net = anticipate(model, example=(3, 64, 64), placement="stages").eval()
    assert net.origin["cuts"] == cuts
    assert [next(head.parameters()).shape[0] for head in net.exits] == widths  # of a LayerNorm
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert [feature.shape[3] for feature in net.features(x)] == widths
        assert torch.equal(net.exit_logits(x)[-1], model(x))
        assert torch.equal(prune(net, [3])(x), model(x))
        aep_ext.save(net, tmp_path)
        assert torch.equal(aep_ext.load(tmp_path, model=build(name))(x), net(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"), [("torchvision/swin_t", "onnxruntime"), ("timm/mambaout_femto", "openvino")]
)
def test_channels_last_feature_maps_on_an_engine(name: str, backend: str) -> None:
    pytest.importorskip(backend, reason="the engine is what is tested")
    net, x = anticipate(build(name).eval(), example=(3, 64, 64)).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(aep_ext.compile(net, x, backend=backend)(x), net(x), rtol=1e-3, atol=1e-4)


def test_token_sequences_are_refused_by_name() -> None:
    message = r"VisionTransformer cannot be cut: from .* works on token sequences \(\[2, 1, 768\]\)"
    with pytest.raises(ValueError, match=message):
        anticipate(build("torchvision/vit_b_16"))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_refused_with_the_reason(name: str) -> None:
    model = getattr(torchvision.models, name)(weights=None, init_weights=False)
    with pytest.raises(ValueError, match="takes another path in training mode .*'(aux1|AuxLogits)'.* aux_logits=False"):
        anticipate(model)


def test_a_cut_inside_a_residual_block_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"cannot cut after 'layer2.0.conv1': 2 tensors are alive there .* inside a branch"
    ):
        anticipate(torchvision.models.resnet18(weights=None), cuts=["layer2.0.conv1"])


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
def test_the_original_comes_back_out_after_training(name: str) -> None:
    model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    net = anticipate(model, fused=False)
    x = torch.randn(2, 3, 64, 64)
    net(x)  # BatchNorm learns
    model.load_state_dict(net.original_state_dict(), strict=True)
    net.eval(), model.eval()
    with torch.no_grad():
        assert torch.equal(net.exit_logits(x)[-1], model(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_pickle_and_deepcopy(name: str) -> None:
    net = anticipate(getattr(torchvision.models, name)(weights=None, num_classes=10)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(x), expected)


def test_stochastic_depth_is_alive_in_training_and_silent_in_eval() -> None:
    net = anticipate(
        torchvision.models.efficientnet_b0(weights=None, num_classes=4, stochastic_depth_prob=0.9), exits=2
    )
    drops = [module for module in net.modules() if type(module).__name__ == "StochasticDepth"]
    assert drops and all(module.training for module in drops)
    x = torch.randn(2, 3, 64, 64)
    net.eval()
    with torch.no_grad():
        assert torch.equal(net(x), net(x))


def test_four_exits_of_a_deep_network_are_spread_over_its_cost() -> None:
    net = anticipate(torchvision.models.efficientnet_b0(weights=None, num_classes=4), exits=4, placement="stages")
    assert net.num_exits == 4 and set(net.origin["cuts"]) < set(TORCHVISION["efficientnet_b0"])


def test_torch_compile_of_a_traced_residual_network() -> None:
    net = anticipate(torchvision.models.resnet18(weights=None, num_classes=10)).eval()
    x = torch.randn(1, 3, 64, 64)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))
