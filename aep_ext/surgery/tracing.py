"""A CNN's forward as one flat graph of module calls, opened only where a cut may lie.

Modules stay whole (leaves) unless they must be opened. So everything inside them that depends on the training mode
(dropout, stochastic depth, BatchNorm) keeps working, and whatever they do in Python needs no tracing.
"""

from __future__ import annotations

import builtins
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from aep_ext._utils import eval_mode
from aep_ext.surgery.measure import before_forward, first_line, shadow

__all__ = ["CannotTrace", "TracedModel", "chain_graph", "is_plain_sequential", "same_as_cut", "trace"]


class CannotTrace(Exception):
    """torch.fx could not follow this forward; the text says why."""


@dataclass
class TracedModel:
    """``graph``: its targets are qualified names in the model. ``outputs``: for each module that was called, leaf or
    opened, the nodes that hold its results, one per call."""

    graph: fx.Graph
    outputs: dict[str, list[fx.Node]] = field(default_factory=dict)


class FunctionInMode(nn.Module):
    """A function with an argument that is ``self.training``, as a module, so that a traced net still obeys train/eval.

    Args:
        function: importable, so that the module can be pickled.
        where: position or keyword of the argument.
    """

    def __init__(self, function: Callable[..., Tensor], where: int | str) -> None:
        super().__init__()
        self.function = function
        self.where = where

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(self.where, str):
            return self.function(*args, **{**kwargs, self.where: self.training})
        return self.function(*args[: self.where], self.training, *args[self.where + 1 :], **kwargs)

    def extra_repr(self) -> str:
        return f"{getattr(self.function, '__name__', self.function)}, {self.where}=training"


class Constant(nn.Module):
    """A tensor that a forward makes of numbers. It is in no state dict."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        return self.value


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether the module does nothing but run its children in order."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


class _OneInput(nn.Module):
    """The model called with its image alone: Python then fills in the other arguments' defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def same_as_cut(value: Any, form: str, expected: Any, shape: list[int]) -> None:
    """Stands in a cut network where the model's Python reads a size: what follows was traced for one answer alone.

    Args:
        value: computed from shapes.
        form: what Python made of it: "bool", "len", "int" or "float".
        expected: the answer for an image of ``shape`` (C, H, W).

    Raises:
        ValueError: the answer is another one.
    """
    seen = getattr(builtins, form)(value)
    if seen != expected:
        raise ValueError(
            f"this network was cut for images of shape {shape}, and its forward depends on a size that other images "
            f"change ({expected} there, {seen} here); cut it anew with example= of these images"
        )


class _Sized:
    """What Python may also use as a number or take the length of, if it was computed from shapes."""

    def __len__(self) -> int:
        return self.tracer.known(self, "len")  # type: ignore[attr-defined]

    def __int__(self) -> int:
        return self.tracer.known(self, "int")  # type: ignore[attr-defined]

    def __float__(self) -> float:
        return self.tracer.known(self, "float")  # type: ignore[attr-defined]

    __index__ = __int__


class _SizedProxy(_Sized, fx.Proxy):
    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _SizedAttribute(self, k)


class _SizedAttribute(_Sized, fx.proxy.Attribute):
    __getattr__ = _SizedProxy.__getattr__


