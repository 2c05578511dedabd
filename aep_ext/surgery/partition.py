"""Cuts any CNN into stages: finds where one tensor carries everything, which of these places are stage boundaries, and
where the head begins.

Terms. A *cut point* is a node of the traced graph whose 4-D result, (N, C, H, W) or (N, H, W, C), is the only tensor
alive behind it. A *segment* is
what lies between cut points and holds parameters, with the parameter-free operations behind it (activation, pooling). A
*boundary* is a cut point at a segment's end where the next segment works at another resolution, or begins another group
of blocks (a Sequential of residual blocks, say). A *place* is the end of a block or of a layer with its normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

import torch
from torch import Tensor, fx, nn

from aep_ext._utils import eval_mode
from aep_ext.surgery import measure as measuring
from aep_ext.surgery.measure import Measured, first_line, input_channels, map_size, pattern, shadow
from aep_ext.surgery.tracing import CannotTrace, TracedModel, chain_graph, is_plain_sequential, same_as_cut, trace

__all__ = ["Partition", "Segment", "alive_after", "describe", "partition"]

_SIZES = (224, 64, 32, 28, 96, 128, 299, 256, 160, 384, 240, 288)  # tried in this order where no example is given


@dataclass(frozen=True)
class Segment:
    """Parameters, and what follows them up to the next ones. ``end``: its cut point. ``size``: (H, W) behind its
    parameters, before any pooling that follows."""

    end: fx.Node
    size: tuple[int, int]
    path: str | None  # of the module, where the segment's parameters are one module's
    is_block: bool  # a module of two or more weighted layers
    weighted: bool  # has parameters of two or more dimensions: no mere normalisation


@dataclass
class Partition:
    """What was found in a model. ``model`` is the copy that the graph refers to."""

    model: nn.Module
    traced: TracedModel
    measured: Measured
    cuts: list[fx.Node]  # all cut points before the head, in order; the last is where the head begins
    channel_axes: dict[fx.Node, int]  # of each cut point's feature map: 1 or 3
    segments: list[Segment]
    boundaries: list[fx.Node]  # chosen by the rule above; the last is where the head begins
    places: list[fx.Node]  # likewise
    groups: set[str]  # modules that were opened for ``open_groups``
    num_classes: int
    example: Tensor
    twice: Measured | None  # at twice the example's height and width, if the model takes that

    @property
    def head_start(self) -> fx.Node:
        return self.cuts[-1]


def partition(
    model: nn.Module, example: Tensor | Sequence[int] | None, opened: set[str], *, open_groups: bool = False
) -> Partition:
    """Traces and measures ``model`` (a copy that may be changed) and finds cut points, boundaries and head.

    ``open_groups``: look also into modules that hold several blocks and much of the multiply-adds.

    Raises:
        ValueError: no CNN classifier, or one that cannot be cut; the message says why.
    """
    image = _example(model, example)
    opened, groups = set(opened), set[str]()
    kept_whole: set[str] = set()
    try:
        traced = _trace_or_chain(model, opened, image)
    except CannotTrace as error:
        raise ValueError(f"anticipate: {type(model).__name__} cannot be cut: {error}") from None
    while True:
        measured = _measure(model, traced.graph, image)
        done = opened | kept_whole
        more = _to_open(model, traced, measured) - done
        if not more and open_groups:
            more = _groups(model, traced, measured) - done
            groups |= more
        if not more:
            break
        path = min(more)
        try:
            traced = _trace_or_chain(model, opened | {path}, image)
            opened.add(path)
        except CannotTrace:
            kept_whole.add(path)
        except ValueError:  # its insides take another path in training mode: no matter for a stage
            if any(n.target == path and len(measured.shapes.get(n, ())) != 4 for n in traced.graph.nodes):
                raise
            kept_whole.add(path)
    nodes = list(traced.graph.nodes)
    output = nodes[-1].args[0]
    shape = measured.shapes.get(output) if isinstance(output, fx.Node) else None
    if shape is None or len(shape) != 2 or shape[0] != image.shape[0]:
        got = list(shape) if shape else f"a {type(output).__name__}"
        raise ValueError(f"anticipate: {type(model).__name__} must return logits of shape [N, K], got {got}")
    if any(node.target is same_as_cut for node in nodes):
        try:
            _measure(model, traced.graph, image[:1])
        except ValueError:
            raise ValueError(
                f"anticipate: {type(model).__name__} cannot be cut: its forward takes another path for one image than "
                "for two; stages must treat every image of a batch alike"
            ) from None
    twice = _at_twice_the_size(model, traced.graph, image)
    cuts, axes = _cut_points(model, traced, measured, twice)
    segments = _segments(model, nodes, cuts, measured, axes)
    boundaries, places = (_apart(found, nodes, measured) for found in (_boundaries(segments), _places(segments)))
    return Partition(
        *(model, traced, measured, cuts, axes, segments, boundaries, places, groups & opened, shape[1], image, twice)
    )


def _example(model: nn.Module, example: Tensor | Sequence[int] | None) -> Tensor:
    """Two images: a batch of one would hide a forward that mixes up batch and features."""
    if isinstance(example, Tensor):
        if example.dim() != 4 or example.shape[0] < 1:
            raise ValueError(f"anticipate: example must be images [N, C, H, W], got shape {list(example.shape)}")
        candidates = [torch.cat([example[:1].detach()] * 2).to(pattern((1,), model).device)]
    elif example is not None:
        shape = tuple(int(size) for size in example)
        if len(shape) not in (3, 4) or min(shape) < 1:
            raise ValueError(f"anticipate: example must be a tensor or a shape (C, H, W) or (N, C, H, W), got {shape}")
        candidates = [pattern((2, *shape[-3:]), model)]
    else:
        # The first convolution may come behind a rearrangement of the image.
        counts = dict.fromkeys((input_channels(model), 3))
        candidates = [pattern((2, channels, size, size), model) for channels in counts for size in _SIZES]
    refusal = ""
    for image in candidates:
        try:
            _probe(model, image)
            return image
        except Exception as error:  # whatever the model raises on an image it does not take
            refusal = refusal or f"{list(image.shape[1:])} ({first_line(error)})"
    others = f", nor of {len(candidates) - 1} other shapes" if len(candidates) > 1 else ""
    raise ValueError(
        f"anticipate: {type(model).__name__} does not take images of shape {refusal}{others}; give example=(C, H, W)"
    )


def _probe(model: nn.Module, image: Tensor) -> None:
    """Whether the model takes this image: without data if it can, else for real."""
    with eval_mode(model), torch.no_grad():
        try:
            shadow(model)(image.to("meta"))
        except Exception:  # a model may be no match for the meta device and still be sound
            model(image)


def _measure(model: nn.Module, graph: fx.Graph, image: Tensor) -> Measured:
    try:
        return measuring.measure(shadow(model), graph, image.to("meta"))
    except Exception:  # as in _probe
        try:
            return measuring.measure(model, graph, image)
        except Exception as error:
            raise ValueError(
                f"anticipate: {type(model).__name__} cannot be cut: its traced forward does not run "
                f"({first_line(error)})"
            ) from None


def _at_twice_the_size(model: nn.Module, graph: fx.Graph, image: Tensor) -> Measured | None:
    n, c, h, w = image.shape
    try:
        return _measure(model, graph, pattern((n, c, 2 * h, 2 * w), model))
    except ValueError:  # a network for one size only
        return None


def _trace_or_chain(model: nn.Module, opened: set[str], image: Tensor) -> TracedModel:
    try:
        return trace(model, opened)
    except CannotTrace:  # on with what may be frozen to the image's shape
        try:
            return trace(model, opened, image)
        except CannotTrace as untraceable:
            try:
                return chain_graph(model, image, opened)
            except CannotTrace as unchained:
                raise CannotTrace(
                    f"torch.fx cannot follow its forward ({untraceable}), and it is no plain chain of modules "
                    f"({unchained})"
                ) from untraceable


def _is_block(module: nn.Module) -> bool:
    return sum(p.dim() >= 2 for p in module.parameters()) >= 2


def _to_open(model: nn.Module, traced: TracedModel, measured: Measured) -> set[str]:
    """Leaves that hide stages (built of convolutions, they reduce the image fourfold or more) or the pooling (they are
    given feature maps and return vectors). Modules of torch itself stay whole."""
    paths: set[str] = set()
    for node in traced.graph.nodes:
        if node.op != "call_module":
            continue
        module = model.get_submodule(node.target)
        if is_plain_sequential(module) or type(module).__module__.startswith("torch.nn."):
            continue
        source = next((a for a in node.args if isinstance(a, fx.Node)), None)
        before, after = measured.shapes.get(source, ()), measured.shapes.get(node)
        if source is None or len(before) != 4 or after is None:
            continue
        convolutions = sum(isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 for m in module.modules())
        given = prod(map_size(before, measured.channel_axes.get(source, 1)))
        area = 1 if len(after) != 4 else prod(map_size(after, measured.channel_axes.get(node, 1)))
        if area == 1 < given or (convolutions >= 2 and given >= 16 * area):
            paths.add(node.target)
    return paths


def _groups(model: nn.Module, traced: TracedModel, measured: Measured) -> set[str]:
    """Leaves with two blocks or more in which at least a fifth of the multiply-adds lies: stages that are modules of
    their own. Modules of torch itself stay whole."""
    paths: set[str] = set()
    total = sum(measured.macs.values())
    for node in traced.graph.nodes:
        if node.op == "call_module" and 5 * measured.macs[node] >= total:
            module = model.get_submodule(node.target)
            children = [c for child in module.children() for c in (child, *child.children())]
            if not type(module).__module__.startswith("torch.nn.") and sum(map(_is_block, children)) >= 2:
                paths.add(node.target)
    return paths


def describe(node: fx.Node) -> str:
    """A node in words: the module's name, or the function's, or "the image"."""
    if node.op == "placeholder":
        return "the image"
    return repr(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target)))


def alive_after(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """For each position, the values made so far that are still needed. Parameters read directly can be read again
    anywhere."""
    position = {node: i for i, node in enumerate(nodes)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in nodes}
    alive: list[fx.Node] = []
    result = []
    for i, node in enumerate(nodes):
        made = [] if node.op == "get_attr" else [node]
        alive = [n for n in alive + made if last_use[n] > i]
        result.append(alive)
    return result


def _parameters_of(model: nn.Module, node: fx.Node) -> list[nn.Parameter]:
    if node.op == "call_module":
        return list(model.get_submodule(node.target).parameters())
    found = []
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            owner, _, name = source.target.rpartition(".")
            value = getattr(model.get_submodule(owner), name)
            found += [value] if isinstance(value, nn.Parameter) else []
    return found


def _channel_axis(node: fx.Node, measured: Measured, twice: Measured | None) -> int | None:
    """1 or 3: the axis of a feature map that does not grow with the image, where the two others do; else the one that
    the layers around it take for the channels. None: neither tells."""
    shape, bigger = measured.shapes[node], twice.shapes.get(node, ()) if twice is not None else ()
    still = [axis for axis in range(1, 4) if len(bigger) == 4 and bigger[axis] == shape[axis]]
    axis = still[0] if len(still) == 1 else measured.channel_axes.get(node)
    return axis if axis in (1, 3) and (not bigger or axis in still) else None


def _cut_points(
    model: nn.Module, traced: TracedModel, measured: Measured, twice: Measured | None
) -> tuple[list[fx.Node], dict[fx.Node, int]]:
    """Cut points up to the one where the head begins, and their channel axes. The head begins behind the last feature
    map before the global pooling (its size no longer follows the image's) and before the last weighted layer; dropouts
    in front of it belong to the head, and so does, behind channels-last maps, all that has no weights."""
    nodes = list(traced.graph.nodes)
    weighted = [any(p.dim() >= 2 for p in _parameters_of(model, node)) for node in nodes]
    if not any(weighted):
        raise ValueError(f"anticipate: {type(model).__name__} has no layer with weights in its forward")
    classifier = max(i for i, has in enumerate(weighted) if has)
    alive = alive_after(nodes)
    shapes = measured.shapes
    cuts: list[fx.Node] = []
    axes: dict[fx.Node, int] = {}
    unclear: fx.Node | None = None
    for i, node in enumerate(nodes[:classifier]):
        shape = shapes.get(node, ())
        if alive[i] != [node] or len(shape) != 4 or node.op in ("placeholder", "get_attr"):
            continue
        bigger = shape if twice is None else twice.shapes.get(node, ())
        if prod(shape[1:]) <= max(shape[1:]) if twice is None else (len(bigger) != 4 or bigger[1:] == shape[1:]):
            continue
        axis = _channel_axis(node, measured, twice)
        if axis is None:
            unclear = node
        else:
            unclear = None
            cuts.append(node)
            axes[node] = axis
    while len(cuts) > 1 and _is_dropout(model, cuts[-1]):
        cuts.pop()
    if cuts:
        last = max((i for i in range(nodes.index(cuts[-1]) + 1) if weighted[i]), default=0)
        ending = [cut for cut in cuts if nodes.index(cut) >= last]
        if axes[ending[0]] == 3:
            del cuts[len(cuts) - len(ending) + 1 :]
    _refuse_tokens(model, nodes, weighted, measured, after=cuts[-1] if cuts else None)
    if unclear is not None:
        raise ValueError(
            f"anticipate: {type(model).__name__} cannot be cut: which axis of the tensor behind {describe(unclear)} "
            f"holds the channels cannot be measured (its shape is {list(shapes[unclear])}); feature maps must be "
            "[N, C, H, W] or [N, H, W, C]"
        )
    if not cuts:
        crowded = next((i for i in range(classifier) if len(alive[i]) > 1), 0)
        names = ", ".join(describe(n) for n in alive[crowded][:4])
        raise ValueError(
            f"anticipate: {type(model).__name__} cannot be cut: nowhere before its classifier does one feature map "
            f"carry everything (after {describe(nodes[crowded])} there are {len(alive[crowded])} tensors: {names})"
        )
    return cuts, axes


def _refuse_tokens(
    model: nn.Module, nodes: list[fx.Node], weighted: Sequence[bool], measured: Measured, after: fx.Node | None
) -> None:
    """A vision transformer's blocks come after its last feature map; they are no head that could be copied."""
    start = 0 if after is None else nodes.index(after) + 1
    tokens = [n for n, has in zip(nodes, weighted, strict=True) if has and len(measured.shapes.get(n, ())) == 3]
    tokens = [n for n in tokens if nodes.index(n) >= start]
    if len(tokens) >= (1 if after is None else 3):
        raise ValueError(
            f"anticipate: {type(model).__name__} cannot be cut: from {describe(tokens[0])} on it works on token "
            f"sequences ({list(measured.shapes[tokens[0]])}), as vision transformers do, not on feature maps "
            "[N, C, H, W]; only CNN classifiers can be given exits"
        )


def _is_dropout(model: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        model.get_submodule(node.target), (nn.modules.dropout._DropoutNd, nn.Identity)
    )


def _segments(
    model: nn.Module,
    nodes: Sequence[fx.Node],
    cuts: Sequence[fx.Node],
    measured: Measured,
    axes: Mapping[fx.Node, int],
) -> list[Segment]:
    position = {node: i for i, node in enumerate(nodes)}
    segments: list[Segment] = []
    start = 0
    for cut in cuts:
        stop = position[cut] + 1
        having = [node for node in nodes[start:stop] if _parameters_of(model, node)]
        start = stop
        size = map_size(measured.shapes[cut], axes[cut])
        if not having:
            segments[-1:] = [replace(segments[-1], end=cut)] if segments else [Segment(cut, size, None, False, False)]
            continue
        modules = [node.target for node in having if node.op == "call_module"]
        path = modules[0] if len(having) == 1 and modules else None
        weights = [p for node in having for p in _parameters_of(model, node) if p.dim() >= 2]
        is_block = len(having) > 1 or (path is not None and _is_block(model.get_submodule(path)))
        segments.append(Segment(cut, size, path, is_block, bool(weights)))
    return segments


def _parent(segment: Segment) -> str | None:
    return None if segment.path is None else segment.path.rpartition(".")[0]


def _container(segment: Segment) -> str:
    """What holds the segment's group of blocks."""
    return (_parent(segment) or "").rpartition(".")[0]


def _apart(boundaries: list[fx.Node], nodes: Sequence[fx.Node], measured: Measured) -> list[fx.Node]:
    """Without those that nearly coincide (less than 3 % of the multiply-adds lie between them and the next), or in
    front of which nothing is computed."""
    cost = dict(zip(nodes, accumulate(measured.macs[node] for node in nodes), strict=True))
    kept = boundaries[-1:]
    for node in reversed(boundaries[:-1]):
        if cost[node] and cost[kept[0]] - cost[node] >= 0.03 * cost[boundaries[-1]]:
            kept.insert(0, node)
    return kept


def _places(segments: Sequence[Segment]) -> list[fx.Node]:
    """Ends of blocks, and of layers behind whose normalisation the next weights come; none before the first block."""
    first = _first_place(segments)
    followed = zip(segments, segments[1:], strict=False)
    ends = [i for i, (one, after) in enumerate(followed) if one.is_block or after.weighted]
    return [segments[end].end for end in ends if end >= first] + [segments[-1].end]


def _boundaries(segments: Sequence[Segment]) -> list[fx.Node]:
    ends: list[int] = []
    for i in range(1, len(segments)):
        before, after = segments[i - 1], segments[i]
        other_size = before.size != after.size
        other_group = before.is_block and after.is_block and None not in (_parent(before), _parent(after))
        other_group = other_group and _parent(before) != _parent(after)
        if other_size or other_group:
            ends.append(_before_its_normalisation(segments, i) - 1)
    ends = [end for end in dict.fromkeys(ends) if end >= _first_place(segments)]
    return [segments[end].end for end in ends if end != len(segments) - 1] + [segments[-1].end]


def _first_place(segments: Sequence[Segment]) -> int:
    """The stem of a network of blocks is no stage of its own: what it yields is too early to classify. Where single
    layers outnumber the blocks (VGG), they are the stages; and so are those grouped in one list with the groups of
    blocks (MobileNetV4)."""
    first_block = next((i for i, segment in enumerate(segments) if segment.is_block), 0)
    groups = _container(segments[first_block])
    first_block = next(
        (i for i, segment in enumerate(segments) if groups and _container(segment) == groups), first_block
    )
    if sum(segment.weighted for segment in segments[:first_block]) >= sum(segment.is_block for segment in segments):
        return 0
    return first_block


def _before_its_normalisation(segments: Sequence[Segment], index: int) -> int:
    """A normalisation that opens the container of a strided convolution (ConvNeXt) goes with it to the next stage."""
    while index >= 2:
        segment, before = segments[index], segments[index - 1]
        parent = _parent(segment)
        same = parent not in (None, "") and _parent(before) == parent
        if not same or before.weighted or _parent(segments[index - 2]) == parent:
            break
        index -= 1
    return index
