"""Several processes train as one: with DDP, FSDP2 and ZeRO-3, on gloo; the same losses, factors and checkpoints."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model_of
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from spp.checkpoints.atomic_folder import work_folder
from spp.checkpoints.json_files import read_json
from spp.errors import UsageError
from spp.models.experts import stacks_in
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune
from spp.training.options import CacheTeacherOptions, TrainOptions
from spp.training.teacher_cache import cache_teacher
from spp.training.train import train

pytestmark = pytest.mark.timeout(600)

_PROGRAM = """
import json, os, sys, warnings
from pathlib import Path
from spp.training.options import TrainOptions
from spp.training import checkpoints
from spp.training.train import train

values = json.loads(sys.argv[1])
if stop := values.pop("killed_at", None):
    on_save = checkpoints.Checkpoints.on_save
    def killed(self, args, state, *rest, **more):
        on_save(self, args, state, *rest, **more)
        args.distributed_state.wait_for_everyone()
        if state.global_step == stop:
            os._exit(7)
    checkpoints.Checkpoints.on_save = killed
report = train(TrainOptions.build(values))
if os.environ["RANK"] == "0":
    found = {"losses": report.losses, "validation": report.validation, "trainable": report.trainable_parameters}
    Path(values["out"] + ".json").write_text(json.dumps(found))
os._exit(0)  # gloo's threads sometimes abort an ordinary exit
"""

SHARDINGS = [
    "none",
    "fsdp",
    pytest.param(
        "zero3",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
        ],
    ),
]


@pytest.fixture
def pruned(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    prune(PruneOptions.build({"model": str(tiny_checkpoint), "out": tmp_path / "pruned", "criterion": "magnitude"}))
    return tmp_path / "pruned"


@pytest.fixture
def values(pruned: Path, stories: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a run that saves in its middle, and evaluates."""
    return {
        "model": str(pruned),
        "data": str(stories),
        "window": 48,
        "learning_rate": 0.1,
        "max_steps": 8,
        "r": 4,
        "save_steps": 4,
        "validation": 18,  # three batches in one process, five in two
        "device": "cpu",
        "dtype": "float32",
    }


