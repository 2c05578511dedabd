"""What torch expects of an operator: opcheck, torch.compile, meta tensors, torch.func, the flop counter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from aep_ext import ops

OPERATORS = [
    "global_avg_pool",
    "multi_exit_linear_head",
    "ensemble",
    "ensemble_backward_logits",
    "ensemble_backward_weights",
    "ensemble_stats",
    "multi_exit_loss",
    "multi_exit_loss_backward",
    "multi_exit_loss_with_grad",
    "multi_exit_loss_",
    "multi_exit_loss_scale_",
    "subset_correct",
    "gate",
    "gate_one_",
]


def samples(name: str, device: str, grad: bool) -> Iterator[tuple]:
    """Argument tuples of ``aep::name``; floating arguments require a gradient if ``grad``."""

    def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)

    target = torch.tensor([0, 3, -100, 2, 1], device=device)
    if name == "global_avg_pool":
        yield (rand(5, 3, 4, 2),)
        yield (rand(2, 6, 3, 3, dtype=torch.float64).detach().contiguous(memory_format=torch.channels_last),)
    elif name == "multi_exit_linear_head":
        maps = [rand(5, 3, 4, 4), rand(5, 6, 2, 3)]
        yield maps, [rand(4, 3), rand(4, 6)], [rand(4), None]
        last = [x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(grad) for x in maps]
        yield last, [rand(1, 3), rand(1, 6)], [None, None]
    elif name == "ensemble":
        yield rand(3, 5, 4), rand(3)
        yield rand(1, 0, 4, dtype=torch.float64), rand(1)
    elif name == "ensemble_backward_logits":
        yield rand(5, 4), rand(3)
    elif name == "ensemble_backward_weights":
        yield rand(5, 4), rand(3, 5, 4)
    elif name == "ensemble_stats":
        yield rand(3, 5, 4), rand(3), 0.5, 2.0
        yield rand(3, 5, 1), rand(3), 1.0, 1.0, torch.tensor(0.5, device=device), torch.tensor(2.0, device=device)
    elif name == "multi_exit_loss":
        yield rand(3, 5, 4), target, rand(3)
        for reduction in ("none", "sum", "mean"):
            options = torch.rand(4, device=device), 0.1, -100, reduction
            yield rand(3, 5, 4), target, rand(3), *options
            yield rand(3, 5, 4), torch.rand(5, 4, device=device), rand(3), *options, rand(3), None, 0.5, 3.0, True
    elif name == "multi_exit_loss_backward":
        logits, class_weight = rand(3, 5, 4), torch.rand(4, device=device)
        b = torch.rand(3, device=device)
        yield logits, target, rand(3), rand(32), rand(), None, None, None, None, 0.1, -100, "mean"
        every = rand(3), rand(3), rand(3)
        options = class_weight, 0.0, -100, "sum", rand(3), b, 0.5, 2.5
        yield logits, target, rand(3), rand(82), rand(), *every, *options
        wide = rand(3, 1).expand(3, 5)
        yield logits, target, rand(3), rand(32), None, wide, None, None, class_weight, 0.0, -100, "none"
    elif name in ("multi_exit_loss_with_grad", "multi_exit_loss_"):
        for reduction in ("sum", "mean"):
            x = rand(3, 5, 4)
            # The second is no leaf: it may be overwritten although it requires a gradient.
            logits = x * 1 if name.endswith("_") else x
            terms = (rand(3), torch.rand(3, device=device), 0.5) if reduction == "mean" else ()
            yield logits, target, rand(3), torch.rand(4, device=device), 0.1, -100, reduction, *terms
    elif name == "multi_exit_loss_scale_":
        yield rand(3, 5, 4).detach(), rand().detach(), 2.0
    elif name == "subset_correct":
        yield rand(3, 5, 4), rand(3), target.clamp(0)
    elif name == "gate_one_":  # refuses what requires a gradient, and runs on the CPU only
        if device == "cpu":
            row = torch.zeros(1, 4), torch.zeros(1, 3), torch.zeros(1, dtype=torch.bool)
            yield *row, rand(1, 4).detach(), 0.2, 0.3, 0.5, 1.5, "margin", "exit", True, True
    else:
        for criterion, width in {"confidence": 0, "patience": 2, "vote": 4}.items():
            features = rand(5, 2, 3, 3)
            if criterion == "patience":
                features = features.detach().contiguous(memory_format=torch.channels_last).requires_grad_(grad)
            scalar = torch.tensor(0.5, device=device) if criterion == "vote" else None
            yield (
                features,
                rand(5, 4),
                torch.arange(5, device=device),
                torch.zeros(5, width, dtype=torch.int64, device=device),
                rand(5, 4),
                0.5,
                0.5,
                0.5,
                1.0,
                criterion,
                "ensemble",
                True,
                criterion == "vote",
                scalar,
                None,
                scalar,
                None,
            )


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, grad, device, native):
    operator = getattr(torch.ops.aep, name).default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if grad and ("backward" in name or name.endswith("loss_")):
        # It differentiates. A backward cannot be differentiated: the next test. What a compiler makes of overwritten
        # logits is not asked for: the public function refuses.
        checks.pop()
    for args in samples(name, device, grad):
        torch.library.opcheck(operator, args, test_utils=checks)


@pytest.mark.parametrize("name", [name for name in OPERATORS if "backward" in name])
def test_backward_operators_say_that_they_have_no_derivative(name, device, native):
    operator = getattr(torch.ops.aep, name).default
    for args in samples(name, device, True):
        with pytest.raises(RuntimeError, match=r"aep::\w+: double backward is not supported"):
            operator(*args).sum().backward()


def calls(device: str) -> dict[str, tuple[Callable[..., object], Callable[[int], tuple]]]:
    """Public functions with a maker of arguments for n rows."""
    kind = {"device": device}

    def head(*tensors: Tensor) -> Tensor:
        return ops.multi_exit_linear_head(tensors[:2], tensors[2:4], [tensors[4], None])

    def gate(features: Tensor, running: Tensor, logits: Tensor, criterion: str) -> tuple:
        n, classes = logits.shape
        state = torch.zeros(n, {"confidence": 0, "patience": 2, "vote": classes}[criterion], dtype=torch.int64, **kind)
        indices = torch.arange(n, **kind)
        return ops.gate(features, running, 0.5, indices, state, logits, weight=0.5, threshold=0.5, criterion=criterion)

    weights = torch.tensor([0.2, 0.3, 0.5], **kind)
    return {
        "pool": (ops.global_avg_pool, lambda n: (torch.randn(n, 3, 4, 2, **kind),)),
        "head": (
            head,
            lambda n: (
                torch.randn(n, 3, 4, 4, **kind),
                torch.randn(n, 6, 2, 2, **kind),
                torch.randn(4, 3, **kind),
                torch.randn(4, 6, **kind),
                torch.randn(4, **kind),
            ),
        ),
        "ensemble": (ops.ensemble, lambda n: (torch.randn(3, n, 4, **kind), weights.clone())),
        "stats": (
            lambda x, w: ops.ensemble_stats(x, w, normalizer=w.detach().sum(), temperature=2.0),
            lambda n: (torch.randn(3, n, 4, **kind), weights.clone()),
        ),
        "loss": (
            lambda x, a, y: ops.joint_cross_entropy(x, y, a, label_smoothing=0.1).loss,
            lambda n: (torch.randn(3, n, 4, **kind), weights.clone(), torch.randint(4, (n,), **kind)),
        ),
        "loss in forward": (
            lambda x, a, y: ops.joint_cross_entropy(x, y, a, label_smoothing=0.1, memory="in_forward").loss,
            lambda n: (torch.randn(3, n, 4, **kind), weights.clone(), torch.randint(4, (n,), **kind)),
        ),
        "loss per row": (
            lambda x, a, y: ops.joint_cross_entropy(x, y, a, reduction="none"),
            lambda n: (torch.randn(3, n, 4, **kind), weights.clone(), torch.randint(4, (n,), **kind)),
        ),
        "loss of several terms": (
            lambda x, a, c, y: ops.multi_exit_loss(x, y, a, c, distillation=0.5),
            lambda n: (torch.randn(3, n, 4, **kind), weights.clone(), weights + 1, torch.randint(4, (n,), **kind)),
        ),
        "loss of several terms in forward": (
            lambda x, a, y: ops.multi_exit_loss(x, y, a, a, distillation=0.5, memory="in_forward").loss,
            lambda n: (torch.randn(3, n, 4, **kind), weights.clone(), torch.randint(4, (n,), **kind)),
        ),
        "subsets": (
            ops.subset_correct,
            lambda n: (torch.randn(3, n, 4, **kind), weights.clone(), torch.randint(4, (n,), **kind)),
        ),
        "gate": (
            lambda f, r, x: (*gate(f, r, x, "confidence"), *gate(f, r, x, "patience"), *gate(f, r, x, "vote")),
            lambda n: (torch.randn(n, 2, 3, **kind), torch.randn(n, 4, **kind), torch.randn(n, 4, **kind)),
        ),
    }


NAMES = list(calls("cpu"))


def flat(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def run(function: Callable[..., object], args: tuple) -> list[Tensor]:
    """Results, and gradients of all that require one."""
    leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in args]
    results = flat(function(*leaves))
    total = [r.float().square().sum() for r in results if r.requires_grad]
    if total:
        sum(total).backward()
    return [r.detach() for r in results] + [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name, dynamic, device):
    function, make = calls(device)[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (6, 9) if dynamic else (6,):
        args = make(rows)
        for actual, expected in zip(run(compiled, args), run(function, args), strict=True):
            torch.testing.assert_close(actual, expected)


def test_dynamic_rows_compile_once(device, native):
    function, make = calls(device)["loss"]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 6, 17):
        compiled(*make(rows))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiles_with_inductor(device):
    function, make = calls(device)["loss"]
    torch._dynamo.reset()
    args = make(6)
    compiled = torch.compile(function, fullgraph=True)
    for actual, expected in zip(run(compiled, args), run(function, args), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_give_shapes(name):
    function, make = calls("cpu")[name]
    expected = flat(function(*make(6)))
    on_meta, _ = calls("meta")[name]
    for actual, wanted in zip(flat(on_meta(*(a.to("meta") for a in make(6)))), expected, strict=True):
        assert actual.shape == wanted.shape and actual.dtype == wanted.dtype and actual.is_meta


@pytest.mark.parametrize("path", ["as loaded", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_give_shapes(name, path, on_reference):
    function, make = calls("cpu")[name]
    expected = flat(function(*make(6)))
    with FakeTensorMode():
        function, make = calls("cpu")[name]
        args = make(6)
        result = function(*args) if path == "as loaded" else on_reference(function, *args)
    for actual, wanted in zip(flat(result), expected, strict=True):
        assert actual.shape == wanted.shape and actual.dtype == wanted.dtype


@pytest.mark.parametrize("name", ["pool", "head", "ensemble", "loss", "loss in forward"])
def test_functional_transforms_say_that_they_cannot(name, native):
    """torch.func cannot see into a C++ backward, and torch refuses rather than compute nonsense."""
    function, make = calls("cpu")[name]
    args = make(3)
    with pytest.raises(RuntimeError, match="C\\+\\+ autograd function|functorch transform|torch::autograd::Function"):
        torch.func.grad(lambda x: flat(function(x, *args[1:]))[0].sum())(args[0])


@pytest.mark.parametrize("name", ["pool", "head", "ensemble", "stats", "loss", "loss in forward"])
def test_forward_mode_is_refused(name, native):
    """A tangent is never dropped without a word: zero would be a wrong derivative."""
    function, make = calls("cpu")[name]
    args = [a.detach() for a in make(3)]
    for place, value in enumerate(args):
        if not value.is_floating_point():
            continue
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(value, torch.ones_like(value))
            with pytest.raises(RuntimeError, match="aep::.*: forward-mode differentiation is not supported"):
                function(*args[:place], dual, *args[place + 1 :])


def counted(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops_of_the_head_are_those_of_its_products(device, on_reference):
    rows, maps, classes = 3, [(8, 4, 4), (16, 2, 2)], 10
    features = [torch.randn(rows, *m, device=device, requires_grad=True) for m in maps]
    weights = [torch.randn(classes, m[0], device=device, requires_grad=True) for m in maps]
    biases = [torch.randn(classes, device=device, requires_grad=True), None]

    def forward() -> Tensor:
        return ops.multi_exit_linear_head(features, weights, biases)

    expected = 2 * sum(rows * m[0] * classes for m in maps)
    assert counted(forward) == counted(lambda: on_reference(forward)) == expected
    with torch.no_grad():
        assert counted(forward) == expected
    assert counted(lambda: forward().sum().backward()) == 3 * expected
    assert counted(lambda: on_reference(lambda: forward().sum().backward())) == 3 * expected


@pytest.mark.parametrize("name", [n for n in NAMES if n != "head"])
def test_other_operators_count_nothing(name, device, on_reference):
    function, make = calls(device)[name]
    args = make(4)
    assert counted(lambda: run(function, args)) == counted(lambda: on_reference(run, function, args)) == 0


def test_every_operator_has_a_flop_formula(native):
    from torch.utils.flop_counter import flop_registry

    assert all(getattr(torch.ops.aep, name) in flop_registry for name in OPERATORS)


def test_exports(device, native):
    """torch.export keeps the operators as they are."""

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return ops.ensemble(x, w)

    args = (torch.randn(3, 5, 4, device=device), torch.rand(3, device=device))
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Net(), args, dynamic_shapes=({1: rows}, None))
    assert any("aep.ensemble" in str(node.target) for node in program.graph.nodes)
    other = torch.randn(3, 7, 4, device=device)
    assert torch.equal(program.module()(other, args[1]), ops.ensemble(other, args[1]))
