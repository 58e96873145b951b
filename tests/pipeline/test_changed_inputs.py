"""A killed command goes on only with the inputs that it began with; a changed one is named, and nothing is mixed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spp.adapters import merge as merging
from spp.adapters.options import MergeOptions
from spp.checkpoints.atomic_folder import partial_folder, work_folder
from spp.checkpoints.json_files import read_json, write_json
from spp.checkpoints.lock import locked
from spp.checkpoints.rewrite import Rewriting
from spp.errors import SppError, UsageError
from spp.pipeline.options import RunOptions
from spp.pipeline.run import run
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune
from spp.pruning.pruned_blocks import PrunedBlocks
from spp.training.options import TrainOptions
from spp.training.progress_callback import TrainingProgress
from spp.training.train import train

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def change_weights(folder: Path) -> None:
    """One number of one tensor, in its last row; the file stays as long as it was."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[WEIGHT][-1, -1] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder: Path) -> None:
    """What the model computes, with the same weights."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "rms_norm_eps": 1e-2})


def change_tokenizer(folder: Path) -> None:
    """What the same text is for the model."""
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer + "\n")


CHANGES = {
    change_weights: "weights of the model changed",
    change_config: "configuration or tokenizer of the model changed",
    change_tokenizer: "configuration or tokenizer of the model changed",
}


def stop_prune(patch: pytest.MonkeyPatch) -> None:
    real = PrunedBlocks.keep

    def keep(self: PrunedBlocks, index: int) -> object:
        if index == 1:
            raise KeyboardInterrupt
        return real(self, index)

    patch.setattr(PrunedBlocks, "keep", keep)


def stop_train(patch: pytest.MonkeyPatch) -> None:
    real = TrainingProgress.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        real(self, args, state, control, logs, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    patch.setattr(TrainingProgress, "on_log", on_log)


def stop_merge(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(merging, "_AT_ONCE", 1)
    patch.setattr(Rewriting, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))


@pytest.fixture
def pruned(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    options = {"model": str(tiny_checkpoint), "out": tmp_path / "pruned", "pattern": "2:4", "criterion": "magnitude"}
    return prune(PruneOptions.build(options)).out


TRAINING = {"window": 32, "max_steps": 4, "save_steps": 2, "batch_size": 2, "learning_rate": 0.1}


@pytest.fixture(params=["prune", "train", "merge"])
def command(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, pruned: Path, stories: Path, tmp_path: Path
) -> tuple[Callable[[], object], Callable[[pytest.MonkeyPatch], None], Path, Path]:
    """Work to do, how to stop it in the middle, the model that it reads, and its output."""
    out = tmp_path / "out"
    if request.param == "prune":
        values = {"model": str(tiny_checkpoint), "out": out, "calibration": str(stories), "samples": 2, "window": 16}
        return lambda: prune(PruneOptions.build(values)), stop_prune, tiny_checkpoint, out
    values = {"model": str(pruned), "out": tmp_path / "adapter", "data": str(stories), **TRAINING}
    if request.param == "train":
        return lambda: train(TrainOptions.build({**values, "out": out})), stop_train, pruned, out
    adapter = train(TrainOptions.build(values)).out
    asked = MergeOptions(model=str(pruned), adapter=adapter, out=out)
    return lambda: merging.merge(asked), stop_merge, pruned, out


@pytest.mark.parametrize("change", CHANGES)
def test_a_killed_command_does_not_go_on_with_another_model(command, change, monkeypatch) -> None:
    work, stop, model, out = command
    with monkeypatch.context() as patch:
        stop(patch)
        with pytest.raises(KeyboardInterrupt):
            work()
    change(model)
    with pytest.raises(UsageError, match=rf"{CHANGES[change]}.*--overwrite"):
        work()
    assert not out.exists()
    assert partial_folder(out).is_dir() and work_folder(out).is_dir()


def test_two_processes_never_train_the_same_adapter(pruned, stories, tmp_path) -> None:
    options = {"model": str(pruned), "out": tmp_path / "adapter", "data": str(stories), **TRAINING}
    refused: list[UsageError] = []

    def second() -> None:
        try:
            train(TrainOptions.build(options))
        except UsageError as error:
            refused.append(error)

    with locked(tmp_path / "adapter"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another process is writing" in str(refused[0])


@pytest.fixture
def begun(tiny_checkpoint, stories, tmp_path, monkeypatch) -> RunOptions:
    """A run that was stopped before it merged."""
    values = {"model": str(tiny_checkpoint), "train": str(stories), "eval": str(stories), "out": tmp_path / "run"}
    options = RunOptions.build({**values, "samples": 2, **TRAINING})

    def stopped(_: object) -> None:
        raise SppError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr("spp.pipeline.stages.merge", stopped)
        with pytest.raises(SppError, match="went away"):
            run(options)
    return options


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_another_model(begun, tiny_checkpoint, change) -> None:
    change(tiny_checkpoint)
    with pytest.raises(UsageError, match=rf"{CHANGES[change]}.*--overwrite"):
        run(begun)


def test_a_run_does_not_go_on_with_other_data(begun, stories) -> None:
    stories.write_text(stories.read_text().replace("a", "e"))
    with pytest.raises(UsageError, match=r"training data changed; evaluation text changed.*--overwrite"):
        run(begun)


@pytest.mark.parametrize(("folder", "file"), [("pruned", "config.json"), ("adapter", "adapter_config.json")])
def test_a_run_does_not_go_on_from_a_stage_that_was_edited(begun, folder, file) -> None:
    path = begun.out / folder / file
    path.write_text(path.read_text() + " ")
    with pytest.raises(UsageError, match=rf"{folder} was changed after this run had written it.*--overwrite"):
        run(begun)


def test_a_damaged_record_of_a_stage_is_made_again(begun) -> None:
    (begun.out / "stages" / "train.json").write_text('{"report": ')
    assert run(begun).verified


def test_a_damaged_request_of_a_run_is_named(begun) -> None:
    (begun.out / "run.json").write_text("[1, 2]")
    with pytest.raises(UsageError, match=r"run\.json is damaged.*--overwrite"):
        run(begun)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": "nonsense"}, "target-modules: the model has no nonsense"),
        ({"report_to": "nowhere"}, "report-to: nowhere cannot be used"),
        ({"teacher": "./nothing"}, "nothing"),
        ({"train": "nothing.jsonl"}, "nothing.jsonl': no such file"),
        ({"eval": "nothing.jsonl"}, "nothing.jsonl': no such file"),
        ({"pattern": "3:7"}, "pattern 3:7 does not divide"),
        ({"device_batch_size": 3}, "device-batch-size 3 does not divide"),
        ({"window": 10**6}, "window"),
    ],
)
def test_a_run_checks_every_stage_before_it_writes(tiny_checkpoint, stories, tmp_path, change, message) -> None:
    values = {"model": str(tiny_checkpoint), "train": str(stories), "eval": str(stories), "out": tmp_path / "run"}
    with pytest.raises(UsageError, match=message):
        run(RunOptions.build({**values, **change}))
    assert not (tmp_path / "run").exists()


def test_a_run_names_every_problem_at_once(tiny_checkpoint, stories, tmp_path) -> None:
    values = {"model": str(tiny_checkpoint), "train": "nothing.jsonl", "eval": str(stories), "out": tmp_path / "run"}
    with pytest.raises(UsageError) as caught:
        run(RunOptions.build({**values, "report_to": "nowhere", "target_modules": "nonsense"}))
    assert all(word in str(caught.value) for word in ("3 problems", "nothing.jsonl", "nowhere", "nonsense"))


def test_two_processes_never_make_the_same_run(tiny_checkpoint, stories, tmp_path) -> None:
    values = {"model": str(tiny_checkpoint), "train": str(stories), "eval": str(stories), "out": str(tmp_path / "run")}
    words = [f"--{name}={value}" for name, value in values.items()]
    with locked(tmp_path / "run"):
        command = [sys.executable, "-m", "spp", "run", *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "another process is writing" in done.stderr
    assert not (tmp_path / "run").exists()
