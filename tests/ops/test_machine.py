"""Results do not depend on the number of threads, and the instruction sets agree."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from aep_ext import _load, ops

# Larger than one thread's share (32768 elements), and not a multiple of any vector.
SHAPE = (4, 1037, 101)

PROGRAM = r"""
import sys, torch
from aep_ext import _load, ops
torch.manual_seed(0)
torch.set_num_threads(1)
results = {"isa": _load.extension.isa_in_use()}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x = torch.randn(3, 23, 77).mul(3).to(dtype)
    x[0, 3, 5], x[1, 4, 6], x[2, 5, 7] = float("nan"), float("inf"), -float("inf")
    w, y = torch.rand(3), torch.randint(77, (23,))
    r = {"stats": ops.ensemble_stats(x, w), "subsets": ops.subset_correct(x, w, y)}
    z = torch.randn(3, 23, 77).to(dtype).requires_grad_()
    loss = ops.joint_cross_entropy(z, y, w, label_smoothing=0.1)
    loss.loss.backward()
    r["loss"] = (loss.loss.detach(), loss.exit_losses.detach(), z.grad)
    f = torch.randn(23, 5, 7, 9).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = torch.zeros(23, 0, dtype=torch.int64)
    running, rows = torch.zeros(23, 77, dtype=wide), torch.arange(23)
    r["gate"] = ops.gate(f, running, 0.0, rows, state, x[0], weight=0.5, threshold=0.21)
    last = f.contiguous(memory_format=torch.channels_last)
    r["head"] = ops.multi_exit_linear_head([f, last], [torch.ones(2, 5, dtype=dtype)] * 2)
    results[str(dtype)] = {k: [v] if torch.is_tensor(v) else list(v) for k, v in r.items()}
torch.save(results, sys.argv[1])
"""


def results_with(isa: str, path: str) -> dict:
    environment = os.environ | {"AEP_ISA": isa, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM, path], check=True, env=environment, timeout=300)
    return torch.load(path, weights_only=True)


def test_instruction_sets_agree(native, tmp_path):
    """Sums, counts, argmax and gate decisions to the bit, statistics and losses to rounding."""
    names = [name.strip() for name in _load.extension.isa_supported().split(",")]
    found = {name: results_with(name, str(tmp_path / f"{name}.pt")) for name in names}
    assert [found[name].pop("isa") for name in names] == names
    expected = found.pop("scalar")
    for name, results in found.items():
        for dtype, groups in results.items():
            for group, tensors in groups.items():
                for i, (actual, wanted) in enumerate(zip(tensors, expected[dtype][group], strict=True)):
                    rounded = group in ("loss", "head") or (group, i) in {("stats", 1), ("gate", 4)}
                    half = actual.dtype in (torch.bfloat16, torch.float16)
                    tolerance = (
                        {"rtol": 1.6e-2 if half else 2e-5, "atol": 1e-3 if half else 2e-6}
                        if rounded
                        else {"rtol": 0, "atol": 0}
                    )
                    torch.testing.assert_close(
                        actual, wanted, equal_nan=True, **tolerance, msg=f"{name} {dtype} {group}[{i}]"
                    )


def everything(threads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    w, y = torch.rand(SHAPE[0], generator=generator), torch.randint(SHAPE[2], SHAPE[1:2], generator=generator)
    grad = torch.randn(SHAPE[1:], generator=generator)
    features = torch.randn(SHAPE[1], 8, 5, 5, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaf, scale = x.clone().requires_grad_(), w.clone().requires_grad_()
        ops.ensemble(leaf, scale).backward(grad)
        results = [leaf.grad.clone(), scale.grad.clone(), *ops.ensemble_stats(x, w), ops.subset_correct(x, w, y)]
        leaf.grad = None
        loss = ops.joint_cross_entropy(leaf, y, w, label_smoothing=0.1)
        loss.loss.backward()
        results += [loss.loss.detach(), loss.exit_losses.detach(), leaf.grad]
        state = torch.tensor([-1, 0]).repeat(SHAPE[1], 1)
        running, indices = torch.zeros(SHAPE[1:]), torch.arange(SHAPE[1])
        results += ops.gate(features, running, 0.0, indices, state, x[0], weight=0.5, threshold=1, criterion="patience")
        results += ops.gate(features, running, 0.0, indices, state[:, :0], x[0], weight=0.5, threshold=0.1)
        results += (
            [torch.ops.aep.multi_exit_linear_head([features], [torch.ones(3, 8)], [None])[1]] if _load.extension else []
        )
        return results
    finally:
        torch.set_num_threads(before)


def test_threads_do_not_change_a_bit(native):
    one = everything(1)
    for threads in (2, 3, 7):
        for a, b in zip(one, everything(threads), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_unknown_device_warns_once_and_runs_on_the_reference(monkeypatch, native):
    """A device without kernels is said, once, and still computes."""
    from aep_ext.ops import _dispatch

    monkeypatch.setattr(_dispatch, "_native", {})
    monkeypatch.setattr(_dispatch, "_warned", set())
    x, w = torch.randn(2, 3, 4), torch.ones(2)
    with pytest.warns(RuntimeWarning, match="no native kernels for device type 'cpu'"):
        ops.ensemble(x, w)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.ensemble(x, w)


def test_forced_reference_needs_no_extension():
    """AEP_FORCE_REFERENCE=1: every public function runs, silently."""
    program = (
        "import warnings; warnings.simplefilter('error', RuntimeWarning)\n"
        "import torch\nfrom aep_ext import _load, ops\nassert _load.extension is None\n"
        "x, w, y = torch.randn(2, 3, 4), torch.ones(2), torch.zeros(3, dtype=torch.int64)\n"
        "ops.ensemble(x, w); ops.ensemble_stats(x, w); ops.joint_cross_entropy(x, y, w); ops.subset_correct(x, w, y)\n"
        "ops.multi_exit_linear_head([torch.ones(2, 3, 2, 2)], [torch.ones(4, 3)])\n"
        "ops.gate(x[0], x[0], 0.0, y, y[:, None][:, :0], x[1], weight=0.5, threshold=0.5)\n"
    )
    environment = os.environ | {"AEP_FORCE_REFERENCE": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)
