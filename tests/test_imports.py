"""Imports of lit_compress form no circle: each module can be read after those that it names."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lit_compress

ROOT = Path(lit_compress.__file__).parent


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in ROOT.rglob("*.py")}


def imported(source: str, known: set[str]) -> Iterator[str]:
    """Modules that a source names in its imports, those in functions and for types included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [member if member in known else str(node.module) for member in members]
        else:
            continue
        yield from known.intersection(names)


def circle(sources: dict[str, str]) -> list[str]:
    graph = {name: set(imported(text, set(sources))) for name, text in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_two_modules_import_each_other() -> None:
    assert len(FILES) > 150
    assert circle({name: file.read_text(encoding="utf-8") for name, file in FILES.items()}) == []


@pytest.mark.parametrize(
    "text",
    ["import p.a", "from p import a", "from p.a import x", "def f():\n    from p.a import x",
     "if TYPE_CHECKING:\n    from p.a import x"],
)  # fmt: skip
def test_every_kind_of_import_counts(text: str) -> None:
    sources = {"p": "", "p.a": "from p.b import y", "p.b": "import os", "p.c": "from p.b import z"}
    assert circle(sources) == []
    assert set(circle({**sources, "p.b": text})) == {"p.a", "p.b"}
