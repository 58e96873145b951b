"""What the tests of options run commands on: tiny models, texts and results in a folder; and notes of the work inside.

The same commands work as they are, before any option is changed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import huggingface_hub
import pytest
import torch
from families import tiny_model_of
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations import integration_utils
from transformers.training_args import OptimizerNames

from spp.cli.entry_point import main
from spp.training.trainer import SppTrainer

USUAL: dict[str, tuple[str, dict[str, str]]] = {
    "run": (
        "{recipe} --model {model} --train stories.jsonl --eval stories.jsonl --out {to} --device cpu --window 32 "
        "--samples 4 --max-steps 2",
        {"recipe": "", "model": "dense", "to": "{out}"},
    ),
    "prune": (
        "{model} {to} --device cpu --calibration stories.jsonl --window 32 --samples 4",
        {"model": "dense", "to": "{out}"},
    ),
    "train": (
        "{model} {to} --device cpu --data stories.jsonl --window 32 --batch-size 4 --learning-rate 0.05",
        {"model": "pruned", "to": "{out}"},
    ),
    "cache-teacher": ("{model} {to} --device cpu --data stories.jsonl --window 32", {"model": "dense", "to": "{out}"}),
    "merge": ("{model} {adapter} {to}", {"model": "pruned", "adapter": "adapter", "to": "{out}"}),
    "convert": ("{adapter} {to}", {"adapter": "adapter", "to": "{out}"}),
    "verify": ("{base} {other}", {"base": "pruned", "other": "merged"}),
    "eval": (
        "{model} {others} {source} --device cpu --window 32",
        {"model": "pruned", "others": "", "source": "--text+stories.jsonl"},
    ),
    "pack": ("{model} {to}", {"model": "pruned", "to": "{out}"}),
    "unpack": ("{model} {to}", {"model": "packed", "to": "{out}"}),
    "generate": ("{model} --device cpu --prompt The --max-new-tokens 8", {"model": "pruned"}),
    "inspect": ("{model}", {"model": "pruned"}),
    "push": ("{model} {repo}", {"model": "merged", "repo": "someone/sparse"}),
    "report": ("{runs} --out {to}", {"runs": "runs/first", "to": "{out}.html"}),
    "doctor": ("", {}),
}
"""Command -> the words that it is always given, and the default of each field in them.

`{out}` is a new path each time, and `{taken}` the same with a user's files in it. A plus in a field is a space.
"""

_MADE = (
    ("pruned", "prune", ""),
    ("half", "prune", "--pattern 50% --criterion magnitude"),
    ("adapter", "train", ""),
    ("adapter-of-others", "train", "--data others.jsonl"),
    ("adapter-of-hub", "train", "model=someone/pruned"),
    ("answers", "cache-teacher", ""),
    ("merged", "merge", ""),
    ("merged-of-others", "merge", "adapter=adapter-of-others"),
    ("packed", "pack", ""),
    ("packed-half", "pack", "model=half"),
    ("runs/second", "run", "--seed 1"),
    ("runs/first", "run", ""),
)
"""What the commands make of the models and texts: folder, command, words."""

_STAGES = (
    ("spp.evaluation.evaluate", "evaluate"),
    ("spp.pruning.prune", "prune"),
    ("spp.training.train", "train"),
    ("spp.adapters.merge", "merge"),
    ("spp.checkpoints.verify", "verify"),
)
"""Where `spp run` has its stages from."""

_OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, its output, what it printed, and what `_watched` noted of its work."""

    code: int
    out: Path
    stdout: str
    stderr: str
    seen: dict[str, Any]


