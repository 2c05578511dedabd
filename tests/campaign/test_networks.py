"""The smallest classifier of every model file of timm and of every family of torchvision: given exits, or refused.

    pytest tests/campaign/test_networks.py -m campaign

Each outcome goes into benchmarks/results/networks.json at once, so that the campaign can be stopped and go on; what
passed before, or is recorded for the package's present commit, is left out (delete the file to begin anew).
docs/networks.md is written from that file. Without -m campaign a fixed sample runs, and nothing is written.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import aep_ext

torchvision = pytest.importorskip("torchvision", reason="the list is torchvision's and timm's networks")
timm = pytest.importorskip("timm", reason="the list is torchvision's and timm's networks")

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "networks.json", ROOT / "docs" / "networks.md"
# Name -> model file or family, and the image size: the network's own where it is fixed, else 128.
# Smallest: the fewest parameters with 10 classes; timm's own test networks are left out.
NETWORKS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("networks.json").read_text())
# What a quick run of every test tries: image size and outcome.
SAMPLE = {
    "timm/convnext_atto": (64, "passed"),
    "timm/edgenext_xx_small": (64, "passed"),
    "timm/ghostnet_050": (64, "passed"),
    "timm/hrnet_w18_small": (64, "passed"),
    "timm/lcnet_035": (64, "passed"),
    "timm/levit_128s": (224, "refused"),
    "timm/mambaout_femto": (64, "passed"),
    "timm/mobilenetv4_conv_small": (64, "passed"),
    "timm/nf_regnet_b0": (64, "passed"),
    "timm/resnet10t": (64, "passed"),
    "timm/vit_tiny_patch16_224": (224, "refused"),
    "torchvision/mobilenet_v3_small": (64, "passed"),
    "torchvision/shufflenet_v2_x0_5": (64, "passed"),
    "torchvision/squeezenet1_1": (64, "passed"),
    "torchvision/swin_t": (64, "passed"),
}


def build(name: str) -> nn.Module:
    library, _, short = name.partition("/")
    if library == "timm":
        return timm.create_model(short, pretrained=False, num_classes=10).eval()
    options = {"aux_logits": False, "init_weights": False} if short in ("googlenet", "inception_v3") else {}
    return getattr(torchvision.models, short)(weights=None, num_classes=10, **options).eval()


def wake(model: nn.Module, x: Tensor) -> None:
    """Every part of a network with random weights counts: no layer scale is next to zero, no last layer of a branch is
    zero, and what BatchNorm has seen are these images."""
    for key, parameter in model.named_parameters():
        if not key.endswith("bias") and parameter.abs().max() < 1e-3:
            parameter.normal_(0, 0.1)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()(x)
        model.eval()


def is_convolutional(model: nn.Module, x: Tensor) -> bool:
    """At least half of the multiply-adds are convolutions', or nothing but convolutions mixes positions."""
    model.requires_grad_(False)  # the counter's hooks take no parameter that is a module's input
    with FlopCounterMode(display=False) as counter:
        model(x[:1])
    model.requires_grad_(True)
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    convolutions = sum(count for operator, count in counts.items() if "conv" in operator)
    attention = sum(count for operator, count in counts.items() if "bmm" in operator or "attention" in operator)
    spatial = sum(isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 for m in model.modules())
    return 2 * convolutions >= sum(counts.values()) or (not attention and spatial > 3)


