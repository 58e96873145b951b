"""The shortest use of spp from end to end: prune a tiny random Llama, train two steps, merge, verify; and `spp run`.

`make test-oldest` runs it with the oldest versions of the dependencies, in an environment without test tools. It takes
some seconds, and downloads nothing.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import spp
from spp.cli.entry_point import main as spp_command
from spp.pipeline.bundled import bundled_model

SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "pydantic", "safetensors")
TEXT = "The cat sat. The dog ran after the owl, and the hen hid from the fox.\n\n"


def main() -> None:
    """Do it in a folder that goes afterwards; an AssertionError where a zero was lost or nothing was learned."""
    print(", ".join(f"{name} {version(name)}" for name in SHOWN))
    with tempfile.TemporaryDirectory() as folder:
        use_api(Path(folder))
        use_command(Path(folder))
    print("pruned, trained, merged, and verified, by the API and by spp run")


def use_api(folder: Path) -> None:
    """Make a model, and call each stage; everything stays in the folder."""
    model, pruned, adapter, merged = (str(folder / name) for name in ("model", "pruned", "adapter", "merged"))
    text = folder / "text.txt"
    text.write_text(TEXT * 100, encoding="utf-8")
    make_model(model)
    common = {"window": 32, "device": "cpu"}
    spp.prune(spp.PruneOptions.build({"model": model, "out": pruned, "calibration": str(text), "samples": 4, **common}))
    training = {"model": pruned, "out": adapter, "data": str(text), "max_steps": 2, "batch_size": 2, **common}
    trained = spp.train(spp.TrainOptions.build(training))
    assert trained.steps == 2, f"{trained.steps} steps, not 2"
    spp.merge(spp.MergeOptions.build({"model": pruned, "adapter": adapter, "out": merged}))
    report = spp.verify(spp.VerifyOptions.build({"base": pruned, "other": merged, "pattern": "2:4"}))
    assert report.verified and report.zeros > 0, report.problems
    changed = sum(proof.survivors - proof.unchanged for proof in report.tensors.values())
    assert changed > 0, "training changed no weight"


def use_command(folder: Path) -> None:
    """The same in one command, with its report: it needs the packages for the terminal, recipes and pages, too."""
    text = str(folder / "text.txt")
    command = ["run", "--model", str(folder / "model"), "--train", text, "--eval", text, "--out", str(folder / "run")]
    small = "--window 32 --samples 4 --max-steps 2 --batch-size 2 --limit 4 --device cpu"
    assert spp_command([*command, *small.split()]) == 0
    assert list((folder / "run").glob("*.html")), "no report"


def make_model(out: str) -> None:
    """A random Llama of two blocks with the bundled model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(str(bundled_model()))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
