"""Merging on disk: exact numbers, byte-identical rest, zeros proved, nothing half-written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from families import whole_model_of
from killing import run_killed
from merging import adapter_for, sparse_model
from safetensors.torch import load_file, save_file

from spp.adapters import merge as merge_stage
from spp.adapters.merge import merge
from spp.adapters.options import MergeOptions
from spp.adapters.spp_format import read_adapter
from spp.checkpoints.atomic_folder import partial_folder
from spp.checkpoints.checkpoint import MANIFEST, VERIFICATION, Checkpoint
from spp.checkpoints.fingerprint import base_fingerprint
from spp.checkpoints.json_files import read_json, write_json
from spp.checkpoints.model_card import CARD
from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.rewrite import Rewriting
from spp.checkpoints.verify import verify
from spp.errors import SppError, UsageError
from spp.ops.reference import merged_weight
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune

MODULES = ("self_attn.q_proj", "mlp.down_proj")


@pytest.fixture
def base(tmp_path, tiny_model) -> Path:
    return sparse_model(tmp_path / "base", tiny_model)


@pytest.fixture
def adapter(tmp_path, base) -> Path:
    return adapter_for(tmp_path / "adapter", base, [f"model.layers.{i}.{name}" for i in (0, 1) for name in MODULES])


def naive_merge(weight, A, B, scale):
    """W' = W + s * W * A[group] * B, written out element by element."""
    merged = weight.double().clone()
    out_features, rank = weight.shape[0], A.shape[0]
    for i in range(out_features):
        for j in range(weight.shape[1]):
            w = weight[i, j].double()
            merged[i, j] = w + scale * w * A[i * rank // out_features, j].double() * B[i, 0].double()
    return merged


def test_numbers_are_the_formula_rounded_once(tmp_path, base, adapter):
    report = merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    factors = read_adapter(adapter).factors
    assert set(report.tensors) == {f"{module}.weight" for module in factors}
    for module, factor in factors.items():
        name = f"{module}.weight"
        expected = naive_merge(before[name], factor.A, factor.B, factor.scale).to(torch.bfloat16)
        torch.testing.assert_close(after[name], expected, rtol=2**-8, atol=0)
        zero = before[name] == 0
        assert torch.equal(after[name].view(torch.int16)[zero], torch.zeros_like(before[name]).view(torch.int16)[zero])
    untouched = set(before) - set(report.tensors)
    assert untouched and all(torch.equal(before[n].view(torch.int16), after[n].view(torch.int16)) for n in untouched)


def test_the_result_is_a_plain_complete_model(tmp_path, base, adapter):
    out = tmp_path / "merged"
    report = merge(MergeOptions(model=str(base), adapter=adapter, out=out))
    ours = {MANIFEST, VERIFICATION, CARD}
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()} | ours
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    manifest = read_json(out / MANIFEST)
    assert manifest["kind"] == "merged"
    assert manifest["verification"]["verified"] is True
    assert manifest["verification"]["zeros"] == report.zeros > 0
    proof = read_json(out / VERIFICATION)
    assert proof["verified"] is True and proof["tensors"].keys() == report.tensors.keys()
    assert proof["copied"] + len(proof["tensors"]) == len(Checkpoint.open(base).names)
    assert sum(one["zeros"] for one in proof["tensors"].values()) == proof["zeros"] == report.zeros
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_shards_stay_shards(tmp_path, tiny_model):
    base = sparse_model(tmp_path / "base", tiny_model, max_shard_size="20KB")
    adapter = adapter_for(tmp_path / "adapter", base, ["model.layers.1.mlp.up_proj"])
    merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    assert Checkpoint.open(tmp_path / "merged").names == Checkpoint.open(base).names


def test_conv1d_weights_are_merged_in_their_own_orientation(tmp_path, tiny_model):
    base = sparse_model(tmp_path / "base", tiny_model, family="gpt2", dtype=torch.float32)
    module = "transformer.h.0.attn.c_attn"
    adapter = adapter_for(tmp_path / "adapter", base, [module])
    merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    before, after = (Checkpoint.open(folder).tensor(f"{module}.weight") for folder in (base, tmp_path / "merged"))
    factor = read_adapter(adapter).factors[module]
    expected = naive_merge(before.T, factor.A, factor.B, factor.scale).T
    # W and Delta can nearly cancel: what is exact to fp32 is their size, about 0.02, not the sum.
    torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-8)