class _Tracer(fx.Tracer):
    """With an ``example``, also follows branches and loops that depend on shapes alone: as this example takes them,
    guarded by :func:`same_as_cut`."""

    def __init__(self, opened: set[str], example: Tensor | None = None) -> None:
        super().__init__(param_shapes_constant=True)
        self.opened = opened
        self.example = example
        self.outputs: dict[str, list[fx.Node]] = {}
        self.shadow: nn.Module | None = None
        self.values: dict[fx.Node, Any] = {}
        self.guarded: set[tuple[fx.Node, str]] = set()
        self.evaluating = False  # tracing sees every call of a module

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return super().proxy(node) if self.example is None else _SizedProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return super().to_bool(obj) if self.example is None else self.known(obj, "bool")

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        if self.example is None:
            return super().iter(obj)
        return iter([obj[i] for i in range(self.known(obj, "len"))])

    def known(self, obj: Any, form: str) -> Any:
        """What Python sees of this value on the example, which the cut network will check."""
        value = self._value(obj.node)
        if any(isinstance(part, Tensor) for part in tree_leaves(value)):
            raise fx.proxy.TraceError("its path depends on the numbers in a tensor")
        assert self.example is not None
        seen = getattr(builtins, form)(value)
        if (obj.node, form) not in self.guarded:
            self.guarded.add((obj.node, form))
            with self.graph.inserting_after(obj.node):
                guard = self.graph.call_function(same_as_cut, (obj.node, form, seen, list(self.example.shape[1:])))
            guard.meta["is_wrapped"] = True  # unpickling traces a graph anew: this is not to be looked into
        return seen

    def _value(self, wanted: fx.Node) -> Any:
        """A node's value on the example, computed without data."""
        self.shadow = self.shadow or shadow(self.root).eval()
        self.evaluating = True
        try:
            for node in self.graph.nodes:
                if node not in self.values and node.target is not same_as_cut:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
                    with torch.no_grad():
                        self.values[node] = self._run(
                            node, [list(a) if isinstance(a, list) else a for a in args], kwargs
                        )
                if node is wanted:
                    break
        finally:
            self.evaluating = False
        return self.values[wanted]

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        assert self.shadow is not None and self.example is not None
        if node.op == "placeholder":
            return self.example.to("meta")
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            return getattr(self.shadow.get_submodule(owner), name)
        if node.op == "call_module":
            return self.shadow.get_submodule(node.target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def is_leaf_module(self, module: nn.Module, qualified: str) -> bool:
        path = qualified.removeprefix("model").removeprefix(".")
        return path != "" and path not in self.opened and not is_plain_sequential(module)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m).removeprefix("model").removeprefix(".")
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.outputs.setdefault(path, []).append(result.node)
        return result


def _trace_once(model: nn.Module, opened: set[str], example: Tensor | None) -> TracedModel:
    tracer = _Tracer(opened, example)
    try:
        graph = tracer.trace(_OneInput(model))
    except Exception as error:  # a forward may raise anything when it is fed proxies
        raise CannotTrace(first_line(error)) from error
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.target.startswith("model."):
            _keep_constant(model, graph, node, getattr(tracer.root, node.target))
        elif node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("model.")
    return TracedModel(graph, tracer.outputs)


def _keep_constant(model: nn.Module, graph: fx.Graph, node: fx.Node, value: Tensor) -> None:
    """A tensor that the forward makes of numbers becomes a module of ``model``."""
    name = node.target.lstrip("_")
    before = getattr(model, name, None)
    if isinstance(before, Constant) and not torch.equal(before.value, value):
        raise CannotTrace("its forward makes a tensor that is another one each time")
    model.add_module(name, Constant(value))
    with graph.inserting_before(node):
        node.replace_all_uses_with(graph.call_module(name))
    graph.erase_node(node)


def trace(model: nn.Module, opened: set[str], example: Tensor | None = None) -> TracedModel:
    """Traces ``model``'s forward. Opened: the model itself, plain Sequentials, and the modules named in ``opened``.

    Functions that are given ``self.training`` become modules, which are added to ``model``. Where the forward branches
    on shapes an ``example`` is needed; the graph then checks that later images take the same path.

    Raises:
        CannotTrace: torch.fx cannot follow the forward.
        ValueError: the forward takes another path in training mode.
    """
    with eval_mode(model):
        in_training = _trace_once(model.train(), opened, example)
        traced = _trace_once(model.eval(), opened, example)
    _unify_modes(model, traced, in_training)
    _localise_batch_sizes(traced.graph)
    return traced


