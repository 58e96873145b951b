"""Converting adapters: HiRA in a process without spp, the way back, both published layouts, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spp import SppConfig
from spp.adapters.attach import check_adapter
from spp.adapters.convert import ConvertReport, convert
from spp.adapters.merge import merge
from spp.adapters.options import ConvertOptions, MergeOptions
from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.json_files import read_json, write_json
from spp.cli.entry_point import main
from spp.errors import SppError, UsageError
from spp.patterns import NM

WEIGHTS = "adapter_model.safetensors"


def sparse(folder: Path, tiny_model, family: str = "llama", **changes) -> Path:
    """A 2:4 model in fp32."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("proj" in name or "c_" in name):
                matrix = parameter.T if family == "gpt2" else parameter
                matrix.masked_fill_(~NM(2, 4).keep_mask(matrix.abs()), 0.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path, tiny_model) -> Path:
    return sparse(tmp_path / "base", tiny_model)


def adapter_on(base: Path, folder: Path, **settings) -> Path:
    """An adapter with factors that are not zero."""
    torch.manual_seed(1)
    config = SppConfig(init_weights=False, task_type="CAUSAL_LM", **settings)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    with torch.no_grad():
        return model(torch.arange(4, 36)[None]).logits


def converted(adapter: Path, out: Path, **options: Any) -> ConvertReport:
    return convert(ConvertOptions.build({"adapter": adapter, "out": out, **options}))


def assert_same_adapter(found: Path, wanted: Path) -> None:
    one, other = load_file(found / WEIGHTS), load_file(wanted / WEIGHTS)
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) and one[name].dtype == other[name].dtype for name in one)
    settings = [read_json(folder / "adapter_config.json") for folder in (found, wanted)]
    for each in settings:
        each["target_modules"] = set(each["target_modules"])
    assert settings[0] == settings[1]


def test_hira_gives_the_same_logits_without_spp(tmp_path, base):
    """Groups that differ in size, and modules of another rank, as in every adapter of `spp train`."""
    adapter = adapter_on(base, tmp_path / "adapter", r=3, directions=2, rank_pattern={"down_proj": 5})
    report = converted(adapter, tmp_path / "hira")
    assert (report.source, report.target, report.rank) == ("SPP", "HiRA", 10)
    code = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "before = {name: value.clone() for name, value in model.named_parameters()}\n"
        "model = PeftModel.from_pretrained(model, sys.argv[2]).eval()\n"
        "logits = model(torch.arange(4, 36)[None]).logits\n"
        "merged = dict(model.merge_and_unload().named_parameters())\n"
        "assert all(merged[name][value == 0].count_nonzero() == 0 for name, value in before.items())\n"
        "assert 'spp' not in sys.modules\n"
        "torch.save(logits, sys.argv[3])\n"
    )
    result = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-W", "error", "-c", code, base, tmp_path / "hira", result], check=True)
    expected = logits(base, adapter)
    torch.testing.assert_close(torch.load(result), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(torch.arange(4, 36)[None]).logits
    assert (plain - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "directions": 2, "rank_pattern": {"down_proj": 5}, "dropout": 0.1, "mode": "split"},
        {"r": 16, "directions": 1, "target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
        {"r": 64, "directions": 4},
    ],
    ids=["ranks", "targets", "more groups than rows"],
)
def test_a_round_trip_changes_nothing(tmp_path, base, settings):
    adapter = adapter_on(base, tmp_path / "adapter", **settings)
    converted(adapter, tmp_path / "hira")
    converted(tmp_path / "hira", tmp_path / "back")
    assert_same_adapter(tmp_path / "back", adapter)
    torch.testing.assert_close(logits(base, tmp_path / "hira"), logits(base, adapter), rtol=1e-5, atol=1e-5)


def test_without_our_side_file_it_merges_to_the_same_bits(tmp_path, base):
    adapter = adapter_on(base, tmp_path / "adapter", r=3, directions=2, scale=3.0)
    converted(adapter, tmp_path / "hira")
    (tmp_path / "hira" / MANIFEST).unlink()
    converted(tmp_path / "hira", tmp_path / "back")
    for name in ("adapter", "back"):
        merge(MergeOptions(model=str(base), adapter=tmp_path / name, out=tmp_path / f"{name}-merged"))
    one, other = (load_file(tmp_path / f"{name}-merged" / "model.safetensors") for name in ("adapter", "back"))
    assert all(one[name].equal(other[name]) for name in one)
    torch.testing.assert_close(logits(base, tmp_path / "back"), logits(base, adapter), rtol=1e-5, atol=1e-5)


