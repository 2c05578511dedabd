from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference

WIDTH = {"confidence": 0, "entropy": 0, "margin": 0, "patience": 2, "vote": None}
THRESHOLD = {"confidence": 0.35, "entropy": 1.6, "margin": 0.1, "patience": 2, "vote": 2}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows apart": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:, :1, :1, :1].expand(x.shape),
}


def initial_state(criterion: str, rows: int, classes: int, device: str = "cpu") -> Tensor:
    if criterion == "patience":
        return torch.tensor([-1, 0], device=device).repeat(rows, 1)
    return torch.zeros(rows, classes if criterion == "vote" else 0, dtype=torch.int64, device=device)


def make(rows=13, classes=7, criterion="confidence", device="cpu", dtype=torch.float32, maps=(6, 4, 4)) -> dict:
    state = initial_state(criterion, rows, classes, device)
    logits = torch.randn(rows, classes, device=device).mul(2).to(dtype)
    if criterion == "patience":
        last = torch.where(torch.rand(rows, device=device) < 0.7, logits.argmax(-1), 0)
        state = torch.stack([last, torch.randint(1, 4, (rows,), device=device)], 1)
    elif criterion == "vote":
        state = torch.randint(0, 2, (rows, classes), device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "features": torch.randn(rows, *maps, device=device).to(dtype),
        "running": torch.randn(rows, classes, device=device, dtype=wide),
        "weight_sum": 0.4,
        "indices": torch.randperm(100, device=device)[:rows],
        "state": state,
        "exit_logits": logits,
        "weight": 0.3,
        "threshold": THRESHOLD[criterion],
        "temperature": 1.2,
        "criterion": criterion,
    }


def naive(
    features,
    running,
    weight_sum,
    indices,
    state,
    exit_logits,
    weight,
    threshold,
    temperature,
    criterion,
    criterion_on="ensemble",
    enabled=True,
    last=False,
):
    """Row by row, in Python numbers; returns the rows in their new order, as lists, and the count."""
    stay, leave = [], []
    for i in range(len(indices)):
        total = [r + weight * x for r, x in zip(running[i].tolist(), exit_logits[i].double().tolist(), strict=True)]
        scaled = [t / ((weight_sum + weight) * temperature) for t in total]
        if criterion_on == "exit":
            scaled = [x / temperature for x in exit_logits[i].double().tolist()]
        top = max(scaled)
        exps = [math.exp(j - top) for j in scaled]
        p = sorted((x / sum(exps) for x in exps), reverse=True)
        stats = [p[0], -sum(q * math.log(q) for q in p if q > 0), p[0] - p[1] if len(p) > 1 else p[0]]
        winner = scaled.index(top)
        s = state[i].tolist()
        if criterion == "patience":
            s = [winner, s[1] + 1 if s[0] == winner else 1]
        elif criterion == "vote":
            s[winner] += 1
        reached = {
            "confidence": stats[0] >= threshold,
            "entropy": stats[1] <= threshold,
            "margin": stats[2] >= threshold,
            "patience": criterion == "patience" and s[1] >= threshold,
            "vote": criterion == "vote" and max(s) >= threshold,
        }[criterion]
        leaves = last or (enabled and reached)
        answer = [t / (weight_sum + weight) for t in total]
        row = (features[i], answer if leaves else total, int(indices[i]), s, stats, total.index(max(total)))
        (leave if leaves else stay).append(row)
    return stay + leave, len(stay)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("criterion_on", ["ensemble", "exit"])
@pytest.mark.parametrize("criterion", WIDTH)
def test_equals_naive(criterion, criterion_on, enabled, last, device):
    args = make(23, 7, criterion, device) | {"criterion_on": criterion_on, "enabled": enabled, "last": last}
    for result in (ops.gate(**args), reference.gate(**args)):
        rows, count = naive(**{k: v.cpu() if isinstance(v, Tensor) else v for k, v in args.items()})
        assert result.count.item() == count and result.count.device.type == device
        assert count == 0 if last else 0 < count < 23 if enabled else count == 23
        for i, (features, total, index, state, stats, answer) in enumerate(rows):
            assert torch.equal(result.features[i].cpu(), features if i < count else torch.zeros_like(features))
            torch.testing.assert_close(result.running[i].cpu(), torch.tensor(total))
            assert result.indices[i] == index and result.argmax[i] == answer
            assert result.state[i].tolist() == state
            torch.testing.assert_close(result.stats[i].cpu(), torch.tensor(stats))
        torch.testing.assert_close(result.weight_sum.cpu(), torch.tensor(0.7))


@pytest.mark.parametrize("criterion", WIDTH)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 10), (33, 2), (64, 100), (5, 21841)], ids=str)
def test_equals_reference(shape, criterion, dtype, device, close):
    args = make(*shape, criterion, device, dtype, maps=(4, 2, 2))
    for last in (False, True):
        check(ops.gate(**args, last=last), reference.gate(**args, last=last), close)


