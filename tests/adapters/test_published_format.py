"""Adapters of the published code: both layouts, and .bin files that are hostile, damaged or incomplete."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from spp.adapters.published_format import read_published
from spp.errors import SppError, UsageError

SETTINGS = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def state(*, row: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(32, 1, generator=generator)
    return {
        f"{Q}.lora_A.weight": torch.randn(16, 8, generator=generator),
        f"{Q}.lora_A.weight_col": B.T.contiguous() if row else B,
    }


def saved(folder: Path, content: object, **options) -> Path:
    torch.save(content, folder / "adapter_model.bin", **options)
    return folder


@pytest.mark.parametrize("row", [False, True], ids=["(O, 1)", "(1, O)"])
@pytest.mark.parametrize("zipped", [False, True], ids=["old", "zip"])
def test_both_layouts_of_b_are_read(tmp_path, row, zipped):
    found = read_published(saved(tmp_path, state(row=row), _use_new_zipfile_serialization=zipped), SETTINGS)
    ((module, factors),) = found.items()
    assert module == "model.layers.0.self_attn.q_proj"
    assert factors.scale == 2.0
    assert factors.A.equal(state()[f"{Q}.lora_A.weight"])
    assert factors.B.equal(state()[f"{Q}.lora_A.weight_col"])


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["pickle", "old", "zip"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, how):
    content = {**state(), "payload": Hostile(f"touch {tmp_path / 'ran'}")}
    if how == "pickle":
        (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(content["payload"], protocol=2))
    else:
        saved(tmp_path, content, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(SppError, match="asks for code to be run.*refused.*source that you trust"):
        read_published(tmp_path, SETTINGS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [False, True], ids=["old", "zip"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, zipped, share):
    path = saved(tmp_path, state(), _use_new_zipfile_serialization=zipped) / "adapter_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(SppError, match="truncated or damaged"):
        read_published(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.lora_A.weight_col": None}, r"lacks 1 tensors, e\.g\. .*q_proj\.lora_A\.weight_col"),
        ({f"{Q}.lora_A.weight": None}, r"lacks 1 tensors, e\.g\. .*q_proj\.lora_A\.weight$"),
        ({"base_model.model.lm_head.weight": torch.ones(2, 2)}, r"1 tensors that are no factors, e\.g\. .*lm_head"),
        ({"steps": 3}, "more than named tensors"),
        ({f"{Q}.lora_A.weight_col": torch.ones(4, 8)}, r"\(4, 8\), and \(O, 1\) or \(1, O\)"),
        ({f"{Q}.lora_A.weight": torch.ones(33, 8)}, r"q_proj: A is \(33, 8\) and B is \(32, 1\)"),
        ({f"{Q}.lora_A.weight": torch.ones(16, 8, dtype=torch.int64)}, "only floats are factors"),
    ],
    ids=["no B", "no A", "extra", "no tensor", "B", "more groups than rows", "integers"],
)
def test_tensors_that_are_no_pairs_of_factors_are_refused(tmp_path, change, message):
    content = {name: value for name, value in (state() | change).items() if value is not None}
    with pytest.raises(SppError, match=message):
        read_published(saved(tmp_path, content), SETTINGS)


def test_several_problems_are_reported_together(tmp_path):
    content = {**state(), "odd": torch.ones(1)}
    del content[f"{Q}.lora_A.weight_col"]
    with pytest.raises(SppError, match=r"(?s)2 problems.*lacks 1.*no factors"):
        read_published(saved(tmp_path, content), SETTINGS)


def test_a_list_of_tensors_or_an_empty_file_is_refused(tmp_path):
    with pytest.raises(SppError, match="more than named tensors"):
        read_published(saved(tmp_path, [torch.ones(1)]), SETTINGS)
    with pytest.raises(SppError, match="no factors at all"):
        read_published(saved(tmp_path, {}), SETTINGS)


def test_real_lora_is_refused(tmp_path):
    content = {f"{Q}.lora_A.weight": torch.ones(8, 8), f"{Q}.lora_B.weight": torch.ones(32, 8)}
    with pytest.raises(UsageError, match="is a LoRA adapter: .* not a product with W"):
        read_published(saved(tmp_path, content), SETTINGS)


@pytest.mark.parametrize("settings", [{"r": 8}, {"r": 0, "lora_alpha": 16}, {"r": 8, "lora_alpha": "16"}])
def test_settings_without_a_scale_are_refused(tmp_path, settings):
    with pytest.raises(SppError, match="scale is their quotient"):
        read_published(saved(tmp_path, state()), settings)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        read_published(tmp_path, SETTINGS)
