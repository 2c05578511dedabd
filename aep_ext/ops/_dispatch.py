"""Chooses, per device type, between the native operators and the reference."""

from __future__ import annotations

import warnings

import torch

from aep_ext import _load

# Every operator is registered for the same device types, so one of them answers for all.
_PROBE = "aep::ensemble"
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta", "xpu": "XPU", "mps": "MPS"}


def _has_kernel(device_type: str) -> bool:
    key = _DISPATCH_KEYS.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(_PROBE, key)


# Filled at import for the usual devices, so that tracing finds constants.
_native: dict[str, bool] = {
    kind: _load.extension is not None and (kind == "meta" or _has_kernel(kind)) for kind in ("cpu", "cuda", "meta")
}
_warned: set[str] = set()


def use_native(tensor: torch.Tensor, *others: torch.Tensor) -> bool:
    """True where the native operators have kernels for the device of ``tensor``, and ``others`` are tensors too.

    The first tensor on a device that the loaded extension has no kernels for gives one warning. What is no tensor at
    all goes to the reference path, whose checks name it.
    """
    try:
        kind = tensor.device.type
    except AttributeError:
        return False
    for other in others:
        if not isinstance(other, torch.Tensor):
            return False
    native = _native.get(kind, False)
    if not native and _load.extension is not None and kind not in _warned and not torch.compiler.is_compiling():
        _warn_once(kind)
    return native


# Not called while torch.compile traces: `torch.compiler.disable` would do too, but it imports the compiler (1.4 s).
def _warn_once(kind: str) -> None:
    _warned.add(kind)
    warnings.warn(
        f"aep_ext has no native kernels for device type '{kind}' in this build: the pure-torch reference runs there. "
        "`aep info` tells more.",
        RuntimeWarning,
        stacklevel=4,
    )
