"""What the finished stages of a run reported, on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spp.checkpoints.json_files import read_json, write_json
from spp.runtime.memory import peak_rss_bytes

logger = logging.getLogger("spp")


class StageRecords:
    """What finished stages reported, one JSON file each; a stage with a file is not run again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, stage: Callable[[], Any]) -> None:
        """Run a stage and record its report, its seconds and the process's peak memory, unless that is done."""
        path = self._path(name)
        if path.is_file():
            logger.info("%s: done before", name)
            return
        logger.info("%s ...", name)
        start = time.perf_counter()
        report = stage()
        record = {
            "report": asdict(report),
            "seconds": time.perf_counter() - start,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        write_json(path, record)

    def report(self, name: str) -> dict[str, Any]:
        return read_json(self._path(name))["report"]

    def every(self, key: str) -> dict[str, Any]:
        """One entry of every record, by stage, in the order that they ran in."""
        paths = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        return {path.stem: read_json(path)[key] for path in paths}

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"
