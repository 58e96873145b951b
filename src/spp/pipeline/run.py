"""`spp run`: the stages in order. Each one leaves a folder and a JSON record; a run resumes after the last record."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from spp.adapters.merge import merge
from spp.adapters.options import MergeOptions
from spp.checkpoints.atomic_folder import check_output
from spp.checkpoints.checkpoint import MANIFEST
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import read_json, write_json
from spp.checkpoints.model_card import write_model_card
from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.verify import verify
from spp.errors import UsageError
from spp.evaluation.evaluate import evaluate
from spp.evaluation.options import EvalOptions
from spp.options import Options
from spp.pipeline.bundled import bundled_model
from spp.pipeline.options import RunOptions
from spp.pipeline.records import StageRecords
from spp.pruning.criteria.table import CRITERIA, method_of
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune
from spp.reporting.inputs import RECORDS, RESULTS, Run
from spp.reporting.report import write_report
from spp.reporting.results import Protocol, RunResults, Sparsity, Training, Verification, gap_closed
from spp.runtime.environment import environment, versions
from spp.training.options import TrainOptions
from spp.training.train import train

logger = logging.getLogger("spp")

_RUN, _REPORT = "run.json", "report.html"
_WRITTEN = ("pruned", "adapter", "adapter.checkpoints", "merged", RECORDS, _RUN, RESULTS, _REPORT)
# Options that may differ when a run is resumed: they say where and how, not what.
_FREE_ON_RESUME = {"overwrite", "out", "device"}

StageOptions = TypeVar("StageOptions", bound=Options)


@dataclass(frozen=True)
class RunReport:
    """The result of `run`: the folder, and what its results.json holds."""

    out: Path
    results: RunResults

    @property
    def verified(self) -> bool:
        """Whether the zeros were proved kept."""
        return self.results.verified is True

    def plain(self) -> dict[str, Any]:
        """The results as results.json has them."""
        return self.results.plain()


def run(options: RunOptions) -> RunReport:
    """Prune, fine-tune, merge, verify, evaluate and report.

    A half-finished run with the same options is resumed stage by stage.

    Raises:
        UsageError: a wrong option, or an output folder that holds something else.
        SppError: a stage failed; finished stages are kept.
    """
    model = options.model or str(bundled_model())
    resolve_model(model)
    method_of(options)  # what it refuses is known now, before hours of work
    out = options.out or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    _open_run(out, options)
    logger.info("results go to %s", out)
    records = StageRecords(out / RECORDS)

    def of(kind: type[StageOptions], **values: Any) -> StageOptions:
        shared = {name: value for name, value in options if name in kind.model_fields}
        return kind.build({**shared, **values})

    pruned, adapter, merged = (out / name for name in ("pruned", "adapter", "merged"))
    # The folder of a stage without a record can only be what a killed run left behind, so a stage may replace it.
    new = {"overwrite": True}
    calibration = options.calibration or options.train
    stages: dict[str, Callable[[], Any]] = {
        "evaluate_dense": lambda: evaluate(of(EvalOptions, model=model, text=options.eval)),
        "prune": lambda: prune(of(PruneOptions, model=model, out=pruned, calibration=calibration, **new)),
        "evaluate_pruned": lambda: evaluate(of(EvalOptions, model=str(pruned), text=options.eval)),
        "train": lambda: train(of(TrainOptions, model=str(pruned), out=adapter, data=options.train, **new)),
        # A run's dtype is what it computes in; what it writes keeps the model's own.
        "merge": lambda: merge(of(MergeOptions, model=str(pruned), adapter=adapter, out=merged, dtype="auto", **new)),
        "verify": lambda: verify(
            VerifyOptions.build(
                {"base": str(pruned), "other": str(merged), "pattern": _pattern_of_every_matrix(options, pruned)}
            )
        ),
        "evaluate_spp": lambda: evaluate(of(EvalOptions, model=str(merged), text=options.eval)),
    }
    for name, stage in stages.items():
        records.keep(name, stage)

    results = _results(options, records, read_json(pruned / MANIFEST))
    write_json(out / RESULTS, results.plain())
    figures = {"perplexity": results.perplexity, "evaluation": results.protocol.evaluation}
    write_model_card(merged, figures)
    write_report([Run(out.name, results)], out / _REPORT)
    return RunReport(out, results)


def _pattern_of_every_matrix(options: RunOptions, pruned: Path) -> str | None:
    """What can be asked of each pruned matrix: not a ratio that is a mean over matrices, as OWL's and adopted ones."""
    pattern = read_json(pruned / MANIFEST)["pattern"]
    is_mean = ":" not in pattern and (options.keep_zeros or options.allocation == "owl")
    return None if is_mean else pattern


def _open_run(out: Path, options: RunOptions) -> None:
    """Start a run in `out`, or go on with the one that is there if its options are the same."""
    asked = options.model_dump(mode="json", exclude=_FREE_ON_RESUME)
    if options.overwrite:
        for name in _WRITTEN:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif (out / _RUN).is_file():
        before = read_json(out / _RUN)
        changed = [
            f"{name} was {before.get(name)!r} and is {value!r} now"
            for name, value in asked.items()
            if before.get(name) != value
        ]
        if changed:
            raise UsageError(
                f"{out} holds a run with other options ({'; '.join(changed)}); "
                "repeat its options to resume it, name another folder, or pass --overwrite to start over"
            )
        return
    else:
        check_output(out, overwrite=False)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _RUN, asked)


def _results(options: RunOptions, records: StageRecords, manifest: dict[str, Any]) -> RunResults:
    scores = {name: records.report(f"evaluate_{name}") for name in ("dense", "pruned", "spp")}
    perplexity = {name: score["perplexity"] for name, score in scores.items()}
    verification = Verification.model_validate(records.report("verify"))
    return RunResults(
        perplexity=perplexity,
        gap_closed=gap_closed(**perplexity),
        verified=verification.verified,
        seconds=records.every("seconds"),
        peak_rss_bytes=max(records.every("peak_rss_bytes").values()),
        protocol=_protocol(options, scores["dense"], manifest),
        versions=versions(),
        environment=environment(),
        options=options.model_dump(mode="json"),
        command=_command(options),
        training=Training.model_validate(records.report("train")),
        sparsity=Sparsity(overall=manifest["sparsity"], tensors=manifest["tensors"], skipped=manifest["skipped"]),
        verification=verification,
    )


def _protocol(options: RunOptions, score: dict[str, Any], manifest: dict[str, Any]) -> Protocol:
    """How the run was done, from its options, the dense model's evaluation and the pruned model's manifest."""
    criterion = manifest["criterion"]
    return Protocol(
        model=options.model or "bundled",
        pattern=manifest["pattern"],
        criterion=criterion,
        criterion_title=CRITERIA[criterion].title if criterion else None,
        calibration=manifest["calibration"],
        train=options.train,
        evaluation={key: value for key, value in score.items() if key not in {"perplexity", "nll"}},
        seed=options.seed,
    )


def _command(options: RunOptions) -> str:
    """A command line that repeats the run: every option that differs from its default."""
    words = ["spp", "run"]
    for name, value in options.model_dump(mode="json", exclude_defaults=True, exclude={"overwrite"}).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag.removeprefix("--"))
        else:
            words += [flag, str(value)]
    return shlex.join(words)
