"""Pruning block by block from files to files: bounded memory, killed at any moment, full disks, several processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import run_killed
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spp.checkpoints.atomic_folder import partial_folder, work_folder
from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.json_files import read_json
from spp.checkpoints.unfinished import read_record
from spp.errors import SppError, UsageError
from spp.models.blockwise.journal import FolderJournal
from spp.models.loading import skeleton
from spp.pruning.options import PruneOptions
from spp.pruning.prune import PruneReport, prune
from spp.pruning.pruned_blocks import PrunedBlocks

MakeModel = Callable[..., PreTrainedModel]
BLOCKS = 4


@pytest.fixture
def dense(tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama of four blocks in several files."""
    folder = tmp_path / "dense"
    tiny_model("llama", num_hidden_layers=BLOCKS, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def options(dense: Path, stories: Path, tmp_path: Path) -> Callable[..., PruneOptions]:
    def make(out: str = "pruned", **changes: Any) -> PruneOptions:
        fixed = {"calibration": str(stories), "samples": 8, "window": 32, "device": "cpu"}
        return PruneOptions.build({"model": str(dense), "out": tmp_path / out, **fixed, **changes})

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Every weight file, by name, to the bit."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def finished(out: Path) -> int:
    """Blocks that an unfinished run has finished."""
    record = work_folder(out) / "record.json"
    return len(read_record(record).get("prune", [])) if record.is_file() else 0


def die_after(blocks: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Fail when so many blocks have been pruned, and the next one is to be loaded."""
    done = 0
    loaded, finish = PrunedBlocks.loaded, FolderJournal.finish

    def counted(self: FolderJournal, walk: str, result: Any) -> None:
        nonlocal done
        finish(self, walk, result)
        done += walk == "prune"

    def failing(self: PrunedBlocks, index: int) -> Any:
        if done == blocks:
            raise error
        return loaded(self, index)

    monkeypatch.setattr(FolderJournal, "finish", counted)
    monkeypatch.setattr(PrunedBlocks, "loaded", failing)


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "sparsegpt"},
        {"criterion": "magnitude"},
        {"criterion": "wanda", "pattern": "50%", "allocation": "owl"},
        {"criterion": "ria", "refine": "dsnot"},
        {"criterion": "admm", "pattern": "50%", "allocation": "owl", "refine": "swaps", "update": "least-squares"},
        {"criterion": "wanda", "reconstruct": "attention,mlp", "reconstruct_epochs": 1},
    ],
    ids=["sparsegpt", "magnitude", "owl", "dsnot", "all steps", "reconstruct"],
)
@pytest.mark.parametrize("block", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    options: Callable[..., PruneOptions], settings: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prune(options("whole", **settings))
    with monkeypatch.context() as patch:
        die_after(block, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune(options(**settings))
    resumed = options(**settings)
    assert finished(resumed.out) == block
    assert not resumed.out.exists()
    with monkeypatch.context() as patch:
        real = PrunedBlocks.keep
        kept: list[int] = []
        patch.setattr(PrunedBlocks, "keep", lambda self, index: kept.append(index) or real(self, index))
        report = prune(resumed)
    assert kept == list(range(block, BLOCKS))  # no finished block was done again
    assert contents(report.out) == contents(whole.out)
    assert report.tensors == whole.tensors
    assert not partial_folder(resumed.out).exists()
    assert sorted(path.name for path in report.out.iterdir()) == sorted(path.name for path in whole.out.iterdir())


PRUNE = """
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune

prune(PruneOptions.build({values!r}))
"""


@pytest.mark.parametrize(
    ("module", "owner", "function", "call"),
    [
        pytest.param(
            "checkpoints.safetensors_file", "TensorFile", "write", 2, marks=pytest.mark.slow
        ),  # copying what is not pruned
        ("checkpoints.safetensors_file", "TensorFile", "write", 17),  # in the middle of a block
        pytest.param("models.blockwise.hidden_states", "FolderStates", "__setitem__", 2, marks=pytest.mark.slow),
        pytest.param("models.blockwise.journal", "FolderJournal", "finish", 3, marks=pytest.mark.slow),
        pytest.param("models.blockwise.journal", "shutil", "rmtree", 3, marks=pytest.mark.slow),
        ("checkpoints.atomic_folder", "shutil", "rmtree", 1),  # at the very end
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    options: Callable[..., PruneOptions], module: str, owner: str, function: str, call: int
) -> None:
    whole = prune(options("whole"))
    asked = options()
    run_killed(PRUNE.format(values=asked.model_dump(mode="json")), module, owner, function, call)
    assert not asked.out.exists()
    assert contents(prune(asked).out) == contents(whole.out)


def test_other_options_start_over_where_the_user_says_so(
    options: Callable[..., PruneOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        die_after(2, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune(options())
    with pytest.raises(UsageError, match="seed was 0 and is 1 now"):
        prune(options(seed=1))
    assert contents(prune(options(seed=1, overwrite=True)).out) == contents(prune(options("other", seed=1)).out)


def test_one_block_is_in_memory_at_a_time(
    options: Callable[..., PruneOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = PrunedBlocks.keep, []

    def keep(self: PrunedBlocks, index: int) -> Any:
        loaded = {name.split(".")[2] for name, one in self.model.named_parameters() if not one.is_meta}
        seen.append(loaded)
        return real(self, index)

    monkeypatch.setattr(PrunedBlocks, "keep", keep)
    prune(options())
    assert seen == [{str(index)} for index in range(BLOCKS)]


def test_a_full_disk_is_clean_and_resumable(
    options: Callable[..., PruneOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prune(options("whole"))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        die_after(2, patch, full)
        with pytest.raises(SppError, match="no space is left on the disk.*finished blocks are kept"):
            prune(options())
    assert finished(options().out) == 2
    assert contents(prune(options()).out) == contents(whole.out)


def test_a_disk_too_small_for_the_model_is_noticed_at_once(
    options: Callable[..., PruneOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SppError, match="no room for .* GB of weights"):
        prune(options())
    assert sorted(tmp_path.iterdir()) == before


def test_a_second_process_is_refused(options: Callable[..., PruneOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    real = PrunedBlocks.keep

    def keep(self: PrunedBlocks, index: int) -> Any:
        if index != 1:
            return real(self, index)
        command = [
            sys.executable, "-m", "spp", "prune", options().model, str(options().out), "--criterion", "magnitude",
        ]  # fmt: skip
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert other.returncode == 2
        assert "another process is writing" in other.stderr
        return real(self, index)

    monkeypatch.setattr(PrunedBlocks, "keep", keep)
    assert prune(options(criterion="magnitude")).out.is_dir()


@pytest.mark.parametrize(
    "settings", [{"criterion": "sparsegpt"}, {"criterion": "wanda", "allocation": "owl", "pattern": "60%"}]
)
def test_several_processes_make_the_same_masks(options: Callable[..., PruneOptions], settings: dict[str, Any]) -> None:
    settings = {**settings, "samples": 80, "window": 64}
    alone = tensors(prune(options("alone", **settings)))
    flags = [f"--{name}={value}" for name, value in settings.items()]
    asked = options("shared", **settings)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "spp", "prune",
        asked.model, str(asked.out), f"--calibration={asked.calibration}", "--device=cpu", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    shared = tensors_in(asked.out)
    assert alone.keys() == shared.keys()
    same = {name: (tensor != 0) == (shared[name] != 0) for name, tensor in alone.items()}
    # One weight more or less is a thousandth of these matrices.
    assert torch.cat([one.flatten() for one in same.values()]).double().mean() >= 0.999
    for name, tensor in alone.items():
        found, expected = shared[name][same[name]].float(), tensor[same[name]].float()
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return dict(Checkpoint.open(folder).items())


def tensors(report: PruneReport) -> dict[str, Tensor]:
    return tensors_in(report.out)


def test_a_file_without_a_weight_is_refused(options: Callable[..., PruneOptions], tmp_path: Path, dense: Path) -> None:
    whole = {}
    for path in dense.glob("*.safetensors"):
        whole |= load_file(path)
        path.unlink()
    (dense / "model.safetensors.index.json").unlink()
    del whole["model.layers.2.mlp.up_proj.weight"]
    save_file(whole, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SppError, match=r"lacks 1 weights, e\.g\. model\.layers\.2\.mlp\.up_proj"):
        prune(options())
    assert not partial_folder(options().out).exists()


def test_the_skeleton_has_no_weights(dense: Path, options: Callable[..., PruneOptions]) -> None:
    model = skeleton(dense, options(), torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_zeros_of_others_are_adopted(options: Callable[..., PruneOptions], tmp_path: Path) -> None:
    pruned = prune(options("once", pattern="2:8"))
    (pruned.out / MANIFEST).unlink()
    adopted = prune(options("adopted", model=str(pruned.out), keep_zeros=True))
    assert contents(adopted.out) == contents(pruned.out)
    assert (adopted.pattern, adopted.criterion, adopted.calibration) == ("2:8", None, None)
    assert read_json(adopted.out / MANIFEST)["pattern"] == "2:8"
    with pytest.raises(UsageError, match="has no zeros to keep"):
        prune(options("nothing", keep_zeros=True))
    assert not (tmp_path / "nothing").exists()


def test_the_fit_of_every_block_is_reported(options: Callable[..., PruneOptions]) -> None:
    report = prune(options(reconstruct="attention,mlp", reconstruct_epochs=2))
    assert list(report.reconstruction) == [f"model.layers.{index}" for index in range(BLOCKS)]
    for parts in report.reconstruction.values():
        assert list(parts) == ["attention", "mlp"]
        assert all(0 < fit.after <= fit.before < 1 for fit in parts.values())
        assert parts["mlp"].before == parts["attention"].after  # of the same block, one after the other
    noted = read_json(report.out / MANIFEST)["reconstruction"]
    assert noted == {
        block: {part: asdict(fit) for part, fit in fits.items()} for block, fits in report.reconstruction.items()
    }
    assert not prune(options("plain")).reconstruction


def test_a_sparse_model_is_pruned_further(options: Callable[..., PruneOptions], tmp_path: Path) -> None:
    once = tensors(prune(options("once", pattern="2:4")))
    for criterion in ("wanda", "ria", "sparsegpt"):
        report = prune(options(criterion, model=str(tmp_path / "once"), pattern="75%", criterion=criterion))
        twice = tensors(report)
        assert report.sparsity == pytest.approx(0.75, abs=0.01)
        assert all(not twice[name][once[name] == 0].any() for name in report.tensors)


def test_owl_varies_the_sparsity_and_keeps_its_mean(options: Callable[..., PruneOptions]) -> None:
    report = prune(options(pattern="60%", allocation="owl", owl_threshold=2))
    blocks: dict[str, list[float]] = {}
    for name, one in report.tensors.items():
        blocks.setdefault(name.split(".")[2], []).append(one.sparsity)
    means = [sum(values) / len(values) for values in blocks.values()]
    assert max(means) - min(means) > 0.01
    assert all(0.5 < mean < 0.69 for mean in means)
    assert sum(means) / len(means) == pytest.approx(0.6, abs=0.02)
