"""``aep calibrate``: the gate of a finished run, from its cached logits to ``gates.json`` and a gated network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from aep_ext import deploy
from aep_ext._io import read_arrays, read_json, write_arrays, write_json
from aep_ext._utils import UserError, require
from aep_ext.report import write_report
from aep_ext.training.data import SCORING_BATCH, ImageDataModule
from aep_ext.training.dataset import batches
from aep_ext.training.evaluate import collect
from aep_ext.training.folder import MODEL_FILES, RunFolder
from aep_ext.training.gating.choice import Choice, costs_of, subset_cache
from aep_ext.training.gating.decide import data_rows, decide
from aep_ext.training.gating.figures import (
    Gate,
    calibration_figures,
    curve_figures,
    example_figures,
    histogram_figures,
    report_figures,
    select_figures,
)
from aep_ext.training.gating.live import agreement, gated_network
from aep_ext.training.gating.settings import SPARE_LIMIT, CalibrationSettings
from aep_ext.training.gating.static import matched, static_names, train_static
from aep_ext.training.gating.summary import data_roles, delivered, method_summary
from aep_ext.training.gating.unit import Unit
from aep_ext.training.run import Job, using_threads
from aep_ext.training.splits import split_sha256

FORMAT = "aep_ext.gates"
VERSION = 1
FEWEST = 20
"""So many images to select on there must be."""


def calibrate_run(
    folder: str | Path,
    settings: CalibrationSettings | None = None,
    *,
    static: Sequence[str] | None = None,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    write: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Choose the gate of every network of a finished run, judge it on the test images, and deliver one.

    Output weights and temperatures are fitted on a fifth of the calibration images, the gated exits chosen together
    with their thresholds on the rest (:mod:`.choice`), or with ``settings.risk`` along a path that is then tested on
    images of its own (:mod:`.guarantee`). Calibration images are the run's images to select on, whose exit logits it
    stored; on them the network's epoch (by the accuracy of all exits together) and the pruned subset were chosen
    before, which leans the comparison a little either way. Where ``train_samples`` left enough training images aside,
    these are taken instead (``settings.images``): nothing was learned or chosen on them. The test images are needed to
    hold the live network against the simulator, and for examples.

    Writes ``gates.json``, ``gates_examples.npz``, ``gated/`` (for ``deploy.load``) and the report. After a kill the
    same call goes on where it was; ``seed-S/METHOD/gates.json`` holds what is finished. The same call again makes the
    report again and looks at no image.

    Args:
        folder: the run.
        settings: by default half a point below the pruned ensemble, by confidence.
        static: smaller static networks to train as rivals, see :func:`.static.static_names`; those that are finished
            in the folder are always shown.
        data, data_root: where the images lie now, if they moved.
        device, threads: where to run, by default as the run did.
        write: takes lines of progress.

    Returns:
        The content of ``gates.json``.

    Raises:
        UserError: no run, an unfinished one, one with a single exit, too few images, others than the run's, a static
            network that does not exist, or a negative budget that nothing meets.
    """
    settings = (settings or CalibrationSettings()).checked()
    require("safetensors.torch", "train", "aep calibrate")
    path = RunFolder(folder)
    results = _finished_run(path)
    wanted, notice = static_names(results["config"]["network"], None if static is None else tuple(static))
    units = [Unit.read(path, seed["seed"], name) for seed in results["seeds"] for name in seed["methods"]]
    if len(units[0].select) < FEWEST:
        raise UserError(f"too few images: {len(units[0].select)} to select on (there must be at least {FEWEST})")
    job = _Calibration(path, results, settings, units, wanted, notice)
    if job.finished is None:
        config = path.stored()
        changes = {"data": data, "data_root": data_root, "device": device, "threads": threads}
        config = replace(config, **{name: value for name, value in changes.items() if value is not None}).resolved()
        run = Job(config, path, write)
        with using_threads(run.threads):
            job.run(run)
    write_report(path.path)
    assert job.finished is not None
    return job.finished


def _finished_run(path: RunFolder) -> dict[str, Any]:
    if not path.config.is_file():
        raise UserError(f"no such run: {path.path} holds none")
    if not path.results.is_file():
        raise UserError(f"the run in {path.path} is unfinished; go on with it: aep run --output {path.path} --resume")
    results = read_json(path.results)
    if results["network"]["exits"] < 2:
        raise UserError(f"{results['network']['name']} has one exit: there is nothing to gate")
    return results


