"""Copies of a network's own head for feature maps with other channel counts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, fx, nn

from aep_ext._utils import eval_mode
from aep_ext.surgery.measure import before_forward, first_line, map_size

__all__ = ["HeadForm", "copy_head", "replace_classes", "study_head"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.PReLU, *_NORMS)


@dataclass(frozen=True)
class HeadForm:
    """What the original head does to its feature map.

    Attributes:
        inputs: for each layer with parameters, the shape of what it is given.
        classifiers: the layers that make the classes: the last one with weights, and those beside it (of a distilled
            network, whose answer is the mean of two).
        any_size: whether it takes feature maps of any height and width.
        map_shape: shape of its own feature map.
        channel_axis: where the channels are in it: 1 or 3.
        num_classes: K.
    """

    inputs: dict[str, tuple[int, ...]]
    classifiers: tuple[str, ...]
    any_size: bool
    map_shape: tuple[int, ...]
    channel_axis: int
    num_classes: int

    @property
    def channels(self) -> int:
        """C of its own feature map."""
        return self.map_shape[self.channel_axis]


def _layers(head: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in head.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def _is_scalar(layer: nn.Module) -> bool:
    """Whether it fits any width: its parameters are single numbers."""
    return all(parameter.numel() == 1 for parameter in layer.parameters(recurse=False))


def _width(layer: nn.Module) -> int:
    return getattr(layer, "out_features", getattr(layer, "out_channels", 0))


def _larger(x: Tensor, channel_axis: int) -> Tensor:
    """A map of twice the height and width."""
    for axis in {1, 2, 3} - {channel_axis}:
        x = x.repeat_interleave(2, dim=axis)
    return x


def study_head(head: fx.GraphModule, x: Tensor, channel_axis: int, *, try_larger: bool) -> HeadForm:
    """Runs the original head on its feature map ``x`` (two images) and, on request, on a larger map.

    Raises:
        ValueError: the head has parameters that cannot be rescaled.
    """
    for name, module in head.named_modules():
        if nn.utils.parametrize.is_parametrized(module):
            raise ValueError(
                f"anticipate: the head's layer {name!r} ({type(module).__name__}) is parametrized and cannot be "
                "rescaled; torch.nn.utils.parametrize.remove_parametrizations makes it an ordinary one"
            )
    layers = _layers(head)
    inputs: dict[str, tuple[int, ...]] = {}
    order: list[str] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[name] = tuple(args[0].shape)
        order.append(name)

    with eval_mode(head), torch.no_grad(), before_forward(layers, note):
        output = head(x)
    weighted = [name for name in order if isinstance(layers[name], (nn.Linear, nn.modules.conv._ConvNd))]
    read_directly = [node for node in head.graph.nodes if node.op == "get_attr"]
    if read_directly:
        raise ValueError(
            f"anticipate: the head's parameter {read_directly[0].target!r} is used outside a layer and cannot be "
            "rescaled"
        )
    for name in order:
        if not isinstance(layers[name], _LAYERS) and not _is_scalar(layers[name]):
            kind = type(layers[name]).__name__
            raise ValueError(f"anticipate: the head's layer {name!r} ({kind}) cannot be rescaled")
    if not weighted:
        raise ValueError("anticipate: the head has no linear layer or convolution")
    any_size = False
    if try_larger:
        try:
            with eval_mode(head), torch.no_grad():
                any_size = head(_larger(x, channel_axis)).shape == output.shape
        except Exception:  # a head for one size
            any_size = False
    last = weighted[-1]
    beside = [
        name for name in weighted if inputs[name] == inputs[last] and _width(layers[name]) == _width(layers[last])
    ]
    return HeadForm(inputs, tuple(beside), any_size, tuple(x.shape), channel_axis, output.shape[1])


def _fresh(module: nn.Module, name: str, shape: Sequence[int]) -> None:
    old = getattr(module, name, None)
    if isinstance(old, Tensor):
        new = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
        setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


def _resize(module: nn.Module, incoming: int, outgoing: int, trailing: Sequence[int]) -> None:
    """Gives a layer new widths and new values. ``outgoing`` counts for linear layers and convolutions alone."""
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = incoming, outgoing
        _fresh(module, "weight", (outgoing, incoming))
        _fresh(module, "bias", (outgoing,))
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:
            depthwise = module.groups == module.in_channels
            outgoing = incoming * (module.out_channels // module.in_channels) if depthwise else outgoing
            module.groups = incoming if depthwise else gcd(gcd(module.groups, incoming), outgoing)
        module.in_channels, module.out_channels = incoming, outgoing
        _fresh(module, "weight", (outgoing, incoming // module.groups, *module.kernel_size))
        _fresh(module, "bias", (outgoing,))
    elif isinstance(module, nn.LayerNorm):
        shape = (incoming,) if len(module.normalized_shape) == 1 else tuple(trailing[-len(module.normalized_shape) :])
        module.normalized_shape = shape
        _fresh(module, "weight", shape)
        _fresh(module, "bias", shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = gcd(module.num_groups, incoming)
        module.num_channels = incoming
        _fresh(module, "weight", (incoming,))
        _fresh(module, "bias", (incoming,))
    elif isinstance(module, nn.PReLU):
        if module.num_parameters > 1:
            module.num_parameters = incoming
            _fresh(module, "weight", (incoming,))
    else:
        assert isinstance(module, nn.modules.batchnorm._NormBase)  # the last of _LAYERS
        module.num_features = incoming
        for name in ("weight", "bias", "running_mean", "running_var"):
            _fresh(module, name, (incoming,))
    module.reset_parameters()


def _channel_dim(module: nn.Module, shape: Sequence[int]) -> int:
    """Which dimension of a layer's input holds what the layer calls features."""
    if isinstance(module, nn.Linear):
        return len(shape) - 1
    if isinstance(module, nn.LayerNorm):
        # The channels-first LayerNorms of torchvision and timm are subclasses that permute by themselves.
        last = shape[-1] == module.normalized_shape[-1] and not (
            len(shape) == 4 and shape[1] == module.normalized_shape[-1]
        )
        return len(shape) - 1 if last else 1
    return 1


