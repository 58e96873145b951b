"""Tiny whole inputs, the words of every command on them, and what is wrong with what a command does."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import damage
from datasets import Dataset
from families import tiny_model_of
from killed_process import CACHE, CHANGES, PRINTED
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from spp.adapters.tuner import SppConfig
from spp.cli.entry_point import main
from spp.cli.parser import build_parser

SECONDS = 60
"""After so many, a command hangs; without damage none takes more than some."""

LONGEST = 3000
"""Characters of an error's message, with the list of its problems."""

_USUAL = {
    "prune": "--device cpu",
    "train": "--window 32 --batch-size 2 --device cpu",
    "cache-teacher": "--window 32 --device cpu",
    "eval": "--window 32 --device cpu",
    "generate": "--max-new-tokens 3 --device cpu",
    "run": "--criterion magnitude --window 32 --max-steps 1 --batch-size 2 --device cpu",
}
"""Words that a command always has."""

COMMANDS = (
    "prune {dense} {out} --calibration {stories.jsonl} --samples 4 --window 32",
    "prune {dense} {out} --pattern 50% --criterion magnitude",
    "prune {dense} {out} --pattern 50% --criterion sparsegpt --allocation owl --calibration {stories.txt} --samples 2",
    "prune {sharded} {out} --criterion ria --calibration {stories.parquet} --samples 2 --window 16",
    "prune {gpt2} {out} --reconstruct block --calibration {stories.txt.gz} --samples 2 --window 16",
    "prune {dense} {out} --criterion admm --update least-squares --calibration {stories.jsonl} --samples 2",
    "prune {experts} {out} --refine swaps --calibration {stories.jsonl} --samples 4 --window 32",
    "prune {dense} {out} --dry-run",
    "train {pruned} {out} --data {stories.jsonl} --max-steps 2",
    "train {pruned} {out} --data {alpaca.json} --max-steps 1 --no-pack --recipe {recipe.yaml}",
    "train {pruned} {out} --data {stories.jsonl} --max-steps 1 --teacher {answers}",
    "train {packed} {out} --data {chat.jsonl} --max-steps 1 --completion-only",
    "train {pruned} {out} --data {messages.json} --max-steps 1 --completion-only",
    "train {pruned} {out} --data {stories.jsonl.gz} --max-steps 4 --validation 4 --save-steps 1",
    "train {pruned} {out} --data {stories.jsonl} --max-steps 3 --save-steps 1 --method full",
    "train {packed} {out} --data {stories.jsonl} --max-steps 2 --validation 4 --method full --rounding stochastic",
    "train {pruned-experts} {out} --data {stories.jsonl} --max-steps 1",
    "train {pruned} {out} --data {stories.jsonl} --dry-run",
    "merge {pruned} {adapter} {out}",
    "merge {pruned} {adapter} {out} --rounding stochastic --dtype bfloat16",
    "merge {pruned-sharded} {adapter-sharded} {out}",
    "merge {pruned-experts} {adapter-experts} {out}",
    "merge {pruned} {adapter-whole} {out}",
    "convert {adapter} {out}",
    "convert {adapter} {out} --base {pruned}",
    "convert {hira} {out}",
    "verify {pruned} {merged} --pattern 2:4",
    "verify {packed} {pruned}",
    "verify {merged} --record {verification.json}",
    "eval {merged} --text {stories.jsonl} --limit 4",
    "eval {pruned} --adapter {adapter} --text {stories.txt}",
    "eval {packed} --text {stories.txt}",
    "eval {merged} --tasks quiz --task-folder {tasks}",
    "eval {pruned} {merged} --compare --plot {out}.svg --text {stories.txt}",
    "pack {merged} {out}",
    "pack {pruned-sharded} {out}",
    "pack {merged} {out} --bits 4",
    "pack {pruned} {out} --bits 3 --calibration {stories.jsonl} --samples 4 --window 32",
    "unpack {packed-4} {out}",
    "verify {pruned} {packed-4}",
    "eval {packed-4} --text {stories.txt}",
    "unpack {packed} {out}",
    "generate {merged} --prompt The",
    "generate {pruned} --adapter {adapter} --prompt The",
    "generate {packed} --prompt The",
    "inspect {sharded}",
    "inspect {packed}",
    "inspect {merged}",
    "push {merged} someone/sparse",
    "report {run} --out {out}.html",
    "report {run} {run2} --benchmarks {layer.csv} --out {out}.html",
    "cache-teacher {dense} {out} --data {stories.jsonl}",
    "run {recipe.yaml} --model {dense} --train {stories.jsonl} --eval {stories.txt} --out {run}",
    "run --model {dense} --train {stories.jsonl} --eval {stories.txt} --out {out}",
    "doctor",
)
"""Words of commands that succeed; a name in braces is an input, and `{out}` what is written."""

