"""Files and models: every family's tensors are found as views, and a block made from its files is the loaded one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.json_files import read_json, write_json
from spp.checkpoints.options import PackOptions
from spp.errors import SppError, UsageError
from spp.models.architecture import decoder_blocks, prunable_matrices
from spp.models.loading import load_model, skeleton
from spp.models.weight_map import Part, require_filled, weight_map
from spp.options import LoadingOptions
from spp.pruning.pack import pack

CPU = LoadingOptions(device="cpu")
UP = "model.layers.0.mlp.up_proj.weight"
Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Folder of a tiny model in which no two parameters are alike, norms neither."""

    def save(family: str, dtype: torch.dtype = torch.float32, **arguments: object) -> Path:
        folder = tmp_path_factory.mktemp(family)
        model = tiny_model_of(family, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder, **arguments)
        return folder

    return save


def filled(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, dict[str, Part]]:
    """A skeleton with the weights of its files, put in place through the map."""
    model, checkpoint = skeleton(folder, CPU, dtype), Checkpoint.open(folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    parts = weight_map(model, checkpoint)
    require_filled(parts, (name for name, _ in model.named_parameters()), checkpoint)
    assemble(model, parts, checkpoint.tensor)
    return model, parts


def assemble(model: PreTrainedModel, parts: dict[str, Part], read: Callable[[str], Tensor]) -> None:
    """Give every parameter of a skeleton and every buffer in the files its value."""
    for name, parameter in list(model.named_parameters()):
        real = torch.full_like(parameter, float("nan"), device="cpu")
        for stored, part in parts.items():
            if part.parameter == name:
                part.view(real).copy_(read(stored))
        assert not real.isnan().any(), f"the files do not cover {name}"
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner).register_parameter(key, nn.Parameter(real, requires_grad=False))
    model.tie_weights()
    for name, buffer in model.named_buffers():
        assert not buffer.is_meta
        for stored, part in parts.items():
            if part.parameter == name:
                part.view(buffer).copy_(read(stored))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 83).view(2, 40), use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_with_its_weights_is_the_loaded_model(saved: Saved, family: str, dtype: torch.dtype) -> None:
    folder = saved(family, dtype)
    model, parts = filled(folder, dtype)
    loaded = load_model(folder, CPU, dtype=dtype)
    loaded.set_experts_implementation("eager")
    assert set(parts) == set(Checkpoint.open(folder).names)
    for here, there in (
        (dict(model.named_parameters()), dict(loaded.named_parameters())),
        (dict(model.named_buffers()), dict(loaded.named_buffers())),
    ):
        assert list(here) == list(there)
        for name, tensor in here.items():
            assert tensor.dtype == there[name].dtype, name
            assert tensor.equal(there[name]), name
    assert not model.training
    assert logits(model).equal(logits(loaded))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_a_tensor_of_the_files(saved: Saved, family: str) -> None:
    """Or a matrix in one, where a file holds all experts as one tensor."""
    folder = saved(family)
    model, parts = filled(folder)
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored |= {f"{name} {index}": one for index, one in enumerate(_matrices_in(tensor))}
    prefix, blocks = decoder_blocks(model)
    found: list[str] = []
    for index, block in enumerate(blocks):
        start = f"{prefix}.{index}"
        for matrix in prunable_matrices(start, block):
            same = [name for name, one in stored.items() if one.equal(matrix.weight) or one.T.equal(matrix.weight)]
            assert len(same) == 1, matrix.name
            found += same
            (part,) = (parts[name.partition(" ")[0]] for name in same)
            assert part.parameter.startswith(f"{start}.")
            assert model.get_parameter(part.parameter) is matrix.owner.get_parameter(matrix.parameter)
            assert not matrix.weight.requires_grad
            with torch.no_grad():
                matrix.weight.fill_(7)
            whole = matrix.owner.get_parameter(matrix.parameter)
            assert (whole if matrix.expert is None else whole[matrix.expert]).eq(7).any()
    assert len(found) == len(set(found))


def _matrices_in(tensor: Tensor) -> list[Tensor]:
    if tensor.ndim == 2:
        return [tensor]
    halves = [half for expert in tensor for half in expert.chunk(2)] if tensor.ndim == 3 else []
    return [*(tensor if tensor.ndim == 3 else []), *halves]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_multiplied_by_its_layer_or_by_linear(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model, _ = filled(saved(family))
    linear = nn.functional.linear
    called: set[nn.Module] = set()
    weights: set[int] = set()

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weights.add(weight.data_ptr())
        return linear(x, weight, bias)

    prefix, blocks = decoder_blocks(model)
    matrices = [one for index, block in enumerate(blocks) for one in prunable_matrices(f"{prefix}.{index}", block)]
    for owner in {matrix.owner for matrix in matrices}:
        owner.register_forward_pre_hook(lambda module, _: called.add(module))
    monkeypatch.setattr(nn.functional, "linear", spy)
    logits(model)
    for matrix in matrices:
        assert matrix.owner in called, matrix.name
        stack = matrix.owner.get_parameter(matrix.parameter)
        assert matrix.expert is None or weights & {one.data_ptr() for one in stack}, matrix.name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "llava"])
