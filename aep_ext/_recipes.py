"""Recipes: everything about a training that is neither the data nor the network. Methods: how the exits learn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from aep_ext._utils import UserError
from aep_ext.surgery.exit_weights import FAMILIES, SHORT_NAMES

OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop")
SCHEDULES = ("constant", "cosine", "linear", "onecycle")
LEARNED_WEIGHTS = ("no", "uncertainty", "softmax")
AUGMENTATIONS = ("flip", "translate", "crop", "cutout")
# In all of them the weights stay float32, as everything behind the training expects.
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "auto")


@dataclass(frozen=True)
class Recipe:
    """A named way of training.

    Attributes:
        name, description: for the command line and the report.
        optimizer: one of ``adam``, ``adamw``, ``sgd`` (Nesterov, where ``momentum`` is not 0), ``rmsprop``.
        lr: learning rate (its peak, where the schedule moves it).
        momentum: of ``sgd``.
        weight_decay: as the optimizer takes it; biases and the weights of norms do not decay.
        schedule: ``constant``; ``linear`` or ``cosine``: linear warm-up, then a line or half a cosine down to 0; or
            ``onecycle``: ``torch.optim.lr_scheduler.OneCycleLR``. All move with every step.
        warmup: the warm-up's share of the steps, within 0..1.
        batch_size: of the training; scoring uses larger batches, which change no decision.
        epochs: at most so many.
        patience: stop after so many epochs without a better joint validation loss; None: never.
        augment: names of what is done to the training images, in this order: ``flip`` (left and right), ``translate``
            (by up to a 16th of the side, the border mirrored), ``crop`` (by up to an 8th, the border 0), ``cutout`` (a
            square of half the side set to 0).
        mixup: every training image is mixed with another of its batch, and their labels likewise (arXiv 1710.09412):
            the share of one is drawn for each batch from Beta(mixup, mixup); 0: not.
        label_smoothing: of the training loss, within 0..1.
        ema: decay per step of the exponential moving average of the weights, which is then what is validated and kept;
            0: none. In the first steps it is smaller, ``(1 + step) / (10 + step)``.
        channels_last: train in the channels-last memory format.
        precision: as Lightning names it, 32-true, 16-mixed or bf16-mixed; or auto: bf16-mixed where the hardware
            multiplies bfloat16, else 32-true.
        image_size: side in pixels to which images are resized; None: as the network or the data has it.
        seed, network: where the user names none.
        method: name of the :class:`Method` that multi-exit networks are trained with.

    Raises:
        ValueError: a value is out of range, or a name unknown.
    """

    name: str
    description: str
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: float = 0.05
    batch_size: int = 64
    epochs: int = 20
    patience: int | None = None
    augment: tuple[str, ...] = ()
    mixup: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    channels_last: bool = False
    precision: str = "32-true"
    image_size: int | None = None
    seed: int = 0
    network: str = "resnet_small"
    method: str = "mixed"

    def __post_init__(self) -> None:
        for field, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("augment", AUGMENTATIONS),
            ("precision", PRECISIONS),
        ):
            value = getattr(self, field)
            for name in value if isinstance(value, tuple) else (value,):
                if name not in known:
                    raise ValueError(f"Recipe: {field} must be one of {', '.join(known)}, got {name!r}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"Recipe: lr must be finite and greater than 0, got {self.lr}")
        if not (self.mixup >= 0 and math.isfinite(self.mixup)):
            raise ValueError(f"Recipe: mixup must be finite and at least 0, got {self.mixup}")
        for field in ("momentum", "warmup", "label_smoothing", "ema"):
            value = getattr(self, field)
            if not 0 <= value <= 1 or (value == 1 and field in ("momentum", "ema")):
                least = "at least 0 and less than 1" if field in ("momentum", "ema") else "within 0..1"
                raise ValueError(f"Recipe: {field} must be {least}, got {value}")


@dataclass(frozen=True)
class Method:
    """How the exits of a network learn. A single-exit network knows none of it.

    The loss is :class:`aep_ext.ensemble.JointCrossEntropy`'s. docs/ensemble.md has the formulas and their sources.

    Attributes:
        name, description: for the command line and the report.
        exit_weights: family of the loss and output weights: ``uniform``, ``ascending``, ``descending``, ``mixed``;
            None: the weights that the network has.
        head: form of the early heads in ``aep run``, see :func:`aep_ext.anticipate`; "copy": the network's own.
        prefix_weight: share, within 0..1, of the loss that goes to the prefix ensembles R_e; the rest to the exits.
        detach_prefix: the prefix loss of an exit does not train the exits before it.
        distillation: weight of the Kullback-Leibler divergence from the ensemble of all exits to each, where the exits'
            cross entropies weigh 1 on average; 0: none.
        temperature: of the distillation.
        gradient_equilibrium: scale gradients so that every exit has the same say in the backbone.
        learned_weights: the loss weights are learned with the network, in the form "uncertainty" or "softmax"; or "no".
        backbone_epochs: share, within 0..1, of the epochs: the first ones train backbone and last exit alone.
    """

    name: str
    description: str = ""
    exit_weights: str | None = None
    head: str = "copy"
    prefix_weight: float = 0.0
    detach_prefix: bool = False
    distillation: float = 0.0
    temperature: float = 3.0
    gradient_equilibrium: bool = False
    learned_weights: str = "no"
    backbone_epochs: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prefix_weight", "backbone_epochs"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name.replace('_', '-')} must be a share within 0..1, got {getattr(self, name)}")
        if not 0 <= self.distillation < math.inf:
            raise UserError(f"distillation must be finite and >= 0, got {self.distillation}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature must be finite and > 0, got {self.temperature}")
        object.__setattr__(self, "exit_weights", SHORT_NAMES.get(str(self.exit_weights).lower(), self.exit_weights))
        for name, known in (("exit_weights", (None, *FAMILIES)), ("learned_weights", LEARNED_WEIGHTS)):
            value = getattr(self, name)
            if value not in known:
                names = ", ".join(filter(None, known))
                raise UserError(f"no such {name.replace('_', '-')}: {value!r} (there are: {names})")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("uniform", "The paper's UNIF: equal weights in loss and output.", "uniform"),
        Method("ascending", "The paper's ASC: later exits weigh more.", "ascending"),
        Method("descending", "The paper's DESC: earlier exits weigh more.", "descending"),
        Method("mixed", "The paper's MIX: descending in the loss, ascending in the output.", "mixed"),
        Method(
            "best",
            "Every technique that pays: convolutional early heads, prefix loss, distillation, gradient equilibrium.",
            "uniform",
            head="auto",
            prefix_weight=0.5,
            distillation=0.2,
            gradient_equilibrium=True,
        ),
    )
}


def method_named(name: str) -> Method:
    """The method of that name, in any spelling of a family of exit weights: ``MIX`` is ``mixed``.

    Raises:
        UserError: there is none.
    """
    known = name.lower()
    known = SHORT_NAMES.get(known, known)
    if known not in METHODS:
        raise UserError(f"no such method: {name!r} (there are: {', '.join(METHODS)})")
    return METHODS[known]


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "paper",
            "The protocol of arXiv 2301.12168: Adam at 1e-4, batches of 64, up to 100 epochs, stop after 12 without "
            "a better joint validation loss, keep the best validation top-1, no augmentation, 64 pixels, seed 420.",
            optimizer="adam",
            lr=1e-4,
            batch_size=64,
            epochs=100,
            patience=12,
            image_size=64,
            seed=420,
        ),
        Recipe(
            "quick",
            "Minutes on a CPU: Adam at 3e-3 with a cosine schedule, batches of 64, 30 epochs, small translations.",
            optimizer="adam",
            lr=3e-3,
            schedule="cosine",
            batch_size=64,
            epochs=30,
            augment=("translate",),
            method="best",
        ),
        Recipe(
            "cifar",
            "Small photographs: Nesterov SGD with a one-cycle schedule, flips and translations, a moving average of "
            "the weights, bfloat16 where the hardware has it.",
            optimizer="sgd",
            lr=0.15,
            weight_decay=5e-4,
            schedule="onecycle",
            warmup=0.2,
            batch_size=128,
            epochs=18,
            augment=("flip", "translate"),
            ema=0.998,
            channels_last=True,
            precision="auto",
            network="resnet_cifar",
            method="best",
        ),
    )
}
RECIPES["best"] = replace(
    RECIPES["cifar"], name="best", description="Every technique that pays; its optimisation is that of cifar."
)


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none.
    """
    if name not in RECIPES:
        raise UserError(f"no such recipe: {name!r} (there are: {', '.join(RECIPES)})")
    return RECIPES[name]


def precision_on(precision: str, device: str) -> str:
    """``auto`` as what it is on a device (``auto``, ``cpu``, ``cuda`` or ``cuda:1``); any other precision as it is."""
    if precision != "auto":
        return precision
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "32-true"
