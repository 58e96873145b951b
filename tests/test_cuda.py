"""The whole way on a CUDA device (-m gpu): pruning as on the CPU, resuming, and training to a merged model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spp.errors import SppError
from spp.models.blockwise.journal import FolderJournal
from spp.patterns import parse_pattern
from spp.pipeline.options import RunOptions
from spp.pipeline.run import run
from spp.pruning.in_memory import prune_model
from spp.pruning.memory_estimate import predict_pruning
from spp.pruning.options import Criterion, PruneOptions, PruningSettings
from spp.pruning.prune import prune

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MakeModel = Callable[..., PreTrainedModel]
CRITERIA: list[Criterion] = ["magnitude", "wanda", "ria", "sparsegpt", "admm"]
SETTINGS: dict[str, dict[str, Any]] = {
    **{criterion: {"criterion": criterion} for criterion in CRITERIA},
    "matrix": {"criterion": "magnitude-matrix", "pattern": "50%"},
    "owl": {"criterion": "wanda", "pattern": "75%", "allocation": "owl"},
    "dsnot": {"criterion": "wanda", "refine": "dsnot"},
    "swaps": {"criterion": "wanda", "refine": "swaps"},
    "all steps": {"criterion": "admm", "pattern": "50%", "refine": "swaps", "update": "least-squares"},
    "weights": {"criterion": "wanda", "reconstruct": "attention,mlp", "reconstruct_epochs": 2},
    "factors": {"criterion": "wanda", "reconstruct": "block", "reconstruct_params": "spp", "reconstruct_epochs": 2},
}


@pytest.fixture
def dense(tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama of three blocks in fp32."""
    folder = tmp_path / "dense"
    tiny_model("llama", num_hidden_layers=3).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def options(dense: Path, stories: Path, tmp_path: Path) -> Callable[..., PruneOptions]:
    def make(out: str, **changes: Any) -> PruneOptions:
        fixed = {"calibration": str(stories), "samples": 8, "window": 32, "dtype": "float32"}
        return PruneOptions.build({"model": str(dense), "out": tmp_path / out, **fixed, **changes})

    return make


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("pattern", ["50%", "2:4", "1:4"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_first_block_is_pruned_as_on_the_cpu(
    tiny_model: MakeModel, family: str, criterion: Criterion, pattern: str
) -> None:
    """Later blocks see the rounding of those before them."""
    settings = PruningSettings.build({"criterion": criterion, "pattern": pattern})
    windows = torch.randint(3, 96, (12, 16), generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = (tiny_model(family, num_hidden_layers=1) for _ in range(2))
    prune_model(on_cpu, settings, windows)
    prune_model(on_gpu.cuda(), settings, windows)
    for (name, expected), found in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
        same = (found.cpu() == 0) == (expected == 0)
        assert same.double().mean() >= 0.999, name
        torch.testing.assert_close(found.cpu()[same], expected[same], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_pattern_holds_and_the_files_are_whole(options: Callable[..., PruneOptions], name: str) -> None:
    report = prune(options("gpu", device="cuda", **SETTINGS[name]))
    expected = prune(options("cpu", device="cpu", **SETTINGS[name]))
    assert report.sparsity == pytest.approx(expected.sparsity, abs=1e-3)
    found, dense = weights(report.out), weights(Path(expected.out).parent / "dense")
    assert found.keys() == dense.keys()
    pattern = parse_pattern(report.pattern)
    for tensor, values in found.items():
        if tensor not in report.tensors:
            assert values.equal(dense[tensor]), tensor
        elif SETTINGS[name].get("allocation") is None and report.criterion != "magnitude-matrix":
            assert not pattern.violations(values), tensor
    for fits in report.reconstruction.values():
        assert all(fit.after < fit.before for fit in fits.values())


@pytest.mark.parametrize("name", ["sparsegpt", "dsnot", "owl", "weights"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    options: Callable[..., PruneOptions], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prune(options("whole", device="cuda", **SETTINGS[name]))
    finish = FolderJournal.finish

    def dying(self: FolderJournal, walk: str, result: Any) -> None:
        finish(self, walk, result)
        if walk == "prune":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FolderJournal, "finish", dying)
        prune(options("resumed", device="cuda", **SETTINGS[name]))
    resumed = prune(options("resumed", device="cuda", **SETTINGS[name]))
    for tensor, values in weights(whole.out).items():
        assert values.equal(weights(resumed.out)[tensor]), tensor


def test_nan_is_reported_and_nothing_is_left(
    options: Callable[..., PruneOptions], dense: Path, tiny_model: MakeModel
) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(dense)
    asked = options("out", device="cuda")
    with pytest.raises(SppError, match="layers.1.mlp.down_proj"):
        prune(asked)
    assert not asked.out.exists()


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_the_prediction_of_memory_holds(
    tmp_path: Path, stories: Path, tiny_tokenizer: PreTrainedTokenizerFast, tiny_model: MakeModel, criterion: str
) -> None:
    """At layers of a real size, where small allocations do not count; kernels' own scratch is in no trace."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
    tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=2, **sizes).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    values = {"model": str(tmp_path / "dense"), "out": tmp_path / "out", "criterion": criterion, "device": "cuda"}
    asked = PruneOptions.build({**values, "calibration": str(stories), "samples": 64, "window": 32})
    foretold = predict_pruning(asked).total
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prune(asked)
    peak = torch.cuda.max_memory_allocated() - before
    assert 0.6 * foretold < peak < 1.2 * foretold, (foretold / 2**20, peak / 2**20)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "dense"])
def test_the_whole_run(tmp_path: Path, tiny_checkpoint: Path, stories: Path, pack: bool) -> None:
    values = {"model": str(tiny_checkpoint), "train": str(stories), "eval": str(stories), "out": tmp_path / "run"}
    values |= {"samples": 4, "window": 32, "epochs": 2, "learning_rate": 0.05, "device": "cuda", "pack": pack}
    results = run(RunOptions.build(values)).plain()
    assert results["verified"] is True
    assert results["perplexity"]["spp"] < results["perplexity"]["pruned"]


def test_processes_talk_through_nccl(tmp_path: Path, options: Callable[..., PruneOptions]) -> None:
    """As far as one process can show: every sum and broadcast goes through it."""
    alone = prune(options("alone", device="cuda", criterion="sparsegpt"))
    meeting = {"init_method": f"file://{tmp_path}/meeting", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda:0"), **meeting)
    try:
        together = prune(options("together", device="cuda", criterion="sparsegpt"))
    finally:
        torch.distributed.destroy_process_group()
    for tensor, values in weights(alone.out).items():
        assert values.equal(weights(together.out)[tensor]), tensor