def test_a_model_in_shards_is_read(saved: Saved, family: str) -> None:
    folder = saved(family, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert logits(filled(folder)[0]).equal(logits(_eager(folder)))


def _eager(folder: Path) -> PreTrainedModel:
    model = load_model(folder, CPU)
    model.set_experts_implementation("eager")
    return model


def test_a_packed_archive_reads_as_the_dense_model(saved: Saved, tmp_path: Path) -> None:
    folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors[UP][:, ::2] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    pack(PackOptions(model=str(folder), out=tmp_path / "packed"))
    model, _ = filled(tmp_path / "packed")
    assert model.get_parameter(UP).equal(tensors[UP])


def test_the_files_of_a_bare_base_model_are_read(saved: Saved, tmp_path: Path) -> None:
    whole = load_model(saved("gpt2"), CPU)
    whole.base_model.save_pretrained(tmp_path)
    assert "h.0.attn.c_attn.weight" in Checkpoint.open(tmp_path).names
    assert logits(filled(tmp_path)[0]).equal(logits(whole))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "mixtral", "qwen2_moe", "granitemoe", "phimoe"])
def test_files_with_the_names_and_stacks_of_the_model_are_read(saved: Saved, family: str) -> None:
    """`save_pretrained` writes what earlier versions did; others write what is in the model."""
    folder = saved(family)
    loaded = _eager(folder)
    state = {name: parameter.clone() for name, parameter in loaded.named_parameters()}
    assert set(state) != set(Checkpoint.open(folder).names)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model, parts = filled(folder)
    assert all(part == Part(name) for name, part in parts.items())
    assert logits(model).equal(logits(loaded))


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_are_found_under_either_name(tmp_path: Path, stored: str) -> None:
    tiny_model_of("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[stored] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, parts = filled(tmp_path)
    assert parts[stored] == Part("model.embed_tokens.weight")
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    assert model.get_parameter("lm_head.weight").equal(tensors[stored])


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> tuple[PreTrainedModel, Checkpoint]:
    """A skeleton, and its checkpoint with other tensors."""
    model = skeleton(folder, CPU, torch.float32)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors")
    return model, Checkpoint.open(folder)


def test_tensors_that_the_model_has_no_place_for_are_left_out(saved: Saved) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "mtp.layers.0.up_proj.weight": torch.ones(2),
    }
    model, checkpoint = edited(saved("llama"), lambda tensors: tensors.update(extra))
    assert set(checkpoint.names) - set(weight_map(model, checkpoint)) == set(extra)


def test_missing_weights_are_counted_and_named(saved: Saved) -> None:
    model, checkpoint = edited(saved("llama"), lambda tensors: tensors.pop(UP))
    parts = weight_map(model, checkpoint)
    require_filled(parts, ["model.embed_tokens.weight"], checkpoint)
    with pytest.raises(SppError, match=rf"lacks 1 weights, e\.g\. {UP}; the checkpoint is incomplete"):
        require_filled(parts, (name for name, _ in model.named_parameters()), checkpoint)


@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight"])
def test_a_weight_of_another_shape_is_named(saved: Saved, name: str) -> None:
    model, checkpoint = edited(saved("llama"), lambda tensors: tensors.update({name: torch.ones(4, 4)}))
    with pytest.raises(SppError, match=rf"{name} is \(4, 4\), and config.json says \(\d\d, 32\)"):
        weight_map(model, checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"),
        lambda tensors: tensors.update({"model.layers.1.block_sparse_moe.experts.4.w2.weight": torch.ones(32, 48)}),
        lambda tensors: tensors.update({"model.layers.1.block_sparse_moe.experts.0.w3.weight": torch.ones(8, 32)}),
    ],
)
def test_experts_that_do_not_fill_their_stack_are_refused(
    saved: Saved, change: Callable[[dict[str, Tensor]], object]
) -> None:
    model, checkpoint = edited(saved("mixtral"), change)
    with pytest.raises(SppError, match=r"is no part of model\.layers\.1\.mlp\.experts\..* save_pretrained it"):
        weight_map(model, checkpoint)


def test_an_encoder_decoder_is_refused(saved: Saved) -> None:
    model, checkpoint = edited(saved("llama"), lambda tensors: None)
    model.config.is_encoder_decoder = True
    with pytest.raises(UsageError, match="not a decoder-only"):
        weight_map(model, checkpoint)


