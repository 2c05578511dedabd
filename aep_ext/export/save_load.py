"""Save and load networks, full, pruned or gated: ``model.safetensors`` (tensors), ``model.json`` (how to rebuild).

No pickle. The JSON names the SHA-256 of the tensor file, so two files that do not belong together are found out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from aep_ext._io import write_atomically, write_bytes
from aep_ext._utils import per_exit, require
from aep_ext._version import __version__
from aep_ext.export.preprocessing import Preprocessing
from aep_ext.inference.exit_policy import ExitPolicy
from aep_ext.inference.gated_net import GatedNet
from aep_ext.pruning.extract import subset_view
from aep_ext.surgery import networks
from aep_ext.surgery.anticipation import anticipate
from aep_ext.surgery.multi_exit import MultiExitNet

TENSORS = "model.safetensors"
DESCRIPTION = "model.json"
FORMAT = "aep_ext.model"
VERSION = 2
"""1 had a gated net's thresholds, temperatures and flags as tensors "gate.<name>"; 2 has the entry "exit_policy"."""


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _list_of(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(each, value))


def _object_of(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(each, value.values()))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _ascending(value: Any) -> bool:
    return _list_of(_whole(0))(value) and bool(value) and all(a < b for a, b in zip(value, value[1:], strict=False))


def _shape(value: Any) -> bool:
    """A shape of images, or several: not larger than one would measure a network with."""
    return value is None or (_list_of(_whole(1))(value) and math.prod(value) <= 1 << 28) or _list_of(_shape)(value)


_Rule = tuple[Callable[[Any], bool], str]
_CLASSES: _Rule = (_whole(1), "a whole number of at least 1")
_ENTRIES: dict[str, _Rule] = {
    "origin": (_object_of(lambda value: True), "an object"),
    "num_classes": _CLASSES,
    "exit_ids": (_ascending, "ascending whole numbers"),
    "exit_stages": (_ascending, "ascending whole numbers"),
    "fused": (lambda value: isinstance(value, bool), "true or false"),
    "tied": (_object_of(_text), "an object of names"),
    "strides": (_object_of(_list_of(_whole(0))), "an object of lists of whole numbers"),
    "frozen": (_list_of(_text), "a list of names"),
    "sha256": (lambda value: _text(value) and bool(re.fullmatch("[0-9a-f]{64}", value)), "64 hexadecimal digits"),
    "metadata": (_object_of(lambda value: True), "an object"),
}
"""What every description has."""
_ORIGIN: dict[str, dict[str, _Rule]] = {
    "network": {"name": (_text, "a name"), "num_classes": _CLASSES, "in_channels": _CLASSES},
    "anticipate": {"cuts": (_list_of(_text), "a list of names")},
}
"""What the entry "origin" of each kind has."""
_OPTIONAL: dict[str, _Rule] = {
    "exits": _CLASSES,
    "num_classes": (lambda value: value is None or _CLASSES[0](value), f"null or {_CLASSES[1]}"),
    "cuts": (_list_of(_text), "a list of names"),
    "heads": (_list_of(_text), "a list of names"),
    "head_keys": (
        _list_of(lambda value: _list_of(_text)(value) and len(value) == 2),
        "a list of pairs of names",
    ),
    "example": (_shape, "a shape of images"),
}
"""What it may have besides."""


def _check(values: dict[str, Any], rules: dict[str, _Rule], prefix: str = "") -> None:
    for name, (holds, rule) in rules.items():
        if name not in values:
            raise ValueError(f"must have the entries {', '.join(prefix + one for one in rules)}, got none for {name!r}")
        if not holds(values[name]):
            raise ValueError(f"{prefix}{name} must be {rule}, got {json.dumps(values[name])[:80]}")


