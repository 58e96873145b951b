"""Perplexity against a naive computation, in both protocols; adapters; and what cannot be scored."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_CONFIGS
from peft import HiraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import spp.evaluation.perplexity as stage
from spp.adapters.tuner import SppConfig
from spp.checkpoints.checkpoint import MANIFEST
from spp.checkpoints.fingerprint import base_fingerprint
from spp.checkpoints.json_files import write_json
from spp.checkpoints.options import PackOptions
from spp.errors import SppError, UsageError
from spp.evaluation.evaluate import evaluate
from spp.evaluation.options import EvalOptions
from spp.evaluation.perplexity import Score, perplexity_of
from spp.models.architecture import prunable_linears
from spp.patterns import NM
from spp.pruning.pack import pack

WINDOW = 16
DOCUMENTS = [
    "The cat sat on the mat, and then it slept.",
    "A dog!",
    "An owl saw the hen, the fox and a cat's dog.",
    "x",
]


@pytest.fixture
def texts(tmp_path) -> dict[str, Path]:
    """The same documents as a .jsonl file and, joined with blank lines, as a .txt file."""
    paths = {suffix: tmp_path / f"text.{suffix}" for suffix in ("jsonl", "txt")}
    paths["jsonl"].write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    paths["txt"].write_text("\n\n".join(DOCUMENTS))
    return paths


def measure(model, text, **changes):
    return evaluate(EvalOptions.build({"model": str(model), "text": str(text), "window": WINDOW, **changes}))


@torch.no_grad()
def naive_nll(model, windows) -> tuple[float, int]:
    """Sum of -log p and count of predicted tokens: one window at a time, token by token, in float64."""
    model = model.double().eval()
    total, count = 0.0, 0
    for window in windows:
        log_p = torch.log_softmax(model(torch.tensor([window])).logits[0], dim=-1)
        for position in range(1, len(window)):
            total -= float(log_p[position - 1, window[position]])
            count += 1
    return total, count


def pieces(ids, window) -> list[list[int]]:
    return [ids[start : start + window] for start in range(0, len(ids), window)]


def test_joined_text_is_scored_in_full_windows(tiny_checkpoint, tiny_tokenizer, texts):
    report = measure(tiny_checkpoint, texts["txt"])
    ids = tiny_tokenizer("\n\n".join(DOCUMENTS)).input_ids
    assert len(ids) % WINDOW > 1  # so that a tail that counts would show
    windows = pieces(ids, WINDOW)[:-1]
    total, count = naive_nll(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), windows)
    assert report.tokens == count == len(windows) * (WINDOW - 1)
    assert report.nll == pytest.approx(total / count, rel=1e-6)
    assert report.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert (report.windows, report.window, report.stride) == (len(windows), WINDOW, WINDOW)
    assert (report.per_document, report.documents, report.unit) == (False, 1, "token")


def test_documents_are_scored_by_themselves_with_their_tails(tiny_checkpoint, tiny_tokenizer, texts):
    report = measure(tiny_checkpoint, texts["jsonl"])
    windows = [piece for text in DOCUMENTS for piece in pieces(tiny_tokenizer(text).input_ids, WINDOW)]
    total, count = naive_nll(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), windows)
    assert report.tokens == count
    assert report.nll == pytest.approx(total / count, rel=1e-6)
    assert (report.per_document, report.documents) == (True, len(DOCUMENTS))
    assert report.windows == sum(len(window) > 1 for window in windows)


def test_the_kind_of_file_is_only_a_default(tiny_checkpoint, texts):
    """The documents of the .jsonl file, joined with blank lines, are the .txt file."""
    joined = measure(tiny_checkpoint, texts["jsonl"], per_document=False)
    assert joined.nll == measure(tiny_checkpoint, texts["txt"]).nll
    assert joined.documents == len(DOCUMENTS)
    assert measure(tiny_checkpoint, texts["txt"], per_document=True).tokens > joined.tokens  # the tail counts


def test_the_standard_library_is_one_text(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("spp.data.records.standard_library", lambda part: [f"{part} one", f"{part} two"])
    report = measure(tiny_checkpoint, "python-stdlib", window=8)
    # BOS, "evaluation one", a blank line of two characters, "evaluation two": 31 tokens
    assert (report.per_document, report.documents, report.windows) == (False, 2, 31 // 8)


def test_the_window_defaults_to_the_context(tiny_checkpoint, texts):
    assert measure(tiny_checkpoint, texts["txt"], window=None).window == 64


def test_the_limit_takes_the_first_documents(tiny_checkpoint, tiny_tokenizer, texts):
    report = measure(tiny_checkpoint, texts["jsonl"], limit=2, window=64)
    windows = [tiny_tokenizer(text).input_ids for text in DOCUMENTS[:2]]
    total, count = naive_nll(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), windows)
    assert (report.documents, report.tokens) == (2, count)
    assert report.nll == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize(("dtype", "computed"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_the_dtype_is_reported(tiny_checkpoint, texts, dtype, computed):
    assert measure(tiny_checkpoint, texts["txt"], device="cpu", dtype=dtype).dtype == computed


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_padding_changes_nothing(tiny_model, family):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(0, 96, (length,), generator=generator).tolist() for length in (2, 31, 7, 64, 7, 3, 12)]
    together = perplexity_of(model, windows)
    total, count = naive_nll(model, windows)
    assert together.tokens == count == sum(map(len, windows)) - len(windows)
    assert together.total == pytest.approx(total, rel=1e-6)


def test_batches_and_row_blocks_change_nothing_and_stay_small(tiny_model, monkeypatch):
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(0, 96, (2 + length,), generator=generator).tolist() for length in range(40)]
    expected = perplexity_of(model, windows)
    shapes = []
    hook = model.register_forward_pre_hook(lambda *call: shapes.append(call[2]["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr(stage, "_TOKENS_AT_ONCE", 90)
    monkeypatch.setattr(stage, "_LOGITS_AT_ONCE", 96 * 30)
    monkeypatch.setattr(stage, "_LOG_SOFTMAX_AT_ONCE", 96 * 7)
    score = perplexity_of(model, windows)
    hook.remove()
    assert score.tokens == expected.tokens
    assert score.total == pytest.approx(expected.total, rel=1e-6)
    assert all(rows * length <= 30 or rows == 1 for rows, length in shapes)
    assert any(rows > 1 for rows, _ in shapes)
    assert sum(rows for rows, _ in shapes) == len(windows)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(tiny_model, tiny_tokenizer, texts, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(tmp_path / "uniform")
    tiny_tokenizer.save_pretrained(tmp_path / "uniform")
    for text in texts.values():
        assert measure(tmp_path / "uniform", text).perplexity == pytest.approx(96, rel=1e-6)


def test_dropout_is_off(tiny_model):
    model = tiny_model("opt", dropout=0.5)
    windows = [list(range(3, 60))]
    expected = perplexity_of(model, windows).total
    assert perplexity_of(model.train(), windows).total == expected


def test_a_huge_loss_has_infinite_perplexity():
    assert Score(2000.0, 2).perplexity == math.inf
    assert Score(math.log(8.0) * 4, 4).perplexity == pytest.approx(8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_without_finite_output_is_an_error(tiny_checkpoint, texts, bad):
    weights = load_file(tiny_checkpoint / "model.safetensors")
    weights["model.norm.weight"][3] = bad
    save_file(weights, tiny_checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SppError, match="log-likelihoods that are not finite"):
        measure(tiny_checkpoint, texts["txt"])


def test_requests_that_cannot_be_met_are_refused(tiny_checkpoint, texts, tmp_path):
    with pytest.raises(UsageError, match="window 65 is longer than the model's context of 64"):
        measure(tiny_checkpoint, texts["txt"], window=65)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UsageError, match="has 10 tokens, less than one window of 16; pass --window or --per-document"):
        measure(tiny_checkpoint, tmp_path / "short.txt")
    with pytest.raises(UsageError, match="no such file"):
        measure(tiny_checkpoint, tmp_path / "missing.txt")
    with pytest.raises(UsageError, match=r"adapter .*: no adapter_config\.json there"):
        measure(tiny_checkpoint, texts["txt"], adapter=tmp_path)


def test_documents_with_nothing_to_predict_are_refused(tiny_checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.backend_tokenizer.post_processor = None  # no BOS
    tokenizer.save_pretrained(tiny_checkpoint)
    (tmp_path / "letters.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(UsageError, match="no document has two tokens or more"):
        measure(tiny_checkpoint, tmp_path / "letters.jsonl")


def test_the_tokenizer_of_another_model_is_noticed(tiny_model, tiny_tokenizer, texts, tmp_path):
    tiny_model("llama", vocab_size=50).save_pretrained(tmp_path / "small")
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(UsageError, match="but the model knows 50 tokens; the tokenizer belongs to another model"):
        measure(tmp_path / "small", texts["txt"])


def save_adapter(model, folder: Path, config=None) -> Path:
    """An adapter with random factors, as PEFT saves it."""
    adapted = get_peft_model(model, config or SppConfig(r=4, scale=2.0, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["spp", "lora"])
def test_an_adapter_scores_like_the_merged_model(tiny_checkpoint, tiny_tokenizer, texts, tmp_path, config):
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", config)
    report = measure(tiny_checkpoint, texts["jsonl"], adapter=adapter)

    from peft import PeftModel

    fresh = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    merged = PeftModel.from_pretrained(fresh, str(adapter)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_tokenizer.save_pretrained(tmp_path / "merged")
    assert report.nll == pytest.approx(measure(tmp_path / "merged", texts["jsonl"]).nll, rel=1e-5)
    assert abs(report.nll - measure(tiny_checkpoint, texts["jsonl"]).nll) > 0.01


@pytest.mark.parametrize("config", [LoraConfig, HiraConfig], ids=["lora", "hira"])
def test_a_packed_model_takes_adapters_of_other_methods(tiny_model, tiny_tokenizer, texts, tmp_path, config):
    """Its layers are bf16 there, and the model computes in fp32."""
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    model = tiny_model("llama", dtype=torch.bfloat16)
    for layer in prunable_linears(model).values():
        layer.weight.data.masked_fill_(~NM(1, 4).keep_mask(layer.weight.float().abs()), 0.0)
    model.save_pretrained(pruned)
    tiny_tokenizer.save_pretrained(pruned)
    pack(PackOptions(model=str(pruned), out=packed))
    adapter = save_adapter(model, tmp_path / "adapter", config(r=2, target_modules=["up_proj", "q_proj"]))
    expected = measure(pruned, texts["jsonl"], adapter=adapter)
    found = measure(packed, texts["jsonl"], adapter=adapter)
    assert found.dtype == "float32"
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)
    assert abs(found.nll - measure(packed, texts["jsonl"]).nll) > 5e-5  # ten times the tolerance


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        # Two modules of one block, two factors each: too many of them, or too few.
        ({"num_hidden_layers": 3}, "was made for another model: 4 of its tensors do not match"),
        ({"num_hidden_layers": 1}, "was made for another model: 4 of its tensors do not match"),
        ({"intermediate_size": 64}, "does not load on this model: .*size mismatch for"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tiny_checkpoint, tiny_model, texts, tmp_path, changes, reason):
    config = SppConfig(r=4, target_modules=["q_proj", "down_proj"])
    adapter = save_adapter(tiny_model("llama", **changes), tmp_path / "adapter", config)
    with pytest.raises(SppError, match=reason) as caught:
        measure(tiny_checkpoint, texts["txt"], adapter=adapter)
    assert len(str(caught.value).splitlines()) == 1


def test_an_adapter_of_another_family_is_refused(tiny_checkpoint, tiny_model, texts, tmp_path):
    adapter = save_adapter(tiny_model("gpt2"), tmp_path / "adapter")
    with pytest.raises(SppError, match=r"does not load on this model: .*[Tt]arget modules"):
        measure(tiny_checkpoint, texts["txt"], adapter=adapter)


def test_a_damaged_adapter_is_refused(tiny_checkpoint, tiny_model, texts, tmp_path):
    adapter = save_adapter(tiny_model("llama"), tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(SppError, match="does not load on this model"):
        measure(tiny_checkpoint, texts["txt"], adapter=adapter)


def test_other_weights_than_the_adapter_was_trained_on_are_a_warning(
    tiny_checkpoint, tiny_model, texts, tmp_path, caplog
):
    adapter = save_adapter(tiny_model("llama"), tmp_path / "adapter")
    fingerprint = base_fingerprint(tiny_checkpoint)
    write_json(adapter / MANIFEST, {"base": {"model": "the first one", "fingerprint": fingerprint}})
    with caplog.at_level(logging.WARNING, "spp"):
        same = measure(tiny_checkpoint, texts["txt"], adapter=adapter)
    assert "trained on other weights" not in caplog.text
    caplog.clear()

    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].neg_()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "spp"):
        assert measure(other, texts["txt"], adapter=adapter).nll != same.nll
    assert "was trained on other weights (the first one) than" in caplog.text


def test_the_input_is_left_alone(tiny_checkpoint, tiny_model, texts, tmp_path):
    adapter = save_adapter(tiny_model("llama"), tmp_path / "adapter")
    files = [path for folder in (tiny_checkpoint, adapter) for path in folder.iterdir()]
    before = {path: path.read_bytes() for path in files}
    measure(tiny_checkpoint, texts["txt"], adapter=adapter)
    assert {path: path.read_bytes() for folder in (tiny_checkpoint, adapter) for path in folder.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "perplexity"), [("story", 18.614), ("stories260K", 3.7168)])
def test_real_models_have_their_known_perplexity(shared_data, name, perplexity):
    """The first 600 stories, each by itself; the figures are transformers' own loss, window by window.

    The data's README has 18.6 and 3.67: it drops what goes beyond the context, which 71 of the stories do in the
    small vocabulary of stories260K.
    """
    text = shared_data / "corpora" / "tinystories_valid.jsonl"
    report = measure(shared_data / "models" / name, text, limit=600, window=None)
    assert report.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert report.per_document
