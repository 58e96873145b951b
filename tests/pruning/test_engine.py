"""The engine on a tiny model of each family, against recomputation with the full model and literal formulas."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive_pruning as naive
import pytest
import torch
from conftest import TINY_CONFIGS
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from spp.errors import SppError, UsageError
from spp.models.architecture import decoder_blocks, prunable_linears, weight_oi
from spp.models.blockwise import block_calls
from spp.models.blockwise.journal import FolderJournal
from spp.patterns import NM, Pattern, parse_pattern
from spp.pruning.engine import prune_blocks
from spp.pruning.in_memory import LoadedBlocks, prune_model
from spp.pruning.options import Criterion, PruningSettings
from spp.runtime.tensor_memory import LiveBytes

MakeModel = Callable[..., PreTrainedModel]
FAMILIES = list(TINY_CONFIGS)
PATTERNS = ["50%", "75%", "2:4", "4:8", "2:8", "1:4"]
CRITERIA: list[Criterion] = ["magnitude", "wanda", "ria", "sparsegpt", "admm"]


MASKS: dict[str, Callable[[Tensor, Tensor, Pattern], Tensor]] = {
    "magnitude": lambda weight, _, pattern: naive.magnitude(weight, pattern),
    "wanda": naive.wanda,
    "ria": naive.ria,
}
NEW_VALUES = {"sparsegpt": naive.sparsegpt, "admm": naive.admm}


def windows(samples: int = 12, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (samples, length), generator=torch.Generator().manual_seed(seed))


def prune(
    model: PreTrainedModel, criterion: Criterion, pattern: Pattern, tokens: Tensor | None = None, **settings: Any
) -> list[str]:
    """Prune in place; names of the matrices that were."""
    asked = PruningSettings.build({"criterion": criterion, "pattern": str(pattern), **settings})
    return [matrix.name for block in prune_model(model, asked, tokens) for matrix in block.matrices]


def pruned_copy(model: PreTrainedModel, criterion: Criterion, pattern: Pattern, tokens: Tensor) -> PreTrainedModel:
    pruned = copy.deepcopy(model)
    assert set(prune(pruned, criterion, pattern, tokens)) == set(prunable_linears(model))
    return pruned


def inputs_of(model: PreTrainedModel, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """What each layer gets in one run of the whole model, (T, I)."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            seen[name] = args[0].flatten(0, -2).clone()

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in names]
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def recomputed(
    model: PreTrainedModel, criterion: Criterion, pattern: Pattern, tokens: Tensor, *, sequential: bool = True
) -> PreTrainedModel:
    """Prune with the whole model run from the tokens for every block, and the literal formulas."""
    pruned = copy.deepcopy(model)
    prefix, blocks = decoder_blocks(model)
    for index in range(len(blocks)):
        mine = {n: m for n, m in prunable_linears(pruned).items() if n.startswith(f"{prefix}.{index}.")}
        source = pruned if sequential else copy.deepcopy(model)
        seen = inputs_of(source, list(mine), tokens)
        for name, module in mine.items():
            weight = weight_oi(module)
            if criterion in NEW_VALUES:
                new = NEW_VALUES[criterion](weight, seen[name], pattern)[0].to(weight.dtype)
            else:
                keep = MASKS[criterion](weight, seen[name], pattern)
                new = torch.where(keep, weight, 0)
            weight.copy_(new)
    return pruned