@contextmanager
def _naming(path: Path, what: str = "") -> Iterator[None]:
    """Whatever goes wrong inside becomes a ValueError of one line that names the file (and what could not be done)."""
    try:
        yield
    except ImportError:  # a library that is missing: nothing is wrong with the file
        raise
    except FileNotFoundError as error:
        folder = os.fspath(path.parent)
        raise FileNotFoundError(f"load: {path.name} must be in the folder, got none in {folder!r}") from error
    except Exception as error:
        text = f"{error.strerror or error}" if isinstance(error, OSError) else f"{error}"
        if isinstance(error, KeyError):
            text = f"there is no entry {error}"
        kind = "" if isinstance(error, (ValueError, OSError, KeyError)) else f"{type(error).__name__}: "
        text = " ".join(f"{what}{kind}{text}".split())
        raise ValueError(f"load: {path}: {text[:1000]}") from error


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the strides fill a memory of their own, without holes and overlaps."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return expected > 0


def _own_strides(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory in an order of its own (channels_last): convolutions then run otherwise."""
    usual = torch.empty(tensor.shape, device="meta").stride()
    return tensor.numel() > 0 and tensor.stride() != usual and _dense(tensor.shape, tensor.stride())


def _regular(path: Path) -> Path:
    if path.stat() and not path.is_file():
        raise ValueError("must be a file")
    return path


def save(
    net: MultiExitNet | GatedNet, folder: str | os.PathLike[str], *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write ``net`` to ``folder`` as ``model.safetensors`` and ``model.json``; earlier ones are replaced.

    Args:
        net: a full, pruned or gated network, on any real device. Of a gated one the :class:`ExitPolicy` is written
            too, and its ``calibration`` if it has one, but not the measured profile, which belongs to a machine.
        folder: made if absent.
        metadata: JSON-able values of the user's own, returned by :func:`describe`. ``net.classes``,
            ``net.preprocessing`` and ``net.selection`` are written beside them, by these names, unless these hold
            others.

    Returns:
        The folder.

    Raises:
        TypeError: ``net`` is no MultiExitNet and no GatedNet of one, or origin or metadata cannot be written as JSON.
        ValueError: ``net`` is on the meta device, or gated by a user's own criterion.
        ImportError: safetensors is missing.
    """
    gated, full = (net, net.net) if isinstance(net, GatedNet) else (None, net)
    if not isinstance(full, MultiExitNet):
        raise TypeError(f"save: net must be a MultiExitNet or a GatedNet of one, got {type(full).__name__}")
    gates = {} if gated is None else _gates(gated)
    library = require("safetensors.torch", "export", "aep_ext.save")
    state = full.state_dict()
    meta = next((name for name, tensor in state.items() if tensor.device.type == "meta"), None)
    if meta is not None:
        raise ValueError(f"save: net must be on a real device, got {meta!r} on meta")

    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        # The same numbers under two names (a shared parameter) are written once.
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            # Cloned, because safetensors refuses tensors that overlap; contiguous, because it stores no strides.
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    data = library.save(tensors)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "aep_ext": __version__,
        "torch": torch.__version__,
        "origin": full.origin,
        "num_classes": full.num_classes,
        "exit_ids": list(full.exit_ids),
        "exit_stages": list(full.exit_stages),
        "fused": full.fused,
        "output_weights": full.output_weights.tolist(),
        "loss_weights": full.loss_weights.tolist(),
        "tied": tied,
        "strides": {name: list(tensor.stride()) for name, tensor in state.items() if _own_strides(tensor)},
        "frozen": [name for name, parameter in full.named_parameters() if not parameter.requires_grad],
        "sha256": hashlib.sha256(data).hexdigest(),
        "metadata": {**_own_metadata(net, full), **(metadata or {})},
        **gates,
    }
    try:
        text = json.dumps(description, indent=1)
    except TypeError as error:
        raise TypeError(f"save: origin and metadata must be JSON-able, got {error}") from error
    target = Path(folder)

    def write(file: BinaryIO) -> None:
        # Both files are complete before either takes its name.
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
        write_bytes(target / TENSORS, data)

    write_atomically(target / DESCRIPTION, write)
    return target


