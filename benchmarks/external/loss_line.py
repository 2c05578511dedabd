"""Replaces one line of somebody else's training script."""

from __future__ import annotations

__all__ = ["replace_line"]


def replace_line(source: str, old: str, new: str) -> str:
    """``source`` with the one line that reads ``old`` replaced by ``new``; everything else stays byte for byte.

    Args:
        source: text of a script.
        old: the line to be found, without its indentation and line ending; the whole line must read so.
        new: what takes its place, at the same indentation; one line.

    Raises:
        ValueError: the line is not there exactly once, or ``new`` is not one line.
    """
    if not new.strip() or len(new.splitlines()) != 1:
        raise ValueError(f"replace_line: the new line must be one line, got {new!r}")
    lines = source.splitlines(keepends=True)
    found = [number for number, line in enumerate(lines) if line.strip() == old]
    if len(found) != 1:
        where = f" (lines {', '.join(str(number + 1) for number in found)})" if found else ""
        raise ValueError(
            f"replace_line: the script must have the line {old!r} exactly once, found {len(found)} times{where}"
        )
    lines[found[0]] = lines[found[0]].replace(old, new.strip(), 1)
    return "".join(lines)
