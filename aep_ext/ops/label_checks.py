"""The check of labels: on the reference path, and whether it is made where looking means waiting for a device."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from aep_ext import _load

_on = False


def is_check_labels_enabled() -> bool:
    """Whether :class:`check_labels` is on."""
    return _on


def _switch(mode: bool) -> None:
    global _on
    _on = mode
    if _load.extension is not None:
        _load.extension.ask_labels(mode)


class check_labels:
    """Turns the check of labels on GPUs on or off: a function, and a context manager.

    On the CPU the losses and scores look at their labels in any case, and raise IndexError for one out of range before
    anything is written. On a GPU looking would mean waiting for it, so by default nobody looks: a label out of range
    gives a NaN loss and no gradient, and is never counted as right. With this check on, the same error is raised there,
    at the price of one wait in every call of :func:`joint_cross_entropy`, :func:`multi_exit_loss`,
    :func:`linear_joint_cross_entropy` and :func:`subset_correct`, and of all that is made of them
    (``JointCrossEntropy``, ``score_subsets``). It is meant for
    finding out where a NaN comes from::

        ops.check_labels()  # from here on

        with ops.check_labels(False):  # not in here
            ...

    Off at first, unless the environment variable ``AEP_CHECK_LABELS`` is 1 when ``aep_ext`` is imported. It holds for
    the whole process, other threads included, as ``torch.cuda.set_sync_debug_mode`` does: a checkpointed loss is
    computed again in autograd's threads. Leaving the ``with`` block brings back what held when the object was made.

    Compiled functions (``torch.compile``) look as well where the native operators run, at every call, since their graph
    holds the operators; on the reference path it does not, and nobody looks. Turn the check on or off outside of what
    is compiled. While a CUDA graph is captured (by mode "reduce-overhead" too) nobody can wait for the device, and a
    replay looks at nothing: a call with the check on raises RuntimeError then. Meta and fake tensors have no labels.

    Args:
        mode: True for on, False for off.

    Raises:
        TypeError: ``mode`` is no bool.
    """

    def __init__(self, mode: bool = True) -> None:
        if not isinstance(mode, bool):
            raise TypeError(f"check_labels: mode must be True or False, got {type(mode).__name__}")
        self.mode, self._before = mode, _on
        _switch(mode)

    def __enter__(self) -> None:
        _switch(self.mode)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _switch(self._before)


_switch(_load.switched_on("AEP_CHECK_LABELS"))


def labels(op: str, target: Tensor, num_classes: int, ignore_index: int | None = None) -> None:
    """Raises IndexError for the first label that is neither a class nor ``ignore_index``, where labels are looked at:
    on the CPU, and elsewhere if :class:`check_labels` is on. Under tracing there is nothing to read."""
    if torch.compiler.is_compiling() or isinstance(target, FakeTensor) or not _looks(op, target.device):
        return
    bad = (target < 0) | (target >= num_classes)
    if ignore_index is not None:
        bad &= target != ignore_index
    if bool(bad.any()):
        position = int(bad.nonzero()[0])
        rule = f"within 0..{num_classes - 1}" + ("" if ignore_index is None else " or ignore_index")
        raise IndexError(f"aep::{op}: target must be {rule}, got {int(target[position])} at position {position}")


def _looks(op: str, device: torch.device) -> bool:
    if device.type in ("cpu", "meta"):
        return device.type == "cpu"
    if _on and device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"aep::{op}: check_labels must be off while a CUDA graph is captured (it waits for the device), "
                    "got it on"
                )
    return _on
