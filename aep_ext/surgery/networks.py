"""Networks by name: the paper's eight, as cut points on torchvision models, and two for two CPU cores.

Backbones are torchvision's; the heads are those of the published experiment (arXiv 2301.12168), which differ from
torchvision's: every exit, the last too, has the same form, with widths in proportion to its channels.

Keys of ``MultiExitNet.original_state_dict()`` are torchvision's where the published single-exit network equals
torchvision's (resnet50, densenet169, efficientnet_b5); the heads of VGG16 and MobileNetV3-Small have no counterpart
there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from aep_ext._utils import require
from aep_ext.surgery.anticipation import anticipate
from aep_ext.surgery.heads import (
    ConvPooledLinearHead,
    ConvPooledMLPHead,
    FeatureMap,
    PooledLinearHead,
    head_by_name,
    head_names,
)
from aep_ext.surgery.measure import MacCounter, first_line, map_size, shadow
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.surgery.small_resnets import resnet_cifar, resnet_small

__all__ = [
    "available",
    "build",
    "densenet169",
    "efficientnet_b5",
    "efficientnet_b5_full",
    "known",
    "mobilenet_v3_small",
    "mobilenet_v3_small_full",
    "resnet50",
    "resnet_cifar",
    "resnet_small",
    "scalable",
    "vgg16",
    "vgg16_full",
]


def _models() -> ModuleType:
    try:
        import torchvision.models
    except ImportError as error:
        raise ImportError(f"this network needs torchvision: pip install 'aep_ext[models]' ({error})") from error
    return torchvision.models


def _vgg16_features() -> nn.Module:
    """VGG16 without its 4096-wide classifier, which is most of its parameters and never used here."""
    vgg = _models().vgg
    holder = nn.Module()
    holder.features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
    for module in holder.modules():
        if isinstance(module, nn.Conv2d):
            _initialise(module)
    return holder


def _relu_head(channels: int, num_classes: int) -> nn.Module:
    return PooledLinearHead(channels, num_classes, pre=nn.ReLU())


def _features_until(*ends: int) -> list[list[str]]:
    """Stages of consecutive modules of ``features``, each of which ends before the number given."""
    return [[f"features.{number}" for number in range(*bounds)] for bounds in pairwise((0, *ends))]


@dataclass(frozen=True)
class _Plan:
    """One of the paper's networks: where torchvision's model is cut, and which head each cut gets."""

    torchvision_name: str
    stem: str  # the first convolution: replaced when the images do not have three channels
    stages: Sequence[Sequence[str]]  # qualified names of torchvision's modules, in order; an exit after every stage
    channels: Sequence[int]
    head: Callable[[int, int], nn.Module]
    head_keys: Sequence[Sequence[str]]  # prefixes of keys: in the last exit, in the single-exit network
    make: Callable[[], nn.Module] | None = None

    def backbone(self) -> nn.Module:
        # One class: the classifier is thrown away, and at a thousand it would only cost time.
        return self.make() if self.make else getattr(_models(), self.torchvision_name)(weights=None, num_classes=1)


_RESNET_STEM = ["conv1", "bn1", "relu", "maxpool"]
_DENSENET_STEM = ["conv0", "norm0", "relu0", "pool0"]

_RESNET50 = _Plan(
    "resnet50",
    "conv1",
    [[*_RESNET_STEM, "layer1"], ["layer2"], ["layer3"], ["layer4"]],
    [256, 512, 1024, 2048],
    PooledLinearHead,
    [["linear.", "fc."]],
)
# The published input block ends behind the first convolution, so the first two of VGG's five blocks are one stage.
_VGG16 = _Plan(
    "vgg16",
    "features.0",
    _features_until(10, 17, 24, 31),
    [128, 256, 512, 512],
    PooledLinearHead,
    [["linear.", "classifier."]],
    _vgg16_features,
)
_DENSENET169 = _Plan(
    "densenet169",
    "features.conv0",
    [
        [f"features.{name}" for name in (*_DENSENET_STEM, "denseblock1", "transition1")],
        ["features.denseblock2", "features.transition2"],
        ["features.denseblock3", "features.transition3"],
        ["features.denseblock4", "features.norm5"],
    ],
    [128, 256, 640, 1664],
    _relu_head,
    [["linear.", "classifier."]],
)
_MOBILENET = _Plan(
    "mobilenet_v3_small",
    "features.0.0",
    _features_until(4, 7, 9, 12),
    [24, 40, 48, 96],
    ConvPooledMLPHead,
    [["pre.", "features.12."]],
)
_EFFICIENTNET = _Plan(
    "efficientnet_b5",
    "features.0.0",
    _features_until(3, 5, 6, 8),
    [40, 128, 176, 512],
    ConvPooledLinearHead,
    [["pre.", "features.8."], ["linear.", "classifier.1."]],
)
_PLANS = {
    "resnet50": _RESNET50,
    "vgg16": _VGG16,
    "vgg16_full": replace(_VGG16, stages=_features_until(5, 10, 17, 24, 31), channels=[64, 128, 256, 512, 512]),
    "densenet169": _DENSENET169,
    "mobilenet_v3_small": _MOBILENET,
    "mobilenet_v3_small_full": replace(
        _MOBILENET, stages=_features_until(2, 4, 7, 9, 12), channels=[16, 24, 40, 48, 96]
    ),
    "efficientnet_b5": _EFFICIENTNET,
    "efficientnet_b5_full": replace(
        _EFFICIENTNET, stages=_features_until(2, 3, 4, 5, 6, 7, 8), channels=[24, 40, 64, 128, 176, 304, 512]
    ),
}


def _initialise(conv: nn.Conv2d) -> None:
    """As torchvision's networks initialise their convolutions."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _replace_stem(model: nn.Module, name: str, in_channels: int) -> None:
    parent, _, child = name.rpartition(".")
    old: Any = model.get_submodule(name)
    new = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)
    _initialise(new)
    setattr(model.get_submodule(parent), child, new)