def copy_head(head: fx.GraphModule, form: HeadForm, x: Tensor, channel_axis: int, num_classes: int) -> fx.GraphModule:
    """A new head like ``head`` for the feature map ``x`` (two images, C_e channels): all widths times C_e / C, the
    classes kept.

    Every layer gets new values by its ``reset_parameters``. A head that is made for one height and width gets an
    adaptive average pooling to it in front, and one whose map has its channels on another axis a permutation.

    Raises:
        ValueError: the copy does not give [N, K], for a larger map too.
    """
    new = copy.deepcopy(head)
    for parameter in new.parameters():
        parameter.requires_grad_(True)
    _flatten_instead_of_view(new, form)
    _fit_first(new, form, channel_axis)
    channels = x.shape[channel_axis]
    ratio = channels / form.channels
    layers = _layers(new)
    done: set[str] = set()

    def adapt(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if name in done:
            return
        done.add(name)
        if not isinstance(module, _LAYERS):
            return  # a scalar
        incoming = args[0].shape[_channel_dim(module, form.inputs[name])]
        outgoing = num_classes if name in form.classifiers else max(1, round(_width(module) * ratio))
        _resize(module, incoming, outgoing, args[0].shape)

    run = {name: module for name, module in layers.items() if name in form.inputs}
    try:
        with eval_mode(new), torch.no_grad():
            with before_forward(run, adapt):
                shape = tuple(new(x).shape)
            # What reads rows or columns as channels is made for one size.
            larger = tuple(new(_larger(x, channel_axis)).shape)
    except RuntimeError as error:
        raise ValueError(
            f"anticipate: the head cannot be rescaled from {form.channels} to {channels} channels: {first_line(error)}"
        ) from None
    if not shape == larger == (x.shape[0], num_classes):
        raise ValueError(
            f"anticipate: the head, rescaled to {channels} channels, must give [{x.shape[0]}, {num_classes}], got "
            f"{list(shape)}, and {list(larger)} on a larger map: a size is fixed in its forward"
        )
    for name in layers.keys() - run.keys():  # never run: in the original head for its keys alone
        layers[name]._parameters.clear()
        layers[name]._buffers.clear()
    return new


def replace_classes(head: fx.GraphModule, form: HeadForm, num_classes: int) -> None:
    """Gives the head a new last layer for another number of classes."""
    for name in form.classifiers:
        layer = head.get_submodule(name)
        incoming = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        _resize(layer, incoming, num_classes, ())


def _flatten_instead_of_view(head: fx.GraphModule, form: HeadForm) -> None:
    """``x.view(-1, 512)`` holds a width that is not the copy's: such a view becomes ``torch.flatten(x, 1)``."""
    for node in list(head.graph.nodes):
        view = node.op == "call_method" and node.target in ("view", "reshape")
        view = view or (node.op == "call_function" and node.target is torch.reshape)
        if not view:
            continue
        given = node.args[1:] or (node.kwargs.get("shape", ()),)
        sizes = given[0] if len(given) == 1 else given
        if isinstance(sizes, (tuple, list)) and len(sizes) == 2 and isinstance(sizes[1], int):
            with head.graph.inserting_before(node):
                flat = head.graph.call_function(torch.flatten, (node.args[0], 1))
            node.replace_all_uses_with(flat)
            head.graph.erase_node(node)
    head.graph.eliminate_dead_code()
    head.recompile()


def _fit_first(head: fx.GraphModule, form: HeadForm, channel_axis: int) -> None:
    """Puts in front of the head what makes its own kind of map of the one that it is given."""
    placeholder = next(node for node in head.graph.nodes if node.op == "placeholder")
    users = list(placeholder.users)
    node, axis = placeholder, channel_axis
    with head.graph.inserting_before(placeholder.next):
        if not form.any_size:
            name = "fit"
            while hasattr(head, name):
                name += "_"
            head.add_submodule(name, nn.AdaptiveAvgPool2d(map_size(form.map_shape, form.channel_axis)))
            if axis == 3:
                node, axis = head.graph.call_function(torch.permute, (node, (0, 3, 1, 2))), 1
            node = head.graph.call_module(name, (node,))
        if axis != form.channel_axis:
            order = (0, 3, 1, 2) if axis == 3 else (0, 2, 3, 1)
            node = head.graph.call_function(torch.permute, (node, order))
    for user in users:
        user.replace_input_with(placeholder, node)
    head.recompile()