def differ(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> bool:
    gap = (found - wanted).abs().max()
    return not bool(gap <= tolerance * wanted.abs().max() + 1e-7)


def channel_axis(shapes: Sequence[torch.Size], larger: Sequence[torch.Size] | None) -> int:
    """The axis that does not grow with the image, of all feature maps of a network; where it takes one size only, the
    axis unlike the other two, of those maps that are no cubes."""
    if larger is not None:
        pairs = zip(shapes, larger, strict=True)
        axes = [[axis for axis in (1, 2, 3) if shape[axis] == grown[axis]] for shape, grown in pairs]
    else:
        axes = [[axis for axis in (1, 3) if shape[axis] != shape[2] == shape[4 - axis]] for shape in shapes]
        axes = [fixed for fixed in axes if fixed]
    # A map of a fixed size (before VGG's classifier) tells nothing.
    common = set(range(1, 4)).intersection(*axes)
    assert axes and len(common) == 1, f"no channel axis in maps {shapes}"
    return common.pop()


def check_head(head: nn.Module, shape: torch.Size, axis: int) -> None:
    """On maps of this shape the head reads channels: by the width of its first layer with parameters, and by what
    shuffling changes."""
    channels, feature = shape[axis], torch.randn(shape)
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
        for module in head.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    logits = head(feature)
    for hook in hooks:
        hook.remove()
    layer, given = seen[0]
    names = ("in_features", "in_channels", "num_features", "num_channels", "normalized_shape", "num_parameters")
    width = next(getattr(layer, name) for name in names if hasattr(layer, name))
    width = width[-1] if isinstance(width, tuple) else width
    positions = given[0].numel() // channels
    flat = channels * positions if given.dim() == 2 else channels
    assert width in (channels, flat), f"{layer} reads a map of shape {list(feature.shape)}, channels at axis {axis}"
    last = feature.movedim(axis, 3).flatten(1, 2)
    moved = last[:, torch.randperm(last.shape[1])].unflatten(1, [n for n in feature.movedim(axis, 3).shape[1:3]])
    if positions == 1:
        assert not differ(head(moved.movedim(3, axis)), logits), "a pooled head depends on the positions"
    mixed = last[:, :, torch.randperm(channels)].unflatten(1, moved.shape[1:3])
    assert differ(head(mixed.movedim(3, axis)), logits), "the head does not tell channels apart"


def examine(name: str, folder: Path, size: int, quick: bool = False) -> dict[str, Any]:
    """One network's row: what became of it, and why. Quick: it is not saved and compiled."""
    start = time.process_time()
    model, x = build(name), torch.randn(2, 3, size, size)
    wake(model, torch.randn(8, 3, size, size))
    row: dict[str, Any] = {"convolutional": is_convolutional(model, x), "size": size}

    def outcome(word: str, reason: str = "") -> dict[str, Any]:
        return {**row, "outcome": word, "reason": reason, "seconds": round(time.process_time() - start, 1)}

    step = "anticipated"
    try:
        net = aep_ext.anticipate(model, example=(3, size, size)).eval()
        row["exits"] = net.num_exits
        step = "last exit"
        wanted, exits = model(x), net.exit_logits(x)
        assert not differ(exits[-1], wanted), "the last exit is not the original network"
        assert differ(wanted[:1], wanted[1:]), "the random network answers all images alike"
        step = "heads"
        maps = net.features(x)
        try:
            larger = [m.shape for m in net.features(torch.randn(2, 3, size + 64, size + 64))]
        except Exception:  # a network of one size
            larger = None
        axis = channel_axis([m.shape for m in maps], larger)
        for head, feature in zip(net.exits, maps, strict=True):
            check_head(head, feature.shape, axis)
        step = "pruned"
        kept = sorted({0, net.num_exits - 1})
        small = aep_ext.prune(net, kept)
        answer = small(x)
        assert not differ(answer, exits[kept].mean(0)), "the pruned network is not the mean of its exits"
        if quick:
            return outcome("passed")
        step = "saved and loaded"
        aep_ext.save(small, folder)
        assert torch.equal(aep_ext.load(folder, build(name))(x), answer), "the loaded network answers differently"
        step = "compiled"
        engine = aep_ext.compile(small, x, "openvino", threads=1, batches=(2,))
        assert not differ(engine(x), answer, 1e-3), "the compiled network answers differently"
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        if step == "anticipated" and type(error) is ValueError and len(lines) == 1:
            return outcome("refused", lines[0])
        return outcome("failed", f"{step}: {type(error).__name__}: {lines[0]}"[:300])
    return outcome("passed")


@functools.cache
def state() -> str:
    """The commit of the package, "+" if it is changed."""
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    commit = run(["git", "log", "-1", "--format=%h", "--", "aep_ext"]).stdout.strip()
    return commit + "+" * bool(run(["git", "status", "--porcelain", "--", "aep_ext"]).stdout.strip())


def recorded() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def page(rows: dict[str, dict[str, Any]]) -> str:
    """docs/networks.md."""
    convolutional = [row for row in rows.values() if row["convolutional"]]
    passed = sum(row["outcome"] == "passed" for row in convolutional)
    lines = [
        "# Networks that were tried",
        "",
        f"The smallest classifier of every model file of timm and of every family of torchvision, with random weights: "
        f"{len(NETWORKS)} in all, of which {len(rows)} have been tried.",
        "",
        "- *Passed*: it is given exits; the last exit equals the original network; every head reads the channels; "
        "pruned, saved, loaded and compiled by OpenVINO, it gives the same logits.",
        "- *Refused*: `anticipate` raises a `ValueError` of one line, which is given.",
        "- *Convolutional*: at least half of the multiply-adds are convolutions', or nothing but convolutions mixes "
        "positions.",
        "- *Exits*: four at most. Rows from before exits were placed by cost have one for each stage that was found.",
        "- *Seconds* of one core, for all of it.",
        "",
        f"Of {len(convolutional)} convolutional networks {passed} pass, of {len(rows) - len(convolutional)} others "
        f"{sum(row['outcome'] == 'passed' for row in rows.values()) - passed}.",
        "",
        "The table is written by `pytest tests/campaign/test_networks.py -m campaign`, which goes on where it was "
        "stopped, from `benchmarks/results/networks.json`, which names the package's commit for each network.",
        "",
        "| network | model file or family | convolutional | exits | outcome | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in (name for name in NETWORKS if name in rows):
        row = rows[name]
        reason = row["reason"].removeprefix("anticipate: ").replace("|", "\\|").replace("<", "&lt;")
        cells = [
            name,
            NETWORKS[name]["file"],
            "yes" if row["convolutional"] else "no",
            str(row.get("exits", "")),
            f"{row['outcome']}: {reason}" if reason else row["outcome"],
            str(row["seconds"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.campaign
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_network(name: str, tmp_path: Path) -> None:
    row = recorded().get(name)
    if row is None or (row["outcome"] != "passed" and row["commit"] != state()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters'
            row = {**examine(name, tmp_path, NETWORKS[name]["size"]), "commit": state()}
        rows = {**recorded(), name: row}
        write(RESULTS, json.dumps({name: rows[name] for name in NETWORKS if name in rows}, indent=1) + "\n")
        write(PAGE, page(recorded()))
    assert row["outcome"] in ("passed", "refused"), row["reason"]


def mostly_passed(rows: dict[str, dict[str, Any]]) -> bool:
    """At least 90 % of the convolutional ones."""
    passed = [row["outcome"] == "passed" for row in rows.values() if row["convolutional"]]
    return 10 * sum(passed) >= 9 * len(passed)


@pytest.mark.campaign
def test_all_were_tried() -> None:
    rows = recorded()
    assert rows.keys() == NETWORKS.keys() and len(rows) >= 120
    assert mostly_passed(rows)


def test_results() -> None:
    """The page says what the file does; nothing failed."""
    rows = recorded()
    assert rows and rows.keys() <= NETWORKS.keys() and PAGE.read_text() == page(rows)
    assert {row["outcome"] for row in rows.values()} <= {"passed", "refused"}
    assert mostly_passed(rows)


@pytest.mark.parametrize("name", SAMPLE)
@torch.no_grad()
def test_sample(name: str, tmp_path: Path) -> None:
    size, outcome = SAMPLE[name]
    row = examine(name, tmp_path, size, quick=name != "torchvision/squeezenet1_1")
    assert row["outcome"] == outcome, row["reason"]


@pytest.mark.parametrize("wrong", [False, True])
@torch.no_grad()
def test_the_check_of_heads_sees_rows_read_as_channels(wrong: bool) -> None:
    """On a map (N, H, W, C): pooled over (H, W) and read by C, or pooled over (W, C) and read by H."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6 if wrong else 12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mean((2, 3) if wrong else (1, 2)))

    shape = torch.Size([2, 6, 6, 12])
    axis = channel_axis([shape], [torch.Size([2, 9, 9, 12])])
    assert axis == channel_axis([shape, torch.Size([2, 5, 5, 5])], None) == 3
    if not wrong:
        return check_head(Pooled(), shape, axis)
    with pytest.raises(AssertionError, match="channels at axis 3"):
        check_head(Pooled(), shape, axis)