def _chain(model: nn.Module, names: Sequence[str]) -> nn.Sequential:
    """The named modules one after another, nested so that their keys stay as they were in ``model``."""
    stage = nn.Sequential()
    for name in names:
        parent: nn.Module = stage
        *path, leaf = name.split(".")
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Sequential())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, model.get_submodule(name))
    return stage


def _weights_entry(name: str, weights: str) -> Any:
    """torchvision's weights of that name.

    Raises:
        ValueError: it has none of that name.
    """
    known = _models().get_model_weights(name)
    try:
        return known.verify(weights)
    except KeyError as error:
        raise ValueError(
            f"{name}: weights must be None, DEFAULT or one of {', '.join(entry.name for entry in known)}, "
            f"got {weights!r}"
        ) from error


def _load_weights(model: nn.Module, plan: _Plan, weights: str, skip: str | None) -> None:
    """Loads torchvision's pretrained parameters into everything that ``plan`` uses of the backbone, except ``skip``."""
    entry = _weights_entry(plan.torchvision_name, weights)
    published = entry.get_state_dict(progress=False, check_hash=True)
    used = tuple(f"{name}." for stage in plan.stages for name in stage)
    state = {key: value for key, value in published.items() if key.startswith(used)}
    if skip is not None:
        state = {key: value for key, value in state.items() if not key.startswith(f"{skip}.")}
    wanted = {key for key in model.state_dict() if key.startswith(used) and not (skip and key.startswith(f"{skip}."))}
    # Files older than BatchNorm's batch counter lack it; it has a default. Anything else that is missing is an error.
    missing = sorted(key for key in wanted - set(state) if not key.endswith("num_batches_tracked"))
    if missing:
        raise ValueError(
            f"{plan.torchvision_name}: weights {weights!r} lack {len(missing)} of the backbone's tensors, first "
            f"{missing[0]!r}"
        )
    model.load_state_dict(state, strict=False)