def check(result, expected, close) -> None:
    for name, actual, wanted in zip(expected._fields, result, expected, strict=True):
        assert actual.dtype == wanted.dtype and actual.shape == wanted.shape, name
        if name == "stats":
            close(actual, wanted)
        else:
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_feature_layouts(layout, dtype, device, close):
    args = make(dtype=dtype, device=device)
    args["features"] = LAYOUTS[layout](args["features"])
    result = ops.gate(**args)
    check(result, reference.gate(**args), close)
    kept = layout == "channels_last"
    assert result.features.is_contiguous(memory_format=torch.channels_last if kept else torch.contiguous_format)


@pytest.mark.parametrize("maps", [(), (1,), (5,), (3, 2), (2, 3, 2, 2), (1, 1, 1), (3, 1, 1)], ids=str)
def test_feature_shapes(maps, device, close):
    args = make(device=device, maps=maps)
    check(ops.gate(**args), reference.gate(**args), close)


def test_other_inputs_strided(device, close):
    args = make(9, 6, "vote", device)
    expected = reference.gate(**args)
    for name in ("running", "exit_logits", "state"):
        args[name] = args[name].t().contiguous().t()
    args["indices"] = torch.stack([args["indices"]] * 2, 1)[:, 0]
    check(ops.gate(**args), expected, close)


def test_features_of_another_dtype(device, close):
    args = make(device=device)
    args["features"] = args["features"].half()
    check(ops.gate(**args), reference.gate(**args), close)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_running_sum_in_the_dtype_of_the_logits(half, device, close):
    args = make(device=device, dtype=half)
    args["running"] = args["running"].to(half)
    for last in (False, True):
        result = ops.gate(**args, last=last)
        assert result.running.dtype == half
        check(result, reference.gate(**args, last=last), close)


def test_everything_is_permuted_together(device):
    """The classic bug: features compacted, but not the running ensemble, the indices or the state."""
    rows, classes = 40, 5
    number = torch.arange(rows, device=device)
    result = ops.gate(
        number.float()[:, None].expand(rows, 3).clone(),
        number.float()[:, None].expand(rows, classes).clone(),
        0.0,
        number,
        torch.stack([number + 100, torch.zeros_like(number)], 1),
        torch.nn.functional.one_hot(number % classes, classes).float(),
        weight=0.5,
        threshold=1,
        criterion="patience",
        enabled=False,
    )
    assert torch.equal(result.indices, number) and result.count == rows
    state = torch.stack([number % classes, torch.where(number % 3 == 0, 5, 0)], 1)
    result = ops.gate(
        number.float()[:, None].expand(rows, 3).clone(),
        number.float()[:, None].expand(rows, classes).clone(),
        0.0,
        number,
        state,
        torch.nn.functional.one_hot(number % classes, classes).float(),
        weight=0.5,
        threshold=6,
        criterion="patience",
    )
    leaves = number % 3 == 0
    order = torch.cat([number[~leaves], number[leaves]])
    count = int((~leaves).sum())
    assert result.count == count and torch.equal(result.indices, order)
    assert torch.equal(result.features[:count, 0], order[:count].float()) and not result.features[count:].any()
    divisor = torch.where(order % 3 == 0, 0.5, 1.0)
    assert torch.equal(result.running.amin(-1), order / divisor)
    assert torch.equal(result.state, torch.stack([order % classes, torch.where(order % 3 == 0, 6, 1)], 1))
    assert torch.equal(result.argmax, order % classes)


@pytest.mark.parametrize(
    "criterion, stay, leave", [("confidence", 1.01, 0.0), ("margin", 1.01, 0.0), ("entropy", -1.0, 99.0)]
)
def test_all_stay_and_all_leave(criterion, stay, leave, device):
    args = make(9, 4, criterion, device)
    assert ops.gate(**args | {"threshold": stay}).count == 9
    result = ops.gate(**args | {"threshold": leave})
    assert result.count == 0 and not result.features.any() and torch.equal(result.indices, args["indices"])


@pytest.mark.parametrize("criterion", ["confidence", "margin", "entropy"])
def test_threshold_is_inclusive(criterion, device):
    args = make(6, 5, criterion, device)
    column = ["confidence", "entropy", "margin"].index(criterion)
    value = ops.gate(**args | {"enabled": False}).stats[2, column].item()
    result = ops.gate(**args | {"threshold": value})
    assert args["indices"][2].item() in result.indices[int(result.count) :].tolist()


@pytest.mark.parametrize("criterion_on", ["ensemble", "exit"])
@pytest.mark.parametrize("criterion", WIDTH)
def test_nan_rows_leave_at_the_last_exit_only(criterion, criterion_on, device, close):
    args = make(6, 5, criterion, device) | {
        "threshold": 9.0 if criterion == "entropy" else 0.0,
        "criterion_on": criterion_on,
    }
    args["exit_logits"][2, 1] = float("nan")
    args["exit_logits"][4, 3] = float("inf")
    before = args["state"].clone()
    result = ops.gate(**args)
    check(result, reference.gate(**args), close)
    assert result.count == 2 and torch.equal(result.indices[:2], args["indices"][[2, 4]])
    assert result.stats[:2].isnan().all()
    if criterion == "patience":
        assert result.state[:2].tolist() == [[-1, 0], [-1, 0]]
    elif criterion == "vote":
        assert torch.equal(result.state[:2], before[[2, 4]])
    end = ops.gate(**args | {"last": True, "enabled": False})
    check(end, reference.gate(**args | {"last": True, "enabled": False}), close)
    assert end.count == 0 and torch.equal(end.indices, args["indices"]) and end.stats[[2, 4]].isnan().all()