def test_stock_hira_of_small_rank_becomes_spp(tmp_path, base):
    torch.manual_seed(2)
    config = HiraConfig(r=4, target_modules=["q_proj", "up_proj"], init_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "hira"))
    report = converted(tmp_path / "hira", tmp_path / "spp", base=str(base))
    assert (report.source, report.target) == ("HiRA", "SPP")
    torch.testing.assert_close(logits(base, tmp_path / "spp"), logits(base, tmp_path / "hira"), rtol=1e-4, atol=1e-4)


def test_conv1d_is_announced_where_the_base_is_known(tmp_path, tiny_model):
    base = sparse(tmp_path / "base", tiny_model, family="gpt2")
    adapter = adapter_on(base, tmp_path / "adapter", r=3, directions=2)
    converted(adapter, tmp_path / "hira", base=str(base))
    # PEFT would warn otherwise, and warnings are errors here.
    torch.testing.assert_close(logits(base, tmp_path / "hira"), logits(base, adapter), rtol=1e-5, atol=1e-5)


def published_adapter(folder: Path, base: Path, *, row: bool) -> Path:
    """As the published code saves it: 16 groups and another r in the settings."""
    folder.mkdir()
    checkpoint = Checkpoint.open(base)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for module in [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")]:
        out_features, in_features = checkpoint.shape(f"{module}.weight")
        assert out_features % 16 == 0
        key = f"base_model.model.{module}.lora_A"
        tensors[f"{key}.weight"] = torch.randn(16, in_features, generator=generator)
        shape = (1, out_features) if row else (out_features, 1)
        tensors[f"{key}.weight_col"] = torch.randn(shape, generator=generator)
    torch.save(tensors, folder / "adapter_model.bin")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 24, "lora_dropout": 0.05}
    write_json(folder / "adapter_config.json", {**settings, "base_model_name_or_path": "/their/own/path"})
    return folder


@pytest.mark.parametrize("row", [False, True], ids=["(O, 1)", "(1, O)"])
def test_published_adapters_merge_to_the_published_formula(tmp_path, base, row):
    published = published_adapter(tmp_path / "published", base, row=row)
    report = converted(published, tmp_path / "spp", base=str(base))
    assert (report.source, report.target, report.modules, report.rank) == ("published", "SPP", 4, 16)
    settings = read_json(tmp_path / "spp" / "adapter_config.json")
    wanted = {"r": 16, "directions": 1, "scale": 3.0, "dropout": 0.05, "base_model_name_or_path": str(base)}
    assert {name: settings[name] for name in wanted} == wanted
    merge(MergeOptions(model=str(base), adapter=tmp_path / "spp", out=tmp_path / "merged"))

    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    tensors, changed = torch.load(published / "adapter_model.bin"), 0
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A"
        expected = weight.double()
        if f"{key}.weight" in tensors:
            A, column = tensors[f"{key}.weight"].double(), tensors[f"{key}.weight_col"].double().reshape(-1, 1)
            expected = expected + 24 / 8 * A.repeat_interleave(len(weight) // 16, dim=0) * column * expected
            changed += 1
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert changed == 4
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "spp"))


def test_an_adapter_that_names_no_base_is_not_said_to_have_another(tmp_path, base, caplog):
    published = published_adapter(tmp_path / "published", base, row=False)
    converted(published, tmp_path / "unnamed")
    converted(published, tmp_path / "named", base=str(base))
    for name in ("unnamed", "named"):
        check_adapter(tmp_path / name, str(base), base)
    assert not caplog.records


def test_published_adapters_become_hira_at_once(tmp_path, base):
    published = published_adapter(tmp_path / "published", base, row=True)
    converted(published, tmp_path / "spp")
    report = converted(published, tmp_path / "hira", to="hira")
    assert (report.source, report.target) == ("published", "HiRA")
    torch.testing.assert_close(logits(base, tmp_path / "hira"), logits(base, tmp_path / "spp"), rtol=1e-4, atol=1e-4)


