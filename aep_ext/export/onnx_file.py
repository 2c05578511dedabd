"""A network as one ONNX file. A gated one stops early by itself, wherever ONNX Runtime or OpenVINO runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aep_ext._io import write_bytes
from aep_ext._utils import require
from aep_ext._version import __version__
from aep_ext.inference.backends.eager import fold_batch_norm
from aep_ext.inference.exit_policy import ExitPolicy
from aep_ext.inference.gated_net import GatedNet
from aep_ext.inference.segments import Segment, cut, exported, quiet, segment_inputs
from aep_ext.surgery.multi_exit import MultiExitNet

IMAGES, OUTPUTS = "images", ("logits", "exit", "confidence")
FLOAT, INT64 = 1, 7  # as ONNX numbers its types
LARGEST = (1 << 31) - 1  # bytes of a protocol buffer


def onnx(net: MultiExitNet | GatedNet, path: str | Path, example: Tensor | None = None) -> Path:
    """Writes a network as one ONNX file.

    A gated network becomes stages nested in ``If``: an image that leaves at an exit runs nothing behind it. The file
    takes one image at a time; an engine refuses a batch of two, or another size, by the shape of ``images``. An ungated
    network takes any batch.

    - input: ``images``, (1, C, H, W) float32, or (N, C, H, W) without gates: normalised as ``net.preprocessing`` says.
    - outputs: ``logits`` (1, K) float32, ``exit`` (1,) int64, from 0, and ``confidence`` (1,) float32, as
      :class:`~aep_ext.inference.GatedNet` gives them; ``logits`` (N, K) alone without gates.
    - metadata: ``aep_ext`` (the version), ``classes`` and ``preprocessing`` (JSON, where the network has them), and
      ``policy`` (JSON). The policy's numbers are initialisers of their own: :func:`set_policy` replaces them.

    Args:
        net: full, pruned or gated, float32 on the CPU, in either mode. Criteria must be names.
        path: the file, which appears whole or not at all.
        example: images (N, C, H, W) of the right size, N >= 1; None: zeros of the size that ``net.preprocessing`` says.

    Raises:
        TypeError: ``net`` is neither a MultiExitNet nor a GatedNet around one.
        ValueError: no size is known, the network is not float32 on the CPU, or its criterion is a callable.
        RuntimeError: the network cannot be exported, or is larger than the 2 GB that one file holds.
        ImportError: ``onnx`` or ``onnxscript`` is missing.
    """
    full = net.net if isinstance(net, GatedNet) else net
    if not isinstance(full, MultiExitNet):
        raise TypeError(f"onnx: net must be a MultiExitNet or a GatedNet around one, got {type(full).__name__}")
    policy = net.policy if isinstance(net, GatedNet) else None
    if policy is not None:
        policy.to_dict()  # a callable criterion is refused before any work
    x = _example(full, example)
    model = _model(full, policy, x)
    facts = {
        "aep_ext": __version__,
        "classes": json.dumps(list(net.classes)) if net.classes else "",
        "preprocessing": json.dumps(net.preprocessing.to_dict()) if net.preprocessing else "",
    }
    require("onnx", "onnxruntime", "onnx").helper.set_model_props(model, {k: v for k, v in facts.items() if v})
    if policy is not None:
        _write_policy(model, policy)
    return _save(model, path)


def set_policy(path: str | Path, policy: ExitPolicy) -> Path:
    """Gives the file of a gated network other thresholds, temperatures and output weights, without a new export.

    Args:
        path: what :func:`onnx` wrote; it is replaced whole.
        policy: for the same exits, criterion and ``last_alone``. Its exits may be enabled or not as it likes.

    Raises:
        TypeError: ``policy`` is no ExitPolicy.
        ValueError: the file is no gated network of aep_ext's, or the policy is for other exits or of another kind.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(policy, ExitPolicy):
        raise TypeError(f"set_policy: policy must be an ExitPolicy, got {type(policy).__name__}")
    package = require("onnx", "onnxruntime", "set_policy")
    try:
        model = package.load_model_from_string(Path(path).read_bytes())
        before = ExitPolicy.from_dict(json.loads(_facts(model)["policy"]))
    except FileNotFoundError:
        raise
    except Exception as error:  # protobuf's own, or no such entry
        raise ValueError(f"set_policy: {path} is no gated network that aep_ext wrote") from error
    for name in ("exits", "criterion", "criterion_on", "last_alone"):
        ours, theirs = getattr(before, name), getattr(policy, name)
        if ours != theirs:
            raise ValueError(f"set_policy: policy must have {name} {ours} like {path}, got {theirs}")
    _write_policy(model, policy)
    return _save(model, path)


