"""The gate for one row in place: bit for bit the gate's, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from aep_ext import _load, ops

CRITERIA = {"confidence": 0.35, "entropy": 1.2, "margin": 0.1}
CLASSES = [*range(1, 34), 100, 1000]


@pytest.fixture(params=["as loaded", "reference"], autouse=True)
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "reference":
        request.getfixturevalue("reference_path")
    return request.param


def start(classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Running sum, statistics and decision, the latter two of nonsense."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.zeros(1, classes, dtype=wide), torch.full((1, 3), 77.0), torch.tensor([True])


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN at the same places."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def compare(exits: list[Tensor], running: Tensor, **options: object) -> list[bool]:
    """Walks through exits (1, K) by both operators, compares them at each, and returns the decisions."""
    classes, row = running.shape[1], torch.zeros(1, dtype=torch.int64)
    _, stats, leaves = start(classes)
    ours, theirs, total, found = running.clone(), running.clone(), 0.0, []
    for e, logits in enumerate(exits):
        numbers = {"weight": 0.3 + 0.1 * e, "temperature": 0.8 + 0.3 * e} | options
        before = logits.clone()
        wanted = ops.gate(
            torch.zeros(1, 0), theirs, total, row, torch.zeros(1, 0, dtype=torch.int64), logits, **numbers
        )
        assert ops.gate_one_(ours, stats, leaves, logits, total, **numbers) is None
        assert same(ours, wanted.running) and same(stats, wanted.stats) and same(logits, before)
        assert leaves.item() == (wanted.count.item() == 0)
        found.append(leaves.item())
        if found[-1]:
            break
        theirs, total = wanted.running, wanted.weight_sum.item()
    return found


@pytest.mark.parametrize("criterion_on", ["ensemble", "exit"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_equals_the_gate(criterion, criterion_on, dtype):
    for classes in CLASSES:
        exits = [torch.randn(1, classes).mul(2).to(dtype) for _ in range(3)]
        compare(
            exits,
            start(classes, dtype)[0],
            threshold=CRITERIA[criterion],
            criterion=criterion,
            criterion_on=criterion_on,
        )
        for enabled in (False, True):
            assert compare(
                exits, start(classes, dtype)[0], threshold=2.0, criterion_on=criterion_on, last=True, enabled=enabled
            ) == [True]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_decides_at_the_threshold_itself(criterion):
    column = list(CRITERIA).index(criterion)
    logits, (running, stats, leaves) = torch.randn(1, 7), start(7)
    ops.gate_one_(running, stats, leaves, logits, 0.0, 1.0, 0.0, criterion=criterion, enabled=False)
    value = stats[0, column]
    beyond = torch.nextafter(value, torch.tensor(-math.inf if criterion == "entropy" else math.inf)).item()
    for threshold, wanted in ((value.item(), True), (beyond, False)):
        assert compare(
            [logits], start(7)[0], weight=1.0, temperature=1.0, threshold=threshold, criterion=criterion
        ) == [wanted]


def test_disabled_nobody_leaves_but_the_sum_goes_on(dtype):
    exits = [torch.randn(1, 9).to(dtype) for _ in range(4)]
    assert compare(exits, start(9, dtype)[0], threshold=0.0, enabled=False) == [False] * 4


@pytest.mark.parametrize("criterion_on", ["ensemble", "exit"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(value, criterion_on, dtype):
    for classes in (1, 2, 9, 33):
        for place in {0, classes // 2, classes - 1}:
            logits, rest = torch.randn(1, classes).to(dtype), torch.randn(1, classes).to(dtype)
            logits[0, place] = value
            for criterion, threshold in (("confidence", 0.0), ("entropy", math.inf), ("margin", -1.0)):
                found = compare(
                    [logits, rest],
                    start(classes, dtype)[0],
                    threshold=threshold,
                    criterion=criterion,
                    criterion_on=criterion_on,
                )
                assert not (math.isnan(value) and found[0])
        whole = torch.full((1, classes), value, dtype=dtype)
        compare([whole], start(classes, dtype)[0], threshold=0.0, criterion_on=criterion_on)
        assert compare([whole], start(classes, dtype)[0], threshold=2.0, criterion_on=criterion_on, last=True) == [True]


@pytest.mark.parametrize("layout", ["apart", "expanded", "backwards", "offset"])
def test_strides_of_the_logits(layout, dtype):
    for classes in (1, 2, 17, 40):
        logits = {
            "apart": lambda k: torch.randn(3, k, 2)[1:2, :, 1],
            "expanded": lambda k: torch.randn(1, 1).expand(1, k),
            "backwards": lambda k: torch.randn(k, 5).t()[2:3],
            "offset": lambda k: torch.randn(1, k + 3)[:, 1 : k + 1],
        }[layout](classes).to(dtype)
        compare([logits, logits], start(classes, dtype)[0], threshold=0.4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_running_sum_in_the_dtype_of_the_logits(half):
    for classes in (1, 5, 33):
        compare([torch.randn(1, classes).to(half)] * 3, torch.zeros(1, classes, dtype=half), threshold=0.4)


def test_steps_without_gates_end_at_the_ensemble(dtype):
    logits, weights = torch.randn(4, 1, 6).to(dtype), torch.tensor([0.1, 0.2, 0.3, 0.4])
    (running, stats, leaves), total = start(6, dtype), 0.0
    for x, weight in zip(logits, weights.tolist(), strict=True):
        ops.gate_one_(running, stats, leaves, x, total, weight, 0.0, enabled=False)
        total += weight
    assert torch.equal(running.to(dtype), ops.ensemble(logits, weights))


def test_the_answer_is_the_sum_over_the_weights(dtype):
    for criterion, criterion_on in (("confidence", "ensemble"), ("entropy", "exit")):
        (running, stats, leaves), x = start(21, dtype), torch.randn(1, 21).to(dtype)
        running.normal_()
        wanted = (running + x.to(running.dtype) * 0.3) / torch.tensor(0.7, dtype=running.dtype).add(0.3)
        ops.gate_one_(running, stats, leaves, x, 0.7, 0.3, 2.0, 1.5, criterion, criterion_on, enabled=False, last=True)
        assert leaves and torch.equal(running, wanted)


X = torch.zeros(1, 4)


def call(**changes: object) -> None:
    running, stats, leaves = start(4)
    args = {"running": running, "stats": stats, "leaves": leaves, "exit_logits": X, "weight_sum": 0.0}
    ops.gate_one_(**args | {"weight": 1.0, "threshold": 0.5} | changes)


SHARED = torch.zeros(1, 8)
CASES = {
    "criterion": ({"criterion": "vote"}, ValueError, "criterion"),
    "criterion_on": ({"criterion_on": "both"}, ValueError, "criterion_on"),
    "logits rows": ({"exit_logits": X.expand(2, 4)}, ValueError, "exit_logits"),
    "logits empty": ({"exit_logits": X[:, :0]}, ValueError, "exit_logits"),
    "logits int": ({"exit_logits": X.long()}, TypeError, "exit_logits"),
    "running dtype": ({"running": X.double()}, TypeError, "running"),
    "running wide": ({"running": X.double(), "exit_logits": X.half()}, TypeError, "running"),
    "running shape": ({"running": torch.zeros(1, 3)}, ValueError, "running"),
    "running device": ({"running": X.to("meta")}, ValueError, ".*device"),
    "stats dtype": ({"stats": torch.zeros(1, 3).double()}, TypeError, "stats"),
    "stats shape": ({"stats": torch.zeros(3)}, ValueError, "stats"),
    "leaves dtype": ({"leaves": torch.zeros(1)}, TypeError, "leaves"),
    "leaves shape": ({"leaves": torch.zeros((), dtype=torch.bool)}, ValueError, "leaves"),
    "weight": ({"weight": math.nan}, ValueError, "weight"),
    "weight_sum": ({"weight_sum": math.nan}, ValueError, "weight_sum"),
    "threshold": ({"threshold": math.nan}, ValueError, "threshold"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature"),
    "gradient": ({"exit_logits": X.clone().requires_grad_()}, ValueError, ".*gradient"),
    "gradient of the sum": ({"running": X.clone().requires_grad_()}, ValueError, ".*gradient"),
}
# What only matters to who writes in place.
NATIVE = {
    "running strides": ({"running": SHARED[:, ::2]}, ValueError, "running must be contiguous"),
    "one memory": (
        {"running": SHARED[:, :4], "exit_logits": SHARED[:, 3:7]},
        ValueError,
        "running must not share memory with exit_logits",
    ),
    "one memory of results": (
        {"running": SHARED[:, :4], "stats": SHARED[:, 2:5]},
        ValueError,
        "running must not share memory with stats",
    ),
}


@pytest.mark.parametrize("case", [*CASES, *NATIVE])
def test_errors_come_before_anything_is_written(case, path):
    if case in NATIVE and (path == "reference" or _load.extension is None):
        pytest.skip("the reference does not ask")
    changes, error, message = (CASES | NATIVE)[case]
    running, stats, leaves = start(4)
    given = {"running": running, "stats": stats, "leaves": leaves} | changes
    before = {name: t.detach().clone() for name, t in given.items() if isinstance(t, Tensor) and not t.is_meta}
    with pytest.raises(error, match=f"^aep::gate_one_: {message}.*, got "):
        call(**given)
    assert all(torch.equal(given[name].detach(), t) for name, t in before.items())


def test_no_tensor_at_all():
    with pytest.raises(TypeError, match="gate_one_.*exit_logits"):
        call(exit_logits=[[0.0] * 4])


def test_gradients_are_not_asked_for_where_none_are_recorded():
    with torch.no_grad():
        call(exit_logits=X.clone().requires_grad_())
    with torch.inference_mode():
        call()


def test_writing_is_noticed(native, path):
    """As by every operator in place: what autograd saved before must not be used."""
    running, stats, leaves = start(4)
    versions = [t._version for t in (running, stats, leaves)]
    ops.gate_one_(running, stats, leaves, X, 0.0, 1.0, 0.5)
    assert all(t._version > v for t, v in zip((running, stats, leaves), versions, strict=True))


def test_tangents_are_refused(native, path):
    if path == "reference":
        return  # torch's own operators carry them
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="aep::gate_one_: forward-mode .* not supported"):
        call(exit_logits=forward_ad.make_dual(X.clone(), torch.ones(1, 4)))


def test_opcheck(native, dtype):
    operator = torch.ops.aep.gate_one_.default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for criterion, criterion_on in (("confidence", "ensemble"), ("margin", "exit")):
        args = (*start(5, dtype), torch.randn(1, 5).to(dtype), 0.2, 0.3, 0.5, 1.5, criterion, criterion_on)
        torch.library.opcheck(operator, args, test_utils=checks)


def test_meta_and_fake_tensors_give_nothing():
    meta = [t.to("meta") for t in (*start(4), X)]
    assert ops.gate_one_(*meta, 0.0, 1.0, 0.5) is None
    with FakeTensorMode():
        assert call(exit_logits=torch.zeros(1, 4)) is None


def test_compiles_without_graph_breaks():
    def walk(exits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        running, stats = torch.zeros(1, 4), torch.zeros(1, 3)
        leaves = torch.zeros(1, dtype=torch.bool)
        for e in range(2):
            ops.gate_one_(running, stats, leaves, exits[e], 0.5 * e, 0.5, 0.3)
        return running, stats, leaves

    torch._dynamo.reset()
    exits = torch.randn(2, 1, 4)
    for a, b in zip(torch.compile(walk, fullgraph=True, backend="aot_eager")(exits), walk(exits), strict=True):
        torch.testing.assert_close(a, b)
