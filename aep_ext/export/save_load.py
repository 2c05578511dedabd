"""Save and load networks, full, pruned or gated: ``model.safetensors`` (tensors), ``model.json`` (how to rebuild).

No pickle. The JSON names the SHA-256 of the tensor file, so two files that do not belong together are found out.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
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
_KEYS = ("origin", "num_classes", "exit_ids", "exit_stages", "fused", "tied", "strides", "frozen", "sha256", "metadata")


def _own_strides(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory in an order of its own (channels_last): convolutions then run otherwise."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return tensor.numel() > 0 and tensor.stride() != torch.empty(tensor.shape, device="meta").stride()


def save(
    net: MultiExitNet | GatedNet, folder: str | os.PathLike[str], *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write ``net`` to ``folder`` as ``model.safetensors`` and ``model.json``; earlier ones are replaced.

    Args:
        net: a full, pruned or gated network, on any real device. Of a gated one the :class:`ExitPolicy` is written
            too, and its ``calibration`` if it has one, but not the measured profile, which belongs to a machine.
        folder: made if absent.
        metadata: JSON-able values of the user's own, returned by :func:`describe`. ``net.classes`` and
            ``net.preprocessing`` are written beside them, as "classes" and "preprocessing", unless these hold others.

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
    library = require("safetensors.torch", "deploy", "aep_ext.save")
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
        "metadata": {**_own_metadata(net), **(metadata or {})},
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


def _own_metadata(net: MultiExitNet | GatedNet) -> dict[str, Any]:
    entries: dict[str, Any] = {} if net.classes is None else {"classes": list(net.classes)}
    return entries if net.preprocessing is None else {**entries, "preprocessing": net.preprocessing.to_dict()}


def _set_metadata(net: MultiExitNet | GatedNet, metadata: dict[str, Any]) -> None:
    """The reverse; metadata is a user's own, and may hold something else under these names."""
    classes = metadata.get("classes")
    if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
        net.classes = tuple(classes)
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
    try:
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
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: the gates in {DESCRIPTION} cannot be read: {error}") from error
    gated.calibration = entries.get("calibration")
    return gated


def describe(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of ``model.json``, checked for format and version; ``["metadata"]`` holds the user's own values.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is no description of a network, or of a newer format.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"load: {DESCRIPTION} must be in the folder, got none in {os.fspath(folder)!r}")
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"load: {DESCRIPTION} must be JSON, got {error}") from error
    found = description.get("format") if isinstance(description, dict) else None
    if found != FORMAT:
        raise ValueError(f"load: {DESCRIPTION} must have format {FORMAT!r}, got {found!r}")
    if description.get("version") not in range(1, VERSION + 1):
        raise ValueError(f"load: {DESCRIPTION} must have version 1 to {VERSION}, got {description.get('version')!r}")
    absent = [key for key in _KEYS if key not in description]
    if absent:
        raise ValueError(f"load: {DESCRIPTION} must have the entries {', '.join(_KEYS)}, got none for {absent[0]!r}")
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
                f"load: model= must be left out for the network {origin['name']!r}, which is "
                f"rebuilt by name, got {type(model).__name__}"
            )
        return networks.build(origin["name"], origin["num_classes"], in_channels=origin["in_channels"], weights=None)
    if kind == "anticipate":
        if model is None:
            raise ValueError(
                "load: model= must be given, a model such as the one that anticipate was called "
                f"with ({origin.get('model_class')}), got None"
            )
        expected = origin.get("model_class")
        if expected not in (None, _qualified_name(model), type(model).__name__):
            raise ValueError(f"load: model must be a {expected}, got a {_qualified_name(model)}")
        return anticipate(
            model, cuts=origin["cuts"], num_classes=origin.get("num_classes"), example=origin.get("example")
        )
    raise ValueError(
        f"load: model= must be given, a MultiExitNet of the same architecture, for a network of "
        f"origin {kind!r}, got {'None' if model is None else type(model).__name__}"
    )


def _architecture(description: dict[str, Any], model: nn.Module | None) -> MultiExitNet:
    # Building draws random numbers for parameters that are overwritten: the caller's generator is left alone.
    with torch.random.fork_rng(devices=[]):
        full = _full_network(description, model)
    wanted = tuple(description["exit_ids"])
    missing = [number for number in wanted if number not in full.exit_ids]
    if missing:
        raise ValueError(f"load: the rebuilt network must have the exits {wanted}, got {tuple(full.exit_ids)}")
    net = subset_view(full, tuple(full.exit_ids.index(number) for number in wanted), share=False)
    stages = tuple(description["exit_stages"])
    if tuple(net.exit_stages) != stages or net.num_classes != description["num_classes"]:
        raise ValueError(
            f"load: the rebuilt network must have {description['num_classes']} classes and exits "
            f"after stages {stages}, got {net.num_classes} and {tuple(net.exit_stages)}"
        )
    return net


def _fill(net: MultiExitNet, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Give the tensors of ``net`` the stored values, dtypes and strides; shared parameters stay shared."""
    tensors = tensors | {name: tensors[stored] for name, stored in description["tied"].items()}
    own = net.state_dict(keep_vars=True)
    absent, surplus = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if absent or surplus:
        raise ValueError(
            f"load: {TENSORS} must hold the tensors of the rebuilt network, got {len(absent)} "
            f"missing (first: {absent[:1]}) and {len(surplus)} unknown (first: {surplus[:1]})"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"load: {name} must have shape {list(tensor.shape)}, got {list(tensors[name].shape)}")
    for name in ("output_weights", "loss_weights"):
        per_exit("load", name, tensors[name], net.num_exits, positive=True)
    sources: dict[int, str] = {}
    for name, tensor in own.items():
        source = sources.setdefault(id(tensor), description["tied"].get(name, name))
        if source != description["tied"].get(name, name):
            raise ValueError(
                f"load: {name} must be stored as shared with {source}, as the rebuilt network "
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
        model: left out for networks by name (``aep_ext.surgery.networks``). For a network made by ``anticipate``: the
            user's model again, of the same architecture, with any parameters; for a hand-made one: a MultiExitNet with
            its stages and exits. Not changed.
        map_location: the device to load to.

    Returns:
        The network in eval mode: a :class:`GatedNet` if one was saved, with its ``calibration`` as a plain dict if it
        had one, otherwise a :class:`MultiExitNet`. Its ``classes`` (names) and ``preprocessing`` (how images are made
        its input) are those that were saved, or None.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: another format or version, a tensor file that is not the one saved, an unknown network, ``model``
            missing or of another architecture.
        ImportError: safetensors is missing.
    """
    description = describe(folder)
    library = require("safetensors.torch", "deploy", "aep_ext.load")
    path = Path(folder) / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"load: {TENSORS} must be in the folder, got none in {os.fspath(folder)!r}")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != description["sha256"]:
        raise ValueError(
            f"load: {TENSORS} must have the SHA-256 that {DESCRIPTION} names, "
            f"{description['sha256'][:12]}..., got {digest[:12]}..."
        )
    net = _architecture(description, model)
    net.fused = bool(description["fused"])
    net.origin = description["origin"]
    tensors = library.load(data)
    names = [name for name in tensors if "gate" in description and name.startswith("gate.")]
    old = {name.removeprefix("gate."): tensors.pop(name) for name in names}
    _fill(net, tensors, description)
    _set_metadata(net, description["metadata"])
    # Only now, with the stored weights in place, can the gates be checked against them.
    gated = "gate" in description or "exit_policy" in description
    return (_gated(net, description, old) if gated else net).to(map_location).eval()
