from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every other": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "rows apart": lambda x: F.pad(x, (0, 3)).contiguous(memory_format=torch.channels_last)[..., : x.shape[-1]],
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
    "channels expanded": lambda x: x[:, :1].expand_as(x),
}
SHAPES = [
    (3, 67, 7, 7),
    (2, 33, 9, 3),
    (1, 2100, 2, 2),  # more channels than are summed at a time
    (2, 16, 1, 1),
    (4, 5, 1, 17),
    (0, 4, 3, 3),
    (1, 1, 5, 5),
    (2, 130, 4, 4),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, layout, dtype, device, close):
    x = LAYOUTS[layout](torch.randn(shape, device=device, dtype=dtype))
    result = ops.global_avg_pool(x)
    assert result.shape == shape[:2] and result.dtype == dtype and result.is_contiguous()
    close(result, reference.global_avg_pool(x))
    close(result, x.double().mean((2, 3)).to(dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_half_accumulates_in_float32(layout, device):
    """4096 ones: a bfloat16 accumulator would stop at 256."""
    x = torch.ones(1, 2, 64, 64, dtype=torch.bfloat16, device=device)
    assert ops.global_avg_pool(LAYOUTS[layout](x)).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_channel(bad, layout, device):
    x = torch.ones(2, 20, 3, 5, device=device)
    x[1, 7, 2, 4] = bad
    result = ops.global_avg_pool(LAYOUTS[layout](x))
    assert result[1, 7].isnan() if bad != bad else result[1, 7] == bad
    result[1, 7] = 1
    assert (result == 1).all()


def same_bits(x, layout):
    whole = ops.global_avg_pool(LAYOUTS[layout](x))
    for first, last in ((0, 1), (3, 40), (69, 70)):
        part = LAYOUTS[layout](x)[:, first:last]
        assert torch.equal(ops.global_avg_pool(part), whole[:, first:last])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_channel_gives_the_same_bits_wherever_it_stands(layout, device, native):
    same_bits(torch.randn(2, 70, 5, 8, device=device), layout)


def test_so_does_an_odd_map_on_the_cpu(native):
    """CUDA reads packs that are counted from the tensor's first value: an odd map's depend on those in front of it."""
    same_bits(torch.randn(2, 70, 5, 7), "contiguous")


def test_so_does_an_odd_map_of_channels_beside_each_other(device, native):
    same_bits(torch.randn(2, 70, 5, 7, device=device), "channels_last")


@pytest.mark.parametrize("path", ["as loaded", "reference"])
def test_gradcheck(path, device, on_reference):
    def pool(x: Tensor) -> Tensor:
        return ops.global_avg_pool(x) if path == "as loaded" else on_reference(ops.global_avg_pool, x)

    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradgradcheck(lambda x: pool(x).square(), x)


def test_gradient_is_an_expanded_view(native, device):
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    seen = []
    tap = x.view_as(x)
    tap.register_hook(lambda grad: seen.append(grad.stride()))
    (ops.global_avg_pool(tap).sum() + tap.sum()).backward()
    assert seen and torch.equal(x.grad, torch.full_like(x, 1 + 1 / 16))


def test_the_tap_alone_keeps_nothing(native):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ops.global_avg_pool(x)
    assert saved == []


def test_result_is_new_memory(device):
    x = torch.randn(2, 3, 1, 1, device=device)
    result = ops.global_avg_pool(x)
    assert torch.equal(result, x[:, :, 0, 0]) and result.data_ptr() != x.data_ptr()


def test_autocast_leaves_the_dtype(device):
    x = torch.randn(2, 3, 4, 4, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.global_avg_pool(x).dtype == torch.float32


@pytest.mark.parametrize("path", ["as loaded", "reference"])
@pytest.mark.parametrize(
    "value, error",
    [
        (None, TypeError),
        (torch.ones(2, 3, 4, 4).int(), TypeError),
        (torch.ones(2, 3, 4), ValueError),
        (torch.ones(2, 3, 0, 4), ValueError),
    ],
)
def test_wrong_features(value, error, path, on_reference):
    with pytest.raises(error, match="^aep::global_avg_pool: features must .*, got "):
        ops.global_avg_pool(value) if path == "as loaded" else on_reference(ops.global_avg_pool, value)
