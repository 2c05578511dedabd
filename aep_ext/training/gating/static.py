"""Smaller static networks as rivals: trained alone, by the run's own recipe and seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from aep_ext import deploy
from aep_ext._io import read_json, write_json
from aep_ext._utils import UserError
from aep_ext.pruning import count_macs, count_parameters, single_exit
from aep_ext.surgery import networks
from aep_ext.training.evaluate import accuracy, collect, ensemble_of
from aep_ext.training.fit import fit
from aep_ext.training.run import Job
from aep_ext.training.summary import spread

AUTO_WIDTHS = ("0.5", "0.75")


def static_names(network: str, asked: tuple[str, ...] | None) -> tuple[list[str], str]:
    """Which networks are trained, and why none where that is so.

    Args:
        network: the run's.
        asked: widths ("0.5") of the run's network, names of networks, or ("auto",): the widths 0.5 and 0.75 where the
            network has widths, else none. None: none.

    Returns:
        Names for ``networks.build``, and a notice or "".

    Raises:
        UserError: no such network, or it has no widths.
    """
    if asked is None:
        return [], ""
    if asked == ("auto",):
        if not networks.scalable(network):
            return [], f"no smaller static networks: {network} has no widths; name others by --static NAME,NAME"
        asked = AUTO_WIDTHS
    names = []
    for text in asked:
        name = text
        try:
            width = float(text)
        except ValueError:
            pass
        else:
            if not networks.scalable(network):
                raise UserError(f"no such static network: {network} has no widths, got {text}")
            name = f"{network}@{width}"
        if not networks.known(name):
            raise UserError(f"no such static network: {name!r} (there are: {', '.join(networks.available())})")
        if name not in names:
            names.append(name)
    return names, ""


def title(name: str) -> str:
    """How a report calls it: ``resnet_small@0.5`` is resnet_small at width 0.5."""
    base, _, width = name.partition("@")
    return f"{base} at width {width}" if width else base


def _place(job: Job, name: str) -> Path:
    return job.folder.path / "static" / name.replace("/", "-")


def train_static(job: Job, name: str) -> dict[str, Any]:
    """Train it for every seed of the run, or read what is finished: an entry of ``gates.json``'s ``static``.

    Everything about the training is the run's baseline's: data, recipe, class weights, the epoch that is kept. A kill
    costs at most an epoch; a finished one is there for every later calibration.

    Raises:
        UserError: there is no such network, or the images do not suit it.
    """
    weights = None if "@" in name else job.config.weights
    rival = Job(replace(job.config, network=name, weights=weights), job.folder, job.write, data=job.data)
    rows = []
    for seed in job.config.seeds or ():
        folder = _place(job, name) / f"seed-{seed}"
        if not (folder / "part.json").is_file():
            write_json(folder / "part.json", _trained(rival, name, seed, folder))
        rows.append(read_json(folder / "part.json"))
    return {
        "name": title(name),
        "network": name,
        "macs": rows[0]["macs"],
        "parameters": rows[0]["parameters"],
        "seeds": [{"seed": row["seed"], **{key: row["report"][key] for key in ("top1", "top5")}} for row in rows],
        "top1": spread([row["report"]["top1"] for row in rows]),
    }


def _trained(rival: Job, name: str, seed: int, folder: Path) -> dict[str, Any]:
    rival.data.seed = seed
    net = single_exit(rival.network(seed))
    checkpoint = rival.folder.path / "checkpoints" / "static" / name.replace("/", "-") / f"seed-{seed}.ckpt"
    trained = fit(
        net,
        rival.data,
        rival.recipe,
        checkpoint,
        seed=seed,
        class_weight=rival.class_weight,
        device=rival.config.device,
        precision=rival.config.precision,
        title=" / ".join([f"seed {seed}"] * (len(rival.config.seeds or ()) > 1) + [title(name)]),
        write=rival.write,
    ).to_dict()
    found = {}
    for role, loader in (
        ("select", rival.data.val_dataloader()),
        ("report", rival.data.report_dataloader(f"static/{name}/seed-{seed}")),
    ):
        logits, labels = collect(net, loader, rival.device)
        found[role] = accuracy(ensemble_of(net, logits), labels)
    deploy.save(net, folder, metadata=rival.metadata())
    return {
        "seed": seed,
        "network": name,
        "fit": trained,
        "parameters": count_parameters(net),
        "macs": count_macs(net, rival.shape),
        **found,
    }


def matched(static: list[dict[str, Any]], top1: float) -> int | None:
    """The cheapest static network whose mean test top-1 is not below ``top1``: its index, or None."""
    enough = [(entry["macs"], number) for number, entry in enumerate(static) if entry["top1"]["mean"] >= top1]
    return min(enough)[1] if enough else None