def _network(name: str, num_classes: int, in_channels: int, weights: str | None) -> MultiExitNet:
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{name}: {argument} must be at least 1, got {value}")
    plan = _PLANS[name]
    model = plan.backbone()
    if in_channels != 3:
        _replace_stem(model, plan.stem, in_channels)
    if weights is not None:
        _load_weights(model, plan, weights, skip=plan.stem if in_channels != 3 else None)
    return MultiExitNet(
        [_chain(model, names) for names in plan.stages],
        [plan.head(channels, num_classes) for channels in plan.channels],
        num_classes=num_classes,
        origin={
            "kind": "network",
            "name": name,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "head_keys": [list(pair) for pair in plan.head_keys],
        },
    )


def resnet50(num_classes: int, in_channels: int = 3, weights: str | None = None) -> MultiExitNet:
    """ResNet50 with 4 exits (256, 512, 1024, 2048 channels); heads: pool, linear.

    Args:
        num_classes: K.
        in_channels: channels of the images; other than 3 the first convolution is new.
        weights: None, "DEFAULT" or another name of torchvision's weights: loaded into the backbone, the heads are new.

    Raises:
        ImportError: torchvision is missing.
        ValueError: a number below one; no such weights.
    """
    return _network("resnet50", num_classes, in_channels, weights)


def vgg16(num_classes: int, in_channels: int = 3, weights: str | None = None) -> MultiExitNet:
    """VGG16 (without BatchNorm) with 4 exits (128, 256, 512, 512 channels); heads: pool, linear. See
    :func:`resnet50`."""
    return _network("vgg16", num_classes, in_channels, weights)


def vgg16_full(num_classes: int, in_channels: int = 3, weights: str | None = None) -> MultiExitNet:
    """VGG16 with 5 exits, one after each pooling (64, 128, 256, 512, 512 channels). See :func:`resnet50`."""
    return _network("vgg16_full", num_classes, in_channels, weights)


def densenet169(num_classes: int, in_channels: int = 3, weights: str | None = None) -> MultiExitNet:
    """DenseNet169 with 4 exits (128, 256, 640, 1664 channels); heads: ReLU, pool, linear. See :func:`resnet50`."""
    return _network("densenet169", num_classes, in_channels, weights)


def mobilenet_v3_small(num_classes: int, in_channels: int = 3, weights: str | None = None) -> MultiExitNet:
    """MobileNetV3-Small with 4 exits (24, 40, 48, 96 channels); heads: 1x1 convolution to 6C with BatchNorm and
    hardswish, pool, linear to int(1.75 C), hardswish, dropout 0.2, linear. See :func:`resnet50`."""
    return _network("mobilenet_v3_small", num_classes, in_channels, weights)


def mobilenet_v3_small_full(num_classes: int, in_channels: int = 3, weights: str | None = None) -> MultiExitNet:
    """MobileNetV3-Small with 5 exits (16, 24, 40, 48, 96 channels). See :func:`mobilenet_v3_small`."""
    return _network("mobilenet_v3_small_full", num_classes, in_channels, weights)


def efficientnet_b5(num_classes: int, in_channels: int = 3, weights: str | None = None) -> MultiExitNet:
    """EfficientNet-B5 with 4 exits (40, 128, 176, 512 channels); heads: 1x1 convolution to 4C with BatchNorm and SiLU,
    pool, dropout 0.4, linear. See :func:`resnet50`."""
    return _network("efficientnet_b5", num_classes, in_channels, weights)


def efficientnet_b5_full(num_classes: int, in_channels: int = 3, weights: str | None = None) -> MultiExitNet:
    """EfficientNet-B5 with 7 exits (24, 40, 64, 128, 176, 304, 512 channels). See :func:`efficientnet_b5`."""
    return _network("efficientnet_b5_full", num_classes, in_channels, weights)


def available() -> list[str]:
    """Names that :func:`build` knows; it also takes "torchvision/<name>" and "timm/<name>"."""
    return sorted([*_SMALL, *_PLANS])


