"""Write the table of docs/models.md from what the whole life of every family finds (tests/test_family_lives.py).

    python scripts/family_table.py

The notes in the last column stay as they are; a new family gets a row with an empty note. Families that need a newer
transformers keep their rows.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
_ROW = re.compile(r"^\| `(.+?)` \|.*\| (.*?) \|$", re.MULTILINE)


class Rows:
    """A plugin of pytest that collects the rows that tests record, whether or not they agree with the page."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and (row := dict(report.user_properties).get("row")):
            family, *cells = row
            self.found[family] = cells


def written(page: str, rows: dict[str, list[str]]) -> str:
    """The page with these rows; the rows of other families follow them as they are."""
    old = {match[1]: match for match in _ROW.finditer(page)}
    notes = {family: match[2] for family, match in old.items()}
    lines = [f"| `{family}` | {' | '.join(cells)} | {notes.get(family, '')} |" for family, cells in rows.items()]
    lines += [match[0] for family, match in old.items() if family not in rows]
    first, last = min(match.start() for match in old.values()), max(match.end() for match in old.values())
    return page[:first] + "\n".join(lines) + page[last:]


def main() -> int:
    """Run the lives, and write the page; 1 if a life failed for another reason than the page."""
    rows = Rows()
    pytest.main(["-q", "--tb=short", str(ROOT / "tests" / "test_family_lives.py"), "-k", "a_family"], plugins=[rows])
    PAGE.write_text(written(PAGE.read_text(), rows.found))
    return 0 if rows.found else 1


if __name__ == "__main__":
    sys.exit(main())
