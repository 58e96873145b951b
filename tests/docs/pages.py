"""The README and the pages of `docs/`, and what they show: commands, Python, links, anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("**/*.md"))]

_PROGRAMS = ("spp", "torchrun", "srun", "make", "pip", "python", ".venv/bin/python")
_SHELLS = ("bash", "sh", "console")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """Something that a reader may run: a command, or a block of Python."""

    language: str
    text: str


def shown(markdown: str) -> list[Shown]:
    """All commands and blocks of Python of a page, in order.

    Commands are the lines of fenced blocks for a shell that are not comments and set no variable, and those lines of
    other blocks that begin with the name of a program or have options.
    """
    found: list[tuple[int, Shown]] = []
    for fence in _FENCE.finditer(markdown):
        language, body = fence.groups()
        if language == "python":
            found.append((fence.start(), Shown("python", body)))
        elif language in (*_SHELLS, ""):
            lines = [(at, line) for at, line in _lines(body) if language or _is_command(line)]
            found += [(fence.start(2) + at, Shown("shell", line)) for at, line in lines]
    outside = _FENCE.sub(lambda fence: re.sub(r"[^\n]", "#", fence[0]), markdown)  # the same length
    found += [(at, Shown("shell", line)) for at, line in _lines(outside, indent="    ") if _is_command(line)]
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _lines(text: str, indent: str = "") -> Iterator[tuple[int, str]]:
    whole = re.sub(r" \\\n", lambda end: " " * len(end[0]), text)  # a command may go on in the next line
    for line in re.finditer(rf"^{indent}(\S.*)$", whole, re.MULTILINE):
        if not re.match(r"#|\w+=", line[1]):
            yield line.start(), " ".join(line[1].split())


def _is_command(line: str) -> bool:
    """In a block of no language, which may also hold a formula, a tree, or Python."""
    return line.split()[0] in _PROGRAMS or " --" in line


def commands_in_tables(markdown: str) -> list[Shown]:
    """The commands in cells of tables, `in code`: those of spp that have an argument."""
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    return [Shown("shell", found) for row in rows for found in re.findall(r"`(spp \w[\w-]* [^`]+)`", row)]


def links(markdown: str) -> list[str]:
    """Targets of a page's links and images, outside of code."""
    return re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", markdown))


def anchors(markdown: str) -> set[str]:
    """Anchors of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