def known(name: str) -> bool:
    """Whether :func:`build` would look further than the name; networks of other libraries are looked up there."""
    return name.partition("/")[0] in _LIBRARIES or name.partition("@")[0] in available()


def unknown(name: str) -> str:
    """What to tell someone who asks for a network that there is not: the nearest names, or what there is."""
    library, _, inner = name.rpartition("/")
    # Whole names come first: what torchvision calls resnet18 is torchvision/resnet18 here.
    places = [library] if library in _LIBRARIES else ["", *_LIBRARIES]
    names = {place: available() if not place else _names_of(place) for place in places}
    near = [f"{place}/{inner}" for place in places if place and inner in names[place]]
    for place in places:
        close = difflib.get_close_matches(inner, names[place], n=1, cutoff=0.8)
        near += [f"{place}/{found}".removeprefix("/") for found in close if not near]
    known_ones = f"there are: {', '.join(available())}, torchvision/<name>, timm/<name>"
    return f"no such network: {name!r} ({f'did you mean {near[0]}?' if near else known_ones})"


def _names_of(library: str) -> list[str]:
    """Names of a library's classifiers; none where it cannot be imported."""
    try:
        if library == "torchvision":
            return _models().list_models(module=_models())
        import timm

        return timm.list_models()
    except Exception:  # torchvision beside the wrong torch raises a RuntimeError
        return []


def scalable(name: str) -> bool:
    """Whether there are narrower networks of this kind, ``<name>@<width>``."""
    return name in _SMALL


WEIGHT_FILES = (".safetensors", ".pth", ".pt")


def is_file(weights: str | None) -> bool:
    """Whether these weights are a file's."""
    return weights is not None and weights.lower().endswith(WEIGHT_FILES)


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict in a file, of safetensors or of ``torch.save`` (read with ``weights_only=True``): itself, or what
    lies under "state_dict" or "model". The prefix "module." of a parallel training is dropped.

    Raises:
        ValueError: it cannot be read, or holds something else.
        ImportError: safetensors is missing.
    """
    try:
        if path.lower().endswith(".safetensors"):
            state = require("safetensors.torch", "export", "reading weights").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # each format has its own
        raise ValueError(f"weights {path}: cannot be read ({first_line(error)[:300]})") from error
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {path}: must hold a state dict, tensors by name, got {type(state).__name__}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_weights(state: dict[str, Tensor], path: str, *, into: nn.Module, new_head: bool = False) -> None:
    """Copies what :func:`read_weights` read from ``path`` into a network: a MultiExitNet's backbone and last exit, by
    the keys of its single-exit network.

    Args:
        new_head: what the last exit has beyond the backbone is left as it is where the file has it not, or otherwise.

    Raises:
        ValueError: a tensor is missing, or has another shape.
    """
    own = into.original_state_dict() if isinstance(into, MultiExitNet) else into.state_dict()
    backbone = {key for stage in into.stages for key in stage.state_dict()} if isinstance(into, MultiExitNet) else set()
    wanted = {key for key in own if not (new_head and key not in backbone)}
    absent = sorted(key for key in wanted - state.keys() if not key.endswith("num_batches_tracked"))
    if absent:
        raise ValueError(f"weights {path}: lack {len(absent)} of the network's {len(own)} tensors, first {absent[0]!r}")
    fitting = {key for key in own.keys() & state.keys() if own[key].shape == state[key].shape}
    for key in sorted((wanted & state.keys()) - fitting):
        got = list(state[key].shape)
        raise ValueError(f"weights {path}: {key} must have shape {list(own[key].shape)}, got {got}")
    with torch.no_grad():
        for key in fitting:
            own[key].copy_(state[key])


def trained_as(name: str, weights: str) -> tuple[tuple[float, ...], int]:
    """Of torchvision's or timm's weights by name: mean and standard deviation of their images' channels, means first,
    and the number of classes.

    Raises:
        ValueError: there are no such weights, or the network has a head of its own.
    """
    library, _, inner = name.partition("/")
    if library == "torchvision":
        entry = _weights_entry(inner, weights)
        transforms = entry.transforms()
        return (*transforms.mean, *transforms.std), len(entry.meta["categories"])
    if library == "timm":
        from timm.models import get_pretrained_cfg

        found = get_pretrained_cfg(inner if weights == "DEFAULT" else f"{inner}.{weights}")
        if found is not None:
            return (*found.mean, *found.std), found.num_classes
    raise ValueError(f"{name}: there are no weights {weights!r} of all of it; give a file of its weights")


def weight_channels(weights: str | None) -> int | None:
    """Of the images that weights were trained on: a file's first convolution says so; others have three."""
    if not is_file(weights):
        return None if weights is None else 3
    shapes = (value.shape for value in read_weights(str(weights)).values() if value.dim() == 4)
    return next((shape[1] for shape in shapes if shape[1] in (1, 3)), None)