_ELSEWHERE = ("--dry-run", "{out}.svg")
WRITING = tuple(one for one in COMMANDS if "{out}" in one and not any(words in one for words in _ELSEWHERE))
"""Those that write."""

_MADE = (
    ("pruned", "prune {dense} {out} --criterion magnitude"),
    ("pruned-sharded", "prune {sharded} {out} --criterion magnitude"),
    ("pruned-experts", "prune {experts} {out} --criterion magnitude"),
    ("adapter-experts", "train {pruned-experts} {out} --data {stories.jsonl} --max-steps 1"),
    ("adapter", "train {pruned} {out} --data {stories.jsonl} --max-steps 2"),
    ("adapter-sharded", "train {pruned-sharded} {out} --data {stories.jsonl} --max-steps 1"),
    ("hira", "convert {adapter} {out}"),
    ("merged", "merge {pruned} {adapter} {out}"),
    ("packed", "pack {merged} {out}"),
    ("packed-4", "pack {merged} {out} --bits 4"),
    ("answers", "cache-teacher {dense} {out} --data {stories.jsonl}"),
    ("run", "run {recipe.yaml} --model {dense} --train {stories.jsonl} --eval {stories.txt} --out {out}"),
)
"""What the commands make of the models and texts: folder, words."""

_MEASURED = {"seconds", "tokens_per_second", "peak_rss_bytes", "peak_memory_bytes", "output_sha256"}
"""Measurements in JSON files, and the digest of files that hold some."""

_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% endfor %}"
)


@dataclass
class Outcome:
    """What a command did, and what is wrong with that."""

    words: list[str]
    damage: str
    code: Any = None
    stderr: str = ""
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        said = f"{self.code}: {'; '.join(self.wrong)}\n  {self.stderr[-700:]}"
        return f"[{self.damage}] spp {' '.join(self.words)}\n  -> {said}"


def make_stock(folder: Path, tokenizer: Any) -> None:
    """Fill a folder with whole inputs, by name."""
    _save_models(folder, tokenizer)
    _write_texts(folder)
    for name, words in _MADE:
        case = Case(folder, words, folder / "making")
        outcome = case.run("none")
        assert outcome.code == 0, outcome
        case.out.rename(folder / name)
        shutil.rmtree(folder / "making")
    _save_adapter_with_head(folder / "pruned", folder / "adapter-whole")
    shutil.copytree(folder / "run", folder / "run2")
    shutil.copy(folder / "merged" / "verification.json", folder)
    shutil.copy(Path(__file__).parents[2] / "benchmarks" / "data" / "layer.csv", folder)


def _save_models(folder: Path, tokenizer: Any) -> None:
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    tiny_model_of("llama", **small).save_pretrained(folder / "dense")
    tiny_model_of("qwen3", **small, head_dim=8).save_pretrained(folder / "sharded", max_shard_size="12KB")
    experts: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24}
    tiny_model_of("qwen3_moe", **small, head_dim=8, **experts).save_pretrained(folder / "experts")
    tiny_model_of("gpt2", n_embd=16, n_head=2).save_pretrained(folder / "gpt2")
    for name in ("dense", "sharded", "experts", "gpt2"):
        tokenizer.save_pretrained(folder / name)
        (folder / name / "chat_template.jinja").write_text(_TEMPLATE)


