"""A folder for the state of long work that has no output folder: kept when the work is stopped, deleted when done."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from spp.checkpoints.fingerprint import json_digest
from spp.checkpoints.lock import locked
from spp.checkpoints.request import Request
from spp.errors import SppError

logger = logging.getLogger("spp")

_REQUEST = "request.json"
_DIGITS = 12  # of a digest, in a folder's name


@contextmanager
def scratch_folder(parent: Path, name: str, request: Request) -> Iterator[Path]:
    """Context manager that yields a hidden folder in `parent`, in which only the same request finds its own work.

    It is deleted at the end, and after an SppError, which would occur again. It is kept after anything else, such as a
    full disk or Ctrl-C, and after a kill.

    Args:
        parent: made if it does not exist.
        name: what the work is, for the folder's name, which ends with a digest of the request.
        request: everything that the work depends on.

    Raises:
        UsageError: another process does the same work right now.
    """
    folder = parent / f".{name}-{json_digest(asdict(request))[:_DIGITS]}"
    with locked(folder):
        if Request.read(folder / _REQUEST) == request:
            logger.info("going on with the work in %s", folder)
        else:  # there is none, or its process was killed while it made the folder
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            request.write(folder / _REQUEST)
        try:
            yield folder
        except SppError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)
