"""Save and load networks, full, pruned or gated: ``model.safetensors`` (tensors), ``model.json`` (how to rebuild).

No pickle. The JSON names the SHA-256 of the tensor file, so two files that do not belong together are found out.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from aep_ext import __version__
from aep_ext.calibration.calibration import Calibration
from aep_ext.inference._old_criteria import POLICIES
from aep_ext.inference.gated_net import GatedNet
from aep_ext.pruning.extract import subset_view
from aep_ext.surgery.multi_exit import MultiExitNet

TENSORS = "model.safetensors"
DESCRIPTION = "model.json"
FORMAT = "aep_ext.model"
VERSION = 1
_GATE = ("thresholds", "temperatures", "enabled")  # a gated net's own tensors, stored as "gate.<name>"
_KEYS = ("origin", "num_classes", "exit_ids", "exit_stages", "fused", "tied", "strides", "frozen", "sha256", "metadata")


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("aep_ext.deploy needs safetensors: pip install 'aep_ext[deploy]'") from error
    return safetensors.torch


def _own_strides(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory in an order of its own (channels_last): convolutions then run otherwise."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return tensor.numel() > 0 and tensor.stride() != torch.empty(tensor.shape, device="meta").stride()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; removed if the block fails, otherwise left for ``os.replace``."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def save(
    net: MultiExitNet | GatedNet, folder: str | os.PathLike[str], *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write ``net`` to ``folder`` as ``model.safetensors`` and ``model.json``; earlier ones are replaced.

    Both files are complete before either takes its name.

    Args:
        net: a full, pruned or gated network, on any real device. Of a gated one the policy, its numbers and the modes
            are written too, and its ``calibration`` if it has one, but not the measured costs, which belong to a
            machine.
        folder: made if absent.
        metadata: JSON-able values of the user's own (class names, preprocessing), returned by :func:`describe`.

    Returns:
        The folder.

    Raises:
        TypeError: ``net`` is no MultiExitNet and no GatedNet of one, or origin or metadata cannot be written as JSON.
        ValueError: ``net`` is on the meta device, or gated by a user's own rule.
        ImportError: safetensors is missing.
    """
    gated, net = (net, net.net) if isinstance(net, GatedNet) else (None, net)
    if not isinstance(net, MultiExitNet):
        raise TypeError(f"deploy.save: net must be a MultiExitNet, got {type(net).__name__}")
    gate = None if gated is None else _gate_description(gated)
    library = _safetensors()
    state = net.state_dict()
    meta = next((name for name, tensor in state.items() if tensor.device.type == "meta"), None)
    if meta is not None:
        raise ValueError(f"deploy.save: net must be on a real device, got {meta!r} on meta")

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
    if gated is not None:
        tensors |= {f"gate.{name}": getattr(gated, name).detach().cpu().clone() for name in _GATE}
    data = library.save(tensors)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "aep_ext": __version__,
        "torch": torch.__version__,
        "origin": net.origin,
        "num_classes": net.num_classes,
        "exit_ids": list(net.exit_ids),
        "exit_stages": list(net.exit_stages),
        "fused": net.fused,
        "output_weights": net.output_weights.tolist(),
        "loss_weights": net.loss_weights.tolist(),
        "tied": tied,
        "strides": {name: list(tensor.stride()) for name, tensor in state.items() if _own_strides(tensor)},
        "frozen": [name for name, parameter in net.named_parameters() if not parameter.requires_grad],
        "sha256": hashlib.sha256(data).hexdigest(),
        "metadata": {} if metadata is None else metadata,
    }
    if gate is not None:
        description["gate"] = gate
    try:
        text = json.dumps(description, indent=1)
    except TypeError as error:
        raise TypeError(f"deploy.save: origin and metadata must be JSON-able, got {error}") from error

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with _replacing(target / TENSORS) as tensor_file, _replacing(target / DESCRIPTION) as description_file:
        _write(tensor_file, data)
        _write(description_file, text.encode())
        os.replace(tensor_file, target / TENSORS)
        os.replace(description_file, target / DESCRIPTION)
    return target


def _gate_description(gated: GatedNet) -> dict[str, Any]:
    """What of a gate is no tensor."""
    policy = gated.policy
    if type(policy) is not POLICIES.get(policy.name):
        raise ValueError(
            f"deploy.save: the policy must be one of {', '.join(POLICIES)}, got {policy.name!r} "
            f"({type(policy).__name__}), a rule in Python, which a file cannot hold"
        )
    calibration = getattr(gated, "calibration", None)
    origin = {"calibration": calibration.to_dict()} if isinstance(calibration, Calibration) else {}
    return {"policy": policy.name, "on": policy.on, "mode": list(gated.mode)} | origin


