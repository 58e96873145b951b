"""Perplexity block by block: the same as in memory, in little memory, and whole after a kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIGS
from families import FAMILIES, tiny_model_of
from killing import run_killed
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from scripts import make_synthetic_model
from spp.checkpoints.options import PackOptions
from spp.errors import SppError, UsageError
from spp.evaluation.comparison import Comparison
from spp.evaluation.evaluate import evaluate
from spp.evaluation.options import EvalOptions
from spp.evaluation.perplexity import EvalReport
from spp.evaluation.streaming import batches_of
from spp.evaluation.streaming_memory import predict_streaming
from spp.models.blockwise.hidden_states import FolderStates
from spp.models.blockwise.journal import FolderJournal
from spp.models.blockwise.streamed_blocks import StreamedBlocks
from spp.pruning.pack import pack

MakeModel = Callable[..., PreTrainedModel]
MIB = 2**20
SENTENCES = "The cat sat on the mat, and then it slept. A dog saw the hen, the fox and an owl's nest! "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Documents of many lengths, from one token to more than a window."""
    path = tmp_path / "text.jsonl"
    lengths = [1, 2, 3, 5, 9, 14, 15, 16, 17, 33, 60, *range(40, 60, 2)]
    path.write_text("".join(json.dumps({"text": SENTENCES[:length]}) + "\n" for length in lengths))
    return path


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(model: Path, text: Path, **changes: Any) -> EvalOptions:
    values = {"model": str(model), "text": str(text), "window": 16, "device": "cpu", "stream_folder": text.parent}
    return EvalOptions.build(values | changes)


def score(model: Path, text: Path, **changes: Any) -> EvalReport:
    report = evaluate(options(model, text, **changes))
    assert isinstance(report, EvalReport)
    return report


@pytest.mark.parametrize("per_document", [True, False], ids=["documents", "windows"])
@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_streaming_equals_evaluation_in_memory(
    family: str, per_document: bool, text: Path, tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: Any
) -> None:
    folder = save(tiny_model(family), tiny_tokenizer, tmp_path / "model")
    streamed = score(folder, text, per_document=per_document, stream=True)
    whole = score(folder, text, per_document=per_document, stream=False)
    assert (streamed.streamed, whole.streamed) == (True, False)
    assert abs(streamed.nll - whole.nll) < 1e-6
    assert (streamed.tokens, streamed.windows) == (whole.tokens, whole.windows)
    assert not list(tmp_path.glob(".spp-eval*"))  # nothing is left behind


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(TINY_CONFIGS)))
def test_every_family_can_be_streamed(family: str, text: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """PaliGemma sees a text as a whole, padding too, so only its full windows are the same."""
    folder = save(tiny_model_of(family), tiny_tokenizer, tmp_path / "model")
    by_document = family != "paligemma"
    streamed, whole = (score(folder, text, per_document=by_document, stream=stream) for stream in (True, False))
    assert abs(streamed.nll - whole.nll) < 1e-6


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"num_hidden_layers": 1}], ids=["tied", "one block"]
)
def test_tied_embeddings_and_a_single_block(
    changes: dict[str, Any], text: Path, tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: Any
) -> None:
    folder = save(tiny_model("llama", **changes), tiny_tokenizer, tmp_path / "model")
    streamed, whole = (score(folder, text, stream=stream) for stream in (True, False))
    assert abs(streamed.nll - whole.nll) < 1e-6