def image_size(name: str, weights: str | None = None) -> int | None:
    """Side in pixels of the images that pretrained weights were trained on, or that a network of timm is fixed to.

    Args:
        name, weights: as :func:`build` takes them.

    Returns:
        None where the network takes images of many sizes, and where there are no such weights, which :func:`build`
        says.
    """
    weights = None if is_file(weights) else weights
    library, _, inner = name.partition("/")
    try:
        if library == "timm":
            from timm.models import get_pretrained_cfg

            found = get_pretrained_cfg(inner if weights in (None, "DEFAULT") else f"{inner}.{weights}")
            return found.input_size[-1] if found and (weights or found.fixed_input_size) else None
        if weights is None:
            return None
        plan = _PLANS.get(name)
        entry = _weights_entry(plan.torchvision_name if plan else inner, weights)
        return int(entry.transforms().crop_size[0])
    except (ImportError, ValueError, RuntimeError):
        return None


def build(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    weights: str | None = None,
    *,
    exits: int | None = None,
    cuts: Sequence[str] | None = None,
    head: str | Sequence[str] = "copy",
    placement: str = "cost",
    example: Sequence[int] | None = None,
) -> MultiExitNet:
    """Builds a network by name.

    Args:
        name: one of :func:`available`, or "torchvision/<name>" or "timm/<name>": any classifier of these libraries,
            given exits by :func:`aep_ext.anticipate`. "resnet_small@0.5" has half of the channels of "resnet_small",
            and "resnet_cifar@0.5" likewise.
        num_classes: K.
        in_channels: channels of the images; other than 3 the first convolution is new (timm adapts pretrained ones).
        weights: None, "DEFAULT", a name of torchvision's weights or timm's pretrained tag, or a file,
            FILE.safetensors or FILE.pth, of a state dict. Pretrained values go into the backbone; the last layer is new
            where ``num_classes`` is not the pretrained number, and the last exit of ours where the file has another.
        exits, cuts, placement: where the exits of a network of torchvision or timm are, see
            :func:`aep_ext.anticipate`.
        head: of the early exits, see :func:`aep_ext.anticipate`; "copy" is the network's own. The last exit's stays.
        example: (C, H, W) of the images, for "auto" and for networks that take one size alone. Default: 32 pixels for
            networks made for small images, else as :func:`aep_ext.anticipate` finds out.

    Raises:
        ValueError: no network of that name, or no such head.
        ImportError: the library it comes from is missing.
    """
    if is_file(weights):
        options: dict[str, Any] = {"cuts": cuts, "exits": exits, "head": head, "placement": placement}
        state = read_weights(str(weights))
        net = build(name, num_classes, in_channels, example=example, **options)
        load_weights(state, str(weights), into=net, new_head=True)
        return net
    library, slash, inner = name.partition("/")
    if slash and library in _LIBRARIES:
        for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"build: {argument} must be at least 1, got {value}")
        model = _LIBRARIES[library](inner, num_classes, in_channels, weights)
        net = anticipate(
            model, num_classes=num_classes, exits=exits, cuts=cuts, head=head, placement=placement, example=example
        )
        net.origin = {
            "kind": "network",
            "name": name,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "exits": net.num_exits,
            **{key: net.origin[key] for key in ("cuts", "heads") if key in net.origin},
            **({} if example is None else {"example": list(example)}),
        }
        return net
    if exits is not None:
        raise ValueError(f"build: exits must be left out for {name}, which says where they are, got {exits}")
    base, scaled, text = name.partition("@")
    if scaled and base in _PLANS:
        raise ValueError(f"build: only {' and '.join(_SMALL)} can be scaled by @<width>, got {name!r}")
    if base in _SMALL:
        try:
            width = float(text) if scaled else 1.0
        except ValueError:
            raise ValueError(f"build: the width behind @ must be a number, got {name!r}") from None
        net = _SMALL[base](num_classes, in_channels, weights, width=width)
        return _with_heads(net, head, example or (in_channels, 32, 32))
    if name not in _PLANS:
        raise ValueError(f"build: {unknown(name)}")
    return _with_heads(_network(name, num_classes, in_channels, weights), head, example or (in_channels, 224, 224))