def _save_adapter_with_head(base: Path, folder: Path) -> None:
    """An SPP adapter with a matrix that was trained whole."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = SppConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(model, config).save_pretrained(str(folder))


def _write_texts(folder: Path) -> None:
    animals, verbs = ("cat", "dog", "owl", "hen", "fox"), ("sat", "ran", "hid")
    stories = [f"The {animals[i % 5]} {verbs[i % 3]}. It is {i}." for i in range(16)]
    few = stories[:4]
    _lines(folder / "stories.jsonl", [{"text": one} for one in stories])
    (folder / "stories.txt").write_text("\n\n".join(stories))
    for name in ("stories.jsonl", "stories.txt"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes(), mtime=0))
    Dataset.from_dict({"text": stories}).to_parquet(folder / "stories.parquet")
    alpaca = [{"instruction": "Say", "input": one, "output": "No."} for one in few]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    _lines(folder / "chat.jsonl", [{"prompt": "Who?", "completion": one} for one in few])
    chats = [[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": one}] for one in few]
    (folder / "messages.json").write_text(json.dumps([{"messages": chat} for chat in chats]))
    (folder / "recipe.yaml").write_text("seed: 3\nlearning-rate: 0.02\nscale: 1.5\n")
    (folder / "tasks").mkdir()
    items = [{"question": "Who?", "choices": ["cat", "dog"], "label": i % 2} for i in range(3)]
    _lines(folder / "tasks" / "quiz.jsonl", items)


def _lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Case:
    """Words of a command on its own copies of its inputs, which can be damaged.

    Attributes:
        folder: with the inputs, and with what the command writes.
        out: what it writes, if it is one folder.
        before: what was in `folder` before the command ran.
    """

    def __init__(self, stock: Path, words: str, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.out = folder, folder / "out"
        self.words = [*words.split(), *_USUAL.get(words.split()[0], "").split()]
        for index, word in enumerate(self.words):
            name = word.partition("{")[2].partition("}")[0]
            if name and name != "out" and not (folder / name).exists():
                copy = shutil.copytree if (stock / name).is_dir() else shutil.copy
                copy(stock / name, folder / name)
            self.words[index] = word.replace(f"{{{name}}}", str(folder / name)) if name else word
        self.before = set(folder.iterdir())

    def damaged(self, chance: random.Random) -> str:
        """Damage one thing, and say what."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        kind = chance.random()
        if not files or kind < 0.15:
            return self._other_option(chance)
        if kind < 0.2:
            return self._other_place(chance)
        # Every input is as likely as any other, whatever number of files it has.
        chosen = chance.choice(sorted({path.relative_to(self.folder).parts[0] for path in files}))
        path = chance.choice([path for path in files if path.relative_to(self.folder).parts[0] == chosen])
        times = path.stat()
        phrase = damage.file(path, chance)
        if path.is_file() and chance.random() < 0.5:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        self.before = set(self.folder.iterdir())
        return f"{path.relative_to(self.folder)}: {phrase}"

    def _other_option(self, chance: random.Random) -> str:
        [commands] = [action for action in build_parser()._actions if action.dest == "command"]
        parser: argparse.ArgumentParser = dict(commands.choices or {})[self.words[0]]  # pyright: ignore
        action = chance.choice([one for one in parser._actions if one.dest not in ("help", "out", "plot")])
        value = [] if action.nargs == 0 else [chance.choice(damage.WORDS)]
        if not action.option_strings:
            position = chance.randrange(1, max(len(self.words), 2))
            self.words[position : position + 1] = value
            return f"word {position} is {value}"[:60]
        flag = chance.choice(action.option_strings)
        if flag in self.words:
            at = self.words.index(flag)
            del self.words[at : at + 1 + len(value)]
        self.words += [flag, *value]
        return f"option {flag} {value}"[:60]

    def _other_place(self, chance: random.Random) -> str:
        """Where the output goes, or where an input is."""
        places = {
            "in a file": "a-file/out",
            "a file": "a-file",
            "a pipe": "a-pipe",
            "a folder with something in it": "taken",
            "not UTF-8": "\udcff-out",
            "a long name": "x" * 252,
            "a link to nothing": "a-link",
            "in a link to nothing": "a-link/out",
        }
        kind = chance.choice(("linked", *places))
        if kind == "linked":
            for path in self.before:
                real = path.rename(path.with_name(f"real-{path.name}"))
                path.symlink_to(real)
        else:
            (self.folder / "a-file").write_text("mine")
            os.mkfifo(self.folder / "a-pipe")
            (self.folder / "taken").mkdir()
            (self.folder / "taken" / "file").write_text("mine")
            (self.folder / "a-link").symlink_to(self.folder / "nowhere")
            there = str(self.folder / places[kind])
            self.words = [word.replace(str(self.out), there) for word in self.words]
        self.before = set(self.folder.iterdir())
        return f"inputs are {kind}" if kind == "linked" else f"the output is {kind}"

    def run(self, what: str) -> Outcome:
        """Run the command, and look at what it did."""
        outcome = Outcome(self.words, what)
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                with _at_most(SECONDS):
                    outcome.code = main(self.words)
            except SystemExit as stop:  # of argparse
                outcome.code = stop.code
            except (Exception, _Hang) as error:
                outcome.code = repr(error)
        outcome.stderr = stderr.getvalue()
        outcome.wrong = [*self._wrong(outcome.code, outcome.stderr), *self._rubbish(outcome.code)]
        return outcome

    def _wrong(self, code: Any, said: str) -> Iterator[str]:
        """What is wrong with an exit code and what was printed on standard error."""
        messages = re.split(r"(?:^|\n)error: ", said)[1:]
        if code not in (0, 1, 2):
            yield "a traceback"
        if "Traceback" in said or "this is a bug of spp" in said:
            yield "an error that nothing foresaw"
        if _Hang.__name__ in said:
            yield "it hangs"
        if len(messages) > 1 or (code != 0 and not messages and self.words[0] != "verify"):
            yield f"{len(messages)} messages"
        if messages and len(messages[-1]) > LONGEST:
            yield f"a message of {len(messages[-1])} characters"

    def _rubbish(self, code: Any) -> Iterator[str]:
        """What should not be there: hidden files, and the output of what failed."""
        new = sorted(path.name for path in set(self.folder.iterdir()) - self.before)
        if left := [name for name in new if name.startswith(".") or (code != 0 and self.words[0] != "run")]:
            yield f"it leaves {left}"