def _structure(value: Any, index: dict[fx.Node, int]) -> Any:
    return fx.node.map_arg(value, lambda node: ("node", index[node]))


def _unify_modes(model: nn.Module, traced: TracedModel, in_training: TracedModel) -> None:
    """Makes the eval graph right in both modes; the two may differ in nothing but arguments that are
    ``self.training``."""
    nodes, others = list(traced.graph.nodes), list(in_training.graph.nodes)
    index = {node: i for i, node in enumerate(nodes)} | {node: i for i, node in enumerate(others)}
    flags: list[tuple[fx.Node, list[int | str]]] = []
    for i in range(max(len(nodes), len(others))):
        ours, theirs = (nodes[i] if i < len(nodes) else None), (others[i] if i < len(others) else None)
        if ours is None or theirs is None or (ours.op, ours.target) != (theirs.op, theirs.target):
            names = " against ".join("nothing" if n is None else repr(str(n.target)) for n in (theirs, ours))
            raise ValueError(
                f"anticipate: {type(model).__name__}.forward takes another path in training mode (first difference: "
                f"{names}); switch that off first (auxiliary heads: aux_logits=False)"
            )
        mine = dict(_structure(ours.kwargs, index)) | dict(enumerate(_structure(ours.args, index)))
        other = dict(_structure(theirs.kwargs, index)) | dict(enumerate(_structure(theirs.args, index)))
        where = [key for key in mine if mine[key] != other.get(key)] + [key for key in other if key not in mine]
        if where and not (
            ours.op == "call_function" and all((mine.get(k), other.get(k)) == (False, True) for k in where)
        ):
            raise ValueError(
                f"anticipate: {type(model).__name__}.forward computes something else in training mode, at "
                f"{str(ours.target)!r}"
            )
        if where:
            flags.append((ours, where))
    for number, (node, where) in enumerate(flags):
        if len(where) > 1:
            raise ValueError(f"anticipate: {node.target} depends on the training mode in more than one argument")
        _become_module(model, traced.graph, node, where[0], f"training_mode_{number}")


def _become_module(model: nn.Module, graph: fx.Graph, node: fx.Node, where: int | str, name: str) -> None:
    dropout = node.target is nn.functional.dropout
    args, kwargs = node.args, dict(node.kwargs)
    if dropout:
        p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        module: nn.Module = nn.Dropout(p)
        args, kwargs = ((args[0] if args else kwargs["input"]),), {}
    else:
        module = FunctionInMode(node.target, where)
        if isinstance(where, str):
            kwargs.pop(where)
    while hasattr(model, name):
        name += "_"
    model.add_module(name, module)
    with graph.inserting_before(node):
        new = graph.call_module(name, args, kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _is_batch_size(node: fx.Node) -> bool:
    """``t.size(0)``, ``t.shape[0]`` or ``t.size()[0]``."""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,) or node.kwargs.get("dim") == 0
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "getitem" or node.args[1] != 0:
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    if source.op == "call_function" and source.target is getattr:
        return source.args[1] == "shape"
    return source.op == "call_method" and source.target == "size" and len(source.args) == 1


def _localise_batch_sizes(graph: fx.Graph) -> None:
    """``n = x.size(0); ...; y.view(n, -1)`` becomes ``y.view(y.size(0), -1)``: otherwise n would be alive at every
    cut."""
    for node in [n for n in graph.nodes if _is_batch_size(n)]:
        for user in list(node.users):
            reshape = user.op == "call_method" and user.target in ("view", "reshape")
            reshape = reshape or (user.op == "call_function" and user.target is torch.reshape)
            if reshape and isinstance(user.args[0], fx.Node):
                with graph.inserting_before(user):
                    local = graph.call_method("size", (user.args[0], 0))
                user.replace_input_with(node, local)
        for dead in (node, node.args[0]):
            if not dead.users and dead.op != "placeholder" and (dead is node or dead.target in (getattr, "size")):
                graph.erase_node(dead)


