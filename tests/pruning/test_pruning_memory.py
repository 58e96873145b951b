"""The memory of a pruning run: foretold before it, and not more with more blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import make_synthetic_model

ROOT = Path(make_synthetic_model.__file__).parents[1]
MIB = 2**20


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 0.3 GB in six blocks, whose tensors are of the sizes that a C library keeps in its heap."""
    folder = tmp_path_factory.mktemp("synthetic") / "dense"
    assert make_synthetic_model.main(["--gigabytes", "0.3", str(folder)]) == 0
    return folder


def measured(values: dict[str, Any]) -> dict[str, Any]:
    """What the benchmark's worker, a process of its own, reports of a run."""
    command = [sys.executable, str(ROOT / "benchmarks" / "streaming_worker.py"), json.dumps([values, 1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def predicted(values: dict[str, Any]) -> int:
    """What `spp prune --dry-run` says."""
    flags = [str(part) for name, value in values.items() for part in ("--" + name, value)]
    model, out = flags[1], flags[3]
    command = [sys.executable, "-m", "spp", "prune", model, out, *flags[4:], "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(json.loads(done.stdout)["parts"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps",
    [
        *({"criterion": name} for name in ("wanda", "ria", "sparsegpt", "admm", "magnitude")),
        {"criterion": "wanda", "refine": "swaps", "update": "admm"},
        {"criterion": "sparsegpt", "refine": "swaps", "update": "least-squares"},
    ],
    ids=lambda steps: "+".join(steps.values()),
)
def test_the_prediction_is_close_to_the_measurement(dense: Path, tmp_path: Path, steps: dict[str, str]) -> None:
    """Within 10 %."""
    values = {"model": str(dense), "out": str(tmp_path / "pruned"), **steps, "samples": 8, "window": 512}
    foretold = predicted(values)
    assert not (tmp_path / "pruned").exists()
    peak = measured(values)["peak_bytes"]
    assert abs(peak - foretold) < 0.1 * foretold, (foretold / MIB, peak / MIB)
