"""`scripts/family_table.py` replaces what it found, and nothing else of the page."""

from __future__ import annotations

import runpy
from pathlib import Path

written = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "family_table.py"))["written"]

PAGE = """# Models

| family | blocks | pruned | without | notes |
|---|---|---|---|---|
| `old` | `x` | up |  | also Older |
| `unknown` | `y` | down | down |  |

After.
"""


def test_notes_and_the_rows_of_other_families_stay() -> None:
    page = written(PAGE, {"old": ["`x`", "up, down", "up"], "new": ["`z`", "all", ""]})
    assert page == PAGE.replace(
        "| `old` | `x` | up |  | also Older |\n",
        "| `old` | `x` | up, down | up | also Older |\n| `new` | `z` | all |  |  |\n",
    )
