"""The smallest HTML writer that cannot forget to escape: plain strings are text, only :class:`Markup` is markup."""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = {"br", "col", "hr", "img", "meta"}


class Markup(str):
    """A string that is HTML already."""

    __slots__ = ()


Child = object


def render(child: Child) -> str:
    """A child of an element as HTML: markup as it is, sequences one after another, None as nothing, all else
    escaped."""
    if isinstance(child, Markup):
        return str(child)
    if child is None:
        return ""
    if isinstance(child, Iterable) and not isinstance(child, (str, bytes)):
        return "".join(render(part) for part in child)
    return html.escape(str(child))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """One element. An attribute's trailing underscore is dropped (``class_``), other underscores become hyphens; True
    means no value."""
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written += f" {key}" if value is True else f' {key}="{html.escape(str(value), quote=True)}"'
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{render(children)}</{name}>")


def table(
    head: Iterable[Child], rows: Iterable[Iterable[Child]], *, numeric_from: int = 1, marked: Iterable[int] = ()
) -> Markup:
    """A table; cells from column ``numeric_from`` on are aligned to the right, rows whose index is in ``marked`` stand
    out."""
    marked = set(marked)

    def cells(kind: str, row: Iterable[Child]) -> list[Markup]:
        return [tag(kind, cell, class_="number" if column >= numeric_from else None) for column, cell in enumerate(row)]

    body = [tag("tr", cells("td", row), class_="marked" if index in marked else None) for index, row in enumerate(rows)]
    return tag("div", tag("table", tag("thead", tag("tr", cells("th", head))), tag("tbody", body)), class_="scroll")
