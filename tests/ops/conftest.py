"""Shared by the operators' tests: devices, dtypes, layouts, and the two paths (native, reference)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from aep_ext import _load
from aep_ext.ops import _dispatch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device type with native kernels; CUDA only where a GPU is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def native() -> None:
    """For tests of what only the extension has."""
    if _load.extension is None:
        pytest.skip("the native module is not loaded")


@pytest.fixture
def reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions as they run without the extension."""
    monkeypatch.setattr(_dispatch, "_native", {})
    monkeypatch.setattr(_dispatch, "_warned", {"cpu", "cuda", "meta"})


@pytest.fixture
def on_reference() -> Callable[..., object]:
    """Calls a public function on its reference path, whatever is loaded."""

    def call(function: Callable[..., object], *args: object, **kwargs: object) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_dispatch, "_native", {})
            patch.setattr(_dispatch, "_warned", {"cpu", "cuda", "meta"})
            return function(*args, **kwargs)

    return call


def _layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other memory layouts."""
    yield "contiguous", tensor
    yield "transposed", tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "exits inside", tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    wide = torch.full(
        (*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    wide[..., 1 : 2 * tensor.shape[-1] : 2] = tensor
    yield "every other", wide[..., 1 : 2 * tensor.shape[-1] : 2]
    yield "offset", torch.cat([tensor.new_full((1,), 7.0), tensor.flatten()])[1:].view(tensor.shape)


@pytest.fixture
def layouts() -> Callable[[Tensor], Iterator[tuple[str, Tensor]]]:
    return _layouts


@pytest.fixture
def close() -> Callable[..., None]:
    """assert_close with a tolerance that suits the storage dtype, NaN equal to NaN."""
    tolerances = {
        torch.float64: (1e-10, 1e-12),
        torch.float32: (2e-5, 2e-6),
        torch.bfloat16: (1.6e-2, 1e-3),
        torch.float16: (2e-3, 2e-4),
    }

    def check(actual: Tensor, expected: Tensor, storage: torch.dtype | None = None) -> None:
        rtol, atol = tolerances[storage or expected.dtype]
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)

    return check
