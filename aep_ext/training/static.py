"""Smaller static networks as baselines: trained alone, by the run's own recipe and seeds."""

from __future__ import annotations

from collections.abc import Sequence

from aep_ext._utils import UserError
from aep_ext.surgery import networks

STATIC = "static/"
"""Begins the name of a trained static network."""


def static_networks(network: str, asked: Sequence[str]) -> list[str]:
    """Which networks are trained beside a run.

    Args:
        network: the run's.
        asked: widths ("0.5") of the run's network, or names of networks.

    Returns:
        Names for ``networks.build``; ``resnet_small@0.5`` is resnet_small at width 0.5.

    Raises:
        UserError: no such network, or it has no widths.
    """
    names = []
    for name in asked:
        try:
            width = float(name)
        except ValueError:
            pass
        else:
            if not networks.scalable(network):
                raise UserError(f"no such static network: {network} has no widths, got {name}")
            name = f"{network}@{width}"
        if not networks.known(name):
            raise UserError(f"no such static network: {name!r} (there are: {', '.join(networks.available())})")
        names.append(name)
    return list(dict.fromkeys(names))


def static_title(name: str) -> str:
    """How a trained model is called: ``static/resnet_small@0.5`` is resnet_small at width 0.5."""
    base, _, width = name.removeprefix(STATIC).partition("@")
    return f"{base} at width {width}" if width else base