def chain_graph(model: nn.Module, example: Tensor, opened: set[str]) -> TracedModel:
    """The fallback where tracing fails: the model as a plain chain of its modules, in the order in which they run.

    The chain (with a flattening where the next module expects one) is run beside the model and must give its output
    bit for bit, for another image and in training mode too. Opened are the same modules as by :func:`trace`.

    Raises:
        CannotTrace: the model is no such chain.
    """
    leaves = dict(_leaves(model, "", opened))
    trial = copy.deepcopy(model).train()  # training mode changes BatchNorm's statistics
    _, in_training = _run_recorded(trial, dict(_leaves(trial, "", opened)), example)
    with eval_mode(model):
        expected, calls = _run_recorded(model, leaves, example)
    if [path for path, _ in in_training] != [path for path, _ in calls]:
        raise CannotTrace("its modules run in another order in training mode")
    graph = fx.Graph()
    node, x = graph.placeholder("x"), example
    traced = TracedModel(graph)
    with eval_mode(model), torch.no_grad():
        for path, wanted in calls:
            if tuple(x.shape) != wanted and tuple(x.flatten(1).shape) == wanted:
                node, x = graph.call_function(torch.flatten, (node, 1)), x.flatten(1)
            if tuple(x.shape) != wanted:
                raise CannotTrace(f"{path!r} is given a tensor that the module before it did not return")
            node, x = graph.call_module(path, (node,)), leaves[path](x)
            traced.outputs.setdefault(path, []).append(node)
        if x.shape != expected.shape and x.flatten(1).shape == expected.shape:
            node, x = graph.call_function(torch.flatten, (node, 1)), x.flatten(1)
    if not torch.equal(x, expected):
        raise CannotTrace("its modules, run in order, do not give its output")
    graph.output(node)
    for training, image, when in ((False, -example, "for another image"), (True, example, "in training mode")):
        if not _agree(model, graph, image, training):
            raise CannotTrace(f"its modules, run in order, do not give its output {when}")
    for path in [path for path, _ in calls]:
        parts = path.split(".")
        for container in (".".join(parts[:n]) for n in range(1, len(parts))):
            traced.outputs[container] = traced.outputs[path][-1:]  # the last call inside it is its result
    return traced


def _agree(model: nn.Module, graph: fx.Graph, image: Tensor, training: bool) -> bool:
    """Whether model and graph give the same for this image, from the same state of the random generators."""
    outputs = []
    with torch.random.fork_rng(devices=[image.device] if image.is_cuda else []), torch.no_grad():
        for traced in (False, True):
            twin = copy.deepcopy(model).train(training)  # training mode changes BatchNorm's statistics
            torch.manual_seed(0)
            outputs.append(fx.GraphModule(twin, graph)(image) if traced else twin(image))
    return torch.equal(*outputs)


def _leaves(module: nn.Module, path: str, opened: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Children of the model, with plain Sequentials and what is named opened, and lists of modules looked into."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if inner in opened or is_plain_sequential(child) or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _leaves(child, inner, opened)
        else:
            yield inner, child


def _run_recorded(
    model: nn.Module, leaves: dict[str, nn.Module], example: Tensor
) -> tuple[Tensor, list[tuple[str, tuple[int, ...]]]]:
    """Runs the model; the output, and the leaves called with their inputs' shapes."""
    calls: list[tuple[str, tuple[int, ...]]] = []

    def record(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor):
            raise CannotTrace(f"{path!r} is not called with one tensor")
        calls.append((path, tuple(args[0].shape)))

    with torch.no_grad(), torch.random.fork_rng(devices=[]), before_forward(leaves, record):
        output = model(example)
    if not isinstance(output, Tensor):
        raise CannotTrace(f"its output is no tensor but a {type(output).__name__}")
    return output, calls
