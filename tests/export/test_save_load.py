from __future__ import annotations

import hashlib
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aep_ext import ExitPolicy, ExitWeights, GatedNet, MultiExitNet, compile, load, prune, save
from aep_ext.export import Preprocessing, describe
from aep_ext.pruning import single_exit
from aep_ext.surgery.heads import PooledLinearHead
from aep_ext.surgery.networks import build

pytest.importorskip("safetensors", reason="the files are safetensors")


@pytest.fixture
def net() -> MultiExitNet:
    net = build("resnet_small", 5, in_channels=1)
    net.set_exit_weights(ExitWeights.mixed(4))
    net(torch.randn(16, 1, 12, 12))  # BatchNorm statistics other than the initial ones
    return net.eval()


def same(a: MultiExitNet, b: MultiExitNet, x: torch.Tensor) -> None:
    """Same state, bit for bit, and same answers."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert a.exit_ids == b.exit_ids and a.exit_stages == b.exit_stages and a.origin == b.origin and a.fused == b.fused
    with torch.no_grad():
        assert torch.equal(a(x), b(x)) and torch.equal(a.exit_logits(x), b.exit_logits(x))


@pytest.mark.parametrize("exits", [None, (0,), (3,), (0, 2), (1, 2, 3)])
def test_round_trip_of_full_and_pruned_networks(net, tmp_path, exits):
    if exits is not None:
        net = prune(net, exits)
    random = torch.get_rng_state()
    assert save(net, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    loaded = load(tmp_path / "new" / "folder")
    assert torch.equal(random, torch.get_rng_state())
    assert not loaded.training
    same(net, loaded, torch.randn(3, 1, 12, 12))
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["model.json", "model.safetensors"]


def test_pruning_goes_on_after_loading(net, tmp_path):
    save(prune(net, (0, 1, 3)), tmp_path)
    again = prune(load(tmp_path), (1, 2))
    assert again.exit_ids == (1, 3)
    save(again, tmp_path)  # replaces
    same(again, load(str(tmp_path)), torch.randn(2, 1, 12, 12))
    save(single_exit(net), tmp_path)
    assert load(tmp_path).output_weights.tolist() == [1.0]


def test_training_goes_on_after_loading(net, tmp_path):
    net.stages[0].requires_grad_(False)
    save(net, tmp_path)
    loaded = load(tmp_path).train()
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in net.parameters()]
    loaded(torch.randn(4, 1, 12, 12)).sum().backward()
    assert loaded.exits[0].linear.weight.grad is not None and loaded.stages[0].stem[0].weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_memory_format_and_path_are_kept(net, tmp_path, dtype):
    net = net.to(dtype=dtype, memory_format=torch.channels_last)
    net.fused = False
    save(net, tmp_path)
    loaded = load(tmp_path)
    same(net, loaded, torch.randn(2, 1, 12, 12, dtype=dtype).contiguous(memory_format=torch.channels_last))
    for a, b in zip(net.parameters(), loaded.parameters(), strict=True):
        assert a.stride() == b.stride()


def test_metadata_and_description(net, tmp_path):
    save(net, tmp_path, metadata={"classes": ["a", "b"], "mean": [0.5]})
    found = describe(tmp_path)
    assert found["metadata"] == {"classes": ["a", "b"], "mean": [0.5]}
    assert found["exit_ids"] == [0, 1, 2, 3] and found["origin"]["name"] == "resnet_small"
    assert found["sha256"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    from safetensors.torch import load_file

    assert load_file(tmp_path / "model.safetensors").keys() == net.state_dict().keys()


class Small(nn.Module):
    """An ordinary classifier of a user's."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.layer3(self.layer2(self.layer1(x)))).flatten(1))


