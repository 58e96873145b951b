"""The table of commands: their options, and the functions that do their work."""

from __future__ import annotations

from dataclasses import dataclass

from spp.adapters.options import ConvertOptions, MergeOptions
from spp.checkpoints.options import InspectOptions, PackOptions, PushOptions, UnpackOptions, VerifyOptions
from spp.evaluation.options import EvalOptions, GenerateOptions
from spp.options import Options
from spp.pipeline.options import RunOptions
from spp.pruning.options import PruneOptions
from spp.reporting.options import ReportOptions
from spp.training.options import CacheTeacherOptions, TrainOptions


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its options, which of them are positional, and `module:function` of its work and of its dry run."""

    options: type[Options]
    positional: tuple[str, ...] = ()
    work: str
    example: str
    takes_recipe: bool = False
    dry_run: str | None = None


COMMANDS: dict[str, Command] = {
    "run": Command(
        options=RunOptions,
        work="spp.pipeline.run:run",
        example="spp run --model meta-llama/Llama-3.2-1B --pattern 2:4 --train alpaca.json --eval wiki.txt --out out",
        takes_recipe=True,
    ),
    "prune": Command(
        options=PruneOptions,
        positional=("model", "out"),
        work="spp.pruning.prune:prune",
        example="spp prune ./llama ./llama-2of4 --pattern 2:4 --criterion wanda --calibration c4.jsonl",
        dry_run="spp.pruning.memory_estimate:predict_pruning",
    ),
    "train": Command(
        options=TrainOptions,
        positional=("model", "out"),
        work="spp.training.train:train",
        example="spp train ./llama-2of4 ./adapter --data alpaca.json --epochs 3",
        takes_recipe=True,
        dry_run="spp.training.memory_estimate:predict_training",
    ),
    "cache-teacher": Command(
        options=CacheTeacherOptions,
        positional=("model", "out"),
        work="spp.training.teacher_cache:cache_teacher",
        example="spp cache-teacher ./llama ./answers --data alpaca.json",
    ),
    "merge": Command(
        options=MergeOptions,
        positional=("model", "adapter", "out"),
        work="spp.adapters.merge:merge",
        example="spp merge ./llama-2of4 ./adapter ./llama-2of4-tuned",
    ),
    "convert": Command(
        options=ConvertOptions,
        positional=("adapter", "out"),
        work="spp.adapters.convert:convert",
        example="spp convert ./adapter ./adapter-hira --to hira",
    ),
    "verify": Command(
        options=VerifyOptions,
        positional=("base", "other"),
        work="spp.checkpoints.verify:verify",
        example="spp verify ./llama-2of4 ./llama-2of4-tuned --pattern 2:4",
    ),
    "eval": Command(
        options=EvalOptions,
        positional=("model", "others"),
        work="spp.evaluation.evaluate:evaluate",
        example="spp eval ./llama-2of4-tuned --text wikitext2_test.txt --window 2048",
        dry_run="spp.evaluation.streaming_memory:predict_streaming",
    ),
    "pack": Command(
        options=PackOptions,
        positional=("model", "out"),
        work="spp.pruning.pack:pack",
        example="spp pack ./llama-2of4-tuned ./llama-2of4-packed",
    ),
    "unpack": Command(
        options=UnpackOptions,
        positional=("model", "out"),
        work="spp.checkpoints.pack:unpack",
        example="spp unpack ./llama-2of4-packed ./llama-2of4-plain",
    ),
    "generate": Command(
        options=GenerateOptions,
        positional=("model",),
        work="spp.evaluation.generate:generate",
        example='spp generate ./llama-2of4-packed --prompt "Once upon a time"',
    ),
    "inspect": Command(
        options=InspectOptions,
        positional=("model",),
        work="spp.checkpoints.inspect:inspect_model",
        example="spp inspect ./llama-2of4",
    ),
    "push": Command(
        options=PushOptions,
        positional=("model", "repo"),
        work="spp.checkpoints.push:push_to_hub",
        example="spp push ./llama-2of4-tuned user/llama-2of4-tuned --private",
    ),
    "report": Command(
        options=ReportOptions,
        positional=("runs",),
        work="spp.reporting.report:report",
        example="spp report runs/wanda runs/sparsegpt --out comparison.html",
    ),
    "doctor": Command(options=Options, work="spp.cli.doctor:diagnose", example="spp doctor --json"),
}
