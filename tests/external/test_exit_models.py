"""The network that timm's script builds by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="the network is timm's resnet18")

from benchmarks.external import exit_models  # noqa: E402


@pytest.fixture(autouse=True)
def _registered() -> None:
    exit_models.register()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.float32), ({"smooth": True}, torch.float32), ({"dtype": "float64"}, torch.float64)],
)
def test_timm_builds_it_and_the_outputs_have_both_shapes(options, dtype):
    # The other arguments are what timm's script passes where nothing is asked for.
    net = timm.create_model(
        exit_models.MODEL, pretrained=False, in_chans=3, num_classes=10, drop_rate=0.0, drop_path_rate=None, **options
    )
    x = torch.randn(2, 3, 32, 32)
    logits = net.train()(x)
    assert logits.shape == (exit_models.EXITS, 2, 10) and logits.dtype == dtype
    assert net.eval()(x).shape == (2, 10)
    assert net.num_classes == 10 and timm.data.resolve_data_config({}, model=net)["std"]


def test_the_smooth_network_has_no_kinks():
    kinks = (nn.ReLU, nn.MaxPool2d)
    assert any(isinstance(module, kinks) for module in timm.create_model(exit_models.MODEL).modules())
    smooth = timm.create_model(exit_models.MODEL, smooth=True)
    assert not any(isinstance(module, kinks) for module in smooth.modules())


def test_what_it_has_not_is_refused():
    with pytest.raises(ValueError, match="no pretrained weights"):
        exit_models.aep_resnet18(pretrained=True)
    with pytest.raises(ValueError, match="got 'float16'"):
        exit_models.aep_resnet18(dtype="float16")
