"""The whole inputs that are damaged, or written where there is no room, or whose commands are killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from whole_inputs import make_stock


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder of whole inputs, by name."""
    make_stock(folder := tmp_path_factory.mktemp("stock"), tiny_tokenizer)
    return folder
