"""The whole run on a tiny model: every folder loads without spp, figures are consistent, stages resume."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from spp.checkpoints.json_files import read_json
from spp.errors import SppError, UsageError
from spp.pipeline.options import RunOptions
from spp.pipeline.run import run
from spp.reporting.inputs import read_results
from spp.reporting.results import gap_closed


def options(model, stories, out, **changes) -> RunOptions:
    values = {"model": str(model), "train": str(stories), "eval": str(stories), "out": out}
    values |= {"samples": 4, "window": 32, "epochs": 2, "learning_rate": 0.05}
    return RunOptions.build({**values, **changes})


@pytest.fixture
def finished(tmp_path, tiny_checkpoint, stories):
    return run(options(tiny_checkpoint, stories, tmp_path / "run"))


def test_results_say_what_was_done(finished, tmp_path):
    results = read_json(finished.out / "results.json")
    assert results == json.loads(json.dumps(finished.plain(), default=str))
    assert set(results["perplexity"]) == {"dense", "pruned", "spp"}
    assert results["gap_closed"] == pytest.approx(gap_closed(**results["perplexity"]))
    assert results["verified"] is True
    assert results["peak_rss_bytes"] > 10**8
    assert {"prune", "train", "merge", "verify", "evaluate_spp"} <= set(results["seconds"])
    protocol = results["protocol"]
    assert (protocol["pattern"], protocol["criterion"]) == ("2:4", "wanda")
    assert protocol["calibration"]["source"] == protocol["train"]  # nothing else was named
    assert protocol["evaluation"]["per_document"] is True and protocol["evaluation"]["window"] == 32
    assert protocol["criterion_title"] == "Wanda"
    assert results["training"]["steps"] == 50
    for part, stage in (("training", "train"), ("verification", "verify")):
        reported = read_json(finished.out / "stages" / f"{stage}.json")["report"]
        assert json.dumps(results[part]) == json.dumps(reported)  # to the order, and to what is no float
    assert read_results(finished.out).plain() == results
    assert results["versions"]["torch"] == torch.__version__
    assert results["command"].startswith("spp run ")
    assert "</html>" in (finished.out / "report.html").read_text()


def test_models_that_do_not_fit_are_evaluated_block_by_block(finished, tmp_path, tiny_checkpoint, stories):
    streamed = run(options(tiny_checkpoint, stories, tmp_path / "streamed", stream=True))
    whole = finished.results.perplexity
    assert streamed.results.perplexity == {name: pytest.approx(value, rel=1e-6) for name, value in whole.items()}
    assert streamed.results.protocol.evaluation["streamed"] and not finished.results.protocol.evaluation["streamed"]
    assert not list(streamed.out.glob(".*"))


def test_every_folder_loads_without_spp_and_merging_changes_nothing(finished, tiny_tokenizer):
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[2])\n"
        "assert 'spp' not in sys.modules\n"
        "torch.save(model(torch.arange(4, 36)[None]).logits, sys.argv[3])\n"
    )
    logits = finished.out / "logits.pt"
    folders = [str(finished.out / name) for name in ("merged", "pruned")]
    subprocess.run([sys.executable, "-c", code, *folders, str(logits)], check=True)

    from peft import PeftModel

    import spp  # noqa: F401 (this is what makes PEFT know SPP)

    base = AutoModelForCausalLM.from_pretrained(finished.out / "pruned", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, finished.out / "adapter")
    with torch.no_grad():
        adapted = model(torch.arange(4, 36)[None]).logits
    merged = torch.load(logits, weights_only=True)
    torch.testing.assert_close(merged, adapted, rtol=2**-6, atol=2**-6 * float(adapted.abs().max()))


def test_a_run_resumes_after_its_last_finished_stage(tmp_path, tiny_checkpoint, stories, monkeypatch):
    out = tmp_path / "run"
    asked = options(tiny_checkpoint, stories, out)

    def killed(_):
        raise SppError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr("spp.pipeline.stages.merge", killed)
        with pytest.raises(SppError, match="went away"):
            run(asked)
    assert not (out / "results.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "stages").iterdir()}
    assert set(kept) == {"evaluate_dense.json", "prune.json", "evaluate_pruned.json", "train.json"}
    (out / "merged").mkdir()  # what a killed merge might leave
    (out / "merged" / "junk").touch()

    assert run(asked).verified
    assert {name: (out / "stages" / name).stat().st_mtime_ns for name in kept} == kept
    assert not (out / "merged" / "junk").exists()


def test_another_request_in_the_same_folder_is_refused(finished, tiny_checkpoint, stories):
    changed = options(tiny_checkpoint, stories, finished.out, pattern="4:8")
    with pytest.raises(UsageError, match=r"pattern was 2:4 and is 4:8 now.*--overwrite"):
        run(changed)
    (finished.out / "notes.txt").write_text("mine")
    again = run(changed.model_copy(update={"overwrite": True}))
    assert again.results.protocol.pattern == "4:8"
    assert (finished.out / "notes.txt").read_text() == "mine"


def test_adopted_zeros_are_reported_as_they_were_found(finished, tmp_path, stories):
    """A 4:8 request would say so; nothing was asked for here, and nothing was chosen."""
    pruned = run(options(finished.out / "pruned", stories, tmp_path / "adopted", keep_zeros=True)).plain()
    protocol = pruned["protocol"]
    assert (protocol["pattern"], protocol["criterion"], protocol["criterion_title"]) == ("2:4", None, None)
    assert protocol["calibration"] is None and pruned["verified"]
    page = (tmp_path / "adopted" / "report.html").read_text()
    assert "pruned 2:4, fine-tuned with SPP" in page


def test_zeros_that_matrices_have_in_different_shares_are_verified(tmp_path, tiny_checkpoint, stories):
    """OWL's ratio is a mean over blocks, and so is that of zeros which are adopted from it."""
    settings = {"pattern": "60%", "allocation": "owl", "owl_threshold": 2.0}
    owl = run(options(tiny_checkpoint, stories, tmp_path / "owl", **settings))
    assert len({round(one["sparsity"], 2) for one in owl.plain()["sparsity"]["tensors"].values()}) > 1
    assert owl.verified, owl.results.verification.problems
    adopted = run(options(owl.out / "pruned", stories, tmp_path / "adopted", keep_zeros=True))
    assert adopted.verified, adopted.results.verification.problems


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "pattern", "train", "evaluation", "more"),
    [
        ("story", "50%", "tinystories_train.jsonl", "tinystories_valid.jsonl", {}),
        ("stories260K", "2:4", "tinystories_train.jsonl", "tinystories_valid.jsonl", {}),
        ("shakespeare_opt", "2:4", "shakespeare.txt", "shakespeare.txt", {"max_steps": 1000}),
    ],
)
def test_real_models(shared_data, tmp_path, model, pattern, train, evaluation, more):
    corpora = shared_data / "corpora"
    asked = RunOptions.build(
        {
            "model": str(shared_data / "models" / model),
            "pattern": pattern,
            "train": str(corpora / train),
            "eval": str(corpora / evaluation),
            "out": tmp_path / "run",
            "limit": 300,
            "learning_rate": 0.02,  # these are small
            **more,
        }
    )
    results = run(asked).plain()
    assert results["verified"]
    assert results["perplexity"]["pruned"] > 1.05 * results["perplexity"]["dense"]
    assert results["gap_closed"] > 0.5


