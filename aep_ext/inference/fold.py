"""BatchNorm folded into the convolution before it, for inference."""

from __future__ import annotations

import copy

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fold_batch_norm"]

_PAIRS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}


def fold_batch_norm(module: nn.Module) -> tuple[nn.Module, str | None]:
    """A copy of ``module`` (in eval mode) in which each convolution that feeds one BatchNorm only has absorbed it.

    Returns:
        The copy and None, or ``module`` itself and the reason why its forward cannot be traced.

    Equivalent to, for each pair (float rounding apart)::

        scale = bn.weight / sqrt(bn.running_var + bn.eps)
        conv.weight, conv.bias = conv.weight * scale, (conv.bias - bn.running_mean) * scale + bn.bias
    """
    try:
        graph = fx.symbolic_trace(copy.deepcopy(module))
    except Exception as error:  # whatever a user's forward raises under tracing
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return module, f"eager: BatchNorm of a unit is not folded, its forward cannot be traced ({reason})"
    calls: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(graph.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv, norm = graph.get_submodule(before.target), graph.get_submodule(node.target)
        # A module called twice, or known under two names, must keep its own values for the other place.
        if _PAIRS.get(type(conv)) is not type(norm) or calls[before.target] > 1 or _tied(graph, conv):
            continue
        if norm.running_mean is None or conv.training or norm.training or _hooked(conv) or _hooked(norm):
            continue
        fused = fuse_conv_bn_eval(conv, norm)
        parent, _, name = before.target.rpartition(".")
        setattr(graph.get_submodule(parent), name, fused)
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()  # the BatchNorms
    graph.graph.lint()
    graph.recompile()
    return graph.eval().requires_grad_(False), None


def _tied(graph: fx.GraphModule, module: nn.Module) -> bool:
    return sum(other is module for _, other in graph.named_modules(remove_duplicate=False)) > 1


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
