"""The rooms of the package: who may import whom, what must import without extras, and words that are not names."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "aep_ext"

# From the ground up. A file imports from its own layer and from lower ones. `aep_ext` itself is the face.
LAYERS = (
    ("_version", "_load", "_io", "_utils", "_progress"),
    ("ops",),
    ("_build_info",),
    ("surgery",),
    ("ensemble",),
    ("pruning",),
    ("inference",),
    ("calibration",),
    ("export",),
    ("report",),
    ("_recipes", "_config"),
    ("training",),
    ("serving",),
    ("aep_ext",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
CORE_PACKAGES = {"torch", "numpy", "scipy"}
WITH_EXTRAS = ("training", "report", "export", "serving", "inference.backends")


class Import(NamedTuple):
    """One imported module: by whom, in which line, at import time or later (in a function, for the type checker)."""

    importer: str
    line: int
    imported: str
    names: tuple[str, ...]
    relative: bool
    at_import: bool

    def __str__(self) -> str:
        return f"{self.importer} (line {self.line}) imports {self.imported}"


@cache
def _files() -> dict[str, ast.Module]:
    """The syntax tree of every file, by its module's dotted name."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        files[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return files


def _statements(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, at_import
        else:
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            yield from _statements(child, at_import and not later)


def imports_of(module: str, tree: ast.Module, modules: frozenset[str]) -> list[Import]:
    """All imports of a file. ``from package import module`` imports that module, other names import the package."""
    found = []
    for statement, at_import in _statements(tree):
        if isinstance(statement, ast.Import):
            found += [Import(module, statement.lineno, a.name, (), False, at_import) for a in statement.names]
            continue
        source = statement.module or ""
        names = [alias.name for alias in statement.names]
        own = [name for name in names if f"{source}.{name}" not in modules]
        relative = statement.level > 0
        if own or relative:
            found.append(Import(module, statement.lineno, source, tuple(own), relative, at_import))
        found += [
            Import(module, statement.lineno, f"{source}.{name}", (), relative, at_import)
            for name in names
            if name not in own and not relative
        ]
    return found


@cache
def _imports() -> list[Import]:
    files = _files()
    return [found for name, tree in files.items() for found in imports_of(name, tree, frozenset(files))]


def _inside() -> list[Import]:
    """The imports of the package by the package."""
    return [found for found in _imports() if found.imported.split(".")[0] == "aep_ext"]


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _rank(module: str) -> int:
    return RANK.get(_room(module), len(LAYERS))


def _cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach one another (Tarjan's strongly connected components of two or more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(edges.get(module, ())):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(edges):
        if module not in index:
            visit(module)
    return groups


def test_every_room_has_a_layer() -> None:
    assert sorted({_room(module) for module in _files()} - RANK.keys()) == []


def test_imports_go_to_the_same_or_a_lower_layer() -> None:
    upward = [str(found) for found in _inside() if _rank(found.imported) > _rank(found.importer)]
    assert not upward, "\n".join(upward)


def test_no_import_cycles_between_files() -> None:
    edges: dict[str, set[str]] = {module: set() for module in _files()}
    for found in _inside():
        if found.imported != found.importer:
            edges[found.importer].add(found.imported)
    cycles = [" <-> ".join(group) for group in _cycles(edges)]
    assert not cycles, "\n".join(cycles)


def test_imports_are_absolute() -> None:
    relative = [str(found) for found in _imports() if found.relative]
    assert not relative, "\n".join(relative)


def test_calibration_works_on_logits_and_inference_fits_nothing() -> None:
    networks = {"MultiExitNet", "GatedNet", "collect_logits"}
    wrong = [
        str(found)
        for found in _inside()
        if (_room(found.importer), _room(found.imported)) == ("inference", "calibration")
        or (
            _room(found.importer) == "calibration"
            and not found.importer.endswith(".terminate")
            and (_room(found.imported) == "surgery" or networks & set(found.names))
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_core_imports_nothing_but_torch_numpy_and_scipy() -> None:
    allowed = CORE_PACKAGES | {"aep_ext"} | sys.stdlib_module_names
    extras = tuple(f"aep_ext.{room}" for room in WITH_EXTRAS)
    wrong = [
        str(found)
        for found in _imports()
        if found.at_import and not found.importer.startswith(extras) and found.imported.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_checks_find_what_they_look_for() -> None:
    tree = ast.parse(
        "import torch\n"
        "from . import cost\n"
        "from aep_ext import ops\n"
        "def f():\n    from aep_ext.cli import main, parser\n"
        "if TYPE_CHECKING:\n    import pandas\n"
    )
    found = imports_of("aep_ext.pruning.x", tree, frozenset({"aep_ext", "aep_ext.ops", "aep_ext.cli"}))
    assert [(one.imported, one.names, one.relative, one.at_import) for one in found] == [
        ("torch", (), False, True),
        ("", ("cost",), True, True),
        ("aep_ext.ops", (), False, True),
        ("aep_ext.cli", ("main", "parser"), False, False),
        ("pandas", (), False, False),
    ]
    assert _cycles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}) == [["a", "b", "c"]]


# Words that the field does not use. `non_inferior` is one that it does.
_WORDS = (
    "cautions?|judge[ds]?|judging|refill(s|ed|ing)?|verdicts?|(?<!non_)inferior(ity)?|racing|contestants?|rivals?|"
    "walk(s|er|ing)?|tails|whole_calls"
)
_BANNED = re.compile(rf"(?:^|_)(?:{_WORDS})(?:_|$)|^archive$")  # a tar archive may be one: `jpeg_archive`


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _names(module: str, tree: ast.Module) -> Iterator[str]:
    """What a file defines for others: itself, classes, functions, their arguments, and names of module or class."""
    yield module.rpartition(".")[2]
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        if isinstance(node, ast.arg):
            yield node.arg
        if isinstance(node, (ast.Module, ast.ClassDef)):
            for statement in node.body:
                targets = statement.targets if isinstance(statement, ast.Assign) else []
                targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
                yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_names_are_the_field_s_words() -> None:
    wrong = [
        f"{module}: {name}" for module, tree in _files().items() for name in _names(module, tree) if banned_word(name)
    ]
    assert not wrong, "\n".join(wrong)


def banned_word(name: str) -> bool:
    return _BANNED.search(_snake(name)) is not None


@pytest.mark.parametrize("name", ["Judged", "judge", "refill", "paired_verdict", "CompiledWalk", "inferior", "Archive"])
def test_banned_words_are_found(name: str) -> None:
    assert banned_word(name)


@pytest.mark.parametrize("name", ["non_inferior", "smallest_non_inferior", "NonInferiority", "details", "jpeg_archive"])
def test_other_words_are_not(name: str) -> None:
    assert not banned_word(name)
