"""Files and functions are short enough to be read in one go."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_MOST_LINES, _MOST_CODE = 400, 40
_FILES = [path for folder in ("src", "benchmarks", "scripts") for path in sorted((_ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_no_file_and_no_function_is_too_long(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= _MOST_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = {one.name: count for one in functions if (count := code_lines(one, text.splitlines())) > _MOST_CODE}
    assert not long, "lines of code without docstring, comments and blank lines"


def code_lines(function: ast.FunctionDef, lines: list[str]) -> int:
    """Lines of a function's body, without its docstring, comments and blank lines."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if not body:
        return 0
    own = lines[body[0].lineno - 1 : body[-1].end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in own)