class _Calibration:
    """One calibration of one run: what is asked, what is there, what is left to do."""

    def __init__(
        self,
        folder: RunFolder,
        results: dict[str, Any],
        settings: CalibrationSettings,
        units: list[Unit],
        static: list[str],
        static_notice: str,
    ) -> None:
        self.folder, self.results, self.settings, self.units = folder, results, settings, units
        text = json.dumps([VERSION, settings.to_dict(), [unit.digest for unit in units]], sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        kept = sorted(self.folder.path.glob("static/*/*/part.json"))
        done = [read_json(part)["network"] for part in kept]
        seeds = len(results["seeds"])
        self.static = [name for name in dict.fromkeys(done) if done.count(name) >= seeds]
        self.static += [name for name in static if name not in self.static]
        self.static_notice = static_notice
        self.judged, self.finished = self._history()

    @property
    def target(self) -> Path:
        return self.folder.path / "gates.json"

    def _part(self, unit: Unit) -> Path:
        return self.folder.unit(unit.seed, unit.name) / "gates.json"

    def _history(self) -> tuple[int, dict[str, Any] | None]:
        """How often the test images were looked at, this time included; and the result, if it is there already."""
        known = [self.target, *(self._part(unit) for unit in self.units)]
        seen = [(path, read_json(path)) for path in known if path.is_file()]
        ours = [entry["judged"] for _, entry in seen if entry.get("fingerprint") == self.fingerprint]
        judged = max(ours) if ours else 1 + max((entry.get("judged", 1) for _, entry in seen), default=0)
        for path, entry in seen:
            complete = path == self.target and entry.get("fingerprint") == self.fingerprint
            if complete and [one["network"] for one in entry["static"]] == self.static:
                return judged, entry
        return judged, None

    def run(self, job: Job) -> None:
        """Do what is left."""
        self._check_images(job)
        self.images = _calibration_images(self.settings, job.data)
        parts = []
        for unit in self.units:
            path = self._part(unit)
            kept = read_json(path) if path.is_file() else None
            if kept is None or kept.get("fingerprint") != self.fingerprint:
                found, images = self._unit(job, self._on_calibration_images(job, unit))
                write_arrays(path.with_name("gates_examples.npz"), images=images)
                write_json(path, {"fingerprint": self.fingerprint, "judged": self.judged, **found})
                kept = read_json(path)
            parts.append({name: value for name, value in kept.items() if name not in ("fingerprint", "judged")})
        gates = self._summary(job, parts)
        if self.settings.points < 0 and not any(part["gated"] for part in parts):
            raise UserError(f"the budget of {self.settings.points:g} points cannot be met: {parts[0]['notice']}")
        gates["static"] = [train_static(job, name) for name in self.static]
        for method in gates["methods"].values():
            method["matched"] = matched(gates["static"], method["summary"]["gated_top1"]["mean"])
        first = (gates["delivered"] or self.results["delivered"])["exit_weights"]
        gates["matched"] = gates["methods"][first]["matched"]
        self._deliver(job, gates)
        write_json(self.target, gates)
        self.finished = read_json(self.target)

    def _check_images(self, job: Job) -> None:
        for role, name in (("select", "select"), ("report", "report")):
            labels = getattr(self.units[0], name).target
            if not torch.equal(job.data.dataset(role).labels, labels):
                raise UserError(
                    f"the images of {job.config.data} are not those of the run: their labels differ "
                    "(--data says where they lie now)"
                )

    def _on_calibration_images(self, job: Job, unit: Unit) -> Unit:
        """The unit with the logits of the images that thresholds are chosen on; spare ones are passed over once."""
        if self.images == "select":
            return unit
        path = self.folder.unit(unit.seed, unit.name) / "spare.npz"
        identity = f"{unit.digest} {split_sha256(_rows(job.data, 'spare'))}"
        kept = read_arrays(path) if path.is_file() else {}
        if str(kept.get("identity")) != identity:
            full = deploy.load(self.folder.unit(unit.seed, unit.name) / "full")
            data = Subset(job.data.dataset("spare"), range(len(_rows(job.data, "spare"))))
            job.say(f"seed {unit.seed} / {unit.name}: {len(data):,} spare images")
            logits, labels = collect(full, batches(data, SCORING_BATCH, workers=job.data.workers), job.device)
            kept = {"logits": logits.numpy(), "labels": labels.numpy(), "identity": np.array(identity)}
            write_arrays(path, **kept)
        return unit.calibrated_on(torch.from_numpy(kept["logits"]), torch.from_numpy(kept["labels"]))

    def _unit(self, job: Job, unit: Unit) -> tuple[dict[str, Any], np.ndarray]:
        """Everything about one network: an entry of a method's ``seeds``, and its example images."""
        rows = data_rows(len(unit.select), self.settings)
        title = f"seed {unit.seed} / {unit.name}"
        found = decide(unit, rows, self.settings, None if job.write is None else lambda s: job.say(f"{title}: {s}"))
        gate, choice = found.gate, found.choice
        cache = subset_cache(unit.report, gate.exits, gate.weights)
        outcome = gate.simulate(cache)
        network = gated_network(deploy.load(self.folder.unit(unit.seed, unit.name) / "full"), gate)
        lived = agreement(
            network,
            job.data.report_dataloader(f"gates/seed-{unit.seed}/{unit.name}"),
            cache,
            outcome,
            job.device,
        )
        if lived["differing_elsewhere"] or lived["single"]["differing_elsewhere"]:
            job.say(
                f"{title}: WARNING: the live network parts from the simulator on "
                f"{lived['differing_elsewhere']} of {lived['n']} test images (one by one: "
                f"{lived['single']['differing_elsewhere']} of {lived['single']['n']}) that are near no threshold"
            )
        examples = example_figures(gate, cache, outcome)
        pixels = job.data.dataset("report").pixels([one["index"] for part in examples.values() for one in part])
        fits = choice.fits if found.gated and choice is not None else [_NO_FIT] * len(gate.exits)
        part = {
            "seed": unit.seed,
            "gated": found.gated,
            "notice": found.notice,
            "exits": list(gate.exits),
            "policy": {"name": gate.policy.name, "on": gate.policy.on},
            "thresholds": gate.thresholds.tolist(),
            "temperatures": gate.temperatures.tolist(),
            "enabled": gate.enabled.tolist(),
            "output_weights": gate.weights.tolist(),
            "costs": gate.costs,
            "pruned_exits": unit.pruned_exits,
            "choice": None if choice is None else _choice(choice),
            "guarantee": found.guarantee,
            "select": select_figures(gate, unit, rows["thresholds"]),
            "report": report_figures(unit, cache, outcome),
            "curve_exits": [] if choice is None else list(choice.chosen.exits),
            "curve": [] if choice is None else _curve(choice, unit),
            **histogram_figures(gate, cache, outcome),
            "calibration": calibration_figures(gate, cache, fits),
            "agreement": lived,
            "examples": examples,
        }
        report = part["report"]
        saved = 1 - report["gated"]["mean_macs"] / report["pruned"]["macs"]
        job.say(
            f"{title}: exits {'+'.join(str(e + 1) for e in gate.exits)}, {100 * saved:.1f} % fewer multiply-adds than "
            f"the pruned ensemble, {report['drop_points']:+.2f} points"
            if found.gated
            else f"{title}: {found.notice}"
        )
        return part, pixels.permute(0, 2, 3, 1).contiguous().numpy()

    def _summary(self, job: Job, parts: list[dict[str, Any]]) -> dict[str, Any]:
        methods: dict[str, Any] = {}
        for unit, part in zip(self.units, parts, strict=True):
            methods.setdefault(unit.name, {"seeds": []})["seeds"].append(part)
        for name, method in methods.items():
            units = [unit for unit in self.units if unit.name == name]
            method["summary"] = method_summary(units, method["seeds"])
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "judged": self.judged,
            "settings": self.settings.to_dict(),
            "data": data_roles(_rows(job.data, self.images), self.images, job.data, self.settings, self.judged),
            "methods": methods,
            "delivered": delivered(self.units, parts, self.results["delivered"]),
            "static_notice": self.static_notice,
        }

    def _deliver(self, job: Job, gates: dict[str, Any]) -> None:
        chosen = gates["delivered"] or self.results["delivered"]
        unit = next(u for u in self.units if (u.seed, u.name) == (chosen["seed"], chosen["exit_weights"]))
        examples = self._part(unit).with_name("gates_examples.npz")
        with np.load(examples) as arrays:
            write_arrays(self.folder.path / "gates_examples.npz", images=arrays["images"])
        if gates["delivered"] is None:
            for name in MODEL_FILES:  # of an earlier calibration: it is not this one's
                (self.folder.path / "gated" / name).unlink(missing_ok=True)
            return
        part = next(s for s in gates["methods"][unit.name]["seeds"] if s["seed"] == unit.seed)
        full = deploy.load(self.folder.unit(unit.seed, unit.name) / "full")
        deploy.save(gated_network(full, Gate.from_part(part)), self.folder.path / "gated", metadata=job.metadata())


def _calibration_images(settings: CalibrationSettings, data: ImageDataModule) -> str:
    """ "select" or "spare"."""
    spare = len(data.spare[1])
    if settings.images == "spare" and spare < FEWEST:
        raise UserError(f"too few spare images: the run left {spare} training images aside, {FEWEST} are needed")
    if settings.images != "auto":
        return settings.images
    return "spare" if spare >= max(FEWEST, len(data.roles.parts["select"][1])) else "select"


def _rows(data: ImageDataModule, images: str) -> torch.Tensor:
    """The indices of the calibration images in their source."""
    return data.spare[1][:SPARE_LIMIT] if images == "spare" else data.roles.parts["select"][1]


_NO_FIT = {"converged": True, "bounded": None}


def _choice(choice: Choice) -> dict[str, Any]:
    return {**choice.chosen.to_dict(), "candidates": [one.to_dict() for one in choice.candidates]}


def _curve(choice: Choice, unit: Unit) -> list[dict[str, float]]:
    exits, weights = choice.chosen.exits, choice.chosen.weights
    return curve_figures(choice.curve, subset_cache(unit.report, exits, weights), costs_of(exits, unit.macs))
