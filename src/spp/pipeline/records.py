"""The reports of a run's finished stages, on disk."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spp.checkpoints.fingerprint import folder_digest
from spp.checkpoints.json_files import read_object, write_json
from spp.errors import SppError, UsageError, shown
from spp.pipeline.stages import Stage
from spp.runtime.memory import peak_rss_bytes

logger = logging.getLogger("spp")

_ENTRIES = {"report": dict, "seconds": (int, float), "peak_rss_bytes": int, "output_sha256": (str, type(None))}
"""What the record of a stage holds."""


class StageRecords:
    """The reports of finished stages, one JSON file each; a stage with a file is not run again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, stage: Stage) -> None:
        """Run a stage and record its report, seconds and the process's peak memory, unless a record says it is done.

        Raises:
            UsageError: the stage is done, but the folder that it wrote has changed since.
        """
        path = self._path(stage.name)
        if self._is_done(stage):
            logger.info("%s: done before", stage.name)
            return
        logger.info("%s ...", stage.name)
        start = time.perf_counter()
        report = stage.work()
        record = {
            "report": asdict(report),
            "seconds": time.perf_counter() - start,
            "peak_rss_bytes": peak_rss_bytes(),
            "output_sha256": stage.out and folder_digest(stage.out),
        }
        write_json(path, record)

    def _is_done(self, stage: Stage) -> bool:
        try:
            record = self._read(stage.name)
        except SppError as error:  # there is none, or it is damaged
            if self._path(stage.name).exists():
                logger.warning("%s; the stage is run again", error)
            return False
        if stage.out and record["output_sha256"] is None:  # killed while the run itself changed it
            return False
        if stage.out and not (stage.out.is_dir() and folder_digest(stage.out) == record["output_sha256"]):
            raise UsageError(
                f"{stage.out} was changed after this run had written it; restore it, or pass --overwrite to start over"
            )
        return True

    @contextmanager
    def changing(self, name: str, out: Path) -> Iterator[None]:
        """Context manager in which the run itself changes the folder `out` that the stage `name` wrote."""
        path = self._path(name)
        record, times = self._read(name), path.stat()
        write_json(path, {**record, "output_sha256": None})
        yield
        write_json(path, {**record, "output_sha256": folder_digest(out)})
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # `every` goes by it

    def report(self, name: str) -> dict[str, Any]:
        """The report of a finished stage.

        Raises:
            SppError: its record is damaged.
        """
        return self._read(name)["report"]

    def every(self, key: str) -> dict[str, Any]:
        """One entry of every record, by stage, in the order that they ran in."""
        paths = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        return {path.stem: self._read(path.stem)[key] for path in paths}

    def _read(self, name: str) -> dict[str, Any]:
        """A stage's record, with every entry that `keep` writes.

        Raises:
            SppError: it is missing or damaged.
        """
        record = read_object(self._path(name))
        for key, kinds in _ENTRIES.items():
            if not isinstance(record.get(key), kinds):
                raise SppError(f"{self._path(name)}: not the record of a stage: {key} is {shown(record.get(key))}")
        return record

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
