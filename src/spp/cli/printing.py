"""What commands print for people. One function per command; `--json` bypasses them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.table import Table

from spp.reporting.units import size

if TYPE_CHECKING:  # each command imports what it needs, and no other
    from rich.console import RenderableType

    from spp.adapters.convert import ConvertReport
    from spp.adapters.merge import MergeReport
    from spp.checkpoints.inspect import InspectReport
    from spp.checkpoints.pack import PackReport
    from spp.checkpoints.push import PushReport
    from spp.checkpoints.verify import VerifyReport
    from spp.cli.doctor import DoctorReport
    from spp.evaluation.comparison import Comparison
    from spp.evaluation.generate import GenerateReport
    from spp.evaluation.perplexity import EvalReport
    from spp.evaluation.streaming_memory import StreamingPrediction
    from spp.evaluation.tasks import TasksReport
    from spp.pipeline.run import RunReport
    from spp.pruning.memory_estimate import PruningPrediction
    from spp.pruning.prune import PruneReport
    from spp.reporting.report import ReportReport
    from spp.runtime.memory_estimate import MemoryPrediction
    from spp.training.memory_estimate import TrainingPrediction
    from spp.training.teacher_cache import CacheTeacherReport
    from spp.training.train import TrainReport


def describe(command: str, report: Any) -> Iterable[RenderableType]:
    """The parts to print for a command's report, in order."""
    return _DESCRIPTIONS[command](report)


def _run(report: RunReport) -> Iterable[RenderableType]:
    from spp.reporting.summary import summary_table

    yield summary_table(report.results)
    yield f"results are in {report.out}: open report.html, load merged/ with any engine"


def _prune(report: PruneReport) -> Iterable[RenderableType]:
    how = report.criterion or "zeros that were there"
    yield f"{report.sparsity:.2%} of {len(report.tensors)} matrices are zero now ({how}, {report.pattern})"
    if report.reconstruction:
        fits = [fit for parts in report.reconstruction.values() for fit in parts.values()]
        before, after = (fmean(getattr(fit, when) for fit in fits) for when in ("before", "after"))
        yield f"reconstruction brought the blocks' mean relative error from {before:.3g} to {after:.3g}"
    if report.skipped:
        yield f"left dense, because the pattern does not divide them: {', '.join(report.skipped)}"
    yield f"written to {report.out}; next: spp train {report.out} ADAPTER --data FILE"


def _train(report: TrainReport) -> Iterable[RenderableType]:
    yield (
        f"{report.steps} steps, {report.tokens:,} tokens in {report.seconds:.0f} s "
        f"({report.tokens_per_second:,.0f} tokens/s), {report.trainable_parameters:,} trainable parameters, "
        f"peak memory {size(report.peak_memory_bytes)}"
    )
    tried = ", ".join(f"{rate:.2g}: {loss:.4f}" for rate, loss in report.rates_tried)
    yield f"learning rate {report.learning_rate:.2g}" + (
        f" (validation loss after short trials: {tried})" if tried else ""
    )
    if report.best_step is not None:
        loss = dict(report.validation)[report.best_step]
        yield f"the result is that of step {report.best_step}, whose validation loss is the lowest ({loss:.4f})"
    if report.method == "full":
        yield f"proved: all {report.zeros:,} zeros of the sparse model are +0.0"
        yield f"written to {report.out}, with verification.json and a model card, README.md"
    else:
        yield f"written to {report.out}; next: spp merge MODEL {report.out} OUT"


def _cache_teacher(report: CacheTeacherReport) -> Iterable[RenderableType]:
    yield (
        f"{report.tokens:,} predictions for {report.examples:,} examples, the likeliest {report.top_k} tokens of each, "
        f"which have {report.kept:.1%} of the probability: {size(report.bytes)} in {report.seconds:.0f} s"
    )
    yield f"written to {report.out}; next: spp train SPARSE ADAPTER --teacher {report.out}, with the same --data"


def _prune_dry_run(report: PruningPrediction) -> Iterable[RenderableType]:
    yield _memory_table(report)
    yield (
        f"the peak is while {report.phase}, whatever the number of blocks ({report.blocks}); the result takes "
        f"{size(report.disk_bytes)} on disk, and hidden states {size(report.states_bytes)} more until it is finished; "
        "nothing was written"
    )