def _own_metadata(net: MultiExitNet | GatedNet, full: MultiExitNet) -> dict[str, Any]:
    entries: dict[str, Any] = {} if net.classes is None else {"classes": list(net.classes)}
    if full.selection is not None:
        entries["selection"] = full.selection
    return entries if net.preprocessing is None else {**entries, "preprocessing": net.preprocessing.to_dict()}


def _set_metadata(net: MultiExitNet, metadata: dict[str, Any]) -> None:
    """The reverse; metadata is a user's own, and may hold something else under these names."""
    classes = metadata.get("classes")
    if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
        net.classes = tuple(classes)
    if isinstance(metadata.get("selection"), dict):
        net.selection = metadata["selection"]
    with suppress(ValueError):
        net.preprocessing = Preprocessing.from_dict(metadata.get("preprocessing", metadata))


def _gates(gated: GatedNet) -> dict[str, Any]:
    """The entries of a gated net."""
    try:
        entries: dict[str, Any] = {"exit_policy": gated.policy.to_dict()}
    except ValueError as error:
        raise ValueError(f"save: a user's own criterion cannot be written to a file ({error})") from error
    calibration = gated.calibration
    if calibration is not None:
        entries["calibration"] = calibration if isinstance(calibration, dict) else calibration.to_dict()
    return entries


def _gated(net: MultiExitNet, description: dict[str, Any], old: dict[str, Tensor]) -> GatedNet:
    """``net`` behind the gates that were saved; ``old``: their numbers in files of version 1."""
    if "gate" in description:
        entries = description["gate"]
        live = [flag and mode != "off" for flag, mode in zip(old["enabled"].tolist(), entries["mode"], strict=True)]
        policy = ExitPolicy(
            output_weights=tuple(net.output_weights.tolist()),
            thresholds=tuple(old["thresholds"].tolist()),
            criterion=entries["policy"],
            criterion_on=entries["on"],
            temperatures=tuple(old["temperatures"].tolist()),
            enabled=tuple(live),
            exits=net.exit_ids,
        )
    else:
        entries, policy = description, ExitPolicy.from_dict(description["exit_policy"])
    gated = GatedNet(net, policy)
    gated.calibration = entries.get("calibration")
    if not isinstance(gated.calibration, dict | None):
        raise TypeError(f"calibration must be an object, got {type(gated.calibration).__name__}")
    return gated


