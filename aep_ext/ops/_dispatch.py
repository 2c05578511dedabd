"""Chooses, per device type, between the native operators and the reference."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from aep_ext import _load

# Every operator is registered for the same device types, so one of them answers for all.
_PROBE = "aep::ensemble"
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta", "xpu": "XPU", "mps": "MPS"}


def _has_kernel(device_type: str) -> bool:
    key = _DISPATCH_KEYS.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(_PROBE, key)


# Filled at import, so that tracing finds constants; a device that is missing here has no kernels.
_native: dict[str, bool] = {
    kind: True for kind in _DISPATCH_KEYS if _load.extension is not None and (kind == "meta" or _has_kernel(kind))
}
_warned: set[str] = set()


def use_native(tensor: Tensor, *others: Tensor) -> bool:
    """True where the native operators have kernels for the device of ``tensor``, and ``others`` are tensors too.

    The first tensor on a device that the loaded extension has no kernels for gives one warning. What is no tensor at
    all goes to the reference path, whose checks name it.
    """
    for other in others:
        if not isinstance(other, Tensor):
            return False
    try:
        if tensor.is_cpu:  # `device.type` takes five times as long
            return _native["cpu"]
        return _native[tensor.device.type]
    except (AttributeError, KeyError):
        return _other(tensor)


def _other(tensor: object) -> bool:
    """:func:`use_native` for what the table does not hold."""
    if not isinstance(tensor, Tensor):
        return False
    kind = tensor.device.type
    if _load.extension is not None and kind not in _warned and not torch.compiler.is_compiling():
        _warn_once(kind)
    return False


# Not called while torch.compile traces: `torch.compiler.disable` would do too, but it imports the compiler (1.4 s).
def _warn_once(kind: str) -> None:
    _warned.add(kind)
    warnings.warn(
        f"aep_ext has no native kernels for device type '{kind}' in this build: the pure-torch reference runs there. "
        "`aep info` tells more.",
        RuntimeWarning,
        stacklevel=5,
    )