def test_answers_are_the_sums_over_the_weights(dtype, device):
    args = make(40, 9, device=device, dtype=dtype) | {"temperature": 1.0}
    result = ops.gate(**args)
    kept = ops.gate(**args | {"enabled": False})
    count = int(result.count)
    assert 0 < count < 40 and kept.count == 40
    place = [kept.indices.tolist().index(i) for i in result.indices.tolist()]
    sums = kept.running[place]
    assert torch.equal(result.running[:count], sums[:count])
    assert torch.equal(result.running[count:], sums[count:] / result.weight_sum)
    confidence = torch.softmax(result.running[count:], -1).amax(-1)
    torch.testing.assert_close(result.stats[count:, 0], confidence.float(), rtol=1e-5, atol=1e-6)


def test_one_exit_answers_with_its_own_logits(device):
    args = make(8, 5, device=device) | {"weight": 1.0, "weight_sum": 0.0, "last": True}
    args["running"].zero_()
    assert torch.equal(ops.gate(**args).running, args["exit_logits"])


def test_a_nan_in_the_running_sum_does_not_matter_to_the_exit(device, close):
    args = make(4, 5, "confidence", device) | {"criterion_on": "exit", "threshold": 0.0}
    args["running"][1, 2] = float("nan")
    result = ops.gate(**args)
    assert result.count == 0 and result.argmax[1] == 2
    check(result, reference.gate(**args), close)


def test_patience_counts_a_run(device):
    rows, classes = 1, 3
    state, running, total = (
        initial_state("patience", rows, classes, device),
        torch.zeros(rows, classes, device=device),
        0.0,
    )
    seen = []
    for winner in (1, 1, 2, 2, 2):
        logits = torch.full((rows, classes), -9.0, device=device)
        logits[:, winner] = 9.0
        result = ops.gate(
            torch.zeros(rows, 1, device=device),
            running,
            total,
            torch.zeros(rows, dtype=torch.int64, device=device),
            state,
            logits,
            weight=1.0,
            threshold=3,
            criterion="patience",
            criterion_on="exit",
        )
        state, running, total = result.state, result.running, result.weight_sum
        seen.append((state.tolist()[0], int(result.count)))
    assert seen == [([1, 1], 1), ([1, 2], 1), ([2, 1], 1), ([2, 2], 1), ([2, 3], 0)]
    assert total.item() == 5.0


def test_scalars_as_tensors(device, close):
    args = make(device=device)
    expected = ops.gate(**args)
    for name in ("weight_sum", "weight", "threshold", "temperature"):
        for dtype in (torch.float32, torch.float64):
            value = torch.tensor(args[name], dtype=dtype, device=device)
            check(ops.gate(**args | {name: value}), expected, close)


def test_inputs_are_neither_changed_nor_returned(device):
    for criterion in WIDTH:
        args = make(5, 4, criterion, device)
        copies = {k: v.clone() for k, v in args.items() if isinstance(v, Tensor)}
        result = ops.gate(**args | {"enabled": False})
        inputs = {v.untyped_storage().data_ptr() for v in args.values() if isinstance(v, Tensor) and v.numel()}
        assert not inputs & {t.untyped_storage().data_ptr() for t in result if t.numel()}
        assert all(torch.equal(args[k], v) for k, v in copies.items())


def test_chain_of_gates_ends_at_the_ensemble(device):
    """With every gate disabled the running sum is `ensemble`, bit for bit, and the answers are it over the weights."""
    logits, weights = torch.randn(4, 9, 6, device=device), torch.tensor([0.1, 0.2, 0.3, 0.4])
    running, total = torch.zeros(9, 6, device=device), 0.0
    features, indices = torch.zeros(9, 2, device=device), torch.arange(9, device=device)
    state = initial_state("confidence", 9, 6, device)
    for x, weight in zip(logits, weights.tolist(), strict=True):
        result = ops.gate(features, running, total, indices, state, x, weight=weight, threshold=0.0, enabled=False)
        running, total, before = result.running, result.weight_sum, (running, total)
    assert torch.equal(running, ops.ensemble(logits, weights.to(device)))
    result = ops.gate(features, *before, indices, state, logits[3], weight=0.4, threshold=2.0, last=True)
    assert result.count == 0 and torch.equal(result.running, running / total)


def test_not_differentiable(device):
    args = make(device=device)
    for name in ("features", "running", "exit_logits"):
        args[name].requires_grad_()
    assert not any(t.requires_grad for t in ops.gate(**args))