def describe(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of ``model.json``, each entry checked; ``["metadata"]`` holds the user's own values.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it cannot be read, is no description of a network, or of a newer format.
    """
    path = Path(folder) / DESCRIPTION
    with _naming(path):
        data = _regular(path).read_bytes()
    with _naming(path, "must be JSON, got "):
        description = json.loads(data.decode())
    with _naming(path):
        found = description.get("format") if isinstance(description, dict) else None
        if found != FORMAT:
            raise ValueError(f"must have format {FORMAT!r}, got {found!r:.80}")
        version = description.get("version")
        if not _whole(1)(version) or version > VERSION:
            raise ValueError(f"must have version 1 to {VERSION}, got {version!r:.80}")
        _check(description, _ENTRIES)
        origin = description["origin"]
        rules = _ORIGIN.get(str(origin.get("kind")), {})
        _check(
            origin,
            rules | {name: _OPTIONAL[name] for name in _OPTIONAL if name in origin and name not in rules},
            "origin.",
        )
    return description


def _qualified_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _full_network(description: dict[str, Any], model: nn.Module | None) -> MultiExitNet:
    """The unpruned architecture, with whatever parameters: they are overwritten."""
    origin = description["origin"]
    kind = origin.get("kind")
    if isinstance(model, MultiExitNet):
        return model
    if kind == "network":
        if model is not None:
            raise ValueError(
                f"model= must be left out for the network {origin['name']!r}, which is "
                f"rebuilt by name, got {type(model).__name__}"
            )
        return networks.build(
            origin["name"],
            origin["num_classes"],
            origin["in_channels"],
            cuts=origin.get("cuts"),
            head=origin.get("heads", "copy"),
            example=origin.get("example"),
            placement="stages",  # of files without cuts
        )
    if kind == "anticipate":
        if model is None:
            raise ValueError(
                "model= must be given, a model such as the one that anticipate was called "
                f"with ({origin.get('model_class')}), got None"
            )
        expected = origin.get("model_class")
        if expected not in (None, _qualified_name(model), type(model).__name__):
            raise ValueError(f"model must be a {expected}, got a {_qualified_name(model)}")
        return anticipate(
            model,
            cuts=origin["cuts"],
            num_classes=origin.get("num_classes"),
            example=origin.get("example"),
            head=origin.get("heads", "copy"),
        )
    raise ValueError(
        f"model= must be given, a MultiExitNet of the same architecture, for a network of "
        f"origin {kind!r}, got {'None' if model is None else type(model).__name__}"
    )


def _architecture(description: dict[str, Any], model: nn.Module | None) -> MultiExitNet:
    # Building draws random numbers for parameters that are overwritten: the caller's generator is left alone.
    with torch.random.fork_rng(devices=[]):
        full = _full_network(description, model)
    wanted = tuple(description["exit_ids"])
    missing = [number for number in wanted if number not in full.exit_ids]
    if missing:
        raise ValueError(f"the rebuilt network must have the exits {wanted}, got {tuple(full.exit_ids)}")
    net = subset_view(full, tuple(full.exit_ids.index(number) for number in wanted), share=False)
    stages = tuple(description["exit_stages"])
    if tuple(net.exit_stages) != stages or net.num_classes != description["num_classes"]:
        raise ValueError(
            f"the rebuilt network must have {description['num_classes']} classes and exits "
            f"after stages {stages}, got {net.num_classes} and {tuple(net.exit_stages)}"
        )
    return net


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in the header of a tensor file, which are shown to be those of its data; nothing is allocated."""
    library = require("safetensors", "export", "aep_ext.load")
    with _naming(path, "is damaged: "), library.safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _check_sizes(description: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], model: nn.Module | None) -> None:
    """An error before anything is allocated where the description asks for more than the file holds."""
    origin = description["origin"]
    if origin.get("kind") == "network" and model is None:
        # Without memory for values. What cannot be built like this will say so when it is built.
        try:
            with torch.device("meta"):
                net = _architecture(description, None)
        except (ImportError, RuntimeError):
            return
        _compare(net, shapes, description)
    elif origin.get("num_classes") is not None:
        classes = description["num_classes"]
        if not any(classes in shape for name, shape in shapes.items() if name.startswith("exits.")):
            raise ValueError(f"num_classes must be that of the stored exits, got {classes}")
        if origin["num_classes"] != classes:
            raise ValueError(f"origin.num_classes must be num_classes, {classes}, got {origin['num_classes']}")


def _compare(net: MultiExitNet, shapes: Mapping[str, tuple[int, ...]], description: dict[str, Any]) -> None:
    """An error unless the tensors of ``net`` have the stored names and shapes."""
    tied = description["tied"]
    strange = next((name for name, stored in tied.items() if stored not in shapes), None)
    if strange is not None:
        raise ValueError(f"tied must name stored tensors, got {tied[strange]!r} for {strange!r}")
    stored = {**shapes, **{name: shapes[other] for name, other in tied.items()}}
    own = net.state_dict()
    absent, surplus = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    if absent or surplus:
        raise ValueError(
            f"{TENSORS} must hold the tensors of the rebuilt network, got {len(absent)} "
            f"missing (first: {absent[:1]}) and {len(surplus)} unknown (first: {surplus[:1]})"
        )
    for name, tensor in own.items():
        if tuple(tensor.shape) != stored[name]:
            raise ValueError(f"{name} must have shape {list(tensor.shape)}, got {list(stored[name])}")
        strides = description["strides"].get(name)
        if strides is not None and (len(strides) != tensor.dim() or not _dense(tensor.shape, strides)):
            raise ValueError(f"strides of {name} must be an order of its shape {list(tensor.shape)}, got {strides}")


