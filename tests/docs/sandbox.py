"""A folder with everything that the docs mention, in tiny, and the ways to run a documented command in it.

A page that mentions another file or folder: add its name to one of the tables below. A command that cannot be small
enough by itself: add options to `SMALL`. One that cannot run at all is named, with the reason, in `NOT_RUN`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import torch
from pages import ROOT
from torch.distributed.run import get_args_parser
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spp.cli.commands import COMMANDS
from spp.cli.entry_point import main
from spp.cli.parser import build_parser
from spp.errors import UsageError

# What stands for what; the first name is the one that the others are copies of.
MODELS = {
    "dense": ["llama", "meta-llama/Llama-3.2-1B"],
    "pruned": ["pruned", "llama-2of4", "llama-elsewhere", "runs/demo/pruned"],
    "merged": ["merged", "llama-2of4-tuned"],
    "packed": ["llama-2of4-packed"],
    "adapter": ["adapter"],
    "answers": ["answers"],
    "run": ["runs/wanda", "runs/sparsegpt", "runs/magnitude"],
}
TEXTS = ["wiki.txt", "wikitext2_test.txt"]
RECORDS = ["c4.jsonl"]
ALPACA = ["alpaca.json"]

# Options that a command gets in addition, so that it takes a fraction of a second.
_FEW = "--window 32 --max-tokens 4000"
SMALL = {
    "run": f"{_FEW} --samples 4 --max-steps 2 --batch-size 8 --limit 4 --validation 2",
    "prune": "--window 32 --samples 4",
    "train": f"{_FEW} --max-steps 2 --batch-size 8 --validation 2",
    "cache-teacher": _FEW,
    "eval": "--window 32 --limit 4",
    "generate": "--max-new-tokens 4",
    "pack": "--window 32 --samples 4",
}
# The demo's own text is the standard library, which takes half a minute to read and to score.
DEMO = "--train alpaca.json --eval wiki.txt"
# Options that a command is run without.
LEFT_OUT = {"--sharding": "has no meaning for one process; tests/training/test_distributed.py runs several"}
# Parts of a command with which it only has to parse where a package is not installed ...
NEEDS = {"--quantize": "bitsandbytes", "--sharding zero3": "deepspeed"}
# ... or anywhere, and why; the same for Python.
PARSED = {
    "spp push": "uploads; tests/checkpoints/test_push.py has a hub of its own",
    "load_dataset(": "downloads",
    "to_semi_structured(": "needs CUDA; tests/test_semi_structured.py has what does not",
    "--tasks": "lm-eval downloads the tasks' data; the tests of the stage have local ones",
}
# Commands that only have to be sound: a target, a script with such options, an extra that exist.
NOT_RUN = {
    "make": "each target makes an environment, or takes minutes",
    "pip": "installs",
    "python": "benchmarks and scripts take from minutes to hours, and have tests of their own",
}
# Programs of others, which are not installed here.
ELSEWHERE = {"vllm": "vLLM's server", "convert_hf_to_gguf.py": "llama.cpp's"}


def fill(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the stock, in the current folder, which is `folder`; it takes a few seconds."""
    prose = ["The cat sat. The dog ran after the owl, and the hen hid from the fox." * 3 for _ in range(20)]
    for name in TEXTS:
        (folder / name).write_text("\n\n".join(prose))
    for name in RECORDS:
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in prose))
    for name in ALPACA:
        record = {"instruction": "Who sat?", "input": "", "output": "The cat."}
        (folder / name).write_text(json.dumps([record] * 40))
    model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    for command in (
        "prune llama pruned --calibration c4.jsonl",
        "train pruned adapter --data alpaca.json",
        "merge pruned adapter merged",
        "pack merged llama-2of4-packed",
        "cache-teacher llama answers --data alpaca.json",
        "run --model llama --train alpaca.json --eval wiki.txt --out runs/wanda",
    ):
        assert main(_small(shlex.split(command))) == 0
    for first, *others in MODELS.values():
        for name in others:
            shutil.copytree(folder / first, folder / name)
    _save_published(folder / "published-adapter", model)
    shutil.copytree(ROOT / "benchmarks" / "data", folder / "benchmarks" / "data")
    recipe = "model: ./llama\npattern: 50%\ntrain: alpaca.json\neval: wiki.txt\n"
    (folder / "recipe.yaml").write_text(recipe)


