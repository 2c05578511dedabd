"""``anticipate``: gives a CNN classifier early exits."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor, fx, nn

from aep_ext.surgery.cuts import PLACEMENTS, choose, cut_name, named_cuts, to_open_for
from aep_ext.surgery.exit_weights import ExitWeights
from aep_ext.surgery.heads import FeatureMap, head_by_name, head_names
from aep_ext.surgery.measure import map_size
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.surgery.partition import Partition, partition
from aep_ext.surgery.rescale import copy_head, replace_classes, study_head
from aep_ext.surgery.sections import changes_its_input, clear_inplace, sections

__all__ = ["anticipate"]


def anticipate(
    model: nn.Module,
    *,
    exits: int | None = None,
    cuts: Sequence[str] | None = None,
    exit_weights: ExitWeights | str | None = None,
    num_classes: int | None = None,
    example: Tensor | Sequence[int] | None = None,
    head: str | Sequence[str] = "copy",
    placement: str = "cost",
    fused: bool = True,
) -> MultiExitNet:
    """Cuts a CNN classifier into stages and puts a head at the end of every stage.

    The model's head is everything behind the last feature map (pooling, classifier). Copies of it have their widths
    rescaled in proportion to the channels. All early heads get new values (each layer's ``reset_parameters``, from
    torch's global generator); the last exit keeps the model's own. The backbone keeps every value. ``model`` itself is
    not changed: the net is made of a copy.

    Args:
        model: maps images (N, C, H, W) to logits (N, K), by feature maps (N, C, H, W) or (N, H, W, C). Its forward must
            be traceable by torch.fx down to the stages (their insides need not be), or be a plain chain of modules.
            Where it branches on shapes, the net takes images that go the example's way, and raises ValueError for
            others. Forward hooks on the model itself are not carried over.
        exits: how many exits; the last is always the network's end. Default: four, where the network has places for
            them (with "stages": one for each stage found).
        cuts: instead, qualified names of modules behind which an early exit shall sit, e.g. ``["layer1", "layer2"]``;
            the last exit need not be named. "name+2" is two operations behind the module (for operations without a
            module).
        exit_weights: an ExitWeights, or the name of one ("uniform", "ascending", "descending", "mixed"). Default:
            uniform.
        num_classes: another number of classes than the model's: all last layers are then new.
        example: images (N, C, H, W), or a shape (C, H, W). Default: 224 pixels, then 11 other sizes.
        head: of the early exits, one name for all or one for each: "copy" (of the model's), "linear" (global average
            pool, linear), "conv" (grouped 3x3 convolution with stride 2, 1x1 convolution, BatchNorm, ReLU, average
            and maximum pool, linear; "conv@64" has 64 channels, "conv" twice the feature map's), "pooled4" (average
            pool to 4 x 4, linear), or "auto": "conv" as wide as a tenth of the multiply-adds up to there allows where
            the map is at least 4 x 4, else "linear".
        placement: "cost": the exits lie near 20, 45, 70 and 100 % of the multiply-adds, in general (e - 0.2) / E for
            the e-th of E, behind a block or a layer with its normalisation. "stages": where the network changes
            resolution or the group of blocks, as in the paper; of more stages than ``exits`` those that spread evenly
            over the multiply-adds. If there are too few such places, the ends of all layers serve. Without a number of
            exits, between any two lie at least 3 % of the multiply-adds.
        fused: see :class:`MultiExitNet`.

    Returns:
        A :class:`MultiExitNet` in the model's training mode; ``original_state_dict()`` gives back the model's own state
        dict.

    Raises:
        ValueError: the model cannot be cut, or not there: the message says where and why.

    Source: "Anticipate", arXiv 2301.12168, section 3.1.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"anticipate: model must be an nn.Module, got {type(model).__name__}")
    if exits is not None and cuts is not None:
        raise ValueError("anticipate: give exits or cuts, not both")
    if isinstance(cuts, str):
        raise ValueError(f"anticipate: cuts must be a sequence of names, got the string {cuts!r}")
    if num_classes is not None and operator.index(num_classes) < 1:
        raise ValueError(f"anticipate: num_classes must be at least 1, got {num_classes}")
    _refuse_further_inputs(model, example)
    if placement not in PLACEMENTS:
        raise ValueError(f"anticipate: placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    if cuts is None:
        found, chosen = _placed(model, None if exits is None else operator.index(exits), placement, example)
    else:
        found, chosen = _named(model, cuts, example)
    nodes = list(found.traced.graph.nodes)
    cost = dict(zip(nodes, accumulate(found.measured.macs[node] for node in nodes), strict=True))
    maps = []
    for cut in chosen[:-1]:
        shape, axis = found.measured.shapes[cut], found.channel_axes[cut]
        maps.append(FeatureMap(shape[axis], map_size(shape, axis), cost[cut] // len(found.example), axis))
    names = head_names("anticipate", head, maps)
    *stages, own_head = sections(found, chosen)
    classes = num_classes or found.num_classes
    heads = _heads(found, chosen, stages, own_head, classes, names, maps)
    net = MultiExitNet(
        stages,
        heads,
        num_classes=classes,
        origin={
            "kind": "anticipate",
            "cuts": [cut_name(found, node) for node in chosen[:-1]],
            "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
            "num_classes": classes,
            "example": list(found.example.shape[1:]),
            **({} if set(names) <= {"copy"} else {"heads": names}),
        },
        fused=fused,
    )
    if exit_weights is not None:
        net.set_exit_weights(exit_weights)
    net.to(found.example.device)
    net.train(model.training)
    _restore_modes(model, net)
    return net


def _named(
    model: nn.Module, cuts: Sequence[str], example: Tensor | Sequence[int] | None
) -> tuple[Partition, list[fx.Node]]:
    found = partition(copy.deepcopy(model), example, to_open_for(model, cuts))
    return found, named_cuts(found, cuts)


def _placed(
    model: nn.Module, exits: int | None, placement: str, example: Tensor | Sequence[int] | None
) -> tuple[Partition, list[fx.Node]]:
    """The model taken apart, and where it is cut."""
    found = partition(copy.deepcopy(model), example, set(), open_groups=placement == "cost")
    chosen = choose(found, exits, placement)
    if not found.groups:
        return found, chosen
    # A saved net is cut again by names alone, without looking into groups: so is this one. There an operation without
    # a module has another name if a group begins with it.
    names = [cut_name(found, node) for node in chosen[:-1]]
    ends = {name: found.traced.outputs.get(name.partition("+")[0], []) for name in names}
    again = _named(model, [n.partition("+")[0] if ends[n] and ends[n][-1] in found.cuts else n for n in names], example)
    return again if len(again[1]) == len(chosen) else _placed(model, exits, "stages", example)


def _refuse_further_inputs(model: nn.Module, example: object) -> None:
    """A network with exits takes one tensor."""
    parameters = inspect.signature(model.forward).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    several = isinstance(example, (tuple, list)) and any(isinstance(part, Tensor) for part in example)
    if several or len(needed) > 1:
        raise ValueError(
            f"anticipate: {type(model).__name__} is to take more than one input ({', '.join(needed)}), networks with "
            "exits take one tensor: wrap it in a module that makes the others of it, such as "
            "forward(self, x): return self.model(x[:, :3], x[:, 3:])"
        )


def _heads(
    found: Partition,
    cuts: Sequence[fx.Node],
    stages: Sequence[fx.GraphModule],
    head: fx.GraphModule,
    classes: int,
    names: Sequence[str],
    early: Sequence[FeatureMap],
) -> list[nn.Module]:
    """Early heads, and the original one; nothing writes into a shared feature map."""
    clear_inplace(head)
    maps = [found.example.new_zeros(found.measured.shapes[cut]) for cut in cuts]
    for stage, x in zip(stages, [found.example, *maps], strict=False):
        if changes_its_input(stage, x):
            clear_inplace(stage)
            if changes_its_input(stage, x):
                name = next((str(n.target) for n in stage.graph.nodes if n.op != "placeholder"), "")
                raise ValueError(
                    f"anticipate: the stage that begins with {name!r} overwrites the feature map it is given"
                )
    axes = [found.channel_axes[cut] for cut in cuts]
    if classes != found.num_classes or "copy" in names:
        # The head of a network for one image size is fitted to that size, as saved networks have it.
        form = study_head(head, maps[-1], axes[-1], try_larger=found.twice is not None or axes[-1] == 3)
    heads: list[nn.Module] = []
    for name, given, x in zip(names, early, maps, strict=False):
        if name == "copy":
            heads.append(copy_head(head, form, x, given.channel_axis, classes))
        else:
            heads.append(head_by_name(name, given, classes).to(x.dtype))
    if classes != found.num_classes:
        replace_classes(head, form, classes)
    return [*heads, head]


def _restore_modes(model: nn.Module, net: MultiExitNet) -> None:
    """Modules that the user had put in another mode than the model (a frozen BatchNorm) stay in it."""
    modes = {name: module.training for name, module in model.named_modules()}
    for part in (*net.stages, net.exits[-1]):
        for name, module in part.named_modules():
            if name in modes:
                module.training = modes[name] if name else model.training