def _fill(net: MultiExitNet, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Give the tensors of ``net`` the stored values, dtypes and strides; shared parameters stay shared."""
    _compare(net, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, description)
    tensors = tensors | {name: tensors[stored] for name, stored in description["tied"].items()}
    own = net.state_dict(keep_vars=True)
    for name in ("output_weights", "loss_weights"):
        per_exit("load", name, tensors[name], net.num_exits, positive=True)
    sources: dict[int, str] = {}
    for name, tensor in own.items():
        source = sources.setdefault(id(tensor), description["tied"].get(name, name))
        if source != description["tied"].get(name, name):
            raise ValueError(
                f"{name} must be stored as shared with {source}, as the rebuilt network "
                "shares them, got a tensor of its own"
            )
    strides = description["strides"]
    for name, tensor in own.items():
        value = tensors[name]
        if name in strides:
            value = torch.empty_strided(value.shape, strides[name], dtype=value.dtype).copy_(value)
        tensor.data = value
    frozen = set(description["frozen"])
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in frozen)


def load(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, map_location: torch.device | str = "cpu"
) -> MultiExitNet | GatedNet:
    """Read a network that :func:`save` wrote. Parameters, buffers and outputs are those that were saved, bit for bit.

    Args:
        folder: holds ``model.safetensors`` and ``model.json``.
        model: left out for networks by name (``aep_ext.surgery.networks``, also "torchvision/<name>" and
            "timm/<name>"), which are built anew. For a network made by ``anticipate``: the user's model again, of the
            same architecture, with any parameters; for a hand-made one: a MultiExitNet with its stages and exits. Not
            changed.
        map_location: the device to load to.

    Returns:
        The network in eval mode: a :class:`GatedNet` if one was saved, with its ``calibration`` as a plain dict if it
        had one, otherwise a :class:`MultiExitNet`. Its ``classes`` (names), ``preprocessing`` (how images are made its
        input) and ``selection`` (how ``prune`` chose its exits) are those that were saved, or None.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: another format or version, a damaged file, a tensor file that is not the one saved, an unknown
            network, ``model`` missing or of another architecture. The message is one line and names the file. Nothing
            larger than the tensor file is allocated before the two files are known to belong together.
        ImportError: safetensors, or the library that the network comes from, is missing.
    """
    description = describe(folder)
    library = require("safetensors.torch", "export", "aep_ext.load")
    where, path = Path(folder) / DESCRIPTION, Path(folder) / TENSORS
    with _naming(path):
        with _regular(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != description["sha256"]:
            raise ValueError(
                f"must have the SHA-256 that {DESCRIPTION} names, {description['sha256'][:12]}..., got {digest[:12]}..."
            )
    shapes = _stored_shapes(path)
    old_names = [name for name in shapes if "gate" in description and name.startswith("gate.")]
    with _naming(where, "the network cannot be rebuilt: "):
        own = {name: shape for name, shape in shapes.items() if name not in old_names}
        _check_sizes(description, own, model)
        net = _architecture(description, model)
        _compare(net, own, description)
        net.fused = description["fused"]
        net.origin = description["origin"]
        _set_metadata(net, description["metadata"])
    with _naming(path):
        tensors = library.load(path.read_bytes())
        old = {name.removeprefix("gate."): tensors.pop(name) for name in old_names}
        _fill(net, tensors, description)
    loaded: MultiExitNet | GatedNet = net
    if "gate" in description or "exit_policy" in description:
        # Only now, with the stored weights in place, can the gates be checked against them.
        with _naming(where, "the gates cannot be read: "):
            loaded = _gated(net, description, old)
    return loaded.to(map_location).eval()