def _with_heads(net: MultiExitNet, head: str | Sequence[str], example: Sequence[int]) -> MultiExitNet:
    """One of our networks with other early heads; the last one stays."""
    if head == "copy":
        return net
    x, maps = torch.zeros((1, *example), device="meta"), []
    try:
        with torch.no_grad(), MacCounter() as counter:
            for stage in list(shadow(net.stages).eval().children())[:-1]:
                x = stage(x)
                maps.append(FeatureMap(x.shape[1], map_size(x.shape, 1), counter.macs))
    except RuntimeError as error:  # each layer has its own words for a map that is too small
        raise ValueError(
            f"build: {net.origin['name']} cannot take images of {example[-1]} pixels, try another image size: {error}"
        ) from error
    names = head_names("build", head, maps)
    heads = [
        own if name == "copy" else head_by_name(name, found, net.num_classes)
        for name, found, own in zip(names, maps, net.exits, strict=False)
    ]
    return MultiExitNet(
        list(net.stages), [*heads, net.exits[-1]], num_classes=net.num_classes, origin={**net.origin, "heads": names}
    )


def _from_torchvision(name: str, num_classes: int, in_channels: int, weights: str | None) -> nn.Module:
    models = _models()
    try:
        builder = models.get_model_builder(name)
    except ValueError as error:
        raise ValueError(f"build: {unknown(f'torchvision/{name}')}") from error
    arguments: dict[str, object] = {} if weights is not None else {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads make training mode another network; with weights torchvision drops them by itself.
        arguments |= {"aux_logits": False, "init_weights": False} if weights is None else {}
    model = builder(weights=None if weights is None else _weights_entry(name, weights), **arguments)
    if name in ("googlenet", "inception_v3") and weights is not None:
        model.aux_logits, model.AuxLogits, model.aux1, model.aux2 = False, None, None, None
    if in_channels != 3:
        stem = next(path for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
        _replace_stem(model, stem, in_channels)
        if getattr(model, "transform_input", False):
            model.transform_input = False  # it mixes three colour channels
    return model


def _from_timm(name: str, num_classes: int, in_channels: int, weights: str | None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm/{name} needs timm: pip install 'aep_ext[models]' ({error})") from error
    if not timm.is_model(name):
        raise ValueError(f"build: {unknown(f'timm/{name}')}")
    full = name if weights in (None, "DEFAULT") else f"{name}.{weights}"
    if weights not in (None, "DEFAULT") and full not in timm.list_pretrained(f"{name}.*"):
        tags = ", ".join(tag.partition(".")[2] for tag in timm.list_pretrained(f"{name}.*"))
        raise ValueError(
            f"build: timm/{name}: weights must be None, DEFAULT or one of {tags or 'none'}, got {weights!r}"
        )
    return timm.create_model(full, pretrained=weights is not None, num_classes=num_classes, in_chans=in_channels)


_SMALL = {"resnet_cifar": resnet_cifar, "resnet_small": resnet_small}
_LIBRARIES = {"torchvision": _from_torchvision, "timm": _from_timm}
