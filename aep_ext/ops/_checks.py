"""Checks of the operators' arguments: used by the reference path and by the fake kernels.

The native operators make the same checks in C++ (csrc/torch/checks.h) with the same words; tests/ops/test_bad_input.py
compares the two. Every message has the form ``aep::<operator>: <rule>, got <value>``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses import FakeTensor

from aep_ext.ops import label_checks
from aep_ext.ops.types import EnsembleStats, GateResult

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")
MEMORY_MODES = ("recompute", "in_forward", "in_place")
NEEDS_ONE_LOSS = "aep::joint_cross_entropy: memory='{}' needs reduction 'mean' or 'sum', got 'none'"
STATELESS = ("confidence", "entropy", "margin")
POLICIES = (*STATELESS, "patience", "vote")
SUBJECTS = ("ensemble", "exit")
MAX_SUBSET_EXITS = 16


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_width(policy: str, num_classes: int) -> int:
    """Number of int64 state entries per row that ``policy`` keeps."""
    return {"patience": 2, "vote": num_classes}.get(policy, 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"aep::{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def _floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"aep::{op}: {name} must be float32, float64, bfloat16 or float16, got {_name(tensor.dtype)}")


def _dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"aep::{op}: {name} must be {_name(dtype)}, got {_name(tensor.dtype)}")


def _has_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.dim() != len(shape) or any(a != b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"aep::{op}: {name} must have shape {list(shape)}, got {_shape(tensor)}")


def _same_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"aep::{op}: {name} must be on device {device}, got {tensor.device}")


def _exit_logits(op: str, exit_logits: Tensor) -> None:
    _tensor(op, "exit_logits", exit_logits)
    _floating(op, "exit_logits", exit_logits)
    if exit_logits.dim() != 3:
        raise ValueError(f"aep::{op}: exit_logits must have 3 dimensions (E, N, K), got shape {_shape(exit_logits)}")
    if exit_logits.shape[0] < 1 or exit_logits.shape[2] < 1:
        raise ValueError(f"aep::{op}: exit_logits must have E >= 1 and K >= 1, got shape {_shape(exit_logits)}")


def _vector(op: str, name: str, vector: Tensor, length: int, device: torch.device) -> None:
    _tensor(op, name, vector)
    _floating(op, name, vector)
    _has_shape(op, name, vector, [length])
    _same_device(op, name, vector, device)


def _integers(op: str, name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> None:
    _tensor(op, name, tensor)
    _dtype(op, name, tensor, torch.int64)
    _has_shape(op, name, tensor, shape)
    _same_device(op, name, tensor, device)


def _scalar(op: str, name: str, value: object, device: torch.device, *, positive: bool = False) -> None:
    """A number, or a 0-d floating tensor on ``device`` (whose value is not read: that could wait for the device)."""
    if isinstance(value, Tensor):
        _floating(op, name, value)
        _has_shape(op, name, value, [])
        _same_device(op, name, value, device)
    elif isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"aep::{op}: {name} must be a number or a 0-d tensor, got {type(value).__name__}")
    elif positive and not 0 < value < math.inf:  # comparisons, which also trace; False for NaN
        raise ValueError(f"aep::{op}: {name} must be finite and greater than 0, got {value:g}")
    elif value != value:
        raise ValueError(f"aep::{op}: {name} must not be NaN, got {value:g}")


def _labels_wanted(op: str, device: torch.device) -> bool:
    """Whether labels on ``device`` are to be looked at."""
    if device.type in ("cpu", "meta"):
        return device.type == "cpu"
    if not label_checks.is_check_labels_enabled():
        return False
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"aep::{op}: check_labels must be off while a CUDA graph is captured (it waits for the device), "
                    "got it on"
                )
    return True


def labels(op: str, target: Tensor, num_classes: int, ignore_index: int | None = None) -> None:
    """Raises IndexError for the first label that is neither a class nor ``ignore_index``. Off the CPU, where reading
    the labels waits for the device, only if :class:`aep_ext.ops.check_labels` asks for it; under tracing there is
    nothing to read."""
    if torch.compiler.is_compiling() or isinstance(target, FakeTensor) or not _labels_wanted(op, target.device):
        return
    bad = (target < 0) | (target >= num_classes)
    if ignore_index is not None:
        bad &= target != ignore_index
    if bool(bad.any()):
        position = int(bad.nonzero()[0])
        rule = f"within 0..{num_classes - 1}" + ("" if ignore_index is None else " or ignore_index")
        raise IndexError(f"aep::{op}: target must be {rule}, got {int(target[position])} at position {position}")


def _feature_map(op: str, name: str, features: Tensor) -> None:
    _tensor(op, name, features)
    _floating(op, name, features)
    if features.dim() != 4:
        raise ValueError(f"aep::{op}: {name} must have 4 dimensions (N, C, H, W), got shape {_shape(features)}")
    if any(size < 1 for size in features.shape[1:]):
        raise ValueError(f"aep::{op}: {name} must have C, H and W of at least 1, got shape {_shape(features)}")


def global_avg_pool(features: Tensor) -> None:
    """Arguments of ``aep::global_avg_pool``."""
    _feature_map("global_avg_pool", "features", features)


def multi_exit_linear_head(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None
) -> None:
    """Arguments of ``aep::multi_exit_linear_head``."""
    _linears("multi_exit_linear_head", "features", features, weights, biases, _feature_map)


def _pooled(op: str, name: str, pooled: Tensor) -> None:
    _tensor(op, name, pooled)
    _floating(op, name, pooled)
    if pooled.dim() != 2:
        raise ValueError(f"aep::{op}: {name} must have 2 dimensions (N, C), got shape {_shape(pooled)}")
    if pooled.shape[1] < 1:
        raise ValueError(f"aep::{op}: {name} must have C of at least 1, got shape {_shape(pooled)}")


def _linears(
    op: str,
    name: str,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    check_input: Callable[[str, str, Tensor], None],
) -> None:
    """The linear layers of all exits on ``inputs``, an argument called ``name``."""
    if len(inputs) < 1:
        raise ValueError(f"aep::{op}: {name} must hold at least 1 tensor, got 0")
    if len(weights) != len(inputs):
        raise ValueError(f"aep::{op}: weights must hold {len(inputs)} tensors, got {len(weights)}")
    if biases is not None and len(biases) != len(inputs):
        raise ValueError(f"aep::{op}: biases must hold {len(inputs)} tensors, got {len(biases)}")
    for e, x in enumerate(inputs):
        check_input(op, f"{name}[{e}]", x)
    first = inputs[0]
    _tensor(op, "weights[0]", weights[0])
    if weights[0].dim() != 2 or weights[0].shape[0] < 1:
        raise ValueError(f"aep::{op}: weights[0] must have shape [K, C] with K >= 1, got {_shape(weights[0])}")
    num_classes = weights[0].shape[0]
    for e, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        if x.shape[0] != first.shape[0]:
            raise ValueError(f"aep::{op}: {name}[{e}] must have N = {first.shape[0]}, got shape {_shape(x)}")
        _tensor(op, f"weights[{e}]", weight)
        _has_shape(op, f"weights[{e}]", weight, [num_classes, x.shape[1]])
        pairs = [(f"{name}[{e}]", x), (f"weights[{e}]", weight)]
        bias = None if biases is None else biases[e]
        if bias is not None:
            _tensor(op, f"biases[{e}]", bias)
            _has_shape(op, f"biases[{e}]", bias, [num_classes])
            pairs.append((f"biases[{e}]", bias))
        for label, tensor in pairs:
            _dtype(op, label, tensor, first.dtype)
            _same_device(op, label, tensor, first.device)


def ensemble(exit_logits: Tensor, weights: Tensor, *, op: str = "ensemble") -> None:
    """Arguments of ``aep::ensemble``."""
    _exit_logits(op, exit_logits)
    _vector(op, "weights", weights, exit_logits.shape[0], exit_logits.device)


def ensemble_stats(
    exit_logits: Tensor, weights: Tensor, normalizer: float | Tensor, temperature: float | Tensor
) -> None:
    """Arguments of ``aep::ensemble_stats``."""
    op = "ensemble_stats"
    ensemble(exit_logits, weights, op=op)
    _scalar(op, "normalizer", normalizer, exit_logits.device, positive=True)
    _scalar(op, "temperature", temperature, exit_logits.device, positive=True)


def joint_cross_entropy(
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    memory: str = "recompute",
) -> None:
    """Arguments of ``aep::joint_cross_entropy``, the values of the labels apart (:func:`labels`)."""
    op = "joint_cross_entropy"
    _exit_logits(op, exit_logits)
    exits, rows, classes = exit_logits.shape
    _integers(op, "target", target, [rows], exit_logits.device)
    _vector(op, "exit_weights", exit_weights, exits, exit_logits.device)
    _loss_options(op, class_weight, label_smoothing, ignore_index, classes, exit_logits.device)
    if reduction not in REDUCTIONS:
        raise ValueError(f"aep::{op}: reduction must be 'none', 'mean' or 'sum', got '{reduction}'")
    if memory != "recompute" and reduction == "none":
        raise ValueError(NEEDS_ONE_LOSS.format(memory))


def _loss_options(
    op: str, class_weight: Tensor | None, label_smoothing: float, ignore_index: int, classes: int, device: torch.device
) -> None:
    """What the losses have in common."""
    if class_weight is not None:
        _vector(op, "class_weight", class_weight, classes, device)
        if torch.is_grad_enabled() and class_weight.requires_grad:
            raise ValueError(f"aep::{op}: class_weight must not require a gradient, got requires_grad=True")
    for name, value in (("label_smoothing", label_smoothing), ("ignore_index", ignore_index)):
        kinds = (int, torch.SymInt) if name == "ignore_index" else (int, float, torch.SymInt, torch.SymFloat)
        if not isinstance(value, kinds):
            rule = "an integer" if name == "ignore_index" else "a number"
            raise TypeError(f"aep::{op}: {name} must be {rule}, got {type(value).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"aep::{op}: label_smoothing must be within 0..1, got {label_smoothing:g}")


def linear_joint_cross_entropy(
    pooled: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    chunk: int | None,
) -> None:
    """Arguments of ``aep::linear_joint_cross_entropy``, the values of the labels apart (:func:`labels`)."""
    op = "linear_joint_cross_entropy"
    _linears(op, "pooled", pooled, weights, biases, _pooled)
    device = pooled[0].device
    _integers(op, "target", target, [pooled[0].shape[0]], device)
    _vector(op, "exit_weights", exit_weights, len(pooled), device)
    _loss_options(op, class_weight, label_smoothing, ignore_index, weights[0].shape[0], device)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"aep::{op}: reduction must be 'mean' or 'sum', got '{reduction}'")
    if chunk is not None and not isinstance(chunk, (int, torch.SymInt)):
        raise TypeError(f"aep::{op}: chunk must be an integer or None, got {type(chunk).__name__}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"aep::{op}: chunk must be at least 1, got {chunk}")


def memory_mode(memory: object) -> None:
    """The name of a memory mode of ``joint_cross_entropy``."""
    if memory not in MEMORY_MODES:
        raise ValueError(
            f"aep::joint_cross_entropy: memory must be 'recompute', 'in_forward' or 'in_place', got {memory!r}"
        )


def replaceable(exit_logits: Tensor, *others: Tensor | None) -> None:
    """Memory that ``memory="in_place"`` may overwrite: no element shared with another one or with ``others``."""
    op = "joint_cross_entropy"
    reach = 0
    if exit_logits.numel():
        for stride, size in sorted(zip(exit_logits.stride(), exit_logits.shape, strict=True)):
            if size > 1 and stride <= reach:
                raise RuntimeError(
                    f"aep::{op}: memory='in_place' needs exit_logits whose elements do not share memory (clone() "
                    f"them), got shape {_shape(exit_logits)} with strides {list(exit_logits.stride())}"
                )
            reach += stride * (size - 1)
    storage = exit_logits.untyped_storage()._cdata
    for other in others:
        if other is not None and other.untyped_storage()._cdata == storage:
            raise RuntimeError(
                f"aep::{op}: memory='in_place' overwrites exit_logits: no other argument may share their memory, got "
                f"one of shape {_shape(other)} that does"
            )


def subset_correct(exit_logits: Tensor, weights: Tensor, target: Tensor) -> None:
    """Arguments of ``aep::subset_correct``, the values of the labels apart (:func:`labels`)."""
    op = "subset_correct"
    ensemble(exit_logits, weights, op=op)
    if exit_logits.shape[0] > MAX_SUBSET_EXITS:
        raise ValueError(
            f"aep::{op}: exit_logits must have at most {MAX_SUBSET_EXITS} exits, got {exit_logits.shape[0]}"
        )
    _integers(op, "target", target, [exit_logits.shape[1]], exit_logits.device)


def gate(
    features: Tensor,
    running: Tensor,
    weight_sum: float | Tensor,
    indices: Tensor,
    state: Tensor,
    exit_logits: Tensor,
    weight: float | Tensor,
    threshold: float | Tensor,
    temperature: float | Tensor,
    policy: str,
    on: str,
) -> None:
    """Arguments of ``aep::gate``."""
    op = "gate"
    _tensor(op, "exit_logits", exit_logits)
    _floating(op, "exit_logits", exit_logits)
    if exit_logits.dim() != 2 or exit_logits.shape[1] < 1:
        raise ValueError(f"aep::{op}: exit_logits must have shape [n, K] with K >= 1, got {_shape(exit_logits)}")
    rows, classes = exit_logits.shape
    device = exit_logits.device
    if policy not in POLICIES:
        raise ValueError(f"aep::{op}: policy must be one of {', '.join(POLICIES)}, got '{policy}'")
    if on not in SUBJECTS:
        raise ValueError(f"aep::{op}: on must be 'ensemble' or 'exit', got '{on}'")
    _tensor(op, "features", features)
    _floating(op, "features", features)
    if features.dim() < 1 or features.shape[0] != rows:
        raise ValueError(f"aep::{op}: features must have {rows} rows, got shape {_shape(features)}")
    _same_device(op, "features", features, device)
    _tensor(op, "running", running)
    _running_sum(op, running, exit_logits.dtype)
    _has_shape(op, "running", running, [rows, classes])
    _same_device(op, "running", running, device)
    _integers(op, "indices", indices, [rows], device)
    _integers(op, "state", state, [rows, state_width(policy, classes)], device)
    _scalar(op, "weight_sum", weight_sum, device)
    _scalar(op, "weight", weight, device)
    _scalar(op, "threshold", threshold, device)
    _scalar(op, "temperature", temperature, device, positive=True)


def gate_one_(
    running: Tensor,
    stats: Tensor,
    leaves: Tensor,
    exit_logits: Tensor,
    weight_sum: float,
    weight: float,
    threshold: float,
    temperature: float,
    policy: str,
    on: str,
) -> None:
    """Arguments of ``aep::gate_one_``."""
    op = "gate_one_"
    tensors = {"running": running, "stats": stats, "leaves": leaves, "exit_logits": exit_logits}
    for name, tensor in tensors.items():
        _tensor(op, name, tensor)
    _floating(op, "exit_logits", exit_logits)
    if exit_logits.dim() != 2 or exit_logits.shape[0] != 1 or exit_logits.shape[1] < 1:
        raise ValueError(f"aep::{op}: exit_logits must have shape [1, K] with K >= 1, got {_shape(exit_logits)}")
    device = exit_logits.device
    if policy not in STATELESS:
        raise ValueError(f"aep::{op}: policy must be one of {', '.join(STATELESS)}, got '{policy}'")
    if on not in SUBJECTS:
        raise ValueError(f"aep::{op}: on must be 'ensemble' or 'exit', got '{on}'")
    _running_sum(op, running, exit_logits.dtype)
    _row(op, "running", running, exit_logits.shape[1], device)
    _dtype(op, "stats", stats, torch.float32)
    _row(op, "stats", stats, 3, device)
    _dtype(op, "leaves", leaves, torch.bool)
    _has_shape(op, "leaves", leaves, [1])
    _same_device(op, "leaves", leaves, device)
    for name, value in (("weight_sum", weight_sum), ("weight", weight), ("threshold", threshold)):
        _scalar(op, name, value, device)
    _scalar(op, "temperature", temperature, device, positive=True)
    _apart(op, {name: tensors.pop(name) for name in ("running", "stats", "leaves")}, tensors)


def _running_sum(op: str, running: Tensor, dtype: torch.dtype) -> None:
    """A sum of logits of ``dtype`` is kept in the accumulation dtype or in their own."""
    allowed = accumulate_dtype(dtype)
    if running.dtype not in (allowed, dtype):
        rule = _name(allowed) if allowed == dtype else f"{_name(allowed)} or {_name(dtype)}"
        raise TypeError(f"aep::{op}: running must be {rule}, got {_name(running.dtype)}")


def _row(op: str, name: str, tensor: Tensor, count: int, device: torch.device) -> None:
    """One dense row that is written in place."""
    _has_shape(op, name, tensor, [1, count])
    _same_device(op, name, tensor, device)
    if not tensor.is_contiguous():
        raise ValueError(f"aep::{op}: {name} must be contiguous, got strides {list(tensor.stride())}")


# ---- out tensors: checked as csrc/torch/results.h does


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would have something to record."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def no_gradients(op: str, *tensors: Tensor | None) -> None:
    """Operators that write into the caller's tensors record nothing, so nothing may require a gradient."""
    if needs_gradient(*tensors):
        raise ValueError(f"aep::{op}: arguments must not require a gradient where out is given, got requires_grad=True")


