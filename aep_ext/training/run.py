"""The main job: train the baseline and the multi-exit networks, score, prune, calibrate, test once, deliver, report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from aep_ext._config import RunConfig
from aep_ext._io import check_files, read_json, read_record, sha256, write_arrays, write_bytes, write_json, write_record
from aep_ext._progress import Progress
from aep_ext._utils import UserError, require, using_threads
from aep_ext.export import save
from aep_ext.inference import ExitPolicy, GatedNet, collect_logits
from aep_ext.ops import ensemble
from aep_ext.pruning import count_macs, count_parameters, prune, score_subsets, single_exit
from aep_ext.pruning.subsets import MAX_EXITS
from aep_ext.report import read_results, write_report
from aep_ext.surgery import networks
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.training.data import SPLITS, ImageDataModule
from aep_ext.training.evaluate import LATENCY_IMAGES, accuracy, latency_beside, right_answers, torch_device
from aep_ext.training.fit import fit
from aep_ext.training.folder import BASELINE, MODEL_FILES, STATIC, VERSION, RunFolder, begin, open_run
from aep_ext.training.gates import agreement, calibrated, evaluated
from aep_ext.training.summary import (
    Latencies,
    add_latencies,
    calibration_settings,
    delivered,
    environment,
    notices,
    outcome_line,
    public_config,
    selected,
    spread,
    summarise,
)

FORMAT = "aep_ext.run"
ALL_SUBSETS_TIMED = 31
SMALL_STEP = 500_000_000  # multiply-adds of one forward pass of a training batch


def run(
    given: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Do the main job in a run folder, or what is left of it.

    Args:
        given: the fields of :class:`~aep_ext.training.RunConfig` that differ from the defaults.
        resume: go on in a folder that holds this run. A kill at any moment costs at most the epoch it fell into.
        overwrite: remove the run that the folder holds, once this one is found to be possible.
        progress: where it is shown how far the run is; None: nowhere.

    Returns:
        The content of ``results.json``; its ``output`` is the folder.

    Raises:
        UserError: no such data or network, fewer classes than labels, a folder that holds another run or is in use,
            a file of the run that was damaged or cannot be written.
    """
    for package in ("safetensors.torch", "matplotlib"):  # missed now rather than after hours of training
        require(package, "train", "aep run")
    config, folder = open_run(given, resume=resume, overwrite=overwrite)
    job = None if resume and folder.results.is_file() else Job(config, folder, progress)
    with begin(config, folder, resume=resume, overwrite=overwrite):
        results = read_results(folder.results) if job is None else job.run()
        folder.check_delivered(results)
        write_report(folder.path)
    return {**results, "output": str(folder.path)}