def _save_published(folder: Path, model: PreTrainedModel) -> None:
    """An adapter as the published code saves it, before its first step."""
    folder.mkdir()
    layers = {name: layer for name, layer in model.named_modules() if name.endswith("_proj")}
    tensors = {}
    for name, layer in layers.items():
        out_features, in_features = layer.get_parameter("weight").shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(16, in_features)
        tensors[f"base_model.model.{name}.lora_A.weight_col"] = torch.zeros(out_features, 1)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')


def run(command: str) -> int | str:
    """Run or check one documented command in the current folder: its exit code, or what is wrong with it."""
    words = shlex.split(command.replace("/shared/", "./"))
    if words[0] == "srun":
        words = words[1:]
    if words[0] == "torchrun":
        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.module and parsed.training_script == "spp", "torchrun starts `-m spp`"
        words = ["spp", *parsed.training_script_args]
    program = Path(words[0]).name
    if program != "spp":
        return _problem(program, words[1:])
    arguments = build_parser().parse_args(words[1:])
    lacking = [part for part, package in NEEDS.items() if importlib.util.find_spec(package) is None]
    if any(part in command for part in [*lacking, *PARSED]):
        return _refusal(words[1], arguments)
    if not getattr(arguments, "dry_run", False) and (out := getattr(arguments, "out", None)):
        shutil.rmtree(out, ignore_errors=True)  # the stock has the results of most commands, too
    return main(_small(words[1:]))


def _refusal(name: str, arguments: argparse.Namespace) -> int | str:
    """0 for options that go together; otherwise what is wrong with them."""
    options = COMMANDS[name].options
    try:
        options.build({key: value for key, value in vars(arguments).items() if key in options.model_fields})
    except UsageError as error:
        return str(error)
    return 0


def run_python(code: str, page: str) -> None:
    """Run a documented block of Python in the current folder."""
    program = compile(code, page, "exec")
    if any(part in code for part in PARSED):
        return
    for out in re.findall(r'out="([^"]+)"', code):
        shutil.rmtree(out, ignore_errors=True)
    exec(program, {})


def _small(words: list[str]) -> list[str]:
    for flag in LEFT_OUT:
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    demo = DEMO if words[0] == "run" and "runs/demo" in words else ""
    return [*words, *SMALL.get(words[0], "").split(), *demo.split()]


def _problem(program: str, words: list[str]) -> int | str:
    """0 for a command that is sound but not run; otherwise what is wrong with it."""
    if program in ELSEWHERE or (words and words[0] in ELSEWHERE):
        return 0
    if program not in NOT_RUN:
        return f"no test can run {program}: see tests/docs/sandbox.py"
    if program == "make":
        done = subprocess.run(["make", "--dry-run", "-C", ROOT, *words], capture_output=True, text=True)
        return 0 if done.returncode == 0 else done.stderr
    if program == "pip":
        extras = ",".join(re.findall(r"\[([\w,]+)\]", " ".join(words)))
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        unknown = set(filter(None, extras.split(","))) - set(known)
        return f"no extra {unknown}" if unknown else 0
    if words[0] == "-m":
        words = [f"{words[1].replace('.', '/')}.py", *words[2:]]
    script = ROOT / words[0]
    if not script.is_file():
        return f"no script {script}"
    source = "".join(path.read_text() for path in script.parent.glob("*.py"))  # they share some options
    unknown = {word for word in words if word.startswith("--") and f'"{word}"' not in source}
    return f"{words[0]} has no option {unknown}" if unknown else 0


def examples_of_the_help() -> list[str]:
    """What `spp COMMAND --help` ends with."""
    return [command.example for command in COMMANDS.values()]