def damaged_case(stock: Path, folder: Path, seed: int) -> Outcome:
    """The outcome of the damaged command of a number."""
    chance = random.Random(seed)
    case = Case(stock, chance.choice(COMMANDS), folder / f"{seed}")
    outcome = case.run(f"{seed}: {case.damaged(chance)}")
    shutil.rmtree(case.folder, ignore_errors=True)
    return outcome


class _Hang(BaseException):
    """A command took too long."""


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Context manager that ends what takes longer, and leaves the logger and warnings as they were."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        logging.getLogger("spp").handlers.clear()


def results(case: Case) -> dict[str, bytes]:
    """What a command wrote, hidden files included, without what is measured and without where it is."""
    known = {path.name for path in case.before} | {PRINTED, CHANGES, CACHE}
    new = [path for path in sorted(case.folder.rglob("*")) if path.relative_to(case.folder).parts[0] not in known]
    place = str(case.folder).encode()
    return {str(path.relative_to(case.folder)): _comparable(path).replace(place, b"") for path in new if path.is_file()}


def _comparable(path: Path) -> bytes:
    if path.name == "report.html" or path.parent.name == "stages":
        return b""  # full of measurements, in many forms
    content = path.read_bytes()
    return json.dumps(_unmeasured(json.loads(content))).encode() if path.suffix == ".json" else content


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unmeasured(one) for key, one in value.items() if key not in _MEASURED}
    return [_unmeasured(one) for one in value] if isinstance(value, list) else value