def test_negative_zeros_become_positive_where_something_is_merged(tmp_path, base, adapter):
    tensors = load_file(base / "model.safetensors")
    merged_name, copied_name = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
    for name in (merged_name, copied_name):
        tensors[name][0, :4] = -0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "merged"
    merge(MergeOptions(model=str(base), adapter=adapter, out=out))
    merged = load_file(out / "model.safetensors")
    assert merged[merged_name][0, :4].view(torch.int16).tolist() == [0] * 4
    assert merged[copied_name].view(torch.int16).equal(tensors[copied_name].view(torch.int16))
    assert verify(VerifyOptions(base=str(base), other=str(out))).verified


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
def test_the_result_may_have_another_dtype(tmp_path, tiny_model, base_dtype, dtype):
    base = sparse_model(tmp_path / "base", tiny_model, dtype=base_dtype, max_shard_size="40KB")
    adapter = adapter_for(tmp_path / "adapter", base, [f"model.layers.0.{name}" for name in MODULES])
    out, wanted = tmp_path / "merged", getattr(torch, dtype)
    report = merge(MergeOptions(model=str(base), adapter=adapter, out=out, dtype=dtype))
    before, after = Checkpoint.open(base), Checkpoint.open(out)
    assert {tensor.dtype for _, tensor in after.items()} == {wanted}
    assert after.config == before.config | {"dtype": dtype}
    for module, factor in read_adapter(adapter).factors.items():
        expected = naive_merge(before.tensor(f"{module}.weight"), factor.A, factor.B, factor.scale)
        unit = torch.finfo(wanted).eps + torch.finfo(torch.float32).eps
        torch.testing.assert_close(after.tensor(f"{module}.weight").double(), expected, rtol=unit, atol=1e-7)
    same = base_dtype == wanted
    assert set(report.tensors) | set(report.converted) == (set(report.tensors) if same else set(before.names))
    assert all(
        after.tensor(name).equal(before.tensor(name).to(wanted)) for name in set(before.names) - set(report.tensors)
    )
    assert read_json(out / VERIFICATION)["copied"] == len(before.names) - len(report.tensors) - len(report.converted)
    assert verify(VerifyOptions(base=str(base), other=str(out))).verified
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(out).dtype == wanted


def test_the_new_dtype_replaces_the_old_one_everywhere_in_the_configuration(tmp_path, base, adapter):
    config = read_json(base / "config.json")
    config.pop("dtype")
    write_json(base / "config.json", config | {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "n": 1}})
    merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged", dtype="float32"))
    expected = config | {"torch_dtype": "float32", "text_config": {"dtype": "float32", "n": 1}}
    assert read_json(tmp_path / "merged" / "config.json") == expected


def test_a_dtype_too_narrow_for_a_tensor_fails_and_leaves_nothing(tmp_path, tiny_model):
    base = sparse_model(tmp_path / "base", tiny_model)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e30
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_for(tmp_path / "adapter", base, ["model.layers.0.mlp.up_proj"])
    with pytest.raises(SppError, match=r"model\.norm\.weight: 1 entries turned NaN or infinite; nothing was written"):
        merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged", dtype="float16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_stochastic_rounding_keeps_small_updates_in_the_mean(tmp_path, tiny_model):
    base = sparse_model(tmp_path / "base", tiny_model)
    module = "model.layers.0.mlp.up_proj"
    adapter = adapter_for(tmp_path / "adapter", base, [module], rank=1)
    # The same small relative change in every weight, 2^-11, which bf16 cannot tell.
    key = f"base_model.model.{module}"
    factors = load_file(adapter / "adapter_model.safetensors")
    factors[f"{key}.spp_A.weight"].fill_(2**-12)
    factors[f"{key}.spp_B.weight"].fill_(1.0)
    save_file(factors, adapter / "adapter_model.safetensors")
    before = Checkpoint.open(base).tensor(f"{module}.weight").double()
    gains = {}
    for rounding, seed in (("nearest", 0), ("stochastic", 0), ("stochastic", 1)):
        out = tmp_path / f"{rounding}-{seed}"
        report = merge(MergeOptions(model=str(base), adapter=adapter, out=out, rounding=rounding, seed=seed))
        after = Checkpoint.open(out).tensor(f"{module}.weight")
        assert not after.view(torch.int16)[before == 0].any()
        assert (report.unchanged_share == 1) == (rounding == "nearest")
        gains[rounding, seed] = after.double() / before
    found = [float(gains["stochastic", seed].nanmean() - 1) for seed in (0, 1)]
    assert float(gains["nearest", 0].nanmean()) == 1
    # About one of 12 weights jumps, of 768 that are not zero: 0.6 is five standard deviations of that share.
    assert found == pytest.approx([2**-11] * 2, rel=0.6)
    assert found[0] != found[1]


