"""Reading ``results.json``: whole and consistent, or an error of one line. Its format is ``results.schema.json``."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from aep_ext._io import read_json
from aep_ext._utils import UserError, require

FORMAT, VERSION = "aep_ext.run", 2


def read_results(path: str | Path) -> dict[str, Any]:
    """The content of a run's ``results.json``.

    Raises:
        UserError: the file cannot be read, is not a run's, was written by another version, or an entry is missing or
            not what it should be; the message names the file and the entry.
    """
    results = read_json(path)
    delivered = results.get("delivered") if isinstance(results, dict) else None
    if isinstance(delivered, dict) and "exit_weights" in delivered:  # as methods were called
        delivered["method"] = delivered.pop("exit_weights")
    check_results(results, str(path))
    return results


def check_results(results: Any, where: str = "results.json") -> None:
    """Compare with the schema, and the entries that refer to each other.

    Args:
        results: as ``json.load`` gives it.
        where: the file's name, for the message.

    Raises:
        UserError: as :func:`read_results`.
    """
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise UserError(f"{where} is not a run's result file: its format must be {FORMAT!r}")
    if results.get("version") != VERSION:
        raise UserError(
            f"{where}: version must be {VERSION}, got {results.get('version')!r}: "
            "another version of aep_ext wrote it, run it again"
        )
    jsonschema = require("jsonschema", "train", "reading results")
    schema = json.loads(files("aep_ext.report").joinpath("results.schema.json").read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(results))
    if error is not None:
        raise UserError(f"{where}: {error.json_path.removeprefix('$').lstrip('.')}: {error.message[:160]}")
    _check_links(results, where)


def _check_links(results: dict[str, Any], where: str) -> None:
    methods, delivered = list(results["summary"]["methods"]), results["delivered"]
    for index, seed in enumerate(results["seeds"]):
        if sorted(seed["methods"]) != sorted(methods):
            raise UserError(f"{where}: seeds[{index}].methods must be {sorted(methods)}, got {sorted(seed['methods'])}")
        for name, part in seed["methods"].items():
            if part["gated"]:
                _check_gated(part["gated"], f"{where}: seeds[{index}].methods.{name}.gated")
    known = [(seed["seed"], name) for seed in results["seeds"] for name in methods]
    if (delivered["seed"], delivered["method"]) not in known:
        raise UserError(f"{where}: delivered must name one of the trained models (seed, method), got {delivered}")
    if not delivered_part(results)[delivered["kind"]] or not delivered_model(results):
        raise UserError(f"{where}: delivered.kind is {delivered['kind']!r}, but that model has no such entry")


def _check_gated(gated: dict[str, Any], where: str) -> None:
    policy, count = gated["policy"], len(gated["policy"]["exits"])
    entries = {f"policy.{name}": (policy[name], count) for name in ("output_weights", "temperatures")}
    entries |= {f"policy.{name}": (policy[name], count - 1) for name in ("thresholds", "enabled")}
    entries |= {name: (gated[name], count) for name in ("costs", "right_by_exit")}
    entries |= {f"per_class[{number}]": (row, count) for number, row in enumerate(gated["per_class"])}
    entries["test.exit_counts"] = (gated["test"]["exit_counts"], count)
    for name, (values, wanted) in entries.items():
        if len(values) != wanted:
            raise UserError(f"{where}.{name} must have {wanted} entries for {count} exits, got {len(values)}")


def delivered_part(results: dict[str, Any]) -> dict[str, Any]:
    """The trained model that was delivered: a ``methods`` entry of one seed."""
    delivered = results["delivered"]
    seed = next(seed for seed in results["seeds"] if seed["seed"] == delivered["seed"])
    return seed["methods"][delivered["method"]]


def delivered_model(results: dict[str, Any]) -> dict[str, Any]:
    """The summary over all seeds of the kind of model that was delivered."""
    return results["summary"]["methods"][results["delivered"]["method"]][results["delivered"]["kind"]]
