"""The paper's eight networks against the published numbers (tests/golden), and networks by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from published_formula import uniform
from torch import Tensor, nn

from aep_ext.pruning import count_macs
from aep_ext.surgery import networks

pytest.importorskip("torchvision", reason="the paper's networks are cut from torchvision's")

PUBLISHED = {
    "resnet50": "resnet50",
    "vgg16": "vgg16",
    "vgg16_full": "vgg16full",
    "densenet169": "densenet169",
    "mobilenet_v3_small": "mobilenetv3small",
    "mobilenet_v3_small_full": "mobilenetv3smallfull",
    "efficientnet_b5": "efficientnetB5",
    "efficientnet_b5_full": "efficientnetB5full",
}

# Multiply-adds of convolutions and matrix products, all exits, K = 10, three channels: 64 and 224 pixels.
MACS = {
    "resnet50": (333682176, 4087174656),
    "vgg16": (1252800256, 15346644736),
    "vgg16_full": (1252800896, 15346645376),
    "densenet169": (274163968, 3358206208),
    "mobilenet_v3_small": (5646072, 62344632),
    "mobilenet_v3_small_full": (6042256, 67164496),
    "efficientnet_b5": (201634304, 2411680064),
    "efficientnet_b5_full": (206536512, 2471555712),
}


def on_meta(name: str, num_classes: int = 10, in_channels: int = 3) -> networks.MultiExitNet:
    with torch.device("meta"):
        return networks.build(name, num_classes, in_channels)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_and_shapes_are_the_published_ones(published: dict[str, Any], name: str) -> None:
    figures = published["networks"][PUBLISHED[name]]["K10_ch3"]
    net = on_meta(name).eval()
    assert net.num_exits == figures["n_exits"]
    for size in (64, 224):
        shapes = [list(feature.shape[1:]) for feature in net.features(torch.empty(1, 3, size, size, device="meta"))]
        if f"exit_feature_shapes_{size}" in figures:
            assert shapes == figures[f"exit_feature_shapes_{size}"]
        assert [shape[0] for shape in shapes] == figures["exit_channels"]
    if "parts" in figures:
        stages = [part["params"] for part in figures["parts"]["stages"]]
        stages[0] += figures["parts"]["input"]["params"]  # our first stage holds the input block
        assert [parameters(stage) for stage in net.stages] == stages
        assert [parameters(head) for head in net.exits] == [part["params"] for part in figures["parts"]["heads"]]


@pytest.mark.parametrize("name", MACS)
def test_multiply_adds(name: str) -> None:
    net = on_meta(name)
    assert (count_macs(net, (3, 64, 64)), count_macs(net, (3, 224, 224))) == MACS[name]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("num_classes", [2, 43, 200])
def test_other_classes_and_channels_change_heads_and_stem_alone(name: str, num_classes: int) -> None:
    ten, other = on_meta(name), on_meta(name, num_classes, in_channels=1)
    first = next(m for m in ten.modules() if isinstance(m, nn.Conv2d))
    saved = first.weight.numel() * 2 // 3
    assert parameters(ten.stages) - parameters(other.stages) == saved
    for ours, theirs in zip(other.exits, ten.exits, strict=True):
        last = [m for m in theirs.modules() if isinstance(m, nn.Linear)][-1]
        assert parameters(ours) - parameters(theirs) == (num_classes - 10) * (last.in_features + 1)
    assert other.eval()(torch.empty(1, 1, 64, 64, device="meta")).shape == (1, num_classes)


def fill_by_formula(net: nn.Module) -> int:
    filled = 0
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            values = uniform(filled, np.arange(parameter.numel())) * np.sqrt(1.5 / parameter[0].numel())
            parameter.copy_(torch.from_numpy(values.astype(np.float32)).view_as(parameter))
            filled += 1
    return filled


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_small"])
@pytest.mark.parametrize("fused", [True, False])
def test_formula_filled_forward(published: dict[str, Any], name: str, fused: bool) -> None:
    figures = published["forward_formula_filled_K10_ch3_64px"][PUBLISHED[name]]
    net = networks.build(name, 10).eval()
    net.fused = fused
    assert fill_by_formula(net) == figures["weight_tensors_filled"]
    image = torch.from_numpy(uniform(999999, np.arange(3 * 64 * 64))).view(1, 3, 64, 64)
    expected = torch.tensor(figures["logits_float64"], dtype=torch.float64)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
            logits = net.to(dtype).exit_logits(image.to(dtype))[:, 0].double()
            error = (logits - expected).abs().amax(1) / expected.abs().amax(1)  # per exit: stricter than over all
            assert error.max() < tolerance


@pytest.mark.parametrize("name", ["resnet50", "densenet169", "efficientnet_b5"])
def test_original_state_dict_is_torchvisions(name: str) -> None:
    import torchvision

    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None, num_classes=10).state_dict()
    ours = on_meta(name).original_state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.fixture
def pretrained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """torchvision's download replaced by a state dict made here; nothing is fetched."""
    import torchvision

    torch.manual_seed(1)
    state = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    asked: dict[str, object] = {}

    def get_state_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        asked["name"] = self.name
        return state

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    return state


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_pretrained_weights_go_into_the_backbone(pretrained: dict[str, Tensor], weights: str) -> None:
    net = networks.mobilenet_v3_small(10, weights=weights)
    backbone = {key: value for stage in net.stages for key, value in stage.state_dict().items()}
    assert len(backbone) > 200
    assert all(torch.equal(value, pretrained[key]) for key, value in backbone.items())


