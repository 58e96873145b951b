"""The tree in the README is the one of the sources, in the words of their docstrings."""

from __future__ import annotations

import ast
from pathlib import Path

from pages import README, ROOT

_SOURCES = ROOT / "src" / "spp"


def test_the_readme_prints_the_tree_of_the_sources():
    shown = README.read_text(encoding="utf-8")
    assert "\n".join(tree()) in shown, "README.md must have this tree:\n" + "\n".join(tree())


def tree() -> list[str]:
    """Rooms and the files beside them, a line each: the name, and the first sentence of its docstring."""
    files = [path for path in sorted(_SOURCES.glob("*.py")) if path.stem != "__init__"]
    lines = ["src/spp/", *(_line(path, path.name, 1) for path in files)]
    for room in packages(_SOURCES):
        lines.append(_line(room / "__init__.py", f"{room.name}/", 1))
        lines += [_line(inner / "__init__.py", f"{inner.name}/", 2) for inner in packages(room)]
    return lines


def packages(folder: Path) -> list[Path]:
    """The packages in a folder."""
    return sorted(path.parent for path in folder.glob("*/__init__.py"))


def _line(path: Path, name: str, depth: int) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path} has no docstring"
    first = docstring.partition("\n")[0].rstrip(".")
    return f"{'  ' * depth}{name}".ljust(20) + first


def test_the_top_level_is_read_in_a_minute():
    files = [path for path in _SOURCES.iterdir() if path.is_file()]
    assert len(packages(_SOURCES)) <= 12, "at most 12 rooms"
    assert len(files) <= 8, "at most 7 files of Python, and the marker py.typed"