def ruled(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    sources: list[str],
    targets: list[str],
    operations: list[ConversionOps],
    change: Callable[[dict[str, Tensor]], object],
) -> tuple[PreTrainedModel, Checkpoint]:
    """As `edited`, and transformers converts by one rule of our own."""
    rules = [WeightRenaming("^old_name", "model"), WeightConverter(sources, targets, operations)]
    monkeypatch.setattr("spp.models.weight_map.get_model_conversion_mapping", lambda _: rules)
    return edited(folder, change)


def test_a_transposed_matrix_is_a_view(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama")
    before = load_file(folder / "model.safetensors")[UP]

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["old_name.layers.0.mlp.w3"] = tensors.pop(UP).T

    model, checkpoint = ruled(
        monkeypatch, folder, ["mlp.w3"], ["mlp.up_proj.weight"], [Transpose(0, 1, check_dims=True)], change
    )
    part = weight_map(model, checkpoint)["old_name.layers.0.mlp.w3"]
    assert part.parameter == UP
    assert part.view(before).equal(before.T)
    assert part.view(before).data_ptr() == before.data_ptr()


def test_a_transposed_stack_along_another_dimension_is_read(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors (32,) of the files as columns of (32, 2), and that transposed and laid beside others."""
    operations = [MergeModulelist(dim=1), Concatenate(dim=1), Transpose(0, 1)]

    def change(tensors: dict[str, Tensor]) -> None:
        rows = tensors.pop(UP)
        tensors |= {f"model.layers.0.mlp.a.{index}.w": rows[index] for index in range(40)}
        tensors |= {f"model.layers.0.mlp.b.{index}.w": rows[40 + index] for index in range(8)}

    folder = saved("llama")
    before = load_file(folder / "model.safetensors")[UP]
    model, checkpoint = ruled(
        monkeypatch, folder, ["mlp.a.*.w", "mlp.b.*.w"], ["mlp.up_proj.weight"], operations, change
    )
    parts = weight_map(model, checkpoint)
    for name, row in (("a.0", 0), ("a.2", 2), ("a.10", 10), ("b.0", 40), ("b.7", 47)):
        assert parts[f"model.layers.0.mlp.{name}.w"].view(before).equal(before[row])


def _split_gate_and_up(tensors: dict[str, Tensor]) -> None:
    whole = torch.cat([tensors.pop(UP.replace("up", "gate")), tensors.pop(UP)])
    tensors["model.layers.0.mlp.both.weight"] = whole


@pytest.mark.parametrize(
    ("targets", "operations", "change"),
    [
        (["gate_proj.weight", "up_proj.weight"], [Chunk(dim=0)], _split_gate_and_up),
        (
            ["up_proj.weight"],
            [Interleave(dim=0)],
            lambda tensors: tensors.update({UP.replace("up_proj", "both"): tensors.pop(UP)}),
        ),
    ],
)
def test_what_is_no_view_is_refused_in_a_block(
    saved: Saved,
    monkeypatch: pytest.MonkeyPatch,
    targets: list[str],
    operations: list[ConversionOps],
    change: Callable[[dict[str, Tensor]], object],
) -> None:
    model, checkpoint = ruled(monkeypatch, saved("llama"), ["both.weight"], targets, operations, change)
    with pytest.raises(
        SppError, match=r"layers\.0\.mlp\.both\.weight .* the files use a layout that transformers conv"
    ):
        weight_map(model, checkpoint)


def test_what_is_no_view_is_left_out_elsewhere(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.embed_tokens.weight"
    model, checkpoint = ruled(
        monkeypatch,
        saved("llama"),
        ["embed_tokens.weight"],
        ["embed_tokens.weight"],
        [Interleave(dim=0)],
        lambda _: None,
    )
    parts = weight_map(model, checkpoint)
    assert set(checkpoint.names) - set(parts) == {name}
    with pytest.raises(SppError, match=name):
        require_filled(parts, [name], checkpoint)


def test_a_skeleton_takes_the_dtype_of_its_files(saved: Saved) -> None:
    folder = saved("llama", torch.bfloat16)
    model = skeleton(folder, CPU, "auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.name_or_path == str(folder)


def test_a_skeleton_of_what_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    small = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="of type 't5', which is no causal language model"):
        skeleton(tmp_path, CPU, torch.float32)


def test_a_skeleton_of_a_damaged_configuration_is_refused(saved: Saved) -> None:
    folder = saved("llama")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "hidden_act": "nonsense"})
    with pytest.raises(SppError, match="cannot be built from its config.json and weights: .*nonsense"):
        skeleton(folder, CPU, torch.float32)
    write_json(folder / "config.json", {**config, "num_attention_heads": "many"})
    with pytest.raises(UsageError, match="no usable config.json"):
        skeleton(folder, CPU, torch.float32)
