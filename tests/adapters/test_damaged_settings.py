"""Settings and factors that no training leaves: refused when they are made or read, in every format."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spp.adapters.convert import convert
from spp.adapters.factors import read_tensors
from spp.adapters.options import ConvertOptions
from spp.adapters.spp_format import read_adapter
from spp.adapters.tuner import SppConfig
from spp.cli.entry_point import main
from spp.errors import SppError, UsageError

A, B = "base_model.model.layer.spp_A.weight", "base_model.model.layer.spp_B.weight"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"r": 0}, "r must"),
        ({"r": True}, "r must"),
        ({"r": 2.0}, "r must"),
        ({"r": "8"}, "r must"),
        ({"lora_rank": None}, "lora_rank must"),
        ({"directions": 17}, "directions must"),
        ({"scale": math.nan}, "scale must"),
        ({"scale": math.inf}, "scale must"),
        ({"scale": 10**400}, "scale must"),
        ({"scale": "2"}, "scale must"),
        ({"scale": None}, "scale must"),
        ({"dropout": 1}, "dropout must"),
        ({"dropout": math.nan}, "dropout must"),
        ({"dropout": None}, "dropout must"),
        ({"init_weights": "zeros"}, "init_weights must"),
        ({"init_weights": 1}, "init_weights must"),
        ({"init_weights": ["ones"]}, "init_weights must"),
        ({"mode": "both"}, "mode must"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has"),
        ({"rank_pattern": {"q": -1}}, "rank_pattern"),
        ({"target_modules": 5}, "target_modules must"),
        ({"target_modules": [["q_proj"]]}, "target_modules must"),
        ({"layers_to_transform": "first"}, "layers_to_transform must"),
    ],
)
def test_nonsense_is_refused_when_the_settings_are_made(settings, named):
    with pytest.raises(ValueError, match=f"SppConfig: .*{named}"):
        SppConfig(**settings)


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({A: torch.ones(2, 8), B: torch.ones(4, 1)}, folder / "adapter_model.safetensors")
    write_scale(folder, "2.0")
    return folder


def write_scale(folder, scale):
    settings = {"peft_type": "SPP", "r": 2, "directions": 1, "scale": "SCALE", "target_modules": ["layer"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings).replace('"SCALE"', scale))


@pytest.mark.parametrize(
    "scale",
    ["1" + "0" * 400, "1" + "0" * 5000, "1" + "0" * 299 + "0" * 9, "Infinity", "NaN", "1e999", "true", "-1", '"2"'],
)
def test_a_scale_that_is_no_positive_number_is_one_error(adapter, tmp_path, scale, capsys):
    write_scale(adapter, scale)
    with pytest.raises(SppError, match="adapter_config.json"):
        read_adapter(adapter)
    assert main(["convert", str(adapter), str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err) < 500 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [A, B])
def test_factors_that_are_not_finite_are_neither_read_nor_converted(adapter, tmp_path, name, value):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[name][0, 0] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(SppError, match="layer: A or B holds NaN or infinity"):
        convert(ConvertOptions(adapter=adapter, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_hira_factors_that_are_not_finite_are_not_converted(adapter, tmp_path):
    convert(ConvertOptions(adapter=adapter, out=tmp_path / "hira"))
    tensors = load_file(tmp_path / "hira" / "adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if name.endswith("hira_A"))[0, 0] = math.nan
    save_file(tensors, tmp_path / "hira" / "adapter_model.safetensors")
    with pytest.raises(SppError, match="A or B holds NaN or infinity"):
        convert(ConvertOptions(adapter=tmp_path / "hira", out=tmp_path / "out"))


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (4, 0)])
def test_factors_of_no_features_are_refused_in_every_format(adapter, tmp_path, rows, columns):
    save_file({A: torch.ones(2, columns), B: torch.ones(rows, 1)}, adapter / "adapter_model.safetensors")
    name = "base_model.model.layer.hira_"
    hira = {f"{name}A": torch.ones(2, columns), f"{name}B": torch.ones(rows, 2)}
    (tmp_path / "hira").mkdir()
    save_file(hira, tmp_path / "hira" / "adapter_model.safetensors")
    for folder, kind in ((adapter, "SPP"), (tmp_path / "hira", "HIRA")):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 2, "scale": 2.0}))
        with pytest.raises(SppError, match=r"are? expected"):
            convert(ConvertOptions(adapter=folder, out=tmp_path / "out"))


def test_a_scale_under_which_factors_overflow_is_refused(adapter, tmp_path):
    write_scale(adapter, "1e308")
    with pytest.raises(SppError, match="its scale is so large"):
        convert(ConvertOptions(adapter=adapter, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_may_not_be_read_is_not_called_missing(adapter, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match="adapter_model.safetensors: .*may not be read"):
        read_tensors(adapter)


def test_a_full_disk_leaves_nothing_of_a_conversion(adapter, tmp_path, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("spp.checkpoints.safetensors_file._write_all", full)
    assert main(["convert", str(adapter), str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "adapter_model.safetensors: No space left on device" in message and message.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