@pytest.mark.parametrize("exits", [None, (0, 2), (1,)])
def test_round_trip_of_anticipated_networks(tmp_path, exits):
    from aep_ext import anticipate

    full = anticipate(Small(), cuts=["layer1", "layer2"], example=(3, 16, 16)).eval()
    net = full if exits is None else prune(full, exits)
    save(net, tmp_path)
    other = Small()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    same(net, load(tmp_path, model=other), torch.randn(2, 3, 16, 16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    same(net, load(tmp_path, model=full), torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"model= must be given, a model such as .*Small\), got None"):
        load(tmp_path)
    with pytest.raises(ValueError, match="model must be a .*Small, got a .*Sequential"):
        load(tmp_path, model=nn.Sequential())
    with pytest.raises(ValueError, match="must have shape"):
        load(tmp_path, model=Small(width=4))


def test_anticipation_with_another_number_of_classes(tmp_path):
    from aep_ext import anticipate

    net = anticipate(Small(), cuts=["layer2"], example=(3, 16, 16), num_classes=9).eval()
    save(net, tmp_path)
    same(net, load(tmp_path, model=Small()), torch.randn(2, 3, 16, 16))


def _hand_made(tie: bool = True) -> MultiExitNet:
    stages = [nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6)]
    heads = [PooledLinearHead(6, 4), PooledLinearHead(6, 4)]
    if tie:
        heads[1].linear.weight = heads[0].linear.weight
    return MultiExitNet(stages, heads, exit_stages=[0, 2], num_classes=4, output_weights=[0.3, 0.7]).eval()


def test_hand_made_networks_and_shared_parameters(tmp_path):
    net = _hand_made()
    net.stages[1].weight = nn.Parameter(torch.randn(6, 6, 3, 6)[..., ::2])  # does not fill its memory
    save(net, tmp_path)
    loaded = load(tmp_path, model=_hand_made())
    same(net, loaded, torch.randn(2, 3, 8, 8))
    assert loaded.exits[0].linear.weight is loaded.exits[1].linear.weight
    assert len(describe(tmp_path)["tied"]) == 1
    same(net, load(tmp_path, model=_hand_made(tie=False)), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="model= must be given, a MultiExitNet of the same architecture"):
        load(tmp_path)
    with pytest.raises(ValueError, match="model= must be given, a MultiExitNet .*got Linear"):
        load(tmp_path, model=nn.Linear(2, 2))
    save(_hand_made(tie=False), tmp_path)
    with pytest.raises(ValueError, match="must be stored as shared with exits.0.linear.weight"):
        load(tmp_path, model=_hand_made())


def _edit(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_broken_folders_are_refused(net, tmp_path):
    with pytest.raises(FileNotFoundError, match="model.json must be in the folder, got none in"):
        load(tmp_path / "absent")
    save(net, tmp_path)
    good = (tmp_path / "model.json").read_text()
    origin = json.loads(good)["origin"]
    for changes, message in (
        ({"format": "other"}, "must have format 'aep_ext.model', got 'other'"),
        ({"version": 3}, "must have version 1 to 2, got 3"),
        ({"sha256": "0" * 64}, "must have the SHA-256 that model.json names, 000000000000..., got"),
        ({"origin": origin | {"name": "resnet_huge"}}, "resnet_huge"),
        ({"origin": origin | {"kind": "magic"}}, "for a network of origin 'magic', got None"),
        ({"origin": None}, "model.json: origin must be an object, got null"),
        ({"exit_ids": [0, "1"]}, r'exit_ids must be ascending whole numbers, got \[0, "1"\]'),
        ({"origin": {"kind": "network"}}, "must have the entries origin.name, .* got none for 'name'"),
        # 9 GB, were it built before it is compared
        ({"num_classes": 20_000_000, "origin": origin | {"num_classes": 20_000_000}}, r"must have shape \[20000000"),
        ({"origin": origin | {"num_classes": 9}}, "must have 5 classes and exits after stages .*got 9"),
        ({"exit_ids": [0, 1, 2, 8]}, r"must have the exits \(0, 1, 2, 8\), got \(0, 1, 2, 3\)"),
        ({"exit_ids": [0, 1]}, r"exits after stages \(0, 1, 2, 3\), got 5 and \(0, 1\)"),
        ({"exit_ids": [0, 1], "exit_stages": [0, 1]}, "got 0 missing .* and .* unknown"),
    ):
        _edit(tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
        (tmp_path / "model.json").write_text(good)
    for text, message in (
        ("{", "must be JSON, got"),
        ("[]", "must have format 'aep_ext.model', got None"),
        (json.dumps({"format": "aep_ext.model", "version": 1}), "got none for 'origin'"),
    ):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    (tmp_path / "model.json").write_text(good)
    with pytest.raises(ValueError, match="model= must be left out for the network 'resnet_small'"):
        load(tmp_path, model=nn.Linear(1, 1))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors must be in the folder, got none in"):
        load(tmp_path)


@pytest.mark.parametrize("bad", [0.0, -0.5, float("nan"), float("inf")])
def test_stored_weights_that_are_not_positive_are_refused(net, tmp_path, bad):
    net.output_weights[1] = bad
    save(net, tmp_path)
    with pytest.raises(ValueError, match="load: output_weights must be positive and finite, got .* at position 1"):
        load(tmp_path)


def test_what_cannot_be_saved_leaves_the_old_files(net, tmp_path, monkeypatch):
    save(net, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("model.json", "model.safetensors")}
    other = prune(net, (0,))
    with pytest.raises(TypeError, match="origin and metadata must be JSON-able"):
        save(other, tmp_path, metadata={"model": net})
    with pytest.raises(ValueError, match="net must be on a real device, got '.*' on meta"):
        save(prune(net, (0,)).to("meta"), tmp_path)
    with pytest.raises(TypeError, match="save: net must be a MultiExitNet or a GatedNet of one, got Linear"):
        save(nn.Linear(1, 1), tmp_path)

    def broken(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        save(other, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in sorted(os.listdir(tmp_path))} == before


def test_without_safetensors_the_extra_is_named(net, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"aep_ext.save needs safetensors: pip install 'aep_ext\[export\]'"):
        save(net, tmp_path)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "torchvision/resnet18"])
def test_torchvision_networks(tmp_path, name):
    pytest.importorskip("torchvision", reason="these networks' backbones are torchvision's")
    net = prune(build(name, 4), (0, 2)).eval()
    save(net, tmp_path)
    same(net, load(tmp_path), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet10t"])
def test_networks_of_libraries_keep_their_cuts(tmp_path, name):
    pytest.importorskip(name.partition("/")[0], reason="the network is this library's")
    net = build(name, 4, cuts=["layer1"]).eval()  # as another release may have cut it
    assert net.num_exits == 2 < build(name, 4).num_exits and net.origin["cuts"] == ["layer1"]
    save(net, tmp_path)
    same(net, load(tmp_path), torch.randn(1, 3, 64, 64))


def gated_net(net: MultiExitNet, exits: tuple[int, ...] = (0, 1, 2, 3)) -> GatedNet:
    count = len(exits)
    policy = ExitPolicy(
        output_weights=[0.1 * (e + 1) for e in range(count)],
        thresholds=[1 + 0.1 * e for e in range(count - 1)],
        criterion="patience",
        criterion_on="exit",
        temperatures=0.7,
        enabled=[e != 1 for e in range(count - 1)],
        exits=exits,
    )
    return GatedNet.from_policy(net, policy)


@pytest.mark.parametrize("exits", [(0, 1, 2, 3), (0, 2), (1,)])
def test_gated_networks(net, tmp_path, exits):
    gated, x = gated_net(net, exits), torch.randn(5, 1, 12, 12)
    expected = gated(x)
    gated.measure(x, repeats=1)  # may close the gates here, not in the file
    assert save(gated, tmp_path, metadata={"a": 1}) == tmp_path
    loaded = load(tmp_path)
    assert isinstance(loaded, GatedNet) and not loaded.training
    assert loaded.profile is None and loaded.calibration is None
    same(gated.net, loaded.net, x)
    assert loaded.policy == gated.policy
    description = describe(tmp_path)
    assert description["metadata"] == {"a": 1} and ExitPolicy.from_dict(description["exit_policy"]) == gated.policy
    for a, b in zip(expected, loaded(x), strict=True):
        assert torch.equal(a, b)
    save(loaded.net, tmp_path)  # and back to the net without gates
    assert isinstance(load(tmp_path), MultiExitNet) and "exit_policy" not in describe(tmp_path)


def test_gates_of_the_first_format(net, tmp_path):
    """Thresholds, temperatures and flags were tensors of the file, and the output weights only the network's own."""
    from safetensors.torch import load_file
    from safetensors.torch import save as written

    gated, x = gated_net(net), torch.randn(5, 1, 12, 12)
    save(gated.net, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"gate.{name}": getattr(gated, name) for name in ("thresholds", "temperatures", "enabled")}
    data = written(tensors)
    (tmp_path / "model.safetensors").write_bytes(data)
    gate = {"policy": "patience", "on": "exit", "mode": ["mask", "auto", "off"], "calibration": {"seed": 7}}
    _edit(tmp_path, version=1, gate=gate, sha256=hashlib.sha256(data).hexdigest())
    loaded = load(tmp_path)
    gated.enabled[2] = False  # a mode "off" was the same
    assert loaded.policy == gated.policy and loaded.calibration == {"seed": 7}
    for a, b in zip(gated(x), loaded(x), strict=True):
        assert torch.equal(a, b)
    for change, message in (
        ({"policy": "luck"}, "criterion must be one of confidence, .* got 'luck'"),
        ({"on": "both"}, "criterion_on must be 'ensemble' or 'exit', got 'both'"),
        ({"mode": []}, "zip"),
    ):
        _edit(tmp_path, gate=gate | change)
        with pytest.raises(ValueError, match=f"load: .*model.json: the gates cannot be read: .*{message}"):
            load(tmp_path)
    _edit(tmp_path, gate={"policy": "vote"})
    with pytest.raises(ValueError, match="cannot be read: there is no entry 'mode'"):
        load(tmp_path)


def test_gates_that_no_file_can_hold_and_broken_ones(net, tmp_path):
    own = GatedNet(net, ExitPolicy(output_weights=net.output_weights, criterion=lambda state: state.indices > 0))
    with pytest.raises(ValueError, match="save: a user's own criterion cannot be written to a file .*<lambda>"):
        save(own, tmp_path)
    assert not os.listdir(tmp_path)
    save(gated_net(net), tmp_path)
    good = describe(tmp_path)
    for change, message in (
        ({"exit_policy": None}, "values must be a mapping, got NoneType"),
        ({"exit_policy": good["exit_policy"] | {"luck": 1}}, r"differing: \['luck'\]"),
        ({"exit_policy": good["exit_policy"] | {"output_weights": [1.0] * 4}}, "the network's output weights"),
    ):
        _edit(tmp_path, **change)
        with pytest.raises(ValueError, match=f"load: .*model.json: the gates cannot be read: .*{message}"):
            load(tmp_path)
        _edit(tmp_path, **good)


def test_where_the_policy_comes_from_goes_with_it(net, tmp_path):
    gated = gated_net(net)
    gated.calibration = SimpleNamespace(to_dict=lambda: {"n": 64, "budget": {"points": 0.5}})
    loaded = load(save(gated, tmp_path / "calibrated"))
    assert loaded.calibration == {"n": 64, "budget": {"points": 0.5}}
    assert load(save(loaded, tmp_path / "again")).calibration == loaded.calibration


PREPROCESSING = Preprocessing(12, 1, (0.5,), (0.25,))


def test_classes_and_preprocessing_go_with_a_network(net, tmp_path):
    assert net.classes is None and net.preprocessing is None
    save(net, tmp_path)
    assert describe(tmp_path)["metadata"] == {} and load(tmp_path).classes is None
    net.classes, net.preprocessing = ("a", "b", "c", "d", "e"), PREPROCESSING
    pruned = prune(net, (0, 2))
    gated = GatedNet(pruned, ExitPolicy(output_weights=tuple(pruned.output_weights.tolist()), thresholds=(0.5,)))
    compiled = compile(gated, torch.randn(2, 1, 12, 12), backend="eager")
    for one in (net, pruned, gated, compiled, compiled.net):
        assert one.classes == net.classes and one.preprocessing == PREPROCESSING
    for one in (net, pruned, gated):
        save(one, tmp_path, metadata={"author": "me"})
        loaded = load(tmp_path)
        assert loaded.classes == net.classes and loaded.preprocessing == PREPROCESSING
        save(loaded, tmp_path / "again")
        again = load(tmp_path / "again")
        assert again.classes == net.classes and again.preprocessing == PREPROCESSING
        kept = {"classes": list(net.classes), "preprocessing": PREPROCESSING.to_dict()}
        assert describe(tmp_path / "again")["metadata"] == kept
        assert describe(tmp_path)["metadata"] == {**kept, "author": "me"}
    save(net, tmp_path, metadata={"classes": ["v", "w", "x", "y", "z"]})
    assert load(tmp_path).classes == ("v", "w", "x", "y", "z")


def test_metadata_of_a_user_s_own_form_is_left_alone(net, tmp_path):
    save(net, tmp_path, metadata={"classes": 5, "preprocessing": "the usual one"})
    loaded = load(tmp_path)
    assert loaded.classes is None and loaded.preprocessing is None
    old = {"image_size": 12, "channels": 1, "normalisation": {"mean": [0.5], "std": [0.25]}}  # as releases wrote it
    save(net, tmp_path, metadata=old)
    assert load(tmp_path).preprocessing == Preprocessing(12, 1, (0.5,), (0.25,), resize="squash")
