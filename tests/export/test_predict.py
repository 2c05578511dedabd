"""predict: images, files and tensors through every kind of network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="images need Pillow")

from PIL import Image

from aep_ext import ExitPolicy, GatedNet, MultiExitNet, compile, predict
from aep_ext._utils import UserError
from aep_ext.export import Prediction, Preprocessing
from aep_ext.export.predict import image_files
from aep_ext.surgery import networks

GREY = Preprocessing(8, 1, (0.5,), (0.25,))
IMAGES = [Image.fromarray(pixels) for pixels in np.random.default_rng(0).integers(0, 256, (7, 8, 8), dtype=np.uint8)]
INPUTS = torch.stack([GREY(image) for image in IMAGES])


@pytest.fixture
def net() -> MultiExitNet:
    net = networks.build("resnet_small", 3, 1)
    net(torch.randn(32, 1, 8, 8))  # BatchNorm statistics other than the initial ones
    net.classes, net.preprocessing = ("a", "b", "c"), GREY
    return net.eval()


@pytest.fixture
def gated(net: MultiExitNet) -> GatedNet:
    """Half of the images leave at the first exit."""
    with torch.no_grad():
        middle = float(net.exit_logits(INPUTS)[0].softmax(1).amax(1).median())
    return GatedNet(net, ExitPolicy(output_weights=(0.25,) * 4, thresholds=(middle, 1.0, 1.0)))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for number, image in enumerate(IMAGES):
        image.save(tmp_path / f"{number}.png")
    return sorted(tmp_path.iterdir())


def plain(found: list[Prediction]) -> list[tuple[Any, ...]]:
    return [(one.label, one.class_name, pytest.approx(one.confidence, abs=1e-6), one.exit) for one in found]


def test_gated(gated: GatedNet, files: list[Path]) -> None:
    expected = gated(INPUTS)
    found = predict(gated, files)
    assert [one.file for one in found] == [str(file) for file in files]
    assert {one.exit for one in found} == {0, 3}
    for one, logits, taken, confidence in zip(found, *expected, strict=True):
        assert one.label == int(logits.argmax()) and one.class_name == "abc"[one.label]
        assert one.exit == int(taken) and one.confidence == pytest.approx(float(confidence), abs=1e-6)


def test_every_way_to_give_images(gated: GatedNet, files: list[Path]) -> None:
    expected = plain(predict(gated, files))
    for images in (IMAGES, iter(IMAGES), map(str, files), INPUTS, list(INPUTS), [INPUTS[:3], IMAGES[3], *files[4:]]):
        seen: list[int] = []
        assert plain(predict(gated, images, batch_size=3, progress=seen.append)) == expected
        assert seen == [3, 6, 7]
    assert [plain(predict(gated, one)) for one in (IMAGES[0], files[0], str(files[0]), INPUTS[0], INPUTS[:1])] == [
        expected[:1]
    ] * 5
    assert predict(gated, []) == [] and predict(gated, IMAGES[0])[0].file is None


def test_without_gates_the_last_exit_answers(net: MultiExitNet) -> None:
    net.output_weights.mul_(4)
    net.train()
    net.stages[0].eval()
    modes = [part.training for part in net.modules()]
    found = predict(net, IMAGES)
    assert [part.training for part in net.modules()] == modes
    never = GatedNet(net.eval(), ExitPolicy(output_weights=(1.0,) * 4, thresholds=(0.5,) * 3, enabled=(False,) * 3))
    assert plain(found) == plain(predict(never, IMAGES)) and {one.exit for one in found} == {3}


def test_compiled(net: MultiExitNet, gated: GatedNet) -> None:
    for one in (net, gated):
        assert plain(predict(compile(one, INPUTS, backend="eager"), IMAGES)) == plain(predict(one, IMAGES))


def test_names(net: MultiExitNet) -> None:
    net.classes = ("a",)  # a network may have more classes than the data had
    assert {one.class_name for one in predict(net, IMAGES)} <= {"a", None}
    net.classes = None
    assert {one.class_name for one in predict(net, IMAGES)} == {None}


def test_bad_images(net: MultiExitNet, files: list[Path]) -> None:
    files[2].write_bytes(files[2].read_bytes()[:40])
    with pytest.raises(UserError, match=r"2\.png cannot be read as an image \(.*\)$"):
        predict(net, files)
    bad: list[UserError] = []
    found = predict(
        net, [*files, IMAGES[0], Image.fromarray(np.full((8, 8), 7.0, np.float32))], on_bad_image=bad.append
    )
    assert [one.file for one in found] == [*(str(file) for n, file in enumerate(files) if n != 2), None]
    assert "2.png cannot be read" in str(bad[0]) and str(bad[1]).startswith("image 8 cannot be read") and len(bad) == 2
    assert predict(net, files[2], on_bad_image=bad.append) == []


def test_what_is_refused(net: MultiExitNet, gated: GatedNet) -> None:
    for images, kind, message in (
        (INPUTS[0, 0], TypeError, r"a tensor must be floating, \(C, H, W\) .*, got torch.float32 of shape \[8, 8\]"),
        (INPUTS.byte(), TypeError, r"a tensor must be floating, .* got torch.uint8"),
        ([INPUTS[0], INPUTS[0, :, :4]], ValueError, r"must have one shape, got \[\(1, 4, 8\), \(1, 8, 8\)\]"),
        (7, TypeError, "an image must be a path, a Pillow image or a tensor, got int"),
        (np.zeros((2, 8, 8)), TypeError, "an image must be a path, a Pillow image or a tensor, got ndarray"),
        ("nowhere.png", UserError, "nowhere.png cannot be read as an image"),
    ):
        with pytest.raises(kind, match=message):
            predict(gated, images)
    with pytest.raises(TypeError, match="predict: net must be a GatedNet, MultiExitNet or CompiledNet, got Linear"):
        predict(torch.nn.Linear(1, 1), IMAGES)
    with pytest.raises(ValueError, match="predict: batch_size must be at least 1, got 0"):
        predict(net, IMAGES, batch_size=0)
    net.preprocessing = None
    with pytest.raises(ValueError, match="predict: net.preprocessing must say how images become inputs, got None"):
        predict(net, IMAGES)
    assert len(predict(net, INPUTS)) == 7


def test_pillow_missing_is_no_bad_image(net: MultiExitNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"reading images needs PIL: pip install 'aep_ext\[train\]'"):
        predict(net, ["a.png"], on_bad_image=lambda error: None)


def test_image_files(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/10.png", "b/c/1.png", "b/notes.txt", "b/.hidden.png", "a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "b" / "folder.png").mkdir()
    found = image_files([tmp_path / "b" / "notes.txt", tmp_path / "b", str(tmp_path / "a.png")])
    assert [str(Path(file).relative_to(tmp_path)) for file in found] == [
        "b/notes.txt",
        "b/10.png",
        "b/2.JPG",
        "b/c/1.png",
        "a.png",
    ]
    with pytest.raises(UserError, match="^no such image: nowhere$"):
        image_files(["nowhere"])
    with pytest.raises(UserError, match=r"^no images in .*folder\.png \(files that end in .*\.jpg"):
        image_files([tmp_path / "b" / "folder.png"])
