"""The benchmark of merging runs, and says what it claims. Nothing here looks at how long anything took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import merging
from scripts import make_synthetic_model

# So small a model is merged between two looks of the script, and before anything is recorded: it is killed by hand.


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    model, adapter = tmp_path / "in" / "model", tmp_path / "in" / "adapter"
    asked = ["--gigabytes", "0.001", "--sparse", "2:4", "--shard-gigabytes", "0.0005", "--adapter", str(adapter)]
    assert make_synthetic_model.main([*asked, str(model)]) == 0
    monkeypatch.setattr(merging, "_kill_half_way", lambda *_: 0)
    return [str(model), str(adapter), "--threads", "1", "--repeats", "1", "--work", str(tmp_path), "--json"]


@pytest.mark.slow
def test_merging_prints_one_object(case: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merging.main(case)
    row = json.loads(capsys.readouterr().out)
    assert row["files"] > 1 and row["merged"] == 9 * 7 and row["zeros"] > 10**5
    assert row["of_copy_speed"] == pytest.approx(row["copy_seconds"] / row["merge_seconds"], rel=0.5)
    assert min(row["peak_bytes"], row["verify_peak_bytes"], row["resumed_peak_bytes"]) > 10**8
    assert [path.name for path in tmp_path.iterdir()] == ["in"]  # no result is left


@pytest.mark.slow
def test_merging_notices_other_bits(case: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([{"model.safetensors": "one"}, {"model.safetensors": "another"}])
    monkeypatch.setattr(merging, "_digests", lambda _: next(found))
    with pytest.raises(SystemExit, match="other bits in model.safetensors"):
        merging.main(case)


@pytest.mark.slow
def test_merging_notices_that_a_lost_zero_was_not_found(case: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = merging._spp

    def blind(command: list[str], threads: int | None, exit_code: int = 0) -> Any:
        return real(["doctor"] if exit_code else command, threads, exit_code)

    monkeypatch.setattr(merging, "_spp", blind)
    with pytest.raises(SystemExit, match="ended with exit code 0, not 1"):
        merging.main(case)