class Stock:
    """A folder of tiny models, texts and results, in which commands are run, and the outcomes so far."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder = folder
        self._numbers = itertools.count(1)
        self._outcomes: dict[tuple[str, str, str], Outcome] = {}
        self._stages: dict[str, list[tuple[Any, Any]]] = {}  # of `runs/first`: function -> options, report
        self._replays = False
        _write_texts(folder)
        _save_models(folder, tokenizer)
        (folder / "runs").mkdir()
        for name, command, words in _MADE:
            made = self.run(command, words)
            assert made.code == 0, made.stderr
            made.out.rename(folder / name)
        _save_published(folder)
        _save_altered(folder)
        self._replays = True

    def outcome(self, command: str, words: str, again: str = "") -> Outcome:
        """The outcome of a command, which is run once for the same words and the same `again`."""
        key = (command, words, again)
        if key not in self._outcomes:
            self._outcomes[key] = self.run(command, words)
        return self._outcomes[key]

    def run(self, command: str, words: str) -> Outcome:
        """Run a command with its usual words and others: `--seed 1` is added, `model=other` sets a field."""
        line = [command, *_words(command, words)]
        out = self.folder / "out" / str(next(self._numbers))
        out.parent.mkdir(exist_ok=True)
        if any("{taken}" in word for word in line):
            out.mkdir()
            for name in ("page.html", "plot.svg"):
                (out / name).write_text("mine")
        stdout, stderr = io.StringIO(), io.StringIO()
        if self._replays:
            stage = functools.partial(self._replay, {name: iter(done) for name, done in self._stages.items()})
        else:
            self._stages.clear()
            stage = self._record
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            _quick(),
            _watched(self.folder, stage) as seen,
        ):
            code = main([word.format(out=out, taken=out) for word in line])
        return Outcome(code, out, stdout.getvalue(), stderr.getvalue(), seen)

    def _record(self, work: Callable[[Any], Any], options: Any) -> Any:
        """Do a stage of `spp run`."""
        report = work(options)
        self._stages.setdefault(work.__name__, []).append((options, report))
        return report

    def _replay(self, left: dict[str, Iterator[Any]], work: Callable[[Any], Any], options: Any) -> Any:
        """Leave what such a stage left in `runs/first`; what a stage does is for the rows of its own command."""
        then, report = next(left[work.__name__], self._stages[work.__name__][-1])
        if hasattr(options, "out"):
            first = self.folder / "runs" / "first"
            # Full fine-tuning writes what merging writes in `runs/first`.
            made = next(one for one in (first / options.out.name, first / then.out.name) if one.is_dir())
            shutil.copytree(made, options.out, dirs_exist_ok=True)
        return report


_STOCK = pytest.StashKey[Stock]()


def stock_of(request: pytest.FixtureRequest) -> Stock:
    """The one stock of all test modules."""
    stash = request.config.stash
    if _STOCK not in stash:
        folder = request.getfixturevalue("tmp_path_factory").mktemp("stock")
        stash[_STOCK] = Stock(folder, request.getfixturevalue("tiny_tokenizer"))
    return stash[_STOCK]


def _words(command: str, words: str) -> list[str]:
    usual, fields = USUAL[command]
    replaced, added = dict(fields), []
    for word in words.split():
        name, _, value = word.partition("=")
        if name in fields:
            replaced[name] = value
        else:
            added.append(word)
    for name, value in replaced.items():  # not `format`: a value may hold `{out}`
        usual = usual.replace(f"{{{name}}}", value.replace("+", " "))
    return [*usual.split(), *added]


def _write_texts(folder: Path) -> None:
    def lines(name: str, records: list[dict[str, Any]]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    animals, verbs = ("cat", "dog", "owl", "hen"), ("sat", "ran", "hid")
    stories = [f"The {animals[i % 4]} {verbs[i % 3]}. The {animals[(i + 1) % 4]} {verbs[i % 3]}!" for i in range(12)]
    lines("stories.jsonl", [{"text": text} for text in stories])
    lines("others.jsonl", [{"text": f"It is {i}. {text}"} for i, text in enumerate(reversed(stories))])
    lines("columns.jsonl", [{"text": text, "body": text[::-1]} for text in stories])
    lines("copies.jsonl", [{"text": stories[0]}] * 12)
    (folder / "stories.txt").write_text("\n\n".join(stories))
    lines("one-window.jsonl", [{"text": " and ".join(stories)[:31]}])  # and one token in front
    lines("answers.jsonl", [{"prompt": f"Is it a {one}?", "completion": f" The {one}."} for one in animals * 3])
    answers = [f"the {one}" for one in animals]
    for name, right in (("quiz", 0), ("quizzes/quiz", 1), ("riddles/quiz", 2)):
        lines(f"{name}.jsonl", [{"question": f"Who {one}?", "choices": answers, "label": right} for one in verbs])
    (folder / "recipe.yaml").write_text("seed: 7\ninit_weights: published\n")
    shutil.copy(Path(__file__).parents[2] / "benchmarks" / "data" / "layer.csv", folder)


def _save_models(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    odd = {"odd": tiny_model_of("llama", dtype=torch.bfloat16, intermediate_size=44)}
    llamas = {name: tiny_model_of("llama", dtype=torch.bfloat16) for name in ("dense", "other", "own")}
    models = llamas | odd | {"moe": tiny_model_of("mixtral", dtype=torch.bfloat16)}
    for seed, (name, model) in enumerate(models.items()):
        chance = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            # Larger than a new model's, whose predictions are all alike.
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=chance).to(parameter.dtype)
            parameter.data[parameter.data == 0] = 0.1
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "own" / "code.py").write_text(_OWN_CODE)
    classes = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    _edit_json(folder / "own" / "config.json", model_type="own", auto_map=classes)
    tokenizers = {"AutoTokenizer": [None, "code.OwnTokenizer"]}
    _edit_json(folder / "own" / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokenizers)
    for command in USUAL:  # one each: transformers knows the classes of a folder once it has loaded them
        shutil.copytree(folder / "own", folder / f"own-{command}")


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _save_published(folder: Path) -> None:
    """An adapter as the published code has it, which names no base."""
    with safe_open(folder / "pruned" / "model.safetensors", "pt") as base:
        shapes = {name: base.get_slice(name).get_shape() for name in base.keys() if "q_proj" in name}  # noqa: SIM118
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A"
        tensors |= {f"{key}.weight": torch.ones(4, in_features), f"{key}.weight_col": torch.ones(out_features, 1)}
    (folder / "published").mkdir()
    save_file(tensors, folder / "published" / "adapter_model.safetensors")
    (folder / "published" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')


def _save_altered(folder: Path) -> None:
    """The adapter with another scale, and the sparse model with an infinite entry."""
    shutil.copytree(folder / "adapter", folder / "adapter-of-scale-4")
    _edit_json(folder / "adapter-of-scale-4" / "adapter_config.json", scale=4.0)
    shutil.copytree(folder / "pruned", folder / "infinite")
    path = folder / "infinite" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """Context manager: one thread, which is faster for tiny tensors, no fsync, and no garbage in what is there before.

    The Trainer collects garbage after each run, which takes longer than the training.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    try:
        with patch.object(os, "fsync"):
            yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