def test_pretrained_weights_with_another_stem(pretrained: dict[str, Tensor]) -> None:
    net = networks.build("mobilenet_v3_small", 10, in_channels=1, weights="DEFAULT")
    backbone = {key: value for stage in net.stages for key, value in stage.state_dict().items()}
    assert backbone["features.0.0.weight"].shape == (16, 1, 3, 3)
    assert all(torch.equal(v, pretrained[k]) for k, v in backbone.items() if k != "features.0.0.weight")


def test_incomplete_pretrained_weights_are_an_error(pretrained: dict[str, Tensor]) -> None:
    del pretrained["features.3.block.0.0.weight"]
    with pytest.raises(
        ValueError, match=r"mobilenet_v3_small: weights 'DEFAULT' lack 1 .*'features.3.block.0.0.weight'"
    ):
        networks.mobilenet_v3_small(10, weights="DEFAULT")


def test_unknown_names_and_bad_numbers() -> None:
    with pytest.raises(ValueError, match=r"build: no such network: 'rn50' \(there are: densenet169, .*timm/<name>\)"):
        networks.build("rn50", 10)
    with pytest.raises(ValueError, match="no such network: 'torchvision/resnet51' .did you mean torchvision/resnet50?"):
        networks.build("torchvision/resnet51", 10)
    with pytest.raises(ValueError, match="resnet50: num_classes must be at least 1, got 0"):
        networks.resnet50(0)
    with pytest.raises(ValueError, match="build: in_channels must be at least 1, got 0"):
        networks.build("torchvision/resnet18", 10, in_channels=0)
    with pytest.raises(ValueError, match="resnet50: weights must be .* one of IMAGENET1K_V1, .*'NO_SUCH"):
        networks.resnet50(10, weights="NO_SUCH_WEIGHTS")
    with pytest.raises(ValueError, match="resnet18: weights must be None, .*, got 'NO_SUCH_WEIGHTS'"):
        networks.build("torchvision/resnet18", 10, weights="NO_SUCH_WEIGHTS")
    assert set(networks.available()) == {*PUBLISHED, "resnet_small", "resnet_cifar"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resnet18", "torchvision/resnet18"),
        ("resnet_smal", "resnet_small"),
        ("mobilenet_v4", "torchvision/mobilenet_v2"),
        ("torchvision/resnet19", "torchvision/resnet18"),
    ],
)
def test_the_nearest_name_is_suggested(name: str, meant: str) -> None:
    assert networks.unknown(name) == f"no such network: {name!r} (did you mean {meant}?)"


def test_torchvision_by_name(pretrained: dict[str, Tensor]) -> None:
    net = networks.build("torchvision/mobilenet_v3_small", 7, in_channels=1)
    assert net.origin["kind"] == "network" and net.origin["name"] == "torchvision/mobilenet_v3_small"
    assert net.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 7)
    state = networks.build("torchvision/mobilenet_v3_small", 7, weights="DEFAULT").original_state_dict()
    assert all(
        torch.equal(value, state[key]) for key, value in pretrained.items() if not key.startswith("classifier.3")
    )
    assert state["classifier.3.weight"].shape == (7, 1024)


def test_googlenet_by_name_has_no_auxiliary_heads() -> None:
    net = networks.build("torchvision/googlenet", 3)
    assert net.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_timm_by_name() -> None:
    pytest.importorskip("timm", reason="timm/<name> needs timm")
    net = networks.build("timm/resnet10t", 4, in_channels=1).eval()
    assert net(torch.zeros(1, 1, 64, 64)).shape == (1, 4)
    with pytest.raises(ValueError, match="build: no such network: 'timm/resnet51x' .did you mean timm/resnet"):
        networks.build("timm/resnet51x", 4)
    with pytest.raises(ValueError, match="timm/resnet18: weights must be None, .*a1_in1k.*, got 'NOPE'"):
        networks.build("timm/resnet18", 4, weights="NOPE")
