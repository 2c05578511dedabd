"""Global average pooling: the tap by which an exit reads the trunk."""

from __future__ import annotations

from torch import Tensor

from aep_ext.ops import _checks, _native, reference
from aep_ext.ops._dispatch import has_native


def global_avg_pool(features: Tensor) -> Tensor:
    """Mean over the spatial positions of every channel.

    Args:
        features: (N, C, H, W), float32, float64, bfloat16 or float16, any strides; channels_last and contiguous memory
            are the fast ones. C, H and W at least 1; N may be 0.

    Returns:
        (N, C) in the dtype of ``features``: the sum is formed in float32 (float64 for float64), divided by H * W and
        rounded once. New memory, never a view.

    Differentiable, any number of times (reverse mode; the native operator refuses forward mode). The gradient is an
    expanded view of one number per channel, so that autograd adds it to the trunk's gradient in one pass, without a
    full-size tensor of its own. Autocast leaves the operator alone.

    Raises:
        TypeError: ``features`` is no tensor, or its dtype breaks the rules above.
        ValueError: its shape does.

    Equivalent to::

        features.mean((2, 3))
    """
    if has_native(features):
        return _native.global_avg_pool(features)
    _checks.global_avg_pool(features)
    return reference.global_avg_pool(features)