def test_the_gap_is_counted_from_the_mask_alone(tmp_path, tiny_checkpoint, stories):
    settings = {"reconstruct": "block", "reconstruct_epochs": 1, "max_steps": 2}
    results = run(options(tiny_checkpoint, stories, tmp_path / "run", **settings)).plain()
    plain = run(options(tiny_checkpoint, stories, tmp_path / "plain", max_steps=2)).plain()
    perplexity = results["perplexity"]
    assert list(perplexity) == ["dense", "pruned", "reconstructed", "spp"]
    assert perplexity["pruned"] == plain["perplexity"]["pruned"] != perplexity["reconstructed"]
    three = [perplexity[name] for name in ("dense", "pruned", "spp")]
    assert results["gap_closed"] == (None if gap_closed(*three) is None else pytest.approx(gap_closed(*three)))
    assert not (tmp_path / "run" / "one-shot").exists()
    assert "pruned + reconstructed" in (tmp_path / "run" / "report.html").read_text()
    assert "pruned + reconstructed" in (tmp_path / "run" / "merged" / "README.md").read_text()


def test_full_fine_tuning_needs_no_merge(tmp_path, tiny_checkpoint, stories):
    """The training stage writes the model, which later stages verify, evaluate and give a card."""
    asked = options(tiny_checkpoint, stories, tmp_path / "run", method="full", learning_rate=None, max_steps=6)
    report = run(asked)
    assert {"train", "verify", "evaluate_spp"} <= set(report.results.seconds)
    assert "merge" not in report.results.seconds and not (report.out / "adapter").exists()
    assert report.verified and report.results.training.method == "full"
    assert report.results.perplexity["spp"] < report.results.perplexity["pruned"]
    assert "| this model |" in (report.out / "merged" / "README.md").read_text()
    assert run(asked).plain()["seconds"] == report.plain()["seconds"]  # nothing is done again
