"""Exit heads: the pool by which an exit reads the trunk, and pool and linear layer of all exits at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aep_ext.ops import _checks, _native, reference
from aep_ext.ops._dispatch import use_native


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
    if use_native(features):
        return _native.global_avg_pool(features)
    _checks.tensor("global_avg_pool", "features", features, "NCHW")
    return reference.global_avg_pool(features)


def multi_exit_linear_head(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> Tensor:
    """Exit logits from the exits' feature maps.

    Args:
        features: E tensors (N, C_e, H_e, W_e) of one floating dtype and device, any strides; channels_last and
            contiguous memory are the fast ones. C, H and W at least 1; N may be 0.
        weights: E tensors (K, C_e), dtype and device as the features.
        biases: E entries, each a tensor (K,) or None; or None for no bias at all.

    Returns:
        (E, N, K) in the dtype of the features. The pool accumulates in float32 (float64 for float64) and rounds to the
        features' dtype before the product.

    Differentiable in all tensors, once. The gradient of a feature map is an expanded view of one number per channel, so
    that autograd adds it to the trunk's gradient without a full-size tensor of its own. Under autocast all inputs are
    cast to the autocast dtype, as torch does for ``linear``. Multiply-adds: N * C_e * K per exit.

    Raises:
        TypeError: an argument is no list or tuple, holds something that is no tensor, or a dtype breaks the rules.
        ValueError: a shape, a device or the number of tensors does.

    Source: section 3.1 of arXiv 2301.12168 (the exits), in the form of torchvision's ResNet head.

    Equivalent to::

        torch.stack([F.linear(x.mean((2, 3)), w, b) for x, w, b in zip(features, weights, biases)])
    """
    op = "multi_exit_linear_head"
    _checks.sequences(op, features=features, weights=weights, biases=features if biases is None else biases)
    if biases is None:
        biases = [None] * len(features)
    if len(features) > 0 and use_native(*features, *weights, *[bias for bias in biases if bias is not None]):
        return _native.multi_exit_linear_head(features, weights, biases)[0]
    features, weights, biases = reference.autocast(features, weights, biases)
    _checks.linears(op, "features", features, "NCHW", weights, biases)
    return reference.multi_exit_linear_head(features, weights, biases)