def _memory_table(report: MemoryPrediction) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(justify="right")
    for part, count in report.parts.items():
        table.add_row(part, size(count))
    table.add_row("predicted peak", size(report.total), style="bold")
    table.add_row(f"available on {report.device}", size(report.available))
    return table


def _train_dry_run(report: TrainingPrediction) -> Iterable[RenderableType]:
    yield _memory_table(report)
    yield (
        f"{report.sequences} sequences of {report.tokens} tokens at once, gradient checkpointing "
        f"{'on' if report.gradient_checkpointing else 'off'}, {report.packed} layers packed; nothing was written"
    )


def _merge(report: MergeReport) -> Iterable[RenderableType]:
    yield f"proved: all {report.zeros:,} zeros of the base are +0.0; {len(report.tensors)} matrices were merged"
    yield from _replaced(report.replaced)
    if report.converted:
        yield f"{len(report.converted)} other tensors were converted, the rest copied byte for byte"
    yield f"rounding left {report.unchanged_share:.1%} of the survivors unchanged, and made {report.underflowed:,} zero"
    yield f"written to {report.out}, with verification.json and a model card, README.md"


def _replaced(names: Sequence[str]) -> Iterable[RenderableType]:
    if names:
        yield f"not proved: {len(names)} tensors that were trained whole, as dense weights: {', '.join(names)}"


def _convert(report: ConvertReport) -> Iterable[RenderableType]:
    yield f"{report.source} -> {report.target}: {report.modules} modules, rank {report.rank}"
    loads = "without spp" if report.target == "HiRA" else "after import spp"
    yield f"written to {report.out}; PeftModel.from_pretrained loads it {loads}"


def _verify(report: VerifyReport) -> Iterable[RenderableType]:
    if not report.verified:
        yield f"NOT verified: {len(report.problems)} problems"
        yield from report.problems
    elif report.record is not None:
        yield (
            f"verified: all {report.compared:,} tensors of {report.base} are those that {report.record} was made of, "
            f"which proves that {report.zeros:,} zeros were kept"
        )
    else:
        yield f"verified: all {report.zeros:,} zeros of {report.base} are +0.0 in {report.other}"
    yield from _replaced(report.replaced)
    if report.pattern is not None:
        yield (
            f"pattern {report.pattern}: {report.matrices_checked:,} matrices checked ({report.matrices_because}); "
            f"{len(report.matrices_dense):,} tensors need not obey it"
            + (f", e.g. {report.matrices_dense[0]}" if report.matrices_dense else "")
        )
    if report.in_few_bits:
        name, proof = max(report.tensors.items(), key=lambda one: one[1].largest_relative_change)
        yield (
            f"{report.in_few_bits} tensors of {report.other} are in few bits: a weight of {name} is off by "
            f"{proof.largest_relative_change:.3g} times its size, which is the most"
        )
    if underflowed := sum(proof.underflowed for proof in report.tensors.values()):
        yield f"note: {underflowed:,} non-zeros of BASE are zero in OTHER"


def _eval(report: EvalReport | TasksReport | Comparison) -> Iterable[RenderableType]:
    from spp.evaluation.comparison import Comparison
    from spp.evaluation.tasks import TasksReport

    if isinstance(report, Comparison):
        return _comparison(report)
    return _task_scores(report) if isinstance(report, TasksReport) else _perplexity(report)


def _perplexity(report: EvalReport) -> Iterable[RenderableType]:
    table = Table(show_header=False, box=None)
    for label, value in (
        ("perplexity", f"{report.perplexity:.4f}"),
        ("per token", f"{report.nll:.5f} nats over {report.tokens:,} tokens"),
        ("text", report.source),
        ("protocol", _protocol(report)),
    ):
        table.add_row(label, value)
    yield table


def _eval_dry_run(report: StreamingPrediction) -> Iterable[RenderableType]:
    yield _memory_table(report)
    yield (
        f"the peak is while {report.phase} of {report.model}, whatever the number of blocks; hidden states take "
        f"{size(report.states_bytes)} on disk until the evaluation has finished; nothing was written"
    )


