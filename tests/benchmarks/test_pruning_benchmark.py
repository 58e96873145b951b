"""The pruning benchmark runs, and what it compares does the same work. Nothing here looks at how long anything took."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import common, pruning
from spp.pruning.criteria.result import Pruned

# Where the plain version may decide otherwise: its threshold takes all ties, its blocks are rounded one by one.
SAME_MASK = {"magnitude": 1.0, "magnitude-matrix": 0.999, "wanda": 1.0, "ria": 1.0, "sparsegpt": 0.995, "dsnot": 1.0}


def test_script_prints_one_object() -> None:
    command = [sys.executable, "-m", "benchmarks.pruning", "--shape", "24x64", "--pattern", "2:4"]
    done = subprocess.run([*command, "--repeats", "1", "--json"], cwd=common.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == [name for criterion in pruning.STEPS for name in (criterion, f"{criterion}_plain")]
    assert [name for name, value in found.items() if value is None] == [
        f"{name}_plain" for name in ("dsnot", "admm", "swaps", "least-squares")
    ]
    assert all(value > 0 for value in found.values() if value is not None)


def test_appends_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pruning.csv"
    pruning.main(["--shape", "24x64", "--criteria", "wanda", "dsnot", "--repeats", "2", "--csv", str(path)])
    rows = common.read_rows(path)
    wanda = ["wanda", "wanda_plain"]
    assert [row["method"] for row in rows] == [*wanda, "dsnot", "dsnot_plain", *wanda, "dsnot"]
    assert [row["pattern"] for row in rows] == ["50%"] * 4 + ["2:4"] * 3
    assert rows[1]["ratio_to_plain"] == "1.0" and float(rows[0]["ratio_to_plain"]) > 0
    assert "ratio to plain torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pattern", "criterion"),
    [
        ("50%", "dsnot"),
        *itertools.product(["50%", "2:4", "4:8"], [name for name in pruning.CRITERIA if name != "dsnot"]),
    ],
)
def test_both_versions_do_the_same_work(pattern: str, criterion: str) -> None:
    ours, theirs = pruning.Layer((48, 256), "fp32", "cpu").methods(pattern, [criterion]).values()
    assert ours is not None and theirs is not None
    pruned, expected = ours(), theirs()
    assert isinstance(pruned, Pruned) and isinstance(expected, torch.Tensor)
    assert pruned.mask.eq(expected != 0).double().mean() >= SAME_MASK[criterion]
    if criterion != "sparsegpt" or pruned.mask.equal(expected != 0):
        both = pruned.mask & (expected != 0)
        torch.testing.assert_close(pruned.weight[both], expected[both], rtol=1e-4, atol=1e-6)
