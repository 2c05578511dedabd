"""Labels beside points of a figure, each where it covers neither another label nor a point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIDES = tuple(
    (x * reach, y * reach)
    for reach in (1.0, 1.7, 2.6)
    for x, y in ((1, 0), (1, -1), (-1, 0), (0, -1), (0, 1), (1, 1), (-1, -1), (-1, 1))
)
_GAP = 4.0
"""Between a marker and the nearest places of its label, in points of 1/72 inch."""


@dataclass(frozen=True)
class Label:
    """A text for the point (x, y), in data coordinates; ``reach`` is how far its marker reaches, in points of 1/72
    inch."""

    x: float
    y: float
    text: str
    color: str
    reach: float = 4.0


def place(
    axis: Axes, labels: Sequence[Label], obstacles: Sequence[tuple[float, float, float]] = (), size: float = 8
) -> None:
    """Write the labels, the first ones have the choice; where no place is free the one that covers least is taken.

    Limits of the axis and the layout of the figure must be final.

    Args:
        axis: of a figure whose layout was computed (``figure.draw_without_rendering()``).
        labels: what to write.
        obstacles: points (x, y, reach) that no label should cover, besides those that are labelled.
        size: of the type, in points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    figure = axis.figure
    renderer = FigureCanvasAgg(figure).get_renderer()  # measures type as the PNG will have it
    pixel = figure.dpi / 72
    room = axis.get_window_extent(renderer)
    taken: list[Bbox] = []
    for x, y, reach in [*obstacles, *((one.x, one.y, one.reach) for one in labels)]:
        (across, up), half = axis.transData.transform((x, y)), reach * pixel
        taken.append(Bbox.from_extents(across - half, up - half, across + half, up + half))

    def cost(box: Bbox) -> float:
        covered = sum(
            max(0.0, min(box.x1, other.x1) - max(box.x0, other.x0))
            * max(0.0, min(box.y1, other.y1) - max(box.y0, other.y0))
            for other in taken
        )
        outside = sum(
            max(0.0, amount) for amount in (room.x0 - box.x0, box.x1 - room.x1, room.y0 - box.y0, box.y1 - room.y1)
        )
        return covered + 50 * outside

    for one in labels:
        best = None
        for x, y in _SIDES:
            text = axis.annotate(
                one.text,
                (one.x, one.y),
                ((one.reach + _GAP) * x, (one.reach + _GAP) * y),
                textcoords="offset points",
                fontsize=size,
                color=one.color,
                ha="left" if x > 0 else "right" if x < 0 else "center",
                va="bottom" if y > 0 else "top" if y < 0 else "center",
                annotation_clip=False,
                zorder=6,
            )
            text.set_in_layout(False)
            box = text.get_window_extent(renderer)
            found = (cost(box), text, box)
            if best is None or found[0] < best[0]:
                if best is not None:
                    best[1].remove()
                best = found
            else:
                text.remove()
            if best[0] == 0:
                break
        if best is not None:
            taken.append(best[2])
