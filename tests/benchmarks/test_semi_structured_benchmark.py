"""The benchmark of sparse tensor cores, as far as a machine without them can run it."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import common, semi_structured
from spp.patterns import NM


def test_without_cuda_it_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        semi_structured.main(["--shape", "64x64", "--csv", str(tmp_path / "rows.csv")])
    assert stopped.value.code == 2
    assert "needs CUDA: sparse tensor cores" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_json_takes_one_case(capsys):
    with pytest.raises(SystemExit):
        semi_structured.main(["--shape", "64x64", "--json"])
    assert "give one shape, tokens and dtype" in capsys.readouterr().err


def test_the_layer_is_2_of_4_and_rows_compare_with_dense(tmp_path):
    """On the CPU, with a smaller dense layer in the place of the sparse one."""
    layer, other = (semi_structured.sparse_layer((size, 512), torch.float32, "cpu") for size in (512, 128))
    assert NM(2, 4).violations(layer.weight) == 0 and layer.weight.count_nonzero() == 512 * 512 // 2
    found = common.measure(semi_structured.methods(layer, other, torch.randn(64, 512)), 3)
    made = semi_structured.rows(common.machine_columns("cpu"), (512, 512), 64, "fp32", found)
    common.append_rows(tmp_path / "rows.csv", made)
    rows = common.read_rows(tmp_path / "rows.csv")
    assert [row["method"] for row in rows] == ["dense", "semi_structured"]
    assert all(row["shape"] == "512x512" and row["tokens"] == "64" and row["hardware"] for row in rows)
    assert rows[0]["ratio_to_dense"] == "1.0"
    times = [float(row["median_ms"]) for row in rows]
    assert float(rows[1]["ratio_to_dense"]) == pytest.approx(times[1] / times[0], rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_case_on_a_gpu(capsys):
    semi_structured.main(["--shape", "256x256", "--tokens", "1", "--repeats", "2", "--json"])
    assert json.loads(capsys.readouterr().out).keys() == {"dense", "semi_structured"}