def _task_scores(report: TasksReport) -> Iterable[RenderableType]:
    from spp.evaluation.comparison import with_error

    table = Table("task", "items", "examples", "metric", "value ± standard error", box=None)
    for name, score in report.tasks.items():
        if score.part_of is None:
            first = [name, f"{score.items:,}", str(score.num_fewshot)]
            for metric, found in score.metrics.items():
                table.add_row(*first, metric, with_error(found.value, found.stderr))
                first = [""] * len(first)
    if mean := report.mean:
        table.add_row("mean", "", "", f"acc of {len(mean.tasks)}", with_error(mean.value, mean.stderr), style="bold")
    yield table
    if report.mean and report.mean.missing:
        yield f"without {', '.join(report.mean.missing)}: this is not the mean of the paper's seven tasks"
    if parts := sum(score.part_of is not None for score in report.tasks.values()):
        yield f"--json has the {parts} parts of the groups as well"
    yield _protocol(report)


def _protocol(report: EvalReport | TasksReport) -> str:
    from spp.evaluation.tasks import TasksReport

    if isinstance(report, TasksReport):
        limit = "" if report.limit is None else f"the first {report.limit} items of each task only; "
        form = "" if report.form is None else f"{report.form}; "
        chat = "in the chat template; " if report.chat_template else ""
        versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
        return f"{form}{limit}{chat}context {report.context} tokens, {report.dtype} on {report.device}; {versions}"
    how = "each document by itself" if report.per_document else f"stride {report.stride}, tail dropped"
    streamed = ", block by block" if report.streamed else ""
    return f"window {report.window}, {how}, BOS {report.bos}, {report.dtype}{streamed}"


def _comparison(report: Comparison) -> Iterable[RenderableType]:
    from spp.evaluation.comparison import comparison_table

    yield comparison_table(report)
    yield from dict.fromkeys(map(_protocol, report.models.values()))
    if report.plot is not None:
        yield f"plotted in {report.plot}"


def _pack(report: PackReport) -> Iterable[RenderableType]:
    yield (
        f"{report.packed} of {report.tensors} tensors packed: {size(report.archive_bytes)}, "
        f"{report.archive_bytes / report.dense_bytes:.3f} of the {size(report.dense_bytes)} of plain safetensors"
    )
    if report.errors:
        worst = max(report.errors, key=lambda name: report.errors[name])
        yield f"{report.bits} bits: {report.errors[worst]:.2%} off at most, in {worst}; all are in spp.json"
    yield f"written to {report.out}; spp unpack {report.out} OUT writes plain safetensors again"


def _unpack(report: PackReport) -> Iterable[RenderableType]:
    yield f"{report.packed} of {report.tensors} tensors unpacked: {size(report.dense_bytes)}"
    yield f"written to {report.out}"


def _generate(report: GenerateReport) -> Iterable[RenderableType]:
    yield report.prompt + report.text
    yield (
        f"\n{report.prompt_tokens} tokens of prompt in {report.prompt_seconds:.2f} s, {report.new_tokens} new tokens "
        f"at {report.tokens_per_second:.1f} tokens/s; weights {size(report.weight_bytes)} ({report.packed} layers "
        f"packed, {report.dtype}), peak memory {size(report.peak_memory_bytes)}"
    )


def _push(report: PushReport) -> Iterable[RenderableType]:
    yield f"{report.repo} is on the hub{', with its card' if report.card else ''}: {report.url}"


def _inspect(report: InspectReport) -> Iterable[RenderableType]:
    from spp.checkpoints.inspect import inspection_table

    yield inspection_table(report)


def _report(report: ReportReport) -> Iterable[RenderableType]:
    if report.differences:
        yield f"perplexities cannot be compared: the runs differ in {', '.join(report.differences)}"
    yield f"{', '.join(report.runs)}: written to {report.out}"


def _doctor(report: DoctorReport) -> Iterable[RenderableType]:
    from spp.cli.doctor import doctor_table

    yield doctor_table(report)


_DESCRIPTIONS: dict[str, Callable[[Any], Iterable[RenderableType]]] = {
    "run": _run,
    "prune": _prune,
    "prune --dry-run": _prune_dry_run,
    "train": _train,
    "cache-teacher": _cache_teacher,
    "train --dry-run": _train_dry_run,
    "merge": _merge,
    "convert": _convert,
    "verify": _verify,
    "eval": _eval,
    "eval --dry-run": _eval_dry_run,
    "pack": _pack,
    "unpack": _unpack,
    "generate": _generate,
    "push": _push,
    "inspect": _inspect,
    "report": _report,
    "doctor": _doctor,
}
