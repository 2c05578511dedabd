"""The main job: train the baseline and the multi-exit networks, score, prune, test once, report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aep_ext import deploy
from aep_ext._io import read_json, write_arrays, write_bytes, write_json
from aep_ext._utils import UserError, require
from aep_ext.ensemble import ExitWeights
from aep_ext.pruning import count_macs, count_parameters, prune, score_subsets, single_exit
from aep_ext.report import write_report
from aep_ext.surgery import networks
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.training.callbacks import best_weights
from aep_ext.training.config import RunConfig
from aep_ext.training.data import ImageDataModule
from aep_ext.training.evaluate import accuracy, collect, ensemble_of, right_answers, torch_device
from aep_ext.training.fit import fit
from aep_ext.training.folder import BASELINE, MODEL_FILES, RunFolder, begin, open_run
from aep_ext.training.summary import summarise

ALL_SUBSETS_TIMED = 31
SMALL_STEP = 500_000_000  # multiply-adds of one forward pass of a training batch


def run(
    given: Mapping[str, Any], *, resume: bool = False, write: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Do the main job in a run folder, or what is left of it.

    Args:
        given: the fields of :class:`~aep_ext.training.RunConfig` that differ from the defaults.
        resume: go on in a folder that holds this run. A kill at any moment costs at most the epoch it fell into.
        write: takes lines of progress; None: silence.

    Returns:
        The content of ``results.json``; its ``output`` is the folder.

    Raises:
        UserError: no such data or network, fewer classes than labels, a folder that holds another run.
    """
    for package in ("safetensors.torch", "matplotlib"):  # missed now rather than after hours of training
        require(package, "train", "aep run")
    config, folder = open_run(given, resume=resume)
    if resume and folder.results.is_file():
        results = read_json(folder.results)
    else:
        job = Job(config, folder, write)
        begin(config, folder)
        with using_threads(job.threads):
            results = job.run()
    write_report(folder.path)
    return {**results, "output": str(folder.path)}


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """So many CPU threads inside the block; None: as it is."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_network(config: RunConfig, num_classes: int, channels: int) -> MultiExitNet:
    """The run's network.

    Raises:
        UserError: there is none of that name, or it cannot be built like this.
    """
    try:
        return networks.build(config.network, num_classes, channels, weights=config.weights)
    except (ValueError, ImportError) as error:
        raise UserError(f"no such network: {' '.join(str(error).split())}") from error
    except OSError as error:  # no connection, and nothing in the cache
        raise UserError(
            f"no such weights: {config.weights} of {config.network} cannot be had ({' '.join(str(error).split())})"
        ) from error


class Job:
    """One run, resolved: everything that its parts share."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        write: Callable[[str], None] | None,
        *,
        data: ImageDataModule | None = None,
    ) -> None:
        self.config, self.folder, self.write = config, folder, write
        self.recipe = config.training()
        self.device = torch_device(config.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"no such device: {config.device} (this torch sees no GPU)")
        if not networks.known(config.network):  # told before the data is read
            raise UserError(
                f"no such network: {config.network!r} (there are: {', '.join(networks.available())}, "
                "torchvision/<name>, timm/<name>)"
            )
        self.data = data or ImageDataModule(
            config.data,
            image_size=self.recipe.image_size,
            batch_size=self.recipe.batch_size,
            data_root=config.data_root,
            train_samples=config.train_samples,
            workers=config.workers,
            channels=3 if config.weights else None,
            num_classes=config.classes,
        )
        self.shape = (self.data.channels, self.recipe.image_size, self.recipe.image_size)
        self.structure = build_network(config, self.data.num_classes, self.data.channels)
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
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{self.config.network} cannot take images of {self.recipe.image_size} pixels: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        return 1 if work < SMALL_STEP else None

    def say(self, line: str) -> None:
        if self.write is not None:
            self.write(line)

    def network(self, seed: int) -> MultiExitNet:
        """The network as it is before training, the same for every unit of a seed."""
        torch.manual_seed(seed)
        return build_network(self.config, self.data.num_classes, self.data.channels)

    def run(self) -> dict[str, Any]:
        assert self.config.seeds is not None
        seeds = []
        for seed in self.config.seeds:
            self.data.seed = seed
            baseline = self.unit(seed, BASELINE, self.train_baseline)
            methods = {name: self.unit(seed, name, self.train_method) for name in self.config.exit_weights}
            seeds.append({"seed": seed, "baseline": baseline, "methods": methods})
        results = summarise(
            self.config, self.data, self.folder, self.structure, seeds, self.device, class_weight=self.class_weight
        )
        self.deliver(results)
        write_json(self.folder.results, results)
        return results

    def unit(self, seed: int, name: str, work: Callable[[int, str, MultiExitNet], dict[str, Any]]) -> dict[str, Any]:
        """A part of the run: read if it is finished, else done."""
        path = self.folder.part(seed, name)
        if not path.is_file():
            write_json(path, {"seed": seed, "unit": name, **work(seed, name, self.network(seed))})
        return read_json(path)

    def train(self, seed: int, name: str, net: MultiExitNet) -> dict[str, Any]:
        parts = " / ".join([f"seed {seed}"] * (len(self.config.seeds or ()) > 1) + [name])
        return fit(
            net,
            self.data,
            self.recipe,
            self.folder.checkpoint(seed, name),
            seed=seed,
            class_weight=self.class_weight,
            device=self.config.device,
            precision=self.config.precision,
            title=parts,
            write=self.write,
        ).to_dict()

    def metadata(self) -> dict[str, Any]:
        """What a user of a saved network must know: how its images are prepared and what its classes are called."""
        described = self.data.describe()
        return {name: described[name] for name in ("classes", "image_size", "channels", "normalisation")}

    def train_baseline(self, seed: int, name: str, network: MultiExitNet) -> dict[str, Any]:
        net = single_exit(network)
        trained = self.train(seed, name, net)
        select = collect(net, self.data.val_dataloader(), self.device)
        report = collect(net, self.data.report_dataloader(f"seed-{seed}/{name}"), self.device)
        self.keep_predictions(
            seed, name, select, report, {"full": right_answers(ensemble_of(net, report[0]), report[1])}
        )
        deploy.save(net, self.folder.unit(seed, name), metadata=self.metadata())
        return {"fit": trained, **self.outcome(net, select, report)}

    def train_method(self, seed: int, name: str, net: MultiExitNet) -> dict[str, Any]:
        weights = ExitWeights.named(name, net.num_exits)
        net.set_exit_weights(weights)
        trained = self.train(seed, name, net)
        timed = (1 << net.num_exits) - 1 <= ALL_SUBSETS_TIMED
        scores = score_subsets(
            net,
            self.data.val_dataloader(),
            device=self.device,
            latency={"repeats": 20} if timed else False,
            example=self.shape,
        )
        small = prune(net, scores)
        select = collect(net, self.data.val_dataloader(), self.device)
        report = collect(net, self.data.report_dataloader(f"seed-{seed}/{name}/full"), self.device)
        small_report = collect(small, self.data.report_dataloader(f"seed-{seed}/{name}/pruned"), self.device)
        kept = list(small.exit_ids)
        self.keep_predictions(
            seed,
            name,
            select,
            report,
            {
                "full": right_answers(ensemble_of(net, report[0]), report[1]),
                "pruned": right_answers(ensemble_of(small, small_report[0]), small_report[1]),
            },
        )
        for part, model in (("full", net), ("pruned", small)):
            deploy.save(model, self.folder.unit(seed, name) / part, metadata=self.metadata())
        alone = [accuracy(logits, report[1]) for logits in report[0]]
        return {
            "fit": trained,
            "exit_weights": {"loss": list(weights.loss), "output": list(weights.output)},
            "scores": scores.to_dict(),
            "full": {**self.outcome(net, select, report), "each_exit": alone},
            "pruned": self.outcome(small, (select[0][kept], select[1]), small_report),
        }

    def outcome(
        self, net: MultiExitNet, select: tuple[torch.Tensor, torch.Tensor], report: tuple[torch.Tensor, torch.Tensor]
    ) -> dict[str, Any]:
        """A model in figures: its exits (original numbers, from 0), costs, and accuracy in both roles."""
        return {
            "exits": list(net.exit_ids),
            "parameters": count_parameters(net),
            "macs": count_macs(net, self.shape),
            "select": accuracy(ensemble_of(net, select[0]), select[1]),
            "report": accuracy(ensemble_of(net, report[0]), report[1]),
        }

    def keep_predictions(
        self,
        seed: int,
        name: str,
        select: tuple[torch.Tensor, torch.Tensor],
        report: tuple[torch.Tensor, torch.Tensor],
        right: dict[str, torch.Tensor],
    ) -> None:
        """Exit logits of both roles, and per image whether each model was right: what paired intervals are made of."""
        arrays = {
            "select_logits": select[0],
            "select_labels": select[1],
            "report_logits": report[0],
            "report_labels": report[1],
            **{f"report_right_{model}": answers for model, answers in right.items()},
        }
        write_arrays(
            self.folder.unit(seed, name) / "predictions.npz", **{key: value.numpy() for key, value in arrays.items()}
        )

    def deliver(self, results: dict[str, Any]) -> None:
        """Put the chosen models where a user looks for them: pruned at the top, full, baseline and compact beside
        it."""
        chosen = results["delivered"]
        unit = self.folder.unit(chosen["seed"], chosen["exit_weights"])
        for source, target in (
            (unit / "full", self.folder.path / "full"),
            (unit / "pruned", self.folder.path),
            (self.folder.unit(chosen["seed"], BASELINE), self.folder.path / BASELINE),
        ):
            _copy_model(source, target)
        compact = results["summary"]["methods"][chosen["exit_weights"]]["compact"]
        if compact is not None:
            net = copy.deepcopy(self.structure).eval()
            net.load_state_dict(best_weights(self.folder.checkpoint(chosen["seed"], chosen["exit_weights"])))
            deploy.save(prune(net, compact["exits"]), self.folder.path / "compact", metadata=self.metadata())


def _copy_model(source: Path, target: Path) -> None:
    for name in MODEL_FILES:
        write_bytes(target / name, (source / name).read_bytes())