def start(program: Path, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Two processes, as torchrun starts them."""
    program.write_text(_PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*launcher, str(program), json.dumps(values, default=str)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def trained_by_two(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What two processes report of a run that ends well."""
    done = start(folder / "program.py", values)
    assert done.returncode == 0, done.stderr[-4000:]
    return read_json(Path(values["out"] + ".json"))


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("pack", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_train_as_one(values: dict[str, Any], tmp_path: Path, sharding: str, pack: bool) -> None:
    values |= {"pack": pack}
    alone = train(TrainOptions.build({**values, "out": tmp_path / "alone"}))
    found = trained_by_two(tmp_path, {**values, "out": str(tmp_path / "two"), "sharding": sharding})
    assert found["trainable"] == alone.trainable_parameters
    for ours, theirs in ((alone.losses, found["losses"]), (alone.validation, found["validation"])):
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        for (_, one), (_, two) in zip(ours, theirs, strict=True):
            assert abs(one - two) < 1e-3  # of some 4; sums of gradients in another order, and AdamW divides by them
    ours, theirs = factors(tmp_path / "alone"), factors(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)


FULL = {"method": "full", "learning_rate": 0.01}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_the_weights_as_one(values: dict[str, Any], tmp_path: Path, sharding: str) -> None:
    del values["r"]
    values |= FULL
    alone = train(TrainOptions.build({**values, "out": tmp_path / "alone"}))
    found = trained_by_two(tmp_path, {**values, "out": str(tmp_path / "two"), "sharding": sharding})
    assert found["trainable"] == alone.trainable_parameters
    for (_, one), (_, two) in zip(alone.losses, found["losses"], strict=True):
        assert abs(one - two) < 1e-3
    base, ours, theirs = (weights(one) for one in (Path(values["model"]), tmp_path / "alone", tmp_path / "two"))
    for name in base:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)
        assert not theirs[name][base[name] == 0].any()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_killed_run_of_two_resumes_the_weights_to_the_bit(
    values: dict[str, Any], tmp_path: Path, sharding: str
) -> None:
    del values["r"]
    values |= FULL | {"sharding": sharding}
    assert start(tmp_path / "program.py", {**values, "out": str(tmp_path / "whole")}).returncode == 0
    again = {**values, "out": str(tmp_path / "again")}
    assert start(tmp_path / "program.py", {**again, "killed_at": 4}).returncode != 0
    assert not (tmp_path / "again").exists() and (work_folder(tmp_path / "again") / "checkpoint-4").is_dir()
    done = start(tmp_path / "program.py", again)
    assert done.returncode == 0, done.stderr[-4000:]
    assert read_json(tmp_path / "again.json") == read_json(tmp_path / "whole.json")
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_experts_as_one(
    values: dict[str, Any], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, sharding: str
) -> None:
    """A process whose tokens reach only some of the experts still has a gradient for the stack of all."""
    model = tiny_model_of("mixtral", num_local_experts=8)
    for stack in stacks_in(model).values():
        stack.weight.data[..., ::2] = 0
    model.save_pretrained(tmp_path / "experts")
    tiny_tokenizer.save_pretrained(tmp_path / "experts")
    values |= {"model": str(tmp_path / "experts"), "max_steps": 4, "learning_rate": 0.02}
    alone = train(TrainOptions.build({**values, "out": tmp_path / "alone"}))
    found = trained_by_two(tmp_path, {**values, "out": str(tmp_path / "two"), "sharding": sharding})
    for (_, one), (_, two) in zip(alone.losses, found["losses"], strict=True):
        assert abs(one - two) < 1e-3
    ours, theirs = factors(tmp_path / "alone"), factors(tmp_path / "two")
    assert ours.keys() == theirs.keys() and any("experts.spp_A.down_proj" in name for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("cached", [False, True])
def test_two_processes_learn_from_a_teacher(
    values: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path, sharding: str, cached: bool
) -> None:
    values |= {"teacher": str(tiny_checkpoint), "teacher_weight": 0.7}
    if cached:
        values["teacher"] = str(tmp_path / "answers")
        asked = {"model": str(tiny_checkpoint), "out": tmp_path / "answers", "data": values["data"], "window": 48}
        cache_teacher(CacheTeacherOptions.build({**asked, "device": "cpu"}))
    else:
        values["teacher_features"] = 0.1
    alone = train(TrainOptions.build({**values, "out": tmp_path / "alone"}))
    found = trained_by_two(tmp_path, {**values, "out": str(tmp_path / "two"), "sharding": sharding})
    for (_, one), (_, two) in zip(alone.losses, found["losses"], strict=True):
        assert abs(one - two) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_killed_run_of_two_resumes_to_the_bit(values: dict[str, Any], tmp_path: Path, sharding: str) -> None:
    values |= {"sharding": sharding}
    done = start(tmp_path / "program.py", {**values, "out": str(tmp_path / "whole")})
    assert done.returncode == 0, done.stderr[-4000:]
    again = {**values, "out": str(tmp_path / "again")}
    assert start(tmp_path / "program.py", {**again, "killed_at": 4}).returncode != 0
    assert not (tmp_path / "again").exists() and (work_folder(tmp_path / "again") / "checkpoint-4").is_dir()
    done = start(tmp_path / "program.py", again)
    assert done.returncode == 0, done.stderr[-4000:]
    assert read_json(tmp_path / "again.json") == read_json(tmp_path / "whole.json")
    ours, theirs = factors(tmp_path / "whole"), factors(tmp_path / "again")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not (work_folder(tmp_path / "again")).exists()


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(values: dict[str, Any], tmp_path: Path) -> None:
    whole = train(TrainOptions.build({**values, "out": tmp_path / "whole"}))
    again = {**values, "out": str(tmp_path / "again")}
    assert start(tmp_path / "program.py", {**again, "killed_at": 4}).returncode != 0
    assert (work_folder(tmp_path / "again") / "checkpoint-4").is_dir()
    resumed = train(TrainOptions.build(again))
    assert resumed.tokens == whole.tokens
    for (_, one), (_, two) in zip(whole.losses, resumed.losses, strict=True):
        assert abs(one - two) < 1e-3


@pytest.mark.parametrize("sharding", ["fsdp", "zero3"])
def test_one_process_has_nobody_to_share_with(values: dict[str, Any], tmp_path: Path, sharding: str) -> None:
    with pytest.raises(UsageError, match=f"sharding {sharding} divides.*torchrun --nproc-per-node"):
        train(TrainOptions.build({**values, "out": tmp_path / "out", "sharding": sharding}))