def test_several_models_packed_or_plain_go_through_one_pass(
    text: Path, tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block of each model is read once for the pass, and the first one once more for the embeddings' capture."""
    model = tiny_model("llama", num_hidden_layers=3)
    dense = save(model, tiny_tokenizer, tmp_path / "dense")
    for block in model.model.layers:
        block.mlp.down_proj.weight.data[:, ::2] = 0
    plain = save(model, tiny_tokenizer, tmp_path / "plain")
    pack(PackOptions(model=str(plain), out=tmp_path / "packed"))
    shallow = save(tiny_model("llama", num_hidden_layers=1), tiny_tokenizer, tmp_path / "shallow")
    loaded, real = [], StreamedBlocks.loaded
    monkeypatch.setattr(StreamedBlocks, "loaded", lambda self, index: loaded.append((self, index)) or real(self, index))
    folders = [plain, tmp_path / "packed", shallow]
    comparison = evaluate(options(dense, text, others=tuple(map(str, folders)), stream=True))
    assert isinstance(comparison, Comparison)
    reads = {model: [index for one, index in loaded if one is model] for model, _ in loaded}
    assert [indices[1:] for indices in reads.values()] == [[0, 1, 2]] * 3 + [[0]]
    assert {indices[0] for indices in reads.values()} == {0}
    monkeypatch.undo()
    for folder in [dense, *folders]:
        found = comparison.models[str(folder)]
        assert isinstance(found, EvalReport)
        assert abs(found.nll - score(folder, text, stream=False).nll) < 1e-6
    assert comparison.models[str(plain)] != comparison.models[str(dense)]


EVALUATE = """
from spp.evaluation.evaluate import evaluate
from spp.evaluation.options import EvalOptions

evaluate(EvalOptions.build({values!r}))
"""


@pytest.mark.parametrize(
    ("module", "owner", "function", "call"),
    [
        ("checkpoints.scratch_folder", "Request", "write", 1),  # before anything is known of the work
        ("models.blockwise.hidden_states", "FolderStates", "__setitem__", 2),  # while the embeddings are computed
        ("models.blockwise.journal", "FolderJournal", "finish", 3),  # at the end of the second block of the first model
        ("evaluation.streaming", "_Pass", "_score", 2),  # when one of the models has been scored
        (
            "checkpoints.scratch_folder",
            "shutil",
            "rmtree",
            8,
        ),  # at the end: one at first, one after each block
    ],
)
def test_a_killed_evaluation_goes_on_to_the_same_bits(
    text: Path, tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: Any, module: str, owner: str, function: str,
    call: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first = save(tiny_model("llama", num_hidden_layers=3), tiny_tokenizer, tmp_path / "first")
    second = save(tiny_model("llama", num_hidden_layers=3, rms_norm_eps=1e-2), tiny_tokenizer, tmp_path / "second")
    asked = options(first, text, others=(str(second),), stream=True)
    whole = evaluate(asked)
    run_killed(EVALUATE.format(values=asked.model_dump(mode="json", exclude_unset=True)), module, owner, function, call)
    assert len(list(tmp_path.glob(".spp-eval-*[!k]"))) == 1  # the folder; its lock ends with k
    loaded, real = [], StreamedBlocks.loaded
    monkeypatch.setattr(StreamedBlocks, "loaded", lambda self, index: loaded.append(index) or real(self, index))
    resumed = evaluate(asked)
    assert isinstance(whole, Comparison) and isinstance(resumed, Comparison)
    assert nats(resumed) == nats(whole)
    assert not list(tmp_path.glob(".spp-eval*"))
    if function == "finish":
        assert sorted(loaded) == [0, 0, 1, 1, 2, 2]  # the first ones only to see in what form they return their output
    if function == "rmtree":
        assert not loaded


def nats(comparison: Comparison) -> dict[str, float]:
    return {name: report.nll for name, report in comparison.models.items() if isinstance(report, EvalReport)}


def test_another_request_or_a_changed_model_starts_anew(
    text: Path, tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: Any
) -> None:
    folder = save(tiny_model("llama", num_hidden_layers=3), tiny_tokenizer, tmp_path / "model")
    asked = options(folder, text, stream=True)
    program = EVALUATE.format(values=asked.model_dump(mode="json", exclude_unset=True))
    run_killed(program, "models.blockwise.journal", "FolderJournal", "finish", 3)
    save(tiny_model("llama", num_hidden_layers=3, rms_norm_eps=1e-2), tiny_tokenizer, folder)
    assert abs(score(folder, text, stream=True).nll - score(folder, text, stream=False).nll) < 1e-6
    assert score(folder, text, stream=True, window=8).nll != score(folder, text, stream=True).nll


def test_a_full_disk_is_one_error_and_the_work_goes_on(
    text: Path, tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_model("llama", num_hidden_layers=3), tiny_tokenizer, tmp_path / "model")
    real, finished = FolderStates.__setitem__, FolderJournal.finish
    blocks = 0

    def counted(self: FolderJournal, walk: str, result: Any) -> None:
        nonlocal blocks
        finished(self, walk, result)
        blocks += 1

    def full(self: FolderStates, batch: int, state: Any) -> None:
        if blocks == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, batch, state)

    with monkeypatch.context() as patch:
        patch.setattr(FolderJournal, "finish", counted)
        patch.setattr(FolderStates, "__setitem__", full)
        with pytest.raises(
            SppError, match="no space is left on the disk of .*finished blocks are kept.*--stream-folder"
        ):
            score(folder, text, stream=True)
    loaded, load = [], StreamedBlocks.loaded
    monkeypatch.setattr(StreamedBlocks, "loaded", lambda self, index: loaded.append(index) or load(self, index))
    assert abs(score(folder, text, stream=True).nll - score(folder, text, stream=False).nll) < 1e-6
    assert loaded == [0, 2]  # the first to see in what form it returns its output


def test_too_small_a_disk_is_refused_before_any_work(
    text: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = predict_streaming(options(tiny_checkpoint, text, stream=True)).states_bytes
    assert needed > 2 * 665 * 32 * 4  # in and out of a block; tokens; features; bytes of fp32
    usage = shutil.disk_usage(tmp_path)
    for free in (needed - 1, needed):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage._replace(free=free))
        if free < needed:
            with pytest.raises(UsageError, match="hidden states need .* GiB, and the disk of .*--stream-folder"):
                score(tiny_checkpoint, text, stream=True)
        else:
            assert score(tiny_checkpoint, text, stream=True).streamed
        assert not list(tmp_path.glob(".spp-eval*"))


def test_a_model_that_does_not_fit_is_streamed_by_itself(
    text: Path, tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    folder = save(model, tiny_tokenizer, tmp_path / "model")
    in_fp32 = 4 * sum(parameter.numel() for parameter in model.parameters())
    for free, streamed in ((in_fp32, True), (2 * in_fp32, False)):  # 0.8 of the free memory may be taken
        monkeypatch.setattr("spp.evaluation.streaming.available_bytes", lambda device, free=free: free)
        assert score(folder, text).streamed is streamed
    monkeypatch.setattr("spp.evaluation.streaming.available_bytes", lambda device: in_fp32)
    assert not score(folder, text, dtype="bfloat16").streamed
    assert not score(folder, text, stream=False).streamed


def test_a_model_whose_output_is_not_finite_has_no_perplexity_and_leaves_nothing(
    text: Path, tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = torch.inf
    folder = save(model, tiny_tokenizer, tmp_path / "model")
    with pytest.raises(SppError, match="not finite"):
        score(folder, text, stream=True)
    assert not list(tmp_path.glob(".spp-eval*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": "piqa", "text": "python-stdlib"},
            "stream is for the perplexity of a model on disk, and not for tasks",
        ),
        ({"adapter": "adapter"}, "stream is for the perplexity of a model on disk, and not for an adapter"),
    ],
)
def test_what_cannot_be_streamed_is_refused(changes: dict[str, Any], message: str) -> None:
    given = {"model": "model", "stream": True} | changes
    if "tasks" in given:
        given.pop("text")
    with pytest.raises(UsageError, match=message):
        EvalOptions.build(given)


def test_batches_hold_every_window_once_in_few_shapes() -> None:
    windows = [[length % 7 + 1] * length for length in range(2, 1001)]
    batches = list(batches_of(windows, torch.device("cpu")).values())
    rows = [row[:length].tolist() for batch in batches for row, length in zip(batch.ids, batch.lengths, strict=True)]
    assert sorted(rows) == sorted(windows)
    assert sum(int(batch.predicted().sum()) for batch in batches) == sum(len(window) - 1 for window in windows)
    assert len({batch.ids.shape[1] for batch in batches}) <= 64
    assert sum(batch.ids.numel() for batch in batches) < 1.1 * sum(map(len, windows))
    assert max(batch.ids.numel() for batch in batches) <= 2048
    assert max(batch.ids.shape[1] for batch in batches) == 1000  # no longer than the longest


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 0.3 GB, 0.6 GB in fp32, in six blocks."""
    folder = tmp_path_factory.mktemp("synthetic") / "dense"
    assert make_synthetic_model.main(["--gigabytes", "0.3", str(folder)]) == 0
    return folder


MEASURE = """
from spp.evaluation.evaluate import evaluate
from spp.evaluation.options import EvalOptions
from spp.runtime.memory import peak_rss_bytes

nll = evaluate(EvalOptions.build({values!r})).nll
print(peak_rss_bytes(), nll)
"""


def test_memory_stays_as_foretold_whatever_the_size(synthetic: Path, tmp_path: Path) -> None:
    """A process of its own, as the peak is that of a whole process; the libraries alone take about 0.4 GB."""
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES * 40)
    asked = options(synthetic, text, window=256, stream=True)
    command = [sys.executable, "-m", "spp", "eval", str(synthetic), "--text", str(text), "--window", "256", "--stream"]
    foretold = json.loads(
        subprocess.run([*command, "--dry-run", "--json"], capture_output=True, text=True, check=True).stdout
    )
    program = MEASURE.format(values=asked.model_dump(mode="json", exclude_unset=True))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[0])
    total = sum(foretold["parts"].values())
    assert abs(peak - total) < 0.1 * total, (total / MIB, peak / MIB)
    weights = 2 * sum(path.stat().st_size for path in synthetic.glob("*.safetensors"))  # in fp32
    assert peak - foretold["parts"]["Python and libraries"] < 0.6 * weights


def test_only_streaming_has_a_dry_run(text: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="pass --stream too"):
        predict_streaming(options(tiny_checkpoint, text))
    prediction = predict_streaming(options(tiny_checkpoint, text, stream=True))
    assert prediction.total == sum(prediction.parts.values()) > 0
    assert prediction.model == str(tiny_checkpoint)
    assert not list(tmp_path.glob(".spp-eval*"))