def parts(op: str, out: object, names: Sequence[str], optional: str = "") -> None:
    """``out`` is a tuple of tensors with these names; the one named ``optional`` may be None."""
    if not isinstance(out, (tuple, list)) or len(out) != len(names):
        found = f"{len(out)} entries" if isinstance(out, (tuple, list)) else type(out).__name__
        raise TypeError(f"aep::{op}: out must be a tuple of {len(names)} tensors ({', '.join(names)}), got {found}")
    for name, tensor in zip(names, out, strict=True):
        if not (tensor is None and name == optional):
            _tensor(op, f"out {name}", tensor)


def _range(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first element and behind its last."""
    if tensor.numel() == 0 or tensor.is_meta or isinstance(tensor, FakeTensor) or torch.compiler.is_compiling():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _result(
    op: str,
    name: str,
    out: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    _tensor(op, name, out)
    _dtype(op, name, out, dtype)
    _has_shape(op, name, out, shape)
    _same_device(op, name, out, device)
    if not out.is_contiguous(memory_format=memory_format):
        where = "" if memory_format == torch.contiguous_format else " in the memory format of the input"
        raise ValueError(f"aep::{op}: {name} must be contiguous{where}, got strides {list(out.stride())}")


def _apart(op: str, outputs: Mapping[str, Tensor | None], inputs: Mapping[str, object]) -> None:
    """No output shares memory with an input or with another output."""
    names = list(outputs)
    for i, name in enumerate(names):
        others = inputs | {other: outputs[other] for other in names[i + 1 :]}
        for other, tensor in others.items():
            if isinstance(tensor, Tensor) and outputs[name] is not None:
                (a, a_end), (b, b_end) = _range(outputs[name]), _range(tensor)
                if a < b_end and b < a_end:
                    raise ValueError(f"aep::{op}: {name} must not share memory with {other}, got overlapping memory")


def ensemble_out(exit_logits: Tensor, weights: Tensor, out: Tensor) -> None:
    """``out`` of ``aep::ensemble``, whose other arguments were checked."""
    _result("ensemble", "out", out, exit_logits.shape[1:], exit_logits.dtype, exit_logits.device)
    _apart("ensemble", {"out": out}, {"exit_logits": exit_logits, "weights": weights})


def ensemble_stats_out(
    exit_logits: Tensor,
    weights: Tensor,
    normalizer: float | Tensor,
    temperature: float | Tensor,
    out: EnsembleStats,
) -> None:
    """``out`` of ``aep::ensemble_stats``, whose other arguments were checked."""
    op, device = "ensemble_stats", exit_logits.device
    rows = exit_logits.shape[1]
    if out.logits is not None:
        _result(op, "out logits", out.logits, exit_logits.shape[1:], exit_logits.dtype, device)
    _result(op, "out stats", out.stats, [rows, 3], torch.float32, device)
    _result(op, "out argmax", out.argmax, [rows], torch.int64, device)
    inputs = {"exit_logits": exit_logits, "weights": weights, "normalizer": normalizer, "temperature": temperature}
    _apart(op, {f"out {name}": tensor for name, tensor in out._asdict().items()}, inputs)


def subset_correct_out(exit_logits: Tensor, weights: Tensor, target: Tensor, out: Tensor) -> None:
    """``out`` of ``aep::subset_correct``, whose other arguments were checked."""
    op = "subset_correct"
    _result(op, "out", out, [(1 << int(exit_logits.shape[0])) - 1, 2], torch.int64, exit_logits.device)
    _apart(op, {"out": out}, {"exit_logits": exit_logits, "weights": weights, "target": target})


def gate_out(
    features: Tensor,
    running: Tensor,
    indices: Tensor,
    state: Tensor,
    exit_logits: Tensor,
    scalars: Mapping[str, object],
    out: GateResult,
) -> None:
    """``out`` of ``aep::gate``, whose other arguments were checked."""
    rows = exit_logits.shape[0]
    device, integers = exit_logits.device, torch.int64
    _result(
        "gate", "out features", out.features, features.shape, features.dtype, device, suggest_memory_format(features)
    )
    for name, shape, dtype in (
        ("running", running.shape, running.dtype),
        ("indices", [rows], integers),
        ("state", state.shape, integers),
        ("stats", [rows, 3], torch.float32),
        ("argmax", [rows], integers),
        ("weight_sum", [], accumulate_dtype(exit_logits.dtype)),
        ("count", [], integers),
    ):
        _result("gate", f"out {name}", getattr(out, name), shape, dtype, device)
    inputs = {"features": features, "running": running, "indices": indices, "state": state, "exit_logits": exit_logits}
    _apart("gate", {f"out {name}": tensor for name, tensor in out._asdict().items()}, inputs | dict(scalars))
