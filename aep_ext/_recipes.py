"""Recipes: everything about a training that is neither the data nor the network."""

from __future__ import annotations

from dataclasses import dataclass

from aep_ext._utils import UserError

OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Recipe:
    """A named way of training.

    Attributes:
        name, description: for the command line and the report.
        optimizer: one of ``adam``, ``adamw``, ``sgd`` (Nesterov momentum 0.9), ``rmsprop``.
        lr: learning rate (its peak, with the cosine schedule).
        weight_decay: as the optimizer takes it.
        schedule: ``constant``, or ``cosine``: linear warm-up over 5 % of the steps, then a half cosine down to 0.
        batch_size: of the training; scoring uses larger batches, which change no decision.
        epochs: at most so many.
        patience: stop after so many epochs without a better joint validation loss; None: never.
        image_size: side in pixels to which images are resized; None: as the network or the data has it.
        seed: where the user names none.
    """

    name: str
    description: str
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "constant"
    batch_size: int = 64
    epochs: int = 20
    patience: int | None = None
    image_size: int | None = None
    seed: int = 0


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
            "Minutes on a CPU: Adam at 3e-3 with a cosine schedule, batches of 64, 30 epochs, no augmentation.",
            optimizer="adam",
            lr=3e-3,
            schedule="cosine",
            batch_size=64,
            epochs=30,
        ),
        Recipe(
            "cifar-small",
            "CIFAR on a CPU: Adam at 2e-3 with a cosine schedule, batches of 64, 12 epochs, no augmentation.",
            optimizer="adam",
            lr=2e-3,
            schedule="cosine",
            batch_size=64,
            epochs=12,
        ),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none.
    """
    if name not in RECIPES:
        raise UserError(f"no such recipe: {name!r} (there are: {', '.join(RECIPES)})")
    return RECIPES[name]