def test_an_old_adapter_without_directions_is_converted(tmp_path, base):
    adapter = adapter_on(base, tmp_path / "adapter", r=4, directions=1)
    old = read_json(adapter / "adapter_config.json")
    del old["directions"]
    write_json(adapter / "adapter_config.json", old)
    assert converted(adapter, tmp_path / "new", to="spp").target == "SPP"
    assert read_json(tmp_path / "new" / "adapter_config.json")["directions"] == 1
    converted(adapter, tmp_path / "hira")
    torch.testing.assert_close(logits(base, tmp_path / "hira"), logits(base, tmp_path / "new"), rtol=1e-5, atol=1e-5)


def edit_settings(folder: Path, **changes: Any) -> None:
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | changes)


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS)


KEY = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN = {
    "missing tensor": (lambda folder: edit_tensors(folder, **{f"{KEY}.spp_B.weight": None}), "lacks 1 tensors.*q_proj"),
    "extra tensor": (lambda folder: edit_tensors(folder, odd=torch.ones(1)), "1 tensors that are no factors, e.g. odd"),
    "odd shapes": (
        lambda folder: edit_tensors(folder, **{f"{KEY}.spp_A.weight": torch.ones(3, 32)}),
        r"q_proj: A is \(3, 32\) and B is \(32, 2\)",
    ),
    "truncated": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
        "truncated or damaged",
    ),
    "no scale": (lambda folder: edit_settings(folder, scale=None), "scale None"),
    "other directions": (lambda folder: edit_settings(folder, directions=1), "2 directions, and .* says 1"),
    "unknown settings": (lambda folder: edit_settings(folder, directions="many"), "many"),
    "other method": (lambda folder: edit_settings(folder, peft_type="OFT"), "is of type 'OFT'; only SPP"),
    "no settings": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
    "a list": (lambda folder: write_json(folder / "adapter_config.json", []), "a JSON object is expected"),
    "a list as manifest": (lambda folder: write_json(folder / MANIFEST, []), "a JSON object is expected"),
    "a list as method": (lambda folder: edit_settings(folder, peft_type=[]), r"is of type \[\]; only SPP"),
    "unknown task": (lambda folder: edit_settings(folder, task_type="TEA"), "adapter_config.json: .*TEA"),
    "no expression": (lambda folder: edit_settings(folder, rank_pattern={"(": 2}), r"rank_pattern has '\('"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapters_are_refused_and_nothing_is_left(tmp_path, base, name):
    adapter = adapter_on(base, tmp_path / "adapter", r=4, directions=2, target_modules=["q_proj"])
    break_it, message = BROKEN[name]
    break_it(adapter)
    with pytest.raises(SppError, match=message):
        converted(adapter, tmp_path / "hira")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("to", ["spp", "hira"])
def test_a_base_of_other_shapes_is_refused(tmp_path, base, tiny_model, to):
    other = sparse(tmp_path / "other", tiny_model, intermediate_size=80)
    published = published_adapter(tmp_path / "published", base, row=False)
    with pytest.raises(SppError, match=r"trained for another model.*2 of 4 weights do not fit.*up_proj.*\(80, "):
        converted(published, tmp_path / "out", base=str(other), to=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("to", "start"), [("spp", "adapter"), ("hira", "hira")])
def test_an_adapter_in_the_target_layout_is_refused(tmp_path, base, to, start):
    adapter = adapter_on(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    converted(adapter, tmp_path / "hira")
    with pytest.raises(UsageError, match="layout already"):
        converted(tmp_path / start, tmp_path / "out", to=to)


def test_outputs_are_not_overwritten(tmp_path, base):
    adapter = adapter_on(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    converted(adapter, tmp_path / "hira")
    with pytest.raises(UsageError, match="not empty"):
        converted(adapter, tmp_path / "hira")
    with pytest.raises(UsageError, match="is or holds the input"):
        converted(adapter, adapter, overwrite=True)
    converted(adapter, tmp_path / "hira", overwrite=True)


def test_the_command_converts_both_ways_and_names_problems(tmp_path, base, capsys):
    adapter = adapter_on(base, tmp_path / "adapter", r=4, directions=2, target_modules=["q_proj"])
    assert main(["convert", str(adapter), str(tmp_path / "hira"), "--to", "hira", "--base", str(base)]) == 0
    printed = capsys.readouterr().out
    assert "SPP -> HiRA: 2 modules, rank 8" in printed and "loads it without spp" in printed
    assert main(["convert", str(tmp_path / "hira"), str(tmp_path / "back")]) == 0
    assert "HiRA -> SPP" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "no such folder" in capsys.readouterr().err
