"""Verification between two folders: it passes only when every zero is a +0.0, and names what breaks it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spp.checkpoints.checkpoint import MANIFEST, VERIFICATION, Checkpoint
from spp.checkpoints.fingerprint import tensor_digests
from spp.checkpoints.json_files import write_json
from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.verification_record import digests_of
from spp.checkpoints.verify import verify
from spp.errors import SppError, UsageError
from spp.patterns import NM

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path, tiny_model) -> Path:
    model = tiny_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.masked_fill_(~NM(2, 4).keep_mask(parameter.float().abs()), 0.0)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edited(base: Path, edit) -> Path:
    """A copy of a model folder with its tensors changed by `edit(tensors)`."""
    folder = base.parent / "other"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def check(base: Path, other: Path, pattern: str | None = None):
    return verify(VerifyOptions(base=str(base), other=str(other), pattern=pattern))


def set_first_zero(value: float):
    def edit(tensors):
        row, column = (tensors[WEIGHT] == 0).nonzero()[0].tolist()
        tensors[WEIGHT][row, column] = value

    return edit


def test_new_survivors_values_do_not_matter(base):
    def edit(tensors):
        tensors[WEIGHT] *= 2  # exact in every dtype

    report = check(base, edited(base, edit), "2:4")
    assert report.verified and report.problems == []
    assert report.zeros == sum(int((t == 0).sum()) for t in load_file(base / "model.safetensors").values())
    assert report.tensors[WEIGHT].largest_relative_change == 1.0


@pytest.mark.parametrize(("value", "words"), [(1e-8, ""), (-0.0, r" \(1 of them -0\.0\)")])
def test_one_changed_zero_is_found_and_named(base, value, words):
    report = check(base, edited(base, set_first_zero(value)))
    assert not report.verified
    [problem] = report.problems
    zeros = report.tensors[WEIGHT].zeros
    assert problem.startswith(f"{WEIGHT}: 1 of {zeros} zeros of BASE are not +0.0 in OTHER")
    assert problem.endswith("(1 of them -0.0)") == bool(words)


def test_negative_zeros_in_the_base_count_as_zeros(base):
    other = edited(base, lambda tensors: None)
    tensors = load_file(base / "model.safetensors")
    set_first_zero(-0.0)(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert check(base, other).verified
    assert not check(other, base).verified


def test_numbers_without_dimensions_are_compared_like_any_other(tmp_path):
    for name, zero, scale in (("base", -0.0, 0.0), ("same", -0.0, 0.0), ("other", -0.0, 1.0)):
        (tmp_path / name).mkdir()
        save_file({"zero": torch.tensor(zero), "scale": torch.tensor(scale)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    assert check(tmp_path / "base", tmp_path / "same").verified
    assert check(tmp_path / "base", tmp_path / "other").problems == [
        "scale: 1 of 1 zeros of BASE are not +0.0 in OTHER"
    ]


def test_missing_and_misshapen_tensors_are_named(base):
    def edit(tensors):
        del tensors[WEIGHT]
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    report = check(base, edited(base, edit))
    assert [problem.split(":")[0] for problem in report.problems] == [WEIGHT, "model.norm.weight"]


def test_new_nan_is_a_problem(base):
    def edit(tensors):
        tensors["model.norm.weight"][3] = float("nan")

    report = check(base, edited(base, edit))
    assert report.problems == ["model.norm.weight: 1 entries turned NaN or infinite"]


def test_the_pattern_is_checked_in_the_other_model(base):
    assert check(base, base, "2:4").verified
    broken = check(base, base, "1:4")
    assert len(broken.problems) == 14
    assert "groups break the pattern 1:4" in broken.problems[0]


def test_a_dense_base_has_no_pattern(tmp_path, tiny_model):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    report = check(tmp_path / "dense", tmp_path / "dense", "2:4")
    assert not report.verified
    assert "no weight of BASE is sparse enough" in report.problems[0]


def test_unrelated_models_are_a_usage_error(base, tmp_path, tiny_model):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="no tensor name in common"):
        check(base, tmp_path / "gpt2")


def folder_of(path: Path, tensors: dict[str, torch.Tensor], manifest: dict | None = None) -> Path:
    """A model folder that holds these tensors, and a manifest of ours if it is given."""
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_json(path / "config.json", {})
    if manifest is not None:
        write_json(path / MANIFEST, manifest)
    return path


WITH_SIGN = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64]
WITHOUT_SIGN = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", WITH_SIGN + WITHOUT_SIGN, ids=str)
def test_zeros_are_zeros_in_every_dtype(tmp_path, dtype):
    base = torch.tensor([0, 1, 0, 1]).to(dtype)
    kept = base if dtype == torch.bool else torch.tensor([0, 3, 0, 2]).to(dtype)
    lost = torch.tensor([1, 1, 1, 1]).to(dtype)
    folders = {name: folder_of(tmp_path / name, {"w": one}) for name, one in [("b", base), ("k", kept), ("l", lost)]}
    report = check(folders["b"], folders["k"])
    assert report.verified and report.zeros == 2 and report.compared == 1
    assert check(folders["b"], folders["l"]).problems == ["w: 2 of 2 zeros of BASE are not +0.0 in OTHER"]


@pytest.mark.parametrize("dtype", WITH_SIGN, ids=str)
def test_a_negative_zero_is_no_zero_in_any_dtype_that_has_one(tmp_path, dtype):
    base = folder_of(tmp_path / "base", {"w": torch.tensor([0.0, 1.0]).to(dtype)})
    other = folder_of(tmp_path / "other", {"w": torch.tensor([-0.0, 1.0]).to(dtype)})
    assert check(base, other).problems == ["w: 1 of 1 zeros of BASE are not +0.0 in OTHER (1 of them -0.0)"]


def test_fp8_may_be_widened(tmp_path):
    base = folder_of(tmp_path / "base", {"w": torch.tensor([0.0, 1.0]).to(torch.float8_e4m3fn)})
    other = folder_of(tmp_path / "other", {"w": torch.tensor([0.0, 1.5], dtype=torch.bfloat16)})
    assert check(base, other).verified
    other = folder_of(tmp_path / "int", {"w": torch.tensor([0, 1], dtype=torch.int8)})
    assert check(base, other).problems[0].startswith("w: BASE has float8_e4m3fn of shape (2,), OTHER has int8")


@pytest.mark.parametrize("dtype", [*WITH_SIGN, *WITHOUT_SIGN, torch.complex64], ids=str)
def test_a_missing_tensor_is_named_in_every_dtype(tmp_path, dtype):
    shared = {"v": torch.tensor([0.0, 1.0])}
    base = folder_of(tmp_path / "base", {**shared, "w": torch.tensor([0, 1]).to(dtype)})
    [problem] = check(base, folder_of(tmp_path / "other", shared)).problems
    assert problem.startswith("w: missing")


def test_what_cannot_be_looked_into_passes_only_unchanged(tmp_path):
    shared = {"v": torch.tensor([0.0, 1.0])}
    base = folder_of(tmp_path / "base", {**shared, "w": torch.tensor([0, 1j])})
    assert check(base, base).verified
    other = folder_of(tmp_path / "other", {**shared, "w": torch.tensor([0, 2j])})
    assert check(base, other).problems == ["w: complex64 cannot be looked into, and the two differ"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float32], ids=str)
def test_a_base_that_is_not_finite_proves_nothing_unless_asked(tmp_path, value, dtype):
    base = folder_of(tmp_path / "base", {"w": torch.tensor([0.0, value, 1.0]).to(dtype)})
    assert check(base, base).problems == [
        "w: 1 entries of BASE are NaN or infinite; pass --allow-nonfinite if that is meant to be"
    ]
    assert verify(VerifyOptions(base=str(base), other=str(base), allow_nonfinite=True)).verified


def test_a_base_without_a_zero_proves_nothing_unless_asked(tmp_path):
    base = folder_of(tmp_path / "base", {"w": torch.ones(4)})
    [problem] = check(base, base).problems
    assert "is dense: it has no zero that could be kept" in problem and "--allow-dense" in problem
    assert verify(VerifyOptions(base=str(base), other=str(base), allow_dense=True)).verified


SPARSE = torch.tensor([[1.0, 0, 2, 0], [0, 3, 4, 0]])
DENSE = torch.tensor([[1.0, 5, 2, 7], [9, 3, 4, 1]])


def test_every_expert_has_to_obey(tmp_path):
    good = torch.stack([SPARSE, SPARSE, SPARSE])
    for name, tensors in (("good", good), ("bad", torch.stack([SPARSE, DENSE, SPARSE]))):
        folder_of(tmp_path / name, {"experts.up": tensors, "w": SPARSE})
    report = check(tmp_path / "good", tmp_path / "good", "2:4")
    assert report.verified and report.matrices_checked == 4 and report.matrices_dense == []
    assert check(tmp_path / "bad", tmp_path / "bad", "2:4").problems == [
        "experts.up: 2 groups break the pattern 2:4 (in 1 of 3 matrices)"
    ]


def test_a_matrix_with_few_zeros_has_to_obey(tmp_path):
    weight = torch.ones(10, 40)
    weight[:, :9] = 0  # 22.5 %
    base = folder_of(tmp_path / "base", {"w": weight, "v": SPARSE})
    assert check(base, base, "2:4").problems == ["w: 80 groups break the pattern 2:4"]


def test_what_the_manifest_lists_has_to_obey_and_nothing_else(tmp_path):
    tensors = {"w": SPARSE, "dense_now": DENSE, "embedding": torch.tensor([[0.0, 1, 1, 1]]), "bias": torch.zeros(2)}
    listed = {"tensors": {name: {"sparsity": 0.5, "transposed": False} for name in ("w", "dense_now", "gone")}}
    report = check(folder_of(tmp_path / "base", tensors, listed), tmp_path / "base", "2:4")
    assert report.problems == [
        "dense_now: 2 groups break the pattern 2:4",
        "gone: it is listed in the manifest as pruned, and it was not there to be checked against 2:4",
    ]
    assert report.matrices_checked == 2 and report.matrices_dense == ["embedding"]
    assert report.matrices_because == "listed in the manifest as pruned"


def test_targets_say_what_has_to_obey(tmp_path):
    tensors = {"a.up_proj.weight": SPARSE, "b.up_proj.weight": DENSE, "b.down_proj.weight": DENSE.clone()}
    base = folder_of(tmp_path / "base", tensors)

    def problems(targets: str) -> list[str]:
        return verify(VerifyOptions(base=str(base), other=str(base), pattern=NM(2, 4), targets=targets)).problems

    assert problems("a.up_proj") == []
    assert problems("up_proj") == ["b.up_proj.weight: 2 groups break the pattern 2:4"]
    with pytest.raises(UsageError, match=r"targets: gate_proj is no tensor"):
        problems("up_proj,gate_proj")


def test_a_transposed_matrix_obeys_along_its_inputs(tmp_path):
    listed = {"tensors": {"w": {"sparsity": 0.5, "transposed": True}}}
    base = folder_of(tmp_path / "base", {"w": SPARSE.T.contiguous()}, listed)
    assert check(base, base, "2:4").verified


@pytest.fixture
def proved(tmp_path) -> tuple[Path, Path]:
    """A model and the record of its proof, as `spp merge` writes them."""
    model = folder_of(tmp_path / "merged", {"w": SPARSE, "v": torch.ones(3)})
    digests = tensor_digests(Checkpoint.open(model))
    write_json(model / VERIFICATION, {"verified": True, "zeros": 4, **digests_of(digests, digests)})
    return model, model / VERIFICATION


def by_record(model: Path, record: Path):
    return verify(VerifyOptions(base=str(model), record=record))


def test_a_record_proves_the_model_that_it_was_made_of(proved):
    report = by_record(*proved)
    assert report.verified and report.zeros == 4 and report.compared == 2 and report.other is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"w": DENSE}, "w: it is not the tensor that the proof was made of"),
        ({"w": SPARSE.double()}, "w: it is not the tensor that the proof was made of"),
        ({"v": None}, "v: missing, and the proof was made with it"),
        ({"x": torch.ones(1)}, "x: the model has it, and it was not there when the proof was made"),
    ],
)
def test_a_record_cannot_be_carried_to_another_model(proved, tmp_path, change, problem):
    tensors = {name: one for name, one in ({"w": SPARSE, "v": torch.ones(3)} | change).items() if one is not None}
    report = by_record(folder_of(tmp_path / "other", tensors), proved[1])
    assert report.problems == [problem]


@pytest.mark.parametrize("content", [{}, {"sha256": 3, "zeros": 1}, {"sha256": {"model": [1]}, "zeros": 1}])
def test_a_file_that_is_no_record_is_an_error(proved, content):
    write_json(proved[1], content)
    with pytest.raises(SppError, match="no record of spp merge"):
        by_record(*proved)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give two models, or one model and --record"),
        ({"other": "b", "record": "r.json"}, "give two models, or one model and --record"),
        ({"record": "r.json", "pattern": "2:4"}, "leave out the other options"),
        ({"other": "b", "targets": "up_proj"}, "pass --pattern"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        VerifyOptions.build({"base": "a", **values})
