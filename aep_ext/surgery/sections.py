"""Takes a partitioned model apart: one module per stage, and the head, none of which writes into what it is given."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from aep_ext.surgery.measure import shadow
from aep_ext.surgery.partition import Partition

__all__ = ["changes_its_input", "clear_inplace", "sections"]


def sections(found: Partition, cuts: Sequence[fx.Node]) -> list[fx.GraphModule]:
    """The stages that end at ``cuts``, and the head behind the last of them, as modules whose keys are the model's
    own."""
    nodes = list(found.traced.graph.nodes)
    bounds = [0, *(nodes.index(cut) + 1 for cut in cuts), len(nodes) - 1]
    carried = nodes[0]
    result = []
    for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        end = cuts[number] if number < len(cuts) else nodes[-1].args[0]
        graph = fx.Graph()
        known = {carried: graph.placeholder("x")}

        def look_up(node: fx.Node, graph: fx.Graph = graph, known: dict[fx.Node, fx.Node] = known) -> fx.Node:
            # A parameter read directly is read anew in every section that needs it.
            if node not in known and node.op == "get_attr":
                known[node] = graph.get_attr(node.target)
            return known[node]

        for node in nodes[start:stop]:
            if node.op not in ("placeholder", "get_attr"):
                args, kwargs = fx.node.map_arg(node.args, look_up), fx.node.map_arg(node.kwargs, look_up)
                known[node] = graph.create_node(node.op, node.target, args, kwargs)
                if "is_wrapped" in node.meta:
                    known[node].meta["is_wrapped"] = True
        graph.output(look_up(end))
        name = "Head" if number == len(cuts) else "Stage"
        section = fx.GraphModule(found.model, graph, class_name=name)
        result.append(section)
        carried = end
    _keep_unused(found.model, result)
    return result


def _keep_unused(model: nn.Module, parts: Sequence[fx.GraphModule]) -> None:
    """Parameters and buffers that the forward never touches go to the head, so that no key of the state dict is
    lost."""
    present = {key for part in parts for key in part.state_dict()}
    head = parts[-1]
    kinds = dict(model.named_parameters(remove_duplicate=False))
    for key, value in model.state_dict(keep_vars=True).items():
        if key in present or not isinstance(value, Tensor):
            continue
        owner, _, name = key.rpartition(".")
        target: nn.Module = head
        for part in owner.split(".") if owner else []:
            if part not in dict(target.named_children()):
                target.add_module(part, nn.Module())
            target = target.get_submodule(part)
        if key in kinds:
            target.register_parameter(name, kinds[key])
        else:
            target.register_buffer(name, value)


def clear_inplace(part: nn.Module) -> None:
    """Makes every operation of a section leave its input alone; the numbers stay the same."""
    for module in part.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # torch's stub: any attribute is a tensor or a module
    if isinstance(part, fx.GraphModule):
        for node in part.graph.nodes:
            if node.kwargs.get("inplace") is True:
                node.update_kwarg("inplace", False)
            if node.op == "call_method" and node.target in ("relu_", "hardtanh_", "sigmoid_", "tanh_", "clamp_"):
                node.target = node.target.removesuffix("_")
        part.recompile()


def changes_its_input(part: nn.Module, x: Tensor) -> bool:
    """Whether running this section writes into the tensor it is given, in eval or in training mode."""
    try:
        return _writes(shadow(part), x.to("meta"))
    except Exception:  # a model may be no match for the meta device and still be sound
        with torch.random.fork_rng(devices=[]):
            return _writes(copy.deepcopy(part), x)


def _writes(part: nn.Module, x: Tensor) -> bool:
    for training in (False, True):
        probe = x.clone()
        before = probe._version
        with torch.no_grad():
            part.train(training)(probe)
        if probe._version != before:
            return True
    return False