def calibrate_run(
    folder: str | Path, given: Mapping[str, Any] | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Calibrate a finished run anew, on its stored logits, and deliver what comes of it.

    After a kill the same call goes on where it was. The same call again makes the report again and looks at no image.

    Args:
        folder: the run.
        given: what is asked (``CALIBRATION_FIELDS`` of ``aep_ext/_config.py``), where it differs from the run:
            also ``static`` networks to train beside, and ``data``, ``data_root``, ``device``, ``threads`` of now.
        progress: as for :func:`run`.

    Returns:
        The content of ``results.json``; its ``output`` is the folder.

    Raises:
        UserError: no run, an unfinished or damaged one, one with a single exit, a folder in use, or other images than
            the run's.
    """
    require("safetensors.torch", "train", "aep calibrate")
    path = RunFolder(folder)
    results = path.finished()
    if results["network"]["exits"] < 2:
        raise UserError(f"{results['network']['name']} has one exit: there is nothing to gate")
    given = {"terminate": True, **(given or {})}
    if given.get("budget") is not None:  # it takes the place of a guarantee that the run was asked for
        given = {"risk": None, **given}
    config = replace(path.stored(), **given).resolved()
    job = Job(config, path, progress, results["data"])
    with path.locked():
        known = results["calibration"] and results["calibration"]["fingerprint"] == job.fingerprint()
        try:  # a kill may have come between the new network and its results
            path.check_delivered(results)
        except UserError:
            known = False
        if not known or job.static != [entry["network"] for entry in results["static"]]:
            job.check_images()
            results = job.run()
        write_report(path.path)
    return {**results, "output": str(path.path)}


def build_network(
    name: str, num_classes: int, shape: tuple[int, int, int], weights: str | None = None, head: str = "copy"
) -> MultiExitNet:
    """A network by its name for images (C, H, W), with early heads of that form.

    Raises:
        UserError: there is none of that name, or it cannot be built like this.
    """
    try:
        return networks.build(name, num_classes, shape[0], weights=weights, head=head, example=shape)
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split()).removeprefix("build: ")) from error
    except OSError as error:  # no connection, and nothing in the cache
        raise UserError(
            f"no such weights: {weights} of {name} cannot be had ({' '.join(str(error).split())})"
        ) from error


def _static_networks(config: RunConfig) -> list[str]:
    """Names of the smaller static networks; "0.5" is the run's network at that width, ``resnet_small@0.5``.

    Raises:
        UserError: there is none of that name, or it has no widths.
    """
    names = [f"{config.network}@{name}" if name.replace(".", "", 1).isdigit() else name for name in config.static]
    for name in names:
        base, at, _ = name.partition("@")
        if not networks.known(name) or (at and not networks.scalable(base)):
            raise UserError(f"no such static network: {name!r} (there are: {', '.join(networks.available())})")
    return list(dict.fromkeys(names))


def _title(name: str) -> str:
    """How a trained model is called: ``static/resnet_small@0.5`` is resnet_small at width 0.5."""
    return name.removeprefix(STATIC).replace("@", " at width ")


class Job:
    """One run, resolved: everything that its parts share."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        progress: Progress | None = None,
        described: dict[str, Any] | None = None,
    ) -> None:
        assert config.seeds is not None
        self.config, self.folder, self.seeds = config, folder, config.seeds
        self.progress = progress or Progress()
        self.recipe = config.training()
        self.device = torch_device(config.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"no such device: {config.device} (this torch sees no GPU)")
        if not networks.known(config.network):  # told before the data is read
            raise UserError(networks.unknown(config.network))
        if config.logger in ("tensorboard", "wandb"):
            require(config.logger, config.logger, f"--logger {config.logger}")
        self.static = _static_networks(config)
        self.data = ImageDataModule.of_config(config)
        self.described = described
        size = self.data.preprocessing.image_size
        self.recipe = replace(self.recipe, image_size=size)
        self.shape = (self.data.channels, size, size)
        assert config.methods is not None
        self.methods = {name: config.method(name) for name in config.methods}
        self.structure = [  # one for each form of heads: an unknown one is told now
            build_network(config.network, self.data.num_classes, self.shape, config.weights, head)
            for head in {method.head: None for method in self.methods.values()}
        ][0]
        if self.structure.num_exits > MAX_EXITS:
            raise UserError(f"{config.network} has {self.structure.num_exits} exits, a run takes at most {MAX_EXITS}")
        self.threads = config.threads or self._threads()
        weighted = self.data.unbalanced if config.class_weights is None else config.class_weights
        self.class_weight = self.data.class_weights() if weighted else None

    def _threads(self) -> int | None:
        """How many CPU threads where the user names none: one for small work, else as torch chooses.

        Threads bring little to small steps, and on a machine that does other things too they wait for one another
        for many times what they bring.

        Raises:
            UserError: the network cannot take images of this size; an epoch would be the wrong time to find out.
        """
        try:
            work = count_macs(self.structure, self.shape) * self.recipe.batch_size
        except Exception as error:  # each network has its own
            raise UserError(
                f"{self.config.network} cannot take images of {self.recipe.image_size} pixels, try another "
                f"--image-size: {' '.join(str(error).split())[:200]}"
            ) from error
        return 1 if work < SMALL_STEP else None

    def run(self) -> dict[str, Any]:
        """Do what is left of the run.

        Returns:
            The content of ``results.json``.
        """
        with using_threads(self.threads):
            described = self.described or self.describe_data()
            seeds: list[dict[str, Any]] = []
            for seed in self.seeds:
                baseline = self.part(seed, BASELINE)
                methods = {name: self.part(seed, name) for name in self.methods}
                seeds.append({"seed": seed, "baseline": baseline, "methods": methods})
            gated = self.config.terminate and self.structure.num_exits > 1
            calibration, looks = self.calibrate(seeds) if gated else (None, 0)
            if self.config.selects:
                for entry in seeds:
                    for name, part in entry["methods"].items():
                        self.select(entry["seed"], name, part, entry["baseline"])
            static = [self.static_network(name) for name in self.static]
            summary = summarise(self.folder, seeds, self.config.margin / 100)
            add_latencies(summary, self.latencies(seeds, summary))
            results = {
                "format": FORMAT,
                "version": VERSION,
                "config": public_config(self.config),
                "recipe": asdict(self.recipe),
                "environment": environment(self.device),
                "data": {
                    **described,
                    "spec": public_config(self.config)["data"],
                    "class_weight": None if self.class_weight is None else self.class_weight.tolist(),
                },
                "network": {"name": self.config.network, "exits": self.structure.num_exits},
                "calibration": calibration,
                "test_looks": looks,
                "notices": [*described.get("notices", []), *notices(calibration, seeds, looks)],
                "seeds": seeds,
                "summary": summary,
                "delivered": delivered(self.config, seeds),
                "static": static,
                "bench": None,
            }
            self.deliver(results)
            write_json(self.folder.results, results)
        return read_json(self.folder.results)

    def describe_data(self) -> dict[str, Any]:
        """Read all images, tell what is odd about them, and describe them for ``results.json``."""
        size, said = self.recipe.image_size, self.data.preprocessing.resize
        if self.config.image_size is None:
            how = "resized" if said == "squash" else "shorter side resized, then cut square"
            self.progress.line(f"images: {size} x {size} pixels ({how}; --image-size says another size)")
        for split in SPLITS:
            with self.progress.task(f"reading {split} images", 1) as task:
                self.data.dataset(split, task)
        odd = self.data.warnings()
        for line in odd:
            self.progress.line(f"warning: {line}")
        return {**self.data.describe(), "notices": odd}

    def title(self, seed: int, name: str) -> str:
        """How a trained model is called in lines of progress."""
        return " / ".join([f"seed {seed}"] * (len(self.seeds) > 1) + [_title(name)])

    def batches(self, seed: int, name: str, split: str) -> Iterator[Any]:
        """The images of a split in batches, shown while they are used."""
        return self.progress.loader(f"{self.title(seed, name)}: {split} images", self.data.loader(split))

    def part(self, seed: int, name: str) -> dict[str, Any]:
        """A trained model: read if it is finished, else trained."""
        path = self.folder.model(seed, name) / "part.json"
        if not path.is_file():
            values = {"seed": seed, "name": name, **self.trained(seed, name), "gated": None}
            kinds = [kind for kind in ("full", "pruned") if values[kind]]
            files = [f"{kind}/{file}" for kind in kinds for file in MODEL_FILES]
            write_record(path, values, ["predictions.npz", *files])
        return read_record(path, f"delete {path.parent} to train that model again")

    def trained(self, seed: int, name: str) -> dict[str, Any]:
        """Train, evaluate and save a model: the baseline ("baseline"), a static network ("static/NAME"), or a
        multi-exit network, whose name is that of its method."""
        torch.manual_seed(seed)  # the network before training is then the same for every model of a seed
        single = name == BASELINE or name.startswith(STATIC)
        network = name.removeprefix(STATIC) if name.startswith(STATIC) else self.config.network
        ours = network == self.config.network or not (networks.is_file(self.config.weights) or "@" in network)
        pretrained = self.config.weights if ours else None
        method = None if single else self.methods[name]
        head = method.head if method else "copy"
        net = build_network(network, self.data.num_classes, self.shape, pretrained, head)
        net = single_exit(net) if single else net
        training = fit(
            net,
            self.data,
            recipe=self.recipe,
            method=method,
            checkpoint=self.folder.checkpoint(seed, name),
            seed=seed,
            class_weight=self.class_weight,
            device=self.config.device,
            logger=self.logger(seed, name),
            title=self.title(seed, name),
            progress=self.progress,
        )
        found: dict[str, torch.Tensor] = {}
        for split in dict.fromkeys(("val", self.data.calibration_split, "test")):
            logits, labels = collect_logits(net, self.batches(seed, name, split), device=self.device)
            found |= {f"{split}_logits": logits, f"{split}_labels": labels}
        part: dict[str, Any] = {"training": training.to_dict(), "exit_weights": None, "scores": None, "pruned": None}
        part["method"] = method and asdict(method)
        nets = {"full": net}
        if not single:
            latency = {"repeats": 20} if 1 << net.num_exits <= ALL_SUBSETS_TIMED + 1 else False
            loader = self.batches(seed, name, "val")
            scores = score_subsets(net, loader, device=self.device, latency=latency, example=self.shape, split="val")
            nets["pruned"] = prune(net, scores)
            part["exit_weights"] = {"loss": net.loss_weights.tolist(), "output": net.output_weights.tolist()}
            part["scores"] = scores.to_dict()
        for kind, small in nets.items():
            rows = [net.exit_ids.index(e) for e in small.exit_ids]
            answers = {
                split: ensemble(found[f"{split}_logits"][rows], small.output_weights) for split in ("val", "test")
            }
            part[kind] = {
                "exits": list(small.exit_ids),
                "parameters": count_parameters(small),
                "macs": count_macs(small, self.shape),
                **{split: accuracy(logits, found[f"{split}_labels"]) for split, logits in answers.items()},
            }
            if small.selection:
                part[kind]["selection"] = small.selection
            found[f"test_correct_{kind}"] = right_answers(answers["test"], found["test_labels"])
            save(small, self.folder.model(seed, name) / kind, metadata=self.metadata())
        part["full"]["each_exit"] = [
            {
                "exit": exit_id,
                "macs": count_macs(prune(net, range(e + 1)), self.shape),
                "test": accuracy(found["test_logits"][e], found["test_labels"]),
            }
            for e, exit_id in enumerate(net.exit_ids)
        ]
        path = self.folder.model(seed, name) / "predictions.npz"
        write_arrays(path, **{key: value.numpy() for key, value in found.items()})
        return part

    def select(self, seed: int, name: str, part: dict[str, Any], baseline: dict[str, Any]) -> None:
        """Choose a trained model's subset for the run's objective, on the validation images, and save it: fill in
        ``selected``; None where no subset meets the constraints, and ``selected_notice`` says why."""
        predictions, single = self.folder.predictions(seed, name), self.folder.predictions(seed, BASELINE)
        part["selected"], part["selected_notice"] = None, ""
        try:
            part["selected"], chosen = selected(self.config, part, predictions, baseline, single)
        except ValueError as error:
            part["selected_notice"] = str(error).removeprefix("SubsetScores.best: ")
            return
        small = prune(cast(MultiExitNet, self.load(seed, name, "full")), chosen)
        folder = save(small, self.folder.model(seed, name) / "selected", metadata=self.metadata())
        part["files"] |= {f"selected/{file}": sha256(folder / file) for file in MODEL_FILES}

    def logger(self, seed: int, name: str) -> Any:
        """Where the metrics of a model's epochs go, beside its checkpoint; a resumed training begins anew there."""
        if self.config.logger is None:
            return None
        loggers = require("lightning.pytorch.loggers", "train", "aep run --logger")
        folder, title = self.folder.path / "logs", f"seed-{seed}-{name}".replace("/", "-")
        if self.config.logger == "csv":
            return loggers.CSVLogger(folder, name=title, flush_logs_every_n_steps=1)
        if self.config.logger == "tensorboard":
            return loggers.TensorBoardLogger(folder, name=title)
        require("wandb", "wandb", "--logger wandb").finish()  # the model before: one run each
        folder.mkdir(exist_ok=True)
        return loggers.WandbLogger(name=title, save_dir=folder, project="aep_ext", group=self.folder.path.name)

    def metadata(self) -> dict[str, Any]:
        """What a user of a saved network must know: how its images are prepared and what its classes are called."""
        return {"classes": list(self.data.splits.classes), "preprocessing": self.data.preprocessing.to_dict()}

    def fingerprint(self) -> str:
        """SHA-256 of what is asked of the calibration and of the logits that it is asked of."""
        digest = hashlib.sha256(json.dumps(calibration_settings(self.config, self.data), sort_keys=True).encode())
        for seed in self.seeds:
            for name in (BASELINE, *self.methods):
                digest.update(self.folder.file(seed, name, "predictions.npz").read_bytes())
        return digest.hexdigest()

    def calibrate(self, seeds: list[dict[str, Any]]) -> tuple[dict[str, Any], int]:
        """Fill in ``gated`` of every multi-exit network.

        Returns:
            What was asked, and how many calibrations have looked at the test images, this one included.
        """
        fingerprint = self.fingerprint()
        files = [self.folder.model(entry["seed"], name) / "gated.json" for entry in seeds for name in entry["methods"]]
        before = [self.calibrated(path) for path in files if path.is_file()]
        ours = [entry["test_looks"] for entry in before if entry["fingerprint"] == fingerprint]
        looks = max(ours) if ours else 1 + max((entry["test_looks"] for entry in before), default=0)
        for entry in seeds:
            for name, part in entry["methods"].items():
                path = self.folder.model(entry["seed"], name) / "gated.json"
                known = self.calibrated(path) if path.is_file() else None
                if known is None or known["fingerprint"] != fingerprint:
                    if known:  # its network is about to be replaced: a kill must not leave one record of two networks
                        write_record(path, {**known, "fingerprint": "", "gated": None})
                    gated = self.gated(entry["seed"], name, part)
                    values = {"fingerprint": fingerprint, "test_looks": looks, "gated": gated}
                    write_record(path, values, [f"gated/{file}" for file in MODEL_FILES] if gated["feasible"] else ())
                found = self.calibrated(path)
                part["gated"] = found["gated"]
                part["files"] |= found["files"]
        return {**calibration_settings(self.config, self.data), "fingerprint": fingerprint}, looks

    def calibrated(self, path: Path) -> dict[str, Any]:
        """What is stored of a calibration."""
        return read_record(path, f"delete {path} to calibrate that model again")

    def gated(self, seed: int, name: str, part: dict[str, Any]) -> dict[str, Any]:
        """Calibrate a trained model, evaluate its gates on the test images, and save the gated network."""
        predictions, baseline = self.folder.predictions(seed, name), self.folder.predictions(seed, BASELINE)
        split, title = self.data.calibration_split, self.title(seed, name)
        with self.progress.task(f"{title}: calibrating", 1) as task:
            found = calibrated(self.config, part, predictions, baseline, split, task)
        result = evaluated(self.config, part, predictions, found, split)
        policy = ExitPolicy.from_dict(result["policy"])
        folder = self.folder.model(seed, name)
        network = GatedNet.from_policy(cast(MultiExitNet, self.load(seed, name, "full")), policy).eval()
        logits = predictions["test_logits"][list(policy.exits)]
        live = agreement(network, self.batches(seed, name, "test"), logits, policy, self.device)
        result["agreement"] = live
        if found.feasible:
            network.calibration = found
            save(network, folder / "gated", metadata=self.metadata())
        self.progress.line(f"{title}: {outcome_line(result, self.part(seed, BASELINE))}")
        return result

    def check_images(self) -> None:
        """An error unless the data are those of the run.

        Raises:
            UserError: their labels differ.
        """
        predictions = self.folder.predictions(self.seeds[0], BASELINE)
        for split in ("val", "test"):
            if not torch.equal(self.data.dataset(split).labels, predictions[f"{split}_labels"]):
                raise UserError(
                    f"the images of {self.config.data} are not those of the run: their labels differ "
                    "(--data says where they lie now)"
                )

    def static_network(self, network: str) -> dict[str, Any]:
        """A smaller network, trained for every seed as the baseline is: an entry of ``static``."""
        rows = []
        for seed in self.seeds:
            self.data.seed = seed
            rows.append(self.part(seed, STATIC + network)["full"])
        return {
            "name": _title(network),
            "network": network,
            "macs": rows[0]["macs"],
            "parameters": rows[0]["parameters"],
            "seeds": [
                {"seed": seed, **{key: row["test"][key] for key in ("top1", "top5")}}
                for seed, row in zip(self.seeds, rows, strict=True)
            ],
            "top1": spread([row["test"]["top1"] for row in rows]),
        }

    def load(self, seed: int, name: str, kind: str) -> nn.Module:
        """A network of a trained model: "full", "pruned" or "gated"."""
        return self.folder.network(f"seed-{seed}/{name}/{kind}")

    def latencies(self, seeds: list[dict[str, Any]], summary: dict[str, Any]) -> list[Latencies]:
        """For every seed, the latency at batch 1 of each kind of network on test images, beside its baseline's."""
        test = self.data.dataset("test")
        images, _ = test.__getitems__(list(range(min(LATENCY_IMAGES, len(test)))))
        found: list[Latencies] = []
        with self.progress.task("latency", len(seeds)) as task:
            for number, entry in enumerate(seeds):
                seed = entry["seed"]
                nets = {(BASELINE, "full"): self.load(seed, BASELINE, "full")}
                for name, part in entry["methods"].items():
                    nets[name, "full"], nets[name, "pruned"] = (self.load(seed, name, k) for k in ("full", "pruned"))
                    kept = summary["methods"][name]["smallest"]
                    if kept:
                        nets[name, "smallest"] = prune(cast(MultiExitNet, nets[name, "full"]), kept["exits"][number])
                    if summary["methods"][name]["selected"]:
                        nets[name, "selected"] = self.load(seed, name, "selected")
                    if part["gated"]:
                        nets[name, "gated"] = self.load(seed, name, "gated" if part["gated"]["feasible"] else "pruned")
                found.append(latency_beside(nets, images, self.device))
                task(number + 1)
        return found

    def deliver(self, results: dict[str, Any]) -> None:
        """Put the chosen networks where a user looks for them: the delivered one at the top, full, pruned and baseline
        beside it; and the images that the report shows."""
        chosen, top = results["delivered"], self.folder.path
        entry = next(entry for entry in results["seeds"] if entry["seed"] == chosen["seed"])
        part, files = entry["methods"][chosen["method"]], {}
        for model, kind, target in (
            (part, "full", "full/"),
            (part, "pruned", "pruned/"),
            (entry["baseline"], "full", f"{BASELINE}/"),
            (part, chosen["kind"], ""),
        ):
            folder = self.folder.model(entry["seed"], model["name"])
            sources = {name: digest for name, digest in model["files"].items() if name.startswith(f"{kind}/")}
            check_files(folder, sources, f"delete {folder} to train that model again")  # again: hours may have passed
            for name in MODEL_FILES:
                files[target + name] = sha256(write_bytes(top / target / name, (folder / kind / name).read_bytes()))
        gated = part["gated"]
        if gated:
            rows = [example["index"] for part in gated["examples"].values() for example in part]
            pixels = self.data.dataset("test").pixels(rows).permute(0, 2, 3, 1)
            write_arrays(top / "examples.npz", images=pixels.contiguous().numpy())
            files["examples.npz"] = sha256(top / "examples.npz")
        chosen["files"] = files
