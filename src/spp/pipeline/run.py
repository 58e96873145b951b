"""`spp run`: all stages in order. Each writes a folder and a JSON record; a run resumes after the last record."""

from __future__ import annotations

import logging
import math
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from spp._version import __version__
from spp.checkpoints.atomic_folder import check_output
from spp.checkpoints.checkpoint import MANIFEST
from spp.checkpoints.fingerprint import file_digest, model_digests
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import partial_file, read_object, write_json
from spp.checkpoints.lock import locked
from spp.checkpoints.model_card import write_model_card
from spp.checkpoints.request import Request
from spp.errors import SppError, UsageError, brief
from spp.pipeline.bundled import bundled_model
from spp.pipeline.checks import check_run
from spp.pipeline.options import RunOptions
from spp.pipeline.records import StageRecords
from spp.pipeline.stages import ADAPTER, MERGE, MERGED, ONE_SHOT, PRUNED, TRAIN, Stages
from spp.pruning.steps import steps_of
from spp.reporting.inputs import RECORDS, RESULTS, Run
from spp.reporting.report import write_report
from spp.reporting.results import (
    Protocol,
    RunResults,
    Sparsity,
    Training,
    Verification,
    gap_closed,
    warnings_about,
)
from spp.runtime.environment import environment, versions
from spp.runtime.files import user_path
from spp.training.options import TrainOptions
from spp.training.teacher import teacher_digest

logger = logging.getLogger("spp")

_RUN, _REPORT = "run.json", "report.html"
_WRITTEN = (ONE_SHOT, PRUNED, ADAPTER, MERGED, RECORDS, _RUN, RESULTS, _REPORT)


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
        UsageError: a wrong option, or an output folder that holds another run or other files.
        SppError: a stage failed; finished stages are kept.
    """
    model = options.model or str(bundled_model())
    folder = resolve_model(model, code=options.trust_remote_code)
    out = options.out or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    stages = Stages(options, model, folder, out)
    check_run(options, folder, stages.training)
    with locked(out):
        _open_run(out, options, _request(options, folder, stages.training))
        logger.info("results go to %s", out)
        for cost in _costs(options):
            logger.info("%s", cost)
        records = StageRecords(out / RECORDS)
        for stage in stages.in_order():
            records.keep(stage)
        results = _results_of(options, records, stages.pruned / MANIFEST)
        write_json(out / RESULTS, results.plain())
        figures = {"perplexity": results.perplexity, "evaluation": results.protocol.evaluation}
        for warning in results.warnings:
            logger.warning("%s", warning)
        with records.changing(TRAIN if stages.in_full else MERGE, stages.merged):
            write_model_card(stages.merged, figures)
        write_report([Run(out.name, results)], out / _REPORT)
    return RunReport(out, results)


def _costs(options: RunOptions) -> Iterator[str]:
    """What reconstruction and a teacher add to the time of a run, as far as it is known before."""
    windows = len(options.reconstructed_parts) * options.reconstruct_epochs * options.samples
    if windows:
        steps = math.ceil(windows / options.batch_size)
        yield (
            f"reconstruction trains the blocks on {windows:,} full windows, as many as {steps:,} steps of fine-tuning "
            "have at most; besides, the model is pruned and evaluated once more without it"
        )
    if options.teacher:
        yield f"every step of fine-tuning also asks the teacher, {options.teacher}"


def _request(options: RunOptions, folder: Path, training: TrainOptions) -> Request:
    """Everything that the results of the run depend on."""
    sources = {"training data": options.train, "evaluation text": options.eval, "calibration text": options.calibration}
    inputs = {name: source and _data_digest(source) for name, source in sources.items()}
    inputs |= {**model_digests(folder), "teacher": teacher_digest(training)}
    return Request(options.of_the_result(), inputs, {"spp": __version__})


def _data_digest(source: str) -> str:
    """A digest of a file's content; for any other source, its name."""
    path = user_path(source)
    return file_digest(path) if path.is_file() else source


def _open_run(out: Path, options: RunOptions, request: Request) -> None:
    """Start a run in `out`, or resume the run there if it is the same."""
    if options.overwrite:
        for name in _WRITTEN:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif (out / _RUN).is_file():
        if (before := Request.read(out / _RUN)) is None:
            raise UsageError(f"{out / _RUN} is damaged; name another folder, or pass --overwrite to start over")
        if changed := before.differences(request):
            raise UsageError(
                f"{out} holds another run: {'; '.join(changed)}. "
                "Repeat it as it was to resume it, name another folder, or pass --overwrite to start over"
            )
        return
    else:
        partial_file(out / _RUN).unlink(missing_ok=True)  # of a run that was killed before it had begun
        check_output(out, overwrite=False)
    out.mkdir(parents=True, exist_ok=True)
    request.write(out / _RUN)


def _results_of(options: RunOptions, records: StageRecords, manifest: Path) -> RunResults:
    """The results of the finished stages.

    Raises:
        SppError: a record or the manifest does not hold what its stage wrote.
    """
    content = read_object(manifest)
    try:
        return _results(options, records, content)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SppError(
            f"{records.folder}: a record, or {manifest}, was damaged after its stage had finished ({brief(error)}); "
            "pass --overwrite to start the run over"
        ) from error


def _results(options: RunOptions, records: StageRecords, manifest: dict[str, Any]) -> RunResults:
    models = ["dense", "pruned", *(["reconstructed"] if options.reconstruct else []), "spp"]
    scores = {name: records.report(f"evaluate_{name}") for name in models}
    perplexity = {name: score["perplexity"] for name, score in scores.items()}
    verification = Verification.model_validate(records.report("verify"))
    return RunResults(
        perplexity=perplexity,
        gap_closed=gap_closed(*(perplexity[name] for name in ("dense", "pruned", "spp"))),
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
        warnings=warnings_about(perplexity),
    )


def _protocol(options: RunOptions, score: dict[str, Any], manifest: dict[str, Any]) -> Protocol:
    """The run's protocol, from its options, the dense model's evaluation and the pruned model's manifest."""
    criterion = manifest["criterion"]
    return Protocol(
        model=options.model or "bundled",
        pattern=manifest["pattern"],
        criterion=criterion,
        criterion_title=steps_of(options).title if criterion else None,
        calibration=manifest["calibration"],
        train=options.train,
        evaluation={key: value for key, value in score.items() if key not in {"perplexity", "nll"}},
        seed=options.seed,
    )


def _command(options: RunOptions) -> str:
    """A command line that repeats the run: every option that differs from what it is without it."""
    words = ["spp", "run"]
    usual = RunOptions.build({"model": options.model, "effort": options.effort}).model_dump(mode="json")
    usual |= {"model": None, "effort": RunOptions.model_fields["effort"].default}
    given = options.model_dump(mode="json", exclude={"overwrite"})
    for name, value in given.items():
        if value == usual[name]:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag.removeprefix("--"))
        else:
            words += [flag, str(value)]
    return shlex.join(words)
