"""The benchmark scripts run, and report under the promised names. Nothing here looks at how long anything took."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks import common, decode, deploy, layer, step, step_worker
from benchmarks.layer_methods import METHODS, Case, Layer
from spp.models.packed_linear import PackedLinear

PROMISED = {
    *("floor", "reference", "torch", "native", "packed"),
    *("published1", "published2", "peft_hira", "peft_lora", "full"),
}
ONE_CASE = ["--shape", "64x48", "--tokens", "8", "--dtype", "fp32", "--density", "0.5"]


def test_layer_script_prints_one_object():
    command = [sys.executable, "-m", "benchmarks.layer", *ONE_CASE, "--repeats", "1", "--json"]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert PROMISED <= found.keys() <= set(METHODS)
    assert all(value > 0 for name, value in found.items() if name not in ("native", "packed") and value is not None)
    assert {name for name in found if found[name] is None} <= {"triton", "native", "packed", "split", "split_packed"}


def test_json_takes_one_case(capsys):
    with pytest.raises(SystemExit):
        layer.main(["--shape", "64x48", "--tokens", "8", "--dtype", "fp32", "--json"])  # two densities
    assert "give one shape, tokens, dtype and density" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_method_runs(dtype):
    case = Layer(Case(shape=(32, 48), tokens=4, dtype=dtype, density=0.25))
    for one in case.methods(METHODS).values():
        if one:
            one()
    assert case.x.grad is case.A.grad is case.B.grad is None  # nothing accumulates from round to round


def test_published_variants_are_left_out_where_they_fail():
    found = Layer(Case(shape=(20, 48), tokens=4, dtype="fp32", density=0.5)).methods(["published1", "torch"])
    assert found["published1"] is None and found["torch"] is not None


def test_layer_appends_rows(tmp_path, capsys):
    path = tmp_path / "layer.csv"
    for tokens in ("4", "8"):
        arguments = ["--shape", "64x48", "--dtype", "bf16", "--density", "0.25", "--methods", "floor", "full"]
        layer.main([*arguments, "--tokens", tokens, "--repeats", "3", "--csv", str(path)])
    rows = common.read_rows(path)
    assert [(row["tokens"], row["method"]) for row in rows] == [
        ("4", "floor"),
        ("4", "full"),
        ("8", "floor"),
        ("8", "full"),
    ]
    first = rows[0]
    assert first["shape"] == "64x48" and first["torch"] == torch.__version__ and first["ratio_to_floor"] == "1.0"
    assert first["repeats"] == "3" and first["extra_bytes"] == "" and first["device"] == "cpu"
    assert float(first["min_ms"]) <= float(first["median_ms"]) <= float(first["p90_ms"])
    assert "ratio to floor" in capsys.readouterr().out


def test_defaults_leave_out_what_takes_too_long():
    everything = layer.cases(layer._parser().parse_args([]))
    assert len(everything) == 3 * 2 * (4 + 3)
    assert max(case.tokens for case in everything if case.dtype == "fp32") == 2048
    asked = layer.cases(layer._parser().parse_args(["--dtype", "fp32", "--tokens", "8192"]))
    assert {case.tokens for case in asked} == {8192}


def test_measure_goes_there_and_back():
    order = []
    methods = {name: lambda name=name: order.append(name) for name in "abc"} | {"missing": None}
    found = common.measure(methods, 2)
    assert "".join(order) == "abc" + "abc" + "cba"
    assert found["missing"] is None and len(found["b"].times) == 2


def test_columns_of_times():
    columns = common.Measured(times=[5, 1, 4, 2, 3, 10, 9, 8, 7, 6]).columns()
    assert columns == {"repeats": 10, "min_ms": 1, "median_ms": 5.5, "p90_ms": 9}


def test_append_is_atomic_and_keeps_columns(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda run: common.append_rows(path, [{"run": run, "x": "a,b"}] * 20), range(16)))
    rows = common.read_rows(path)
    runs = [row["run"] for row in rows]
    assert len(rows) == 16 * 20 and {row["x"] for row in rows} == {"a,b"}
    assert all(runs[first : first + 20] == [runs[first]] * 20 for first in range(0, len(runs), 20))
    with pytest.raises(ValueError, match="move the old file away"):
        common.append_rows(path, [{"run": 1, "y": 2}])
    assert common.read_rows(path) == rows


@pytest.mark.parametrize(("density", "kept"), [(0.5, 50), (0.25, 25), (1.0, 100)])
def test_sparse_weight_has_exact_rows(density, kept):
    weight = common.sparse_weight(300, 100, density, torch.bfloat16)
    assert (weight.count_nonzero(dim=1) == kept).all()
    assert weight.equal(common.sparse_weight(300, 100, density, torch.bfloat16))


def test_decode_prints_one_object(capsys):
    for tokens in ("2", "8"):
        decode.main(["--shape", "64x96", "--tokens", tokens, "--dtype", "fp32", "--repeats", "2", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert list(found) == ["torch", "own_dense", "packed_50", "packed_75", "packed_90"]
        assert all(found[name] > 0 for name in found if name != "own_dense")
    assert found["own_dense"] is None


def test_decode_appends_rows(tmp_path):
    path = tmp_path / "decode.csv"
    decode.main(["--shape", "64x96", "--tokens", "8", "--repeats", "2", "--csv", str(path)])
    rows = {row["method"]: row for row in common.read_rows(path)}
    assert list(rows) == ["torch", "packed_50", "packed_75", "packed_90"]
    assert rows["torch"]["weight_bytes"] == str(64 * 96 * 2)
    assert int(rows["packed_90"]["weight_bytes"]) < int(rows["packed_50"]["weight_bytes"])


DEPLOYED = [
    *("q8_0", "q4_0", "q4_0_repacked", "q4_k", "q4_k_repacked", "q2_k_repacked", "torch_bf16", "packed_bf16_50"),
    *("packed_8_50", "packed_4_50", "packed_8_75", "packed_4_75", "packed_4_32of64"),
]


def test_deploy_prints_one_object_with_null_for_what_is_missing(tmp_path, capsys):
    (tmp_path / "no library.so").write_text("text")
    command = ["--layer", "64x256", "--repeats", "2", "--threads", "1", "--ggml", str(tmp_path / "no library.so")]
    threads = torch.get_num_threads()
    try:
        deploy.main([*command, "--json"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert sorted(found) == sorted(DEPLOYED)
    assert {name for name in found if found[name] is None} == {name for name in DEPLOYED if name.startswith("q")}
    assert all(found[name] > 0 for name in found if not name.startswith("q"))
    assert "no library.so cannot be used as ggml's library" in printed.err


def test_deploy_appends_rows(tmp_path):
    path = tmp_path / "deploy.csv"
    deploy.main(["--layer", "64x96", "--repeats", "2", "--csv", str(path), "--ggml", str(tmp_path / "none")])
    rows = {row["method"]: row for row in common.read_rows(path)}
    assert "packed_4_32of64" not in rows  # 96 columns
    assert rows["torch_bf16"]["bits_per_weight"] == "16.0" and float(rows["packed_8_75"]["bits_per_weight"]) < 6


@pytest.mark.parametrize("bits", [8, 4])
def test_deployed_weights_keep_their_survivors(bits):
    weight = common.sparse_weight(16, 200, 0.5, torch.bfloat16)
    unpacked = deploy.few_bits(weight, bits).unpack()
    assert (unpacked != 0).equal(weight != 0)
    assert (unpacked - weight).abs().max() <= weight.abs().max() / (2**bits - 1) * 1.05


def test_random_llama_is_sparse_packed_or_not():
    dense, packed = (step_worker.random_llama("tiny", 0.75, packed=packed) for packed in (False, True))
    name = "model.layers.1.mlp.down_proj"
    assert isinstance(packed.get_submodule(name), PackedLinear)
    assert not any(parameter.is_meta for parameter in packed.parameters())
    weight = dense.get_submodule(name).weight
    assert weight.dtype == torch.bfloat16 and (weight.count_nonzero(dim=1) == 96 // 4).all()
    assert packed.get_submodule(name).weight.equal(weight)


def test_every_step_method_trains():
    def settings(method):
        return step_worker.Settings(method=method, size="tiny", sparsity=0.5, batch=2, tokens=8, steps=2)

    found = {method: step_worker.run(settings(method)) for method in step_worker.METHODS}
    for report in found.values():
        assert len(report["step_ms"]) == len(report["losses"]) == 2
        assert 0 < report["imports_bytes"] <= report["peak_bytes"]
    # SPP's first updates are too small to change a bf16 weight, so its loss says nothing about training.
    assert all(
        found[name]["losses"][1] < found[name]["losses"][0] for name in ("peft_lora", "peft_hira", "masked_lora")
    )
    assert found["spp"]["losses"] == found["spp_dense"]["losses"]
    assert found["spp"]["trained_parameters"] < found["peft_hira"]["trained_parameters"]


def test_training_moves_every_factor():
    settings = step_worker.Settings(method="spp", size="tiny", sparsity=0.5, batch=2, tokens=8, steps=1)
    model = step_worker.METHODS["spp"](step_worker.random_llama("tiny", 0.5, packed=True))
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    step_worker._train(model, settings)
    assert len(before) == 2 * 2 * 7
    after = dict(model.named_parameters())
    assert not [name for name, start in before.items() if after[name].equal(start)]


def test_step_rows_pool_the_rounds():
    def report(times, peak):
        return {"step_ms": times, "imports_bytes": 1, "built_bytes": 2, "peak_bytes": peak, "trained_parameters": 7}

    found = {"spp": [report([1, 2], 10), report([3, 6], 20)], "peft_lora": [report([5, 5], 8)]}
    spp, lora = step.rows({"size": "tiny"}, found)
    assert spp["median_ms"] == 2.5 and spp["ratio_to_lora"] == 0.5 and spp["peak_bytes"] == 15
    assert (spp["rounds"], spp["repeats"], lora["rounds"], lora["repeats"]) == (2, 4, 1, 2)