def _example(net: MultiExitNet, example: Tensor | None) -> Tensor:
    anchor = next((p for p in net.parameters() if p.is_floating_point()), None)
    if anchor is not None and (anchor.dtype, anchor.device.type) != (torch.float32, "cpu"):
        raise ValueError(f"onnx: net must be float32 on the CPU, got {anchor.dtype} on {anchor.device}")
    if example is None:
        if net.preprocessing is None:
            raise ValueError("onnx: example must be given for a network without preprocessing")
        size = net.preprocessing.image_size
        return torch.zeros(1, net.preprocessing.channels, size, size)
    if example.dim() != 4 or min(example.shape) < 1 or example.dtype != torch.float32:
        found = f"{example.dtype} {list(example.shape)}"
        raise ValueError(f"onnx: example must be float32 [N, C, H, W], none of them 0, got {found}")
    return example.detach().cpu().contiguous()


def _save(model: Any, path: str | Path) -> Path:
    size = model.ByteSize()
    if size > LARGEST:
        raise RuntimeError(f"onnx: one file must hold at most 2 GB, got a network of {size / 2**30:.1f} GB")
    require("onnx", "onnxruntime", "onnx").checker.check_model(model, full_check=True)
    return write_bytes(path, model.SerializeToString())


def _facts(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _write_policy(model: Any, policy: ExitPolicy) -> None:
    """The policy's numbers into the graph's initialisers, and the policy into its metadata."""
    package = require("onnx", "onnxruntime", "onnx")
    numbers = _numbers(policy)
    kept = [entry for entry in model.graph.initializer if entry.name not in numbers]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name, value in numbers.items():
        model.graph.initializer.append(package.numpy_helper.from_array(value.numpy(), name))
    package.helper.set_model_props(model, {**_facts(model), "policy": json.dumps(policy.to_dict())})


def _numbers(policy: ExitPolicy) -> dict[str, Tensor]:
    """The initialisers of a policy, float32 of no dimension, by their names. A disabled exit has a threshold that
    nothing reaches."""
    never = -torch.inf if policy.criterion == "entropy" else torch.inf
    last = policy.num_exits - 1
    weights = [torch.tensor(1.0 if policy.starts_anew(e) else b) for e, b in enumerate(policy.output_weights)]
    sums = list(accumulate(weights))
    if policy.last_alone:
        sums[last] = weights[last]
    found: dict[str, Tensor] = {}
    for e, (weight, total, temperature) in enumerate(zip(weights, sums, policy.temperatures, strict=True)):
        found |= {f"output_weight_{e}": weight, f"weight_sum_{e}": total, f"temperature_{e}": torch.tensor(temperature)}
    for e, (threshold, enabled) in enumerate(zip(policy.thresholds, policy.enabled, strict=True)):
        found[f"threshold_{e}"] = torch.tensor(threshold if enabled else never)
    return found


def _model(net: MultiExitNet, policy: ExitPolicy | None, example: Tensor) -> Any:
    """The ONNX model, without metadata and the policy's numbers."""
    package = require("onnx", "onnxruntime", "onnx")
    require("onnxscript", "onnxruntime", "onnx")
    helper = package.helper
    segments = cut(copy.deepcopy(net).eval().requires_grad_(False))  # the network itself keeps its mode
    inputs = segment_inputs(segments, example)
    parts = [_part(e, segment, x, policy is None) for e, (segment, x) in enumerate(zip(segments, inputs, strict=True))]
    weights, classes = net.output_weights, net.num_classes
    graph = _ungated(parts, weights, classes) if policy is None else _gated(parts, policy, classes)
    rows: int | str = "N" if policy is None else 1
    graph.input.append(helper.make_tensor_value_info(IMAGES, FLOAT, [rows, *example.shape[1:]]))
    dimension = graph.output[0].type.tensor_type.shape.dim[0]
    if policy is None:
        dimension.dim_param = "N"
    else:
        dimension.dim_value = 1
    versions = {entry.domain: entry.version for part in parts for entry in part.opset_import}
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in sorted(versions.items())],
        ir_version=parts[0].ir_version,
        producer_name="aep_ext",
        producer_version=__version__,
    )


