"""What a run is: the data, the network, the recipe with the user's changes, the seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from aep_ext import pruning
from aep_ext._recipes import OPTIMIZERS, PRECISIONS, SCHEDULES, Method, Recipe, method_named, precision_on, recipe_named
from aep_ext._utils import UserError
from aep_ext.export.preprocessing import RESIZES
from aep_ext.inference import CRITERIA

# They change how fast a run is and where it lies, not what it is: a run may be resumed with others.
RUNTIME_FIELDS = ("output", "data_root", "workers", "device", "threads", "logger")

# What a calibration is asked: `aep calibrate` may change them in a finished run.
CALIBRATION_FIELDS = (
    "terminate",
    "objective",
    "constraints",
    "budget",
    "reference",
    "criterion",
    "criterion_on",
    "num_std_errors",
    "output_weights",
    "risk",
    "delta",
)
OF_RECIPE = (
    "image_size",
    "epochs",
    "batch_size",
    "lr",
    "momentum",
    "weight_decay",
    "optimizer",
    "schedule",
    "warmup",
    "augment",
    "mixup",
    "label_smoothing",
    "ema",
    "channels_last",
    "precision",
)
# Beside the method's exit weights: what a run changes in all of its methods.
OF_METHOD = (
    "head",
    "prefix_weight",
    "detach_prefix",
    "distillation",
    "temperature",
    "gradient_equilibrium",
    "learned_weights",
    "backbone_epochs",
)
LOGGERS = ("tensorboard", "csv", "wandb")
OBJECTIVES = ("gated", *pruning.OBJECTIVES)
REFERENCES = ("best", "baseline", "pruned", "ensemble")


@dataclass(frozen=True)
class RunConfig:
    """One run of the main job. None means: as the recipe says, or as the data has it.

    Attributes:
        data: see :func:`~aep_ext.training.data.load_splits`.
        data_root: where torchvision's data sets lie or are downloaded to.
        network: a name of ``aep_ext.surgery.networks``, or ``torchvision/<name>`` or ``timm/<name>``; "auto": the
            recipe's.
        weights: pretrained weights, as the network's builder takes them (``DEFAULT``); then images get three channels.
        recipe: name of a recipe.
        methods: names of methods, see :class:`~aep_ext.training.Method`; None: the recipe's. A multi-exit network is
            trained for each, the baseline once.
        head, prefix_weight, detach_prefix, distillation, temperature, gradient_equilibrium, learned_weights,
            backbone_epochs: instead of the methods'.
        seeds: everything is trained once for each; the first kind of result is then a mean and a spread.
        classes: K, if it is to be larger than the data's.
        train_samples: learn from so many images only.
        image_size: side in pixels; None: the recipe's, else that of the pretrained weights or of a network that takes
            one size only, else the data's: the median shorter side, at most 224 (16 for the digits).
        resize: how images get it, see :class:`~aep_ext.export.Preprocessing`; None: "crop", for the published
            experiment's data sets "squash", as there.
        normalize: mean and standard deviation of the images' channels, see
            :class:`~aep_ext.training.ImageDataModule`.
        skip_bad_images: leave out images that cannot be read, and list them, instead of stopping at the first.
        epochs, patience, batch_size, lr, momentum, weight_decay, optimizer, schedule, warmup, augment, mixup,
            label_smoothing, ema, channels_last, precision: instead of the recipe's, see
            :class:`~aep_ext.training.Recipe`. ``patience`` 0: never stop early.
        class_weights: weight the classes in the training loss; None: where the data is unbalanced.
        calibration_samples: hold out so many training images: output weights, temperatures and thresholds are fitted on
            them, and on what ``train_samples`` leaves, instead of on the validation images.
        margin: points of top-1 that what is delivered may lose against the single-exit baseline.
        terminate: calibrate gates.
        objective: what is delivered: "gated", the cheapest gated subset within the margin; "published", the pruned
            subset of the published rule; or the ungated subset that is best in "top1", "top5", "nll", "macs",
            "parameters" or "latency" on the validation images.
        constraints: on that subset, as :meth:`aep_ext.pruning.SubsetScores.best` takes them ("top1=-0.5", "macs=50%"),
            against the single-exit baseline.
        budget: points of top-1 that a gated network may lose against ``reference``; None: the margin.
        reference: the right answers that the budget is held against: of the "baseline", the "pruned" network, the
            "ensemble" of all exits, or the "best" of baseline and ensemble on the calibration images.
        criterion, criterion_on: see :class:`~aep_ext.inference.ExitPolicy`.
        num_std_errors: so many standard errors are added to the cross-validated drop before it is held against the
            budget. 0: the plain estimate, which few images make too hopeful; 1: the one-standard-error rule.
        output_weights: of the gated exits: "fitted" on the calibration images, or "run", as trained.
        risk, delta: instead of the budget a guarantee: at most this fraction of the answers is lost, with probability
            ``1 - delta``.
        static: smaller networks to train beside: widths ("0.5") of the run's network, or names of networks.
        output: the run folder.
        logger: "tensorboard", "csv" or "wandb": the metrics of every epoch go to ``logs/`` in the run folder by that
            logger of Lightning's.
        workers, device, threads: processes that load images, where to train, CPU threads.
    """

    data: str = "digits"
    data_root: str = "data"
    network: str = "auto"
    weights: str | None = None
    recipe: str = "quick"
    methods: tuple[str, ...] | None = None
    head: str | None = None
    prefix_weight: float | None = None
    detach_prefix: bool | None = None
    distillation: float | None = None
    temperature: float | None = None
    gradient_equilibrium: bool | None = None
    learned_weights: str | None = None
    backbone_epochs: float | None = None
    seeds: tuple[int, ...] | None = None
    classes: int | None = None
    train_samples: int | None = None
    calibration_samples: int = 0
    image_size: int | None = None
    resize: str | None = None
    skip_bad_images: bool = False
    normalize: str | None = None
    epochs: int | None = None
    patience: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    optimizer: str | None = None
    schedule: str | None = None
    warmup: float | None = None
    augment: tuple[str, ...] | None = None
    mixup: float | None = None
    label_smoothing: float | None = None
    ema: float | None = None
    channels_last: bool | None = None
    precision: str | None = None
    class_weights: bool | None = None
    margin: float = 0.5
    terminate: bool = True
    objective: str = "gated"
    constraints: tuple[str, ...] = ()
    budget: float | None = None
    reference: str = "baseline"
    criterion: str = "confidence"
    criterion_on: str = "ensemble"
    num_std_errors: float = 0.0
    output_weights: str = "fitted"
    risk: float | None = None
    delta: float = 0.1
    static: tuple[str, ...] = ()
    output: str | None = None
    logger: str | None = None
    workers: int = 0
    device: str = "auto"
    threads: int | None = None

    def resolved(self) -> RunConfig:
        """The same run with every None that the recipe answers filled in, and names in one spelling.

        Raises:
            UserError: a value is out of range, or a name unknown.
        """
        recipe = recipe_named(self.recipe)
        filled = {name: getattr(recipe, name) for name in OF_RECIPE if getattr(self, name) is None}
        if self.augment == ("none",):
            filled["augment"] = ()
        if self.patience is None:
            filled["patience"] = recipe.patience or 0
        if self.network == "auto":
            filled["network"] = recipe.network
        if self.seeds is None:
            filled["seeds"] = (recipe.seed,)
        asked = (recipe.method,) if self.methods is None else self.methods
        filled["methods"] = tuple(method_named(name).name for name in asked)
        result = replace(self, **filled)
        result._check()
        assert result.precision is not None
        return replace(result, precision=precision_on(result.precision, result.device))

    def _check(self) -> None:
        smallest = {
            "image_size": 1,
            "epochs": 1,
            "patience": 0,
            "batch_size": 2,
            "lr": 0,
            "weight_decay": 0,
            "workers": 0,
            "margin": 0,
            "classes": 1,
            "train_samples": 2,
            "calibration_samples": 0,
            "num_std_errors": 0,
            "threads": 1,
        }
        for name, least in smallest.items():
            value = getattr(self, name)
            if value == math.inf:
                raise UserError(f"{name.replace('_', '-')} must be finite, got {value}")
            if value is not None and not value >= least:
                raise UserError(f"{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.lr is None or not self.lr > 0 or not self.margin > 0:
            raise UserError(f"lr and margin must be greater than 0, got {self.lr} and {self.margin}")
        for name, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
            ("objective", self.objective, OBJECTIVES),
            ("reference", self.reference, REFERENCES),
            ("criterion", self.criterion, CRITERIA),
            ("criterion-on", self.criterion_on, ("ensemble", "exit")),
            ("output-weights", self.output_weights, ("fitted", "run")),
            ("resize", self.resize, (None, *RESIZES)),
            ("logger", self.logger, (None, *LOGGERS)),
        ):
            if value not in known:
                raise UserError(f"no such {name}: {value!r} (there are: {', '.join(filter(None, known))})")
        try:
            pruning.parse_constraints(self.constraints)
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.constraints and self.objective == "gated":
            raise UserError(
                "constraints need another objective than gated, which keeps the margin: "
                f"{', '.join(pruning.OBJECTIVES)}"
            )
        if self.budget is not None and not -100 <= self.budget <= 100:
            raise UserError(f"budget must be points within -100..100, got {self.budget}")
        for name, value in (("risk", self.risk), ("delta", self.delta)):
            if value is not None and not 0 < value < 1:
                raise UserError(f"{name} must be a fraction within 0..1, got {value}")
        for name in ("seeds", "methods"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UserError(
                    f"{name.replace('_', '-')} must be different from one another and at least one, got {list(values)}"
                )
        for name in self.methods or ():
            self.method(name)
        if any(not 0 <= seed < 1 << 32 for seed in self.seeds or ()):
            raise UserError(f"seeds must be within 0..{(1 << 32) - 1}, got {list(self.seeds or ())}")
        kind, _, number = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
            raise UserError(f"no such device: {self.device!r} (auto, cpu, cuda or cuda:1)")
        try:
            self.training()
        except ValueError as error:
            raise UserError(str(error).removeprefix("Recipe: ").replace("_", "-")) from error

    def training(self) -> Recipe:
        """The recipe with this run's changes; of a resolved configuration."""
        changes = {name: getattr(self, name) for name in OF_RECIPE}
        return replace(recipe_named(self.recipe), patience=self.patience or None, **changes)

    def method(self, name: str) -> Method:
        """The method of that name with this run's changes.

        Raises:
            UserError: there is none, or a change is out of range.
        """
        changes = {field: value for field in OF_METHOD if (value := getattr(self, field)) is not None}
        return replace(method_named(name), **changes)

    @property
    def selects(self) -> bool:
        """Whether a subset is chosen by another rule than the published one."""
        return self.objective not in ("gated", "published") or bool(self.constraints)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for ``config.json``."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The reverse of :meth:`to_dict`.

        Raises:
            UserError: a name is unknown, or a value of another type.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"the configuration has unknown entries: {', '.join(unknown)}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        types = get_type_hints(cls)
        for name, value in values.items():
            if not is_a(value, types[name]):
                wanted = getattr(types[name], "__name__", str(types[name])).replace("NoneType", "None")
                raise UserError(f"{name.replace('_', '-')} must be of type {wanted}, got {value!r:.80}")
        return cls(**values)

    def differences(self, other: RunConfig) -> list[str]:
        """What makes ``other`` another run: one ``name: mine, theirs`` each."""
        return [
            f"{field.name}: {getattr(self, field.name)!r}, {getattr(other, field.name)!r}"
            for field in fields(self)
            if field.name not in RUNTIME_FIELDS and getattr(self, field.name) != getattr(other, field.name)
        ]


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value has the type of a field: a plain one, a union, or a tuple of any length."""
    if isinstance(kind, UnionType):
        return any(is_a(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_a(one, get_args(kind)[0]) for one in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind))