def _with_gate(net: MultiExitNet, gate: Any, tensors: dict[str, Tensor]) -> GatedNet:
    """``net`` behind the gate that was saved, whose numbers are in ``tensors``."""
    try:
        kind, on, mode = POLICIES[gate["policy"]], gate["on"], gate["mode"]
        numbers = [tensors[f"gate.{name}"] for name in _GATE]
    except (KeyError, TypeError) as error:
        raise ValueError(
            "deploy.load: the files of a gated network must hold a built-in policy, its numbers and "
            f"modes, got no {error}"
        ) from error
    gated = GatedNet(net, kind(on), *numbers, mode=mode)
    if "calibration" in gate:
        try:
            gated.calibration = Calibration.from_dict(gate["calibration"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"deploy.load: the calibration of the gates cannot be read: {error}") from error
    return gated


def describe(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of ``model.json``, checked for format and version; ``["metadata"]`` holds the user's own values.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is no description of a network, or of a newer format.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"deploy.load: {DESCRIPTION} must be in the folder, got none in {os.fspath(folder)!r}")
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"deploy.load: {DESCRIPTION} must be JSON, got {error}") from error
    found = description.get("format") if isinstance(description, dict) else None
    if found != FORMAT:
        raise ValueError(f"deploy.load: {DESCRIPTION} must have format {FORMAT!r}, got {found!r}")
    if description.get("version") != VERSION:
        raise ValueError(f"deploy.load: {DESCRIPTION} must have version {VERSION}, got {description.get('version')!r}")
    absent = [key for key in _KEYS if key not in description]
    if absent:
        raise ValueError(
            f"deploy.load: {DESCRIPTION} must have the entries {', '.join(_KEYS)}, got none for {absent[0]!r}"
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
                f"deploy.load: model= must be left out for the network {origin['name']!r}, which is "
                f"rebuilt by name, got {type(model).__name__}"
            )
        from aep_ext.surgery import networks

        return networks.build(origin["name"], origin["num_classes"], in_channels=origin["in_channels"], weights=None)
    if kind == "anticipate":
        if model is None:
            raise ValueError(
                "deploy.load: model= must be given, a model such as the one that anticipate was called "
                f"with ({origin.get('model_class')}), got None"
            )
        expected = origin.get("model_class")
        if expected not in (None, _qualified_name(model), type(model).__name__):
            raise ValueError(f"deploy.load: model must be a {expected}, got a {_qualified_name(model)}")
        from aep_ext.surgery import anticipate

        return anticipate(
            model, cuts=origin["cuts"], num_classes=origin.get("num_classes"), example=origin.get("example")
        )
    raise ValueError(
        f"deploy.load: model= must be given, a MultiExitNet of the same architecture, for a network of "
        f"origin {kind!r}, got {'None' if model is None else type(model).__name__}"
    )


def _architecture(description: dict[str, Any], model: nn.Module | None) -> MultiExitNet:
    # Building draws random numbers for parameters that are overwritten: the caller's generator is left alone.
    with torch.random.fork_rng(devices=[]):
        full = _full_network(description, model)
    wanted = tuple(description["exit_ids"])
    missing = [number for number in wanted if number not in full.exit_ids]
    if missing:
        raise ValueError(f"deploy.load: the rebuilt network must have the exits {wanted}, got {tuple(full.exit_ids)}")
    net = subset_view(full, tuple(full.exit_ids.index(number) for number in wanted), share=False)
    stages = tuple(description["exit_stages"])
    if tuple(net.exit_stages) != stages or net.num_classes != description["num_classes"]:
        raise ValueError(
            f"deploy.load: the rebuilt network must have {description['num_classes']} classes and exits "
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
            f"deploy.load: {TENSORS} must hold the tensors of the rebuilt network, got {len(absent)} "
            f"missing (first: {absent[:1]}) and {len(surplus)} unknown (first: {surplus[:1]})"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"deploy.load: {name} must have shape {list(tensor.shape)}, got {list(tensors[name].shape)}"
            )
    sources: dict[int, str] = {}
    for name, tensor in own.items():
        source = sources.setdefault(id(tensor), description["tied"].get(name, name))
        if source != description["tied"].get(name, name):
            raise ValueError(
                f"deploy.load: {name} must be stored as shared with {source}, as the rebuilt network "
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
        The network in eval mode: a :class:`GatedNet` if one was saved, with its ``calibration`` if it had one,
        otherwise a :class:`MultiExitNet`.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: another format or version, a tensor file that is not the one saved, an unknown network, ``model``
            missing or of another architecture.
        ImportError: safetensors is missing.
    """
    description = describe(folder)
    library = _safetensors()
    path = Path(folder) / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"deploy.load: {TENSORS} must be in the folder, got none in {os.fspath(folder)!r}")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != description["sha256"]:
        raise ValueError(
            f"deploy.load: {TENSORS} must have the SHA-256 that {DESCRIPTION} names, "
            f"{description['sha256'][:12]}..., got {digest[:12]}..."
        )
    net = _architecture(description, model)
    net.fused = bool(description["fused"])
    net.origin = description["origin"]
    tensors, gate = library.load(data), description.get("gate")
    own = {name: tensors.pop(name) for name in list(tensors) if gate is not None and name.startswith("gate.")}
    _fill(net, tensors, description)
    # Only now, with the stored weights in place, can the gate be checked against them.
    delivered = net if gate is None else _with_gate(net, gate, own)
    return delivered.to(map_location).eval()