class _Watch(TrainerCallback):
    """Notes what can be seen of training from within."""

    def __init__(self, seen: dict[str, Any]) -> None:
        self._seen = seen

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        there = sorted(int(path.name.rpartition("-")[2]) for path in Path(args.output_dir).glob("checkpoint-*"))
        self._seen.setdefault("checkpoints", {})[state.global_step] = there

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._seen["weight_decay"] = [group["weight_decay"] for group in parts["optimizer"].param_groups]
        self._seen["checkpointing"] = parts["model"].is_gradient_checkpointing


def _uses(home: str, name: str, package: str) -> list[Any]:
    """The modules of a package that have imported a function from its home."""
    function = getattr(import_module(home), name)
    modules = [module for path, module in list(sys.modules.items()) if path.startswith(f"{package}.") and path != home]
    return [module for module in modules if getattr(module, name, None) is function]


@contextlib.contextmanager
def _watched(folder: Path, stage: Callable[[Callable[[Any], Any], Any], Any]) -> Iterator[dict[str, Any]]:
    """Context manager: notes what commands do inside, with stand-ins for the hub, bitsandbytes and a log service.

    Args:
        folder: for code that models bring along.
        stage: does the work of a stage of `spp run`, from its function and its options.
    """
    import_module("spp.pipeline.run")  # and with it all modules that have to be patched
    seen: dict[str, Any] = {"batches": set(), "dtypes": set(), "uploads": [], "downloads": set(), "stages": []}
    forward, init = LlamaForCausalLM.forward, SppTrainer.__init__

    @functools.wraps(forward)
    def watched_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen["batches"].add(len(args[0] if args else kwargs["input_ids"]))
        seen["dtypes"].add(str(self.dtype))
        return forward(self, *args, **kwargs)

    @functools.wraps(init)
    def watched_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.add_callback(_Watch(seen))
        seen["optimizer"], self.args.optim = self.args.optim, OptimizerNames.ADAMW_TORCH  # which is always there
        seen["examples"], seen["held_out"] = list(self.train_dataset), list(self.eval_dataset or ())

    def quantize(_: Any, layers: Any, kind: str, *__: Any) -> Any:
        seen["quantize"] = kind
        return layers

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.setdefault("logged", []).append(state.global_step)

    def upload(_: HfApi, repo: str = "", *, repo_id: str = "", **named: Any) -> SimpleNamespace:
        seen["uploads"].append((repo or repo_id, named.get("private"), named.get("folder_path")))
        return SimpleNamespace(repo_id=repo or repo_id, commit_url="https://hub.example")

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        seen["downloads"].add((repo, "*.py" in allow_patterns))
        return str(folder / repo.partition("/")[2])

    def watched_stage(name: str, work: Callable[[Any], Any], options: Any) -> Any:
        seen["stages"].append((name, options))
        return stage(work, options)

    stand_ins = [
        ("spp.models.quantized", "quantize_", quantize),
        ("spp.models.quantized", "require_bitsandbytes", lambda _: None),
        (integration_utils.__name__, "get_available_reporting_integrations", lambda: ["tensorboard"]),
    ]
    replaced: list[tuple[Any, str, Any]] = [
        *((module, name, instead) for home, name, instead in stand_ins for module in _uses(home, name, "spp")),
        *(
            (module, name, functools.partial(watched_stage, name, getattr(module, name)))
            for home, name in _STAGES
            for module in _uses(home, name, "spp.pipeline")
        ),
        (LlamaForCausalLM, "forward", watched_forward),
        (SppTrainer, "__init__", watched_init),
        *((HfApi, name, upload) for name in ("create_repo", "upload_folder", "upload_file")),
        (huggingface_hub, "snapshot_download", download),
        # Code that a model brings along is copied there, and imported from there.
        (import_module("transformers.dynamic_module_utils"), "HF_MODULES_CACHE", str(folder / "modules")),
        (sys, "path", [*sys.path]),
    ]
    with ExitStack() as stack:
        for owner, name, instead in replaced:
            stack.enter_context(patch.object(owner, name, instead))
        stack.enter_context(patch.dict(integration_utils.INTEGRATION_TO_CALLBACK, tensorboard=Log))
        stack.enter_context(patch.dict(os.environ))
        yield seen


@pytest.mark.parametrize("command", USUAL)
def test_every_command_works_with_its_usual_words(command: str, request: pytest.FixtureRequest) -> None:
    outcome = stock_of(request).outcome(command, "")
    assert outcome.code == 0, outcome.stderr
