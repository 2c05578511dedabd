"""A gated network as one ONNX file, against the network itself, on both engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aep_ext import MultiExitNet
from aep_ext.export import Preprocessing, load, onnx, save, set_policy
from aep_ext.inference import ExitPolicy, GatedNet
from aep_ext.surgery.networks import build

package = pytest.importorskip("onnx", reason="the file needs onnx")
pytest.importorskip("onnxscript", reason="the file needs onnxscript")

SIZE = (3, 16, 16)


def pictures(n: int) -> Tensor:
    """Images that differ in more than noise, which pooling would average away."""
    return torch.randn(n, 3, 1, 1) * 2 + torch.randn(n, *SIZE) / 2


def policies(exits: int = 4) -> dict[str, ExitPolicy]:
    weights, temperatures = (0.5, 1.25, 2.0, 0.75)[:exits], (0.8, 1.5, 1.1, 1.0)[:exits]
    common: dict[str, Any] = {"output_weights": weights, "temperatures": temperatures}
    return {
        "confidence": ExitPolicy(thresholds=(0.6, 0.7, 0.5), **common),
        "of the exit": ExitPolicy(thresholds=(0.6, 0.7, 0.5), criterion_on="exit", **common),
        "entropy": ExitPolicy(thresholds=(0.9, 0.6, 1.0), criterion="entropy", **common),
        "margin": ExitPolicy(thresholds=(0.3, 0.4, 0.3), criterion="margin", **common),
        "patience": ExitPolicy(thresholds=(1.5, 2.0, 2.5), criterion="patience", **common),
        "vote": ExitPolicy(thresholds=(1.5, 2.0, 2.0), criterion="vote", criterion_on="exit", **common),
        "disabled": ExitPolicy(thresholds=(0.0, 0.6, 0.0), enabled=(False, True, False), **common),
        "last alone": ExitPolicy(thresholds=(0.6, 0.7, 0.5), last_alone=True, **common),
    }


def network(classes: int = 5) -> MultiExitNet:
    """With BatchNorm statistics of images, and logits far enough apart for gates to have something to decide."""
    torch.manual_seed(3)
    net = build("resnet_small", classes)
    with torch.no_grad():
        for _ in range(20):
            net(pictures(32))
        for head in net.exits:
            head.linear.weight.mul_(6)
    return net.eval()


def onnxruntime_of(path: Path) -> Callable[[Tensor], tuple[np.ndarray, ...]]:
    engine = pytest.importorskip("onnxruntime", reason="no ONNX Runtime")
    options = engine.SessionOptions()
    options.intra_op_num_threads = 1
    session = engine.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: tuple(session.run(None, {"images": x.numpy()}))


def openvino_of(path: Path) -> Callable[[Tensor], tuple[np.ndarray, ...]]:
    engine = pytest.importorskip("openvino", reason="no OpenVINO")
    model = engine.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: tuple(model(x.numpy()).values())


ENGINES = {"onnxruntime": onnxruntime_of, "openvino": openvino_of}


def compared(gated: GatedNet, session: Any, images: Tensor) -> Tensor:
    """The exits taken, after every output was compared, but for images at a threshold."""
    expected = gated(images)
    near = gated.near_threshold(gated.net.exit_logits(images), 1e-4)
    assert int(near.sum()) <= len(images) // 10
    for n, image in enumerate(images):
        if near[n]:
            continue
        logits, exits, confidence = session(image[None])
        assert exits.tolist() == [int(expected.exit[n])]
        np.testing.assert_allclose(logits[0], expected.logits[n], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(confidence, expected.confidence[n : n + 1], rtol=1e-4, atol=1e-5)
    return expected.exit


@pytest.mark.parametrize("name", policies())
def test_answers_are_the_network_s(name: str, tmp_path: Path) -> None:
    gated = GatedNet.from_policy(network(), policies()[name])
    images, nowhere = pictures(60), torch.full((1, *SIZE), torch.nan)
    path = onnx(gated, tmp_path / "net.onnx", images)
    for engine in ENGINES.values():
        session = engine(path)
        assert len(compared(gated, session, images).unique()) > 1  # the gates decide something
        if engine is onnxruntime_of:  # OpenVINO's ReLU maps NaN to 0
            logits, exits, _ = session(nowhere)
            assert exits.tolist() == [3] == gated(nowhere).exit.tolist() and np.isnan(logits).all()
    model = package.load(path)
    package.checker.check_model(model, full_check=True)
    assert ExitPolicy.from_dict(json.loads({p.key: p.value for p in model.metadata_props}["policy"])) == gated.policy


def test_an_ungated_network_takes_any_batch(tmp_path: Path) -> None:
    net = network()
    net.output_weights.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    path = onnx(net, tmp_path / "net.onnx", torch.zeros(1, *SIZE))
    for engine in ENGINES.values():
        session = engine(path)
        for n in (1, 2, 7):
            images = torch.randn(n, *SIZE)
            (logits,) = session(images)
            np.testing.assert_allclose(logits, net(images).detach(), rtol=1e-4, atol=1e-4)


def test_another_policy_without_a_new_export(tmp_path: Path) -> None:
    first, other = policies()["confidence"], policies()["disabled"]
    net = network()
    images = pictures(40)
    path = onnx(GatedNet.from_policy(net, first), tmp_path / "net.onnx", images)
    before = path.read_bytes()
    set_policy(path, other)
    assert path.read_bytes() != before
    taken = compared(GatedNet.from_policy(net, other), onnxruntime_of(path), images)
    assert set(taken.tolist()) == {1, 3}
    set_policy(path, first)
    assert compared(GatedNet.from_policy(net, first), onnxruntime_of(path), images).unique().tolist() == [0, 1, 2, 3]
    for name, rule in (("entropy", "criterion confidence"), ("last alone", "last_alone False")):
        with pytest.raises(ValueError, match=f"set_policy: policy must have {rule} like "):
            set_policy(path, policies()[name])
    with pytest.raises(ValueError, match="is no gated network that aep_ext wrote"):
        set_policy(onnx(net, tmp_path / "plain.onnx", images), first)
    with pytest.raises(FileNotFoundError):
        set_policy(tmp_path / "none.onnx", first)
    assert not [file.name for file in tmp_path.iterdir() if file.suffix != ".onnx"]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    gated = GatedNet.from_policy(network(), policies()["confidence"])
    gated.classes, gated.preprocessing = tuple("abcde"), Preprocessing(16, 3, (0.5,) * 3, (0.25,) * 3)
    save(gated, tmp_path / "folder")
    path = onnx(load(tmp_path / "folder"), tmp_path / "net.onnx")
    facts = {entry.key: entry.value for entry in package.load(path).metadata_props}
    assert json.loads(facts["classes"]) == list("abcde")
    assert Preprocessing(**json.loads(facts["preprocessing"])) == gated.preprocessing
    session = onnxruntime_of(path)
    for wrong in ((2, *SIZE), (1, 3, 20, 16), (1, 1, 16, 16)):
        with pytest.raises(Exception, match="images"):
            session(torch.zeros(wrong))
    with pytest.raises(Exception, match="float"):
        session(torch.zeros(1, *SIZE, dtype=torch.float64))


@pytest.mark.parametrize(("classes", "criterion"), [(1, "margin"), (1, "entropy"), (2, "margin")])
def test_few_classes(classes: int, criterion: str, tmp_path: Path) -> None:
    policy = ExitPolicy(output_weights=(1.0, 1.0, 2.0, 3.0), thresholds=0.6, criterion=criterion)
    gated = GatedNet.from_policy(network(classes), policy)
    images = pictures(20)
    compared(gated, onnxruntime_of(onnx(gated, tmp_path / "net.onnx", images)), images)


def test_the_network_keeps_its_mode(tmp_path: Path) -> None:
    net, images = network(), pictures(3)
    expected = net(images).detach()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    (logits,) = onnxruntime_of(onnx(net.train(), tmp_path / "net.onnx", images))(images)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert all(module.training for module in net.modules()) and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


class Sized(nn.Module):
    """A stage whose forward depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_what_is_refused(tmp_path: Path) -> None:
    net, path = network(), tmp_path / "net.onnx"
    policy = ExitPolicy(output_weights=(1.0,) * 4, criterion=lambda state: state.stats[:, 0] > 0.5)
    images = torch.zeros(1, *SIZE)
    with pytest.raises(TypeError, match="onnx: net must be a MultiExitNet or a GatedNet around one, got Linear"):
        onnx(nn.Linear(2, 2), path, images)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="criterion must be a name"):
        onnx(GatedNet.from_policy(net, policy), path, images)
    with pytest.raises(ValueError, match="onnx: example must be given for a network without preprocessing"):
        onnx(net, path)
    with pytest.raises(ValueError, match=r"onnx: example must be float32 \[N, C, H, W\], .*, got .*float64"):
        onnx(net, path, images.double())
    with pytest.raises(ValueError, match=r"onnx: net must be float32 on the CPU, got torch.float64 on cpu"):
        onnx(network().double(), path, images.double())
    with pytest.raises(TypeError, match="set_policy: policy must be an ExitPolicy, got dict"):
        set_policy(path, {})  # type: ignore[arg-type]
    net.stages[1].append(Sized())
    with pytest.raises(RuntimeError, match="onnx: stage 1 cannot be exported: "):
        onnx(net, path, images)
    assert not path.exists()