def _part(e: int, segment: Segment, x: Tensor, any_batch: bool) -> Any:
    """The ONNX model of a segment: ``images`` or the features of the one before -> ``stage_E/features`` (not of the
    last) and ``stage_E/logits``; every other name begins with ``stage_E/`` too."""
    compose = require("onnx.compose", "onnxruntime", "onnx")
    helper = require("onnx.helper", "onnxruntime", "onnx")
    folded, _ = fold_batch_norm(segment, x)
    try:
        with torch.no_grad(), quiet():
            if any_batch:
                program = exported(folded, x)
            else:
                program = torch.export.export(folded, (x[:1].contiguous(),), strict=False)
            made = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:  # whatever torch or a user's forward raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RuntimeError(f"onnx: stage {e} cannot be exported: {reason}") from error
    assert made is not None  # with dynamo=True
    model = made.model_proto
    if model.functions:
        names = ", ".join(sorted({function.name for function in model.functions}))
        raise RuntimeError(f"onnx: stage {e} must consist of ONNX's own operators, got functions ({names})")
    model = compose.add_prefix(model, f"stage_{e}/")
    graph = model.graph
    wanted = [f"stage_{e}/logits"] if segment.last else [f"stage_{e}/features", f"stage_{e}/logits"]
    places = {graph.input[0].name: f"stage_{e - 1}/features" if e else IMAGES}
    made_here = {name for node in graph.node for name in node.output}
    for output, name in zip(graph.output, wanted, strict=True):
        if output.name in made_here and output.name not in places:
            places[output.name] = name
        else:  # a stage that hands its input on
            graph.node.append(helper.make_node("Identity", [output.name], [name]))
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [places.get(name, name) for name in names]
    return model


class _Nodes:
    """The nodes and constants of a graph in the making. A call adds a node and gives the name of its first output."""

    def __init__(self, e: int, kind: str = "gate") -> None:
        self._prefix = f"{kind}_{e}"
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self._package = require("onnx", "onnxruntime", "onnx")

    def __call__(self, operator: str, *inputs: str, output: str | Sequence[str] = "", **attributes: Any) -> str:
        outputs = [output] if isinstance(output, str) else list(output)
        outputs[0] = outputs[0] or f"{self._prefix}/{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(self._package.helper.make_node(operator, inputs, outputs, **attributes))
        return outputs[0]

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> str:
        """A constant tensor's name."""
        name = f"{self._prefix}/constant_{len(self.tensors)}"
        self.tensors.append(self._package.numpy_helper.from_array(torch.tensor(value, dtype=dtype).numpy(), name))
        return name

    def graph(self, outputs: Sequence[str], classes: int, *parts: Any) -> Any:
        """The graph, behind the nodes of segments; ``outputs``: names of logits, exit and confidence."""
        value = self._package.helper.make_tensor_value_info
        kinds = zip(outputs, (FLOAT, INT64, FLOAT), (["N", classes], [1], [1]), strict=False)
        return self._package.helper.make_graph(
            [*(node for part in parts for node in part.graph.node), *self.nodes],
            f"{self._prefix}_graph",
            [],
            [value(name, kind, shape) for name, kind, shape in kinds],
            [*(tensor for part in parts for tensor in part.graph.initializer), *self.tensors],
        )


def _ungated(parts: Sequence[Any], weights: Tensor, classes: int) -> Any:
    """The ensemble: the weighted sum of all exits' logits."""
    add, total = _Nodes(0, "ensemble"), ""
    for e, weight in enumerate(weights.tolist()):
        own = add("Mul", f"stage_{e}/logits", add.constant(weight, torch.float32))
        total = add("Add", total, own) if e else own
    add("Identity", total, output="logits")
    return add.graph(OUTPUTS[:1], classes, *parts)