@pytest.mark.parametrize("wanted", ["auto", "float16"])
def test_stochastic_rounding_goes_on_to_the_same_bytes(tmp_path, tiny_model, wanted, monkeypatch):
    base = sparse_model(tmp_path / "base", tiny_model, dtype=torch.float32 if wanted == "float16" else torch.bfloat16)
    adapter = adapter_for(tmp_path / "adapter", base, [f"model.layers.{i}.{name}" for i in (0, 1) for name in MODULES])

    def options(out: str, **more) -> MergeOptions:
        values = {"model": str(base), "adapter": adapter, "dtype": wanted, "rounding": "stochastic", "seed": 3}
        return MergeOptions(out=tmp_path / out, **{**values, **more})

    merge(options("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(merge_stage, "_AT_ONCE", 1)
        patch.setattr(Rewriting, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(options("resumed"))
        with pytest.raises(KeyboardInterrupt):
            merge(options("other"))
    merge(options("resumed"))
    merge(options("other", seed=4, overwrite=True))  # starts over
    merge(options("fresh", seed=4))
    whole, resumed, other, fresh = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed", "other", "fresh")
    )
    assert whole == resumed
    assert other == fresh != whole


MERGE = """
from spp.checkpoints.model_card import CARD
from spp.adapters.options import MergeOptions
from spp.adapters import merge

merge._AT_ONCE = {at_once}
merge.merge(MergeOptions(model={model!r}, adapter={adapter!r}, out={out!r}))
"""


@pytest.mark.parametrize(
    ("module", "owner", "function", "call", "at_once"),
    [
        pytest.param("checkpoints.safetensors_file", "TensorFile", "write", 2, 1, marks=pytest.mark.slow),
        pytest.param("checkpoints.safetensors_file", "TensorFile", "copy", 9, 1, marks=pytest.mark.slow),
        ("checkpoints.safetensors_file", "TensorFile", "copy", 9, 20_000),
        pytest.param("checkpoints.rewrite", "Rewriting", "sync", 2, 20_000, marks=pytest.mark.slow),
        ("checkpoints.atomic_folder", "Path", "unlink", 1, 1),  # published, and not yet tidied up
        pytest.param("checkpoints.atomic_folder", "Path", "unlink", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_merge_goes_on_to_the_same_bytes(tmp_path, tiny_model, module, owner, function, call, at_once):
    base = sparse_model(tmp_path / "base", tiny_model, max_shard_size="20KB")
    adapter = adapter_for(tmp_path / "adapter", base, [f"model.layers.{i}.{name}" for i in (0, 1) for name in MODULES])
    whole = merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "whole" / "merged"))
    out = tmp_path / "merged"
    where = {"model": str(base), "adapter": str(adapter), "out": str(out)}
    run_killed(MERGE.format(at_once=at_once, **where), module, owner, function, call)
    assert out.exists() == (function == "unlink")
    resumed = merge(MergeOptions(model=str(base), adapter=adapter, out=out))
    assert resumed.tensors == whole.tensors
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "merged").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_what_is_finished_is_not_merged_again(tmp_path, base, adapter, monkeypatch):
    monkeypatch.setattr(merge_stage, "_AT_ONCE", 1)
    options = MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged")
    real, merged = merge_stage.compare, []

    def interrupted(before, after):
        merged.append(before.shape)
        if len(merged) == 3:
            raise KeyboardInterrupt
        return real(before, after)

    monkeypatch.setattr(merge_stage, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(options)
    assert not options.out.exists()
    assert merge(options).verified
    assert len(merged) == 3 + 2  # of four, two had been finished


def test_another_adapter_starts_over_where_the_user_says_so(tmp_path, base, adapter, monkeypatch):
    other = adapter_for(tmp_path / "other", base, ["model.layers.0.mlp.down_proj"], size=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(merge_stage, "_AT_ONCE", 1)
        patch.setattr(Rewriting, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    with pytest.raises(UsageError, match=r"adapter changed.*--overwrite"):
        merge(MergeOptions(model=str(base), adapter=other, out=tmp_path / "merged"))
    merge(MergeOptions(model=str(base), adapter=other, out=tmp_path / "merged", overwrite=True))
    merge(MergeOptions(model=str(base), adapter=other, out=tmp_path / "fresh"))
    first, second = (tmp_path / name / "model.safetensors" for name in ("merged", "fresh"))
    assert first.read_bytes() == second.read_bytes()


def test_underflow_is_counted_and_warned_about(tmp_path, tiny_model, caplog, monkeypatch):
    base = sparse_model(tmp_path / "base", tiny_model, dtype=torch.float16)
    module = "model.layers.0.mlp.up_proj"
    tensors = load_file(base / "model.safetensors")
    tensors[f"{module}.weight"][0, 0] = 6e-8  # the smallest fp16 denormal
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_for(tmp_path / "adapter", base, [module], rank=1)
    factors = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{module}"
    factors[f"{key}.spp_A.weight"].fill_(-0.4)
    factors[f"{key}.spp_B.weight"].fill_(1.0)
    save_file(factors, adapter / "adapter_model.safetensors")
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    report = merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    assert report.verified
    assert report.underflowed >= 1
    assert "rounding made them zero" in caplog.text


def test_swallowed_updates_are_warned_about(tmp_path, base, caplog):
    adapter = adapter_for(tmp_path / "adapter", base, ["model.layers.0.mlp.up_proj"], size=1e-3)
    report = merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    assert report.unchanged_share == 1
    assert "unchanged" in caplog.text


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_adapter_leaves_nothing(tmp_path, base, adapter, poison):
    factors = load_file(adapter / "adapter_model.safetensors")
    next(iter(factors.values())).fill_(poison)
    save_file(factors, adapter / "adapter_model.safetensors")
    with pytest.raises(SppError, match="A or B holds NaN or infinity"):
        merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_merge_that_loses_a_zero_is_caught(tmp_path, base, adapter, monkeypatch):
    def leaky(weight, *_):
        return weight + 1e-3

    monkeypatch.setattr("spp.adapters.factors.merged_weight", leaky)
    with pytest.raises(SppError, match=r"q_proj\.weight: \d+ of \d+ zeros of BASE are not \+0\.0"):
        merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model_is_refused(tmp_path, base, tiny_model):
    other = sparse_model(
        tmp_path / "other", lambda *args, **kw: tiny_model("llama", intermediate_size=64, **kw_dtype(kw))
    )
    adapter = adapter_for(
        tmp_path / "adapter", other, ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"]
    )
    with pytest.raises(SppError, match=r"trained for another model.*1 of 2 weights.*up_proj\.weight is \(48, 32\)"):
        merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    deeper = sparse_model(
        tmp_path / "deeper", lambda *args, **kw: tiny_model("llama", num_hidden_layers=3, **kw_dtype(kw))
    )
    adapter = adapter_for(tmp_path / "adapter-deeper", deeper, ["model.layers.2.mlp.up_proj"])
    with pytest.raises(SppError, match=r"no weight for model\.layers\.2\.mlp\.up_proj"):
        merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))


def test_other_weights_than_the_adapter_was_trained_on_are_a_warning(tmp_path, tiny_model, base, adapter, caplog):
    """Above all the dense model, into which it would merge as well."""
    write_json(adapter / MANIFEST, {"base": {"model": "the pruned one", "fingerprint": base_fingerprint(base)}})
    merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    assert "other weights" not in caplog.text
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    dense = {"model": str(tmp_path / "dense"), "adapter": adapter, "out": tmp_path / "wrong"}
    with pytest.raises(SppError, match=r"is dense: it has no zero.*--allow-dense"):
        merge(MergeOptions.build(dense))
    assert not (tmp_path / "wrong").exists() and not partial_folder(tmp_path / "wrong").exists()
    assert merge(MergeOptions.build({**dense, "allow_dense": True})).zeros == 0
    assert "was trained on other weights (the pruned one) than" in caplog.text


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool])
def test_a_matrix_of_another_kind_of_number_is_not_merged(tmp_path, base, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    adapter = adapter_for(tmp_path / "adapter", base, [name.removesuffix(".weight")])
    tensors = load_file(base / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SppError, match=rf"its {name} is \w+, and only BF16, F16, F32, F64 can be merged into"):
        merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    assert not list(tmp_path.glob("*merged*")) and not list(tmp_path.glob(".*merged*"))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_not_merged_unless_asked(tmp_path, base, adapter, name, value):
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[1] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    options = {"model": str(base), "adapter": adapter, "out": tmp_path / "merged"}
    with pytest.raises(SppError, match=rf"{name}: 1 entries of the model are NaN or infinite; pass --allow-nonfinite"):
        merge(MergeOptions.build(options))
    assert not list(tmp_path.glob("*merged*")) and not list(tmp_path.glob(".*merged*"))
    assert merge(MergeOptions.build({**options, "allow_nonfinite": True})).verified


def test_a_record_names_every_tensor_that_it_was_made_of(tmp_path, base, adapter):
    out = merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged", dtype="float32")).out
    record = read_json(out / VERIFICATION)
    for side, folder in (("base", base), ("model", out)):
        tensors = load_file(folder / "model.safetensors")
        digests = {
            name: hashlib.sha256(one.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, one in tensors.items()
        }
        assert record["sha256"][side] == digests


def test_factors_for_one_weight_under_two_names_are_refused(tmp_path, tiny_model):
    """The files of a bare GPT-2 lack the prefix that its modules have, and some name modules by the files."""
    base = tmp_path / "base"
    tiny_model("gpt2").base_model.save_pretrained(base)
    adapter = adapter_for(tmp_path / "adapter", base, ["h.0.mlp.c_fc"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    again = {name.replace("model.h.0", "model.transformer.h.0"): value + 1 for name, value in tensors.items()}
    save_file(tensors | again, adapter / "adapter_model.safetensors")
    with pytest.raises(SppError, match=r"h\.0\.mlp\.c_fc\.weight for .*, and for another module as well"):
        merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))


def test_the_licence_of_the_dense_model_reaches_the_card(tmp_path, tiny_checkpoint):
    (tiny_checkpoint / CARD).write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    pruned = tmp_path / "pruned"
    prune(PruneOptions(model=str(tiny_checkpoint), out=pruned, criterion="magnitude"))
    adapter = adapter_for(tmp_path / "adapter", pruned, ["model.layers.0.mlp.up_proj"])
    merge(MergeOptions(model=str(pruned), adapter=adapter, out=tmp_path / "merged"))
    assert "license: apache-2.0" in (tmp_path / "merged" / CARD).read_text()


def kw_dtype(kw):
    return {"dtype": kw["dtype"]}


def test_requests_that_cannot_be_met_are_refused(tmp_path, base, adapter):
    out = tmp_path / "merged"

    def attempt(**changes):
        merge(MergeOptions(**{"model": str(base), "adapter": adapter, "out": out, **changes}))

    with pytest.raises(UsageError, match="no such folder"):
        attempt(adapter=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is or holds the input"):
        attempt(out=base, overwrite=True)
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", config | {"peft_type": "LORA"})
    with pytest.raises(UsageError, match="type 'LORA'"):
        attempt()
    write_json(adapter / "adapter_config.json", config)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(SppError, match="truncated"):
        attempt()
    weights.write_bytes(whole)
    save_file(load_file(weights) | {"base_model.model.other.weight": torch.ones(1)}, weights)
    with pytest.raises(
        SppError, match=r"pairs of SPP factors and of weights that modules_to_save .* e\.g\. .*other\.weight"
    ):
        attempt()
    quantized = {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(read_json(base / "config.json") | quantized))
    with pytest.raises(UsageError, match="quantized"):
        attempt()
    assert not out.exists()


@pytest.mark.parametrize("rank", [4, 7, 40])
def test_parts_of_a_weight_that_the_files_hold_by_themselves_get_its_factors(tmp_path, rank):
    """MiniMax M3's files hold gates and ups apart; the row groups of the two need not end where the gates do."""
    folder = tmp_path / "base"
    model = whole_model_of("minimax_m3_vl", mlp_layer_types=["dense", "sparse"])
    name = next(name for name, one in model.named_modules() if name.endswith("gate_up_proj") and hasattr(one, "weight"))
    whole = model.get_parameter(f"{name}.weight").detach()
    whole[:, ::2] = 0
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(rank * 2, whole.shape[1], generator=generator)
    B = torch.randn(len(whole), 2, generator=generator)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    key = f"base_model.model.{name}"
    save_file({f"{key}.spp_A.weight": A, f"{key}.spp_B.weight": B}, adapter / "adapter_model.safetensors")
    write_json(adapter / "adapter_config.json", {"peft_type": "SPP", "r": rank, "scale": 2.0, "directions": 2})
    report = merge(MergeOptions.build({"model": str(folder), "adapter": adapter, "out": tmp_path / "merged"}))
    assert len(report.tensors) == 2
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.get_parameter(f"{name}.weight").equal(merged_weight(whole, A, B, 2.0))