def assert_same_pruning(model: PreTrainedModel, expected: PreTrainedModel, criterion: Criterion) -> None:
    wanted = prunable_linears(expected)
    for name, module in prunable_linears(model).items():
        weight, other = weight_oi(module).double(), weight_oi(wanted[name]).double()
        if criterion in NEW_VALUES:
            same = (weight != 0) == (other != 0)
            assert same.double().mean() >= 0.999, name
            torch.testing.assert_close(
                weight[same], other[same], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert weight.equal(other), name


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_full_model_recomputation(tiny_model: MakeModel, family: str, criterion: Criterion) -> None:
    model, tokens = tiny_model(family), windows()
    pruned = pruned_copy(model, criterion, NM(2, 4), tokens)
    assert_same_pruning(pruned, recomputed(model, criterion, NM(2, 4), tokens), criterion)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_real_block_equals_its_recomputation(shared_data: Path, text: str, criterion: Criterion) -> None:
    """The first block of a trained model, on text of the kind that it was trained on."""
    folder = shared_data / "models" / "story"
    model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=1, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with (shared_data / "corpora" / "tinystories_train.jsonl").open() as lines:
        text_ids = [tokenizer(json.loads(next(lines))["text"]).input_ids for _ in range(12)]
    tokens = torch.tensor([ids[:64] for ids in text_ids if len(ids) >= 64])
    pattern = parse_pattern(text)
    pruned = pruned_copy(model, criterion, pattern, tokens)
    assert_same_pruning(pruned, recomputed(model, criterion, pattern, tokens), criterion)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", FAMILIES)
def test_obeys_the_pattern_and_touches_nothing_else(
    tiny_model: MakeModel, family: str, criterion: Criterion, text: str
) -> None:
    model, pattern = tiny_model(family), parse_pattern(text)
    pruned = pruned_copy(model, criterion, pattern, windows(2))
    weights = {f"{name}.weight" for name in prunable_linears(pruned)}
    for name, module in prunable_linears(pruned).items():
        weight = weight_oi(module)
        assert pattern.violations(weight) == 0, name
        assert int((weight == 0).sum()) == round(weight.numel() * pattern.sparsity), name
        assert not torch.signbit(weight[weight == 0]).any(), name
    before = model.state_dict()
    for name, tensor in pruned.state_dict().items():
        assert tensor.shape == before[name].shape
        assert tensor.dtype == before[name].dtype
        if name not in weights:
            assert tensor.equal(before[name]), name
    with torch.no_grad():
        assert torch.isfinite(pruned(input_ids=windows(1)).logits).all()


def test_later_blocks_see_the_pruned_output(tiny_model: MakeModel) -> None:
    model, tokens = tiny_model("llama"), windows()
    pruned = pruned_copy(model, "wanda", NM(1, 4), tokens)
    parallel = recomputed(model, "wanda", NM(1, 4), tokens, sequential=False)
    first, last = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
    assert weight_oi(pruned.get_submodule(first)).equal(weight_oi(parallel.get_submodule(first)))
    assert not weight_oi(pruned.get_submodule(last)).equal(weight_oi(parallel.get_submodule(last)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gemma3_text", "qwen2"])
def test_blocks_that_are_called_differently(family: str, attention: str) -> None:
    """Sliding and full attention in one model: each block gets its own mask and rotary embeddings."""
    torch.manual_seed(0)
    sliding = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    config = AutoConfig.for_model(
        family, **(TINY_CONFIGS["qwen2"] | {"num_hidden_layers": 3, "use_sliding_window": True} | sliding)
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    tokens = windows(5, 32)
    pruned = pruned_copy(model, "wanda", NM(2, 4), tokens)
    assert_same_pruning(pruned, recomputed(model, "wanda", NM(2, 4), tokens), "wanda")


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("tokens_per_call", [1, 48, 80, 10_000])
def test_batches_do_not_matter(
    tiny_model: MakeModel, family: str, tokens_per_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model(family), windows()
    expected = pruned_copy(model, "wanda", NM(2, 4), tokens)
    monkeypatch.setattr(block_calls, "_TOKENS_PER_CALL", tokens_per_call)
    assert_same_pruning(pruned_copy(model, "wanda", NM(2, 4), tokens), expected, "wanda")


def test_arguments_of_equal_batches_are_kept_once(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    hidden: dict[int, block_calls.State] = {}
    with torch.no_grad():
        calls = block_calls.capture(model, decoder_blocks(model)[1], dict(enumerate(windows().split(1))), hidden)
    assert len(hidden) == 12
    for call in calls:
        assert len({id(kwargs["position_embeddings"][0]) for kwargs in call.kwargs.values()}) == 1
    assert "forward" not in decoder_blocks(model)[1][0].__dict__


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_bfloat16_models(tiny_model: MakeModel, family: str, criterion: Criterion) -> None:
    model, tokens = tiny_model(family, dtype=torch.bfloat16), windows(4)
    pruned = pruned_copy(model, criterion, NM(2, 4), tokens)
    before = prunable_linears(model)
    for name, module in prunable_linears(pruned).items():
        weight = weight_oi(module)
        assert weight.dtype == torch.bfloat16
        assert NM(2, 4).violations(weight) == 0
        if criterion not in NEW_VALUES:
            kept = weight != 0
            assert weight[kept].equal(weight_oi(before[name])[kept])
    if criterion == "wanda":
        assert_same_pruning(pruned, recomputed(model, criterion, NM(2, 4), tokens), criterion)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_already_sparse_model_keeps_its_zeros(tiny_model: MakeModel, criterion: Criterion) -> None:
    sparse = pruned_copy(tiny_model("llama"), "magnitude", parse_pattern("60%"), windows())
    for target in (NM(2, 4), parse_pattern("50%"), parse_pattern("75%")):
        pruned = pruned_copy(sparse, criterion, target, windows())
        before = prunable_linears(sparse)
        for name, module in prunable_linears(pruned).items():
            zeros = weight_oi(before[name]) == 0
            assert not weight_oi(module)[zeros].any()
            assert target.violations(weight_oi(module)) == 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_pruning_twice_changes_no_zero(tiny_model: MakeModel, criterion: Criterion) -> None:
    once = pruned_copy(tiny_model("llama"), criterion, NM(2, 4), windows())
    twice = pruned_copy(once, criterion, NM(2, 4), windows())
    for first, second in zip(prunable_linears(once).values(), prunable_linears(twice).values(), strict=True):
        assert (weight_oi(first) == 0).equal(weight_oi(second) == 0)


def test_negative_zeros_of_pruned_weights_are_canonical(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    for module in prunable_linears(model).values():
        weight_oi(module)[:, ::2] = -0.0
    for module in prunable_linears(pruned_copy(model, "sparsegpt", NM(2, 4), windows())).values():
        weight = weight_oi(module)
        assert not torch.signbit(weight[weight == 0]).any()


def test_a_dead_input_feature(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    model.model.layers[0].input_layernorm.weight.data[[4, 9]] = 0
    pruned = pruned_copy(model, "sparsegpt", NM(2, 4), windows())
    assert not weight_oi(pruned.model.layers[0].self_attn.q_proj)[:, [4, 9]].any()
    assert weight_oi(pruned.model.layers[1].self_attn.q_proj)[:, [4, 9]].any()


def test_all_indivisible_layers_are_reported_before_any_work(tiny_model: MakeModel) -> None:
    model = tiny_model("llama", intermediate_size=50)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as caught:
        prune(model, "wanda", NM(2, 4), windows())
    message = str(caught.value)
    assert "model.layers.0.mlp.down_proj (50)" in message
    assert "model.layers.1.mlp.down_proj (50)" in message
    assert "2 of 14" in message
    assert "q_proj" not in message
    assert "--skip-indivisible" in message
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_indivisible_layers_are_skipped_on_request(tiny_model: MakeModel) -> None:
    model = tiny_model("llama", intermediate_size=50)
    before = weight_oi(model.model.layers[1].mlp.down_proj).clone()
    pruned = prune(model, "wanda", NM(2, 4), windows(), skip_indivisible=True)
    skipped = set(prunable_linears(model)) - set(pruned)
    assert skipped == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert weight_oi(model.model.layers[1].mlp.down_proj).equal(before)
    assert NM(2, 4).violations(weight_oi(model.model.layers[1].mlp.up_proj)) == 0


def test_nothing_left_to_prune_is_an_error(tiny_model: MakeModel) -> None:
    with pytest.raises(UsageError, match="14 of 14"):
        prune(tiny_model("llama"), "magnitude", NM(2, 5), skip_indivisible=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_weights_are_named(tiny_model: MakeModel, bad: float) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = bad
    with pytest.raises(SppError, match=r"model\.layers\.1\.mlp\.up_proj: the weight holds NaN or infinity"):
        prune(model, "magnitude", NM(2, 4))


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_bad_activations_are_named(tiny_model: MakeModel, criterion: Criterion) -> None:
    model = tiny_model("llama")
    model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    with pytest.raises(SppError, match=r"model\.layers\.1\.self_attn\.q_proj: its calibration inputs hold NaN"):
        prune(model, criterion, NM(2, 4), windows())


def test_a_hessian_that_cannot_be_inverted_is_named(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda _, out: out[1].fill_(1))
    with pytest.raises(SppError, match=r"model\.layers\.0\.self_attn\.q_proj: SparseGPT cannot invert"):
        prune(tiny_model("llama"), "sparsegpt", NM(2, 4), windows())


def test_more_damping_is_reported(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = torch.linalg.cholesky_ex, []

    def first_fails(matrix: Tensor, **options: Any) -> Any:
        calls.append(matrix)
        real(matrix, **options)
        if len(calls) == 1:
            options["out"][1].fill_(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", first_fails)
    with caplog.at_level(logging.WARNING, "spp"):
        prune(tiny_model("llama"), "sparsegpt", NM(2, 4), windows())
    assert [record.getMessage() for record in caplog.records] == [
        f"model.layers.0.self_attn.{name}_proj: took 10 times the usual damping to invert its Hessian"
        for name in "qkv"  # which share their inputs, and the inversion
    ]


def test_updates_too_large_for_the_dtype_are_named(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from spp.pruning import steps
    from spp.pruning.criteria import sparsegpt
    from spp.pruning.criteria.result import Pruned

    def huge(weight: Tensor, value: Tensor | None, pattern: Pattern) -> Pruned:
        pruned = sparsegpt.prune(weight, value, pattern)
        return Pruned(pruned.weight * 1e8, pruned.mask)

    monkeypatch.setitem(steps.CRITERIA, "sparsegpt", dataclasses.replace(steps.CRITERIA["sparsegpt"], prune=huge))
    with pytest.raises(SppError, match=r"q_proj: an updated weight is .*too large for float16"):
        prune(tiny_model("llama", dtype=torch.float16), "sparsegpt", NM(2, 4), windows())


def test_a_layer_without_calibration_is_named(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(SppError, match=r"model\.layers\.0\.mlp\.extra: no calibration token"):
        prune(model, "wanda", NM(2, 4), windows())


@pytest.mark.parametrize("tokens", [None, torch.empty(0, 8, dtype=torch.long)])
def test_calibrated_criteria_need_windows(tiny_model: MakeModel, tokens: Tensor | None) -> None:
    with pytest.raises(UsageError, match="wanda needs calibration text"):
        prune(tiny_model("llama"), "wanda", NM(2, 4), tokens)


def test_token_ids_of_another_tokenizer(tiny_model: MakeModel) -> None:
    with pytest.raises(UsageError, match="token id 96, but the model knows 96 tokens"):
        prune(tiny_model("llama"), "wanda", NM(2, 4), torch.full((1, 4), 96))


def test_magnitude_runs_no_forward(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    model.model.forward = None
    prune(model, "magnitude", NM(2, 4))


def test_a_failed_capture_leaves_the_blocks_as_they_were(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    blocks = decoder_blocks(model)[1]
    own = blocks[1].forward
    blocks[1].forward = own  # someone else's wrapper, as accelerate sets one
    model.model.layers[0].mlp.gate_proj = nn.Linear(5, 5)
    with pytest.raises(RuntimeError):
        prune(model, "wanda", parse_pattern("50%"), windows())
    assert "forward" not in blocks[0].__dict__
    assert blocks[1].__dict__["forward"] is own


def test_a_model_that_calls_a_block_twice_is_refused(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    last = model.model.layers[1]
    model.model.layers = nn.ModuleList([model.model.layers[0], model.model.layers[0]])
    blocks = [model.model.layers[0], last]
    with pytest.raises(SppError, match="calls its decoder block 0 after block 0"), torch.no_grad():
        block_calls.capture(model, blocks, {0: windows()}, None)


def test_training_mode_does_not_make_calibration_random(tiny_model: MakeModel) -> None:
    model = tiny_model("opt", dropout=0.5, layerdrop=0.5)
    expected = pruned_copy(model, "wanda", NM(2, 4), windows())
    pruned = pruned_copy(copy.deepcopy(model).train(), "wanda", NM(2, 4), windows())
    assert_same_pruning(pruned, expected, "wanda")


def test_one_block_models(tiny_model: MakeModel) -> None:
    model, tokens = tiny_model("llama", num_hidden_layers=1), windows()
    pruned = pruned_copy(model, "wanda", NM(2, 4), tokens)
    assert_same_pruning(pruned, recomputed(model, "wanda", NM(2, 4), tokens), "wanda")


def test_ten_and_more_blocks_are_told_apart(tiny_model: MakeModel) -> None:
    model, tokens = tiny_model("llama", num_hidden_layers=11), windows(2, 8)
    pruned = pruned_copy(model, "wanda", NM(2, 4), tokens)
    assert_same_pruning(pruned, recomputed(model, "wanda", NM(2, 4), tokens), "wanda")


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_more_calibration_takes_no_more_memory(tiny_model: MakeModel, tmp_path: Path, criterion: Criterion) -> None:
    """Neither outputs nor inputs of a batch are there when the next one runs."""
    settings = PruningSettings.build({"criterion": criterion, "pattern": "2:4"})
    peaks = []
    for batches in (2, 6):
        model = tiny_model("llama", num_hidden_layers=2)
        with FolderJournal(tmp_path / str(batches)) as journal, LiveBytes() as live:
            prune_blocks(LoadedBlocks(model), settings, windows(batches * 2048 // 16), journal)
        peaks.append(live.peak)
    assert peaks[1] <= 1.05 * peaks[0]