def _gated(parts: Sequence[Any], policy: ExitPolicy, classes: int) -> Any:
    """The stages from the last to the first, each in the ``else`` branch of the gate before it."""
    assert isinstance(policy.criterion, str)  # a callable was refused
    later: Any = None
    for e in reversed(range(policy.num_exits)):
        add, answer = _Nodes(e), _Nodes(e, "answer")
        own, running = f"stage_{e}/logits", f"gate_{e}/running"
        compared = running if policy.criterion_on == "ensemble" else own
        fresh = e == 0 or policy.starts_anew(e)
        weighted = add("Mul", own, f"output_weight_{e}", output=running if fresh else "")
        if not fresh:
            add("Add", f"gate_{e - 1}/running", weighted, output=running)
        scale = f"temperature_{e}"
        if compared == running:
            scale = add("Mul", f"weight_sum_{e}", scale)
        scaled = add("Div", compared, scale)
        confidence = add("ReduceMax", add("Softmax", scaled, axis=1), add.constant([1]), keepdims=0)
        names = OUTPUTS if e == 0 else [f"from_{e}/{name}" for name in OUTPUTS]
        if later is None:
            answer, given = add, names
        else:
            given = [f"answer_{e}/{name}" for name in OUTPUTS]
        answer("Div", running, f"weight_sum_{e}", output=given[0])
        answer("Identity", answer.constant([e]), output=given[1])
        answer("Identity", confidence, output=given[2])
        if later is not None:
            leaves = _leaves(add, policy.criterion, e, classes, compared, scaled, confidence)
            branches = {"then_branch": answer.graph(given, classes), "else_branch": later}
            add("If", leaves, output=names, **branches)
        later = add.graph(names, classes, parts[e])
    return later


def _leaves(add: _Nodes, criterion: str, e: int, classes: int, compared: str, scaled: str, confidence: str) -> str:
    """Whether an image leaves at exit e, (1,) bool. NaN leaves nowhere: no comparison with it holds."""
    threshold = f"threshold_{e}"
    if criterion == "confidence":
        return add("GreaterOrEqual", confidence, threshold)
    if criterion == "entropy":
        # A probability of 0 has a logarithm that is finite here, so that their product is 0.
        logarithms = add("Max", add("LogSoftmax", scaled, axis=1), add.constant(-3e38, torch.float32))
        products = add("Mul", add("Softmax", scaled, axis=1), logarithms)
        return add("LessOrEqual", add("Neg", add("ReduceSum", products, add.constant([1]), keepdims=0)), threshold)
    if criterion == "margin":
        if classes == 1:
            return add("GreaterOrEqual", confidence, threshold)
        two = add(
            "TopK",
            add("Softmax", scaled, axis=1),
            add.constant([2]),
            output=[f"gate_{e}/two", f"gate_{e}/places"],
            axis=1,
        )
        second = add("ReduceMin", two, add.constant([1]), keepdims=0)
        return add("GreaterOrEqual", add("Sub", confidence, second), threshold)
    top = add("ArgMax", compared, axis=1, keepdims=0)
    valid = add("Not", add("IsNaN", confidence))
    if criterion == "patience":
        none = add.constant([-1])
        last, length = (f"gate_{e - 1}/class", f"gate_{e - 1}/length") if e else (none, add.constant([0]))
        one = add.constant([1])
        more = add("Where", add("Equal", top, last), add("Add", length, one), one)
        add("Where", valid, top, none, output=f"gate_{e}/class")
        count = add("Where", valid, more, add.constant([0]), output=f"gate_{e}/length")
    else:
        vote = add("OneHot", top, add.constant([classes]), add.constant([0, 1]), axis=-1)
        votes = f"gate_{e}/votes"
        counted = add("Mul", vote, add("Cast", valid, to=INT64), output="" if e else votes)
        if e:
            add("Add", f"gate_{e - 1}/votes", counted, output=votes)
        count = add("ReduceMax", votes, add.constant([1]), keepdims=0)
    reached = add("GreaterOrEqual", add("Cast", count, to=FLOAT), threshold)
    return add("And", valid, reached)
