"""What fine-tuning wins back: SPP and other methods that keep zeros, from the same pruned model, text, order and steps.

    python -m benchmarks.quality --data FOLDER --threads 2 [--model story] [--pattern 2:4] [--method SPP HiRA]

With `--seconds`, every method trains for the same CPU time, not for the same number of steps.

FOLDER has the models in benchmarks/evaluated_models.py; without it, there is the bundled one only. Every method is
tried at the same number of learning rates with the first seed. The one with the lowest loss on examples that were held
out is taken, with all seeds, and evaluated on the text that perplexity is reported on. What the CSV file already has is
not measured again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import HiraConfig, IA3Config, SupertuningConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

import spp
from benchmarks.baselines.finetuning import HalfSpp, Lora, MaskedLora, MaskedWeight, replace_linears
from benchmarks.common import append_rows, machine_columns, read_rows
from benchmarks.evaluated_models import EvaluatedModel, add_model_arguments, evaluated_models
from spp.adapters.options import AdapterSettings
from spp.data.examples import Example, collate
from spp.evaluation.perplexity import perplexity_of, read_windows
from spp.models.architecture import prunable_linears, shape_oi
from spp.models.loading import load_model
from spp.options import LoadingOptions
from spp.reporting.results import gap_closed
from spp.training.distillation_loss import divergence
from spp.training.new_adapter import target_layers, with_new_adapter
from spp.training.teacher import predicted
from spp.training.trained_model import with_trained_values
from spp.training.training_data import hold_out, training_examples

PATTERNS = ("2:4", "50%", "75%")
_HELD_OUT = 32
_WARM_UP = 0.03
_TIMED = 8  # steps


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to fine-tune.

    Attributes:
        adapt: puts what is trained into the model, in place; returns what is called.
        rates: learning rates to try, the same number for each method.
        reconstructed: whether it starts from the model after block reconstruction.
        teacher: share of the loss that is the divergence from the dense model.
        weight_decay: AdamW's.
    """

    adapt: Callable[[PreTrainedModel], nn.Module]
    rates: Sequence[float]
    reconstructed: bool = False
    teacher: float = 0.0
    weight_decay: float = 0.0


def _spp(model: PreTrainedModel, **settings: Any) -> nn.Module:
    """As `spp train` has it: by default with no more parameters in any layer than LoRA of rank 16."""
    return with_new_adapter(model, target_layers(model, "all-linear"), AdapterSettings.build(settings))


def _hira(model: PreTrainedModel) -> nn.Module:
    return get_peft_model(model, HiraConfig(r=16, target_modules=list(prunable_linears(model)), task_type="CAUSAL_LM"))


def _ia3(model: PreTrainedModel) -> nn.Module:
    """Scales the outputs of attention's layers and of the MLP's first, and the inputs of its last, as IA3 has it."""
    linears = list(prunable_linears(model))
    last = [name for name in linears if name.endswith(("down_proj", "fc2"))]
    return get_peft_model(model, IA3Config(target_modules=linears, feedforward_modules=last, task_type="CAUSAL_LM"))


def _super_tuning(model: PreTrainedModel) -> nn.Module:
    """The largest weights, as many as LoRA of rank 16 has parameters; all of them are survivors of pruning."""
    shapes = [shape_oi(layer) for layer in prunable_linears(model).values()]
    share = sum(16 * (rows + columns) for rows, columns in shapes) / sum(rows * columns for rows, columns in shapes)
    targets = list(prunable_linears(model))
    return get_peft_model(model, SupertuningConfig(target_modules=targets, sparsity=1 - share, task_type="CAUSAL_LM"))


def _spp_and_norms(model: PreTrainedModel) -> nn.Module:
    adapted = _spp(model)
    for name, parameter in adapted.named_parameters():
        if parameter.ndim == 1 and "norm" in name.lower():
            parameter.requires_grad_(True)
    return adapted


def _spp_in_the_memory_of_hira(model: PreTrainedModel) -> nn.Module:
    """As many parameters as fit into HiRA's memory at rank 16: the dense bf16 weight, and 16 bytes for each one."""
    rows_columns = [shape_oi(layer) for layer in prunable_linears(model).values()]
    entries, sides = sum(o * i for o, i in rows_columns), sum(o + i for o, i in rows_columns)
    survivors = sum(int((layer.weight != 0).sum()) for layer in prunable_linears(model).values())
    saved = 2 * entries - (2 * survivors + entries / 8)
    return _spp(model, lora_rank=16 + max(int(saved / (16 * sides)), 0))


def _full(model: PreTrainedModel) -> nn.Module:
    """As `spp train --method full` has it."""
    return with_trained_values(model, target_layers(model, "all-linear"))


_RATES = (0.01, 0.02, 0.04, 0.08)
_LORA_RATES = (4e-3, 8e-3, 0.016, 0.032)
_FULL_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
_PUBLISHED = {"r": 16, "directions": 1, "init_weights": "published"}
METHODS: dict[str, Method] = {
    "SPP": Method(adapt=_spp, rates=_RATES),
    "HiRA": Method(adapt=_hira, rates=_RATES),
    "masked LoRA": Method(adapt=partial(replace_linears, make=MaskedLora), rates=_LORA_RATES),
    "SPP, published": Method(adapt=partial(_spp, **_PUBLISHED, dropout=0.05), rates=(4e-3,) * 4, weight_decay=1e-3),
    "masked full": Method(adapt=partial(replace_linears, make=MaskedWeight), rates=_FULL_RATES),
    "SPP + both": Method(adapt=_spp, rates=_RATES, reconstructed=True, teacher=0.5),
    "LoRA*": Method(adapt=partial(replace_linears, make=Lora), rates=_LORA_RATES),
    "SPP + reconstruction": Method(adapt=_spp, rates=_RATES, reconstructed=True),
    "SPP + distillation": Method(adapt=_spp, rates=_RATES, teacher=0.5),
    "HiRA + reconstruction": Method(adapt=_hira, rates=_RATES, reconstructed=True),
    "full": Method(adapt=_full, rates=_FULL_RATES),
    "full + both": Method(adapt=_full, rates=_FULL_RATES, reconstructed=True, teacher=0.5),
    "SPP + norms": Method(adapt=_spp_and_norms, rates=_RATES),
    "half SPP, half masked LoRA": Method(adapt=partial(replace_linears, make=HalfSpp), rates=_LORA_RATES),
    "SPP, memory of HiRA": Method(adapt=_spp_in_the_memory_of_hira, rates=_RATES),
    "Super-Tuning": Method(adapt=_super_tuning, rates=_FULL_RATES),
    "IA3": Method(adapt=_ia3, rates=_RATES),
    "SPP, K = 1": Method(adapt=partial(_spp, directions=1), rates=_RATES),
}
"""Name in the table -> how. Reconstruction alone is the `pruned` of the methods that start from it."""


class Cell:
    """A model at a pattern: what all methods share.

    Args:
        evaluated: the model.
        pattern: of its zeros.
        folder: for pruned models.
        device: cpu or cuda; weights are fp32.
    """

    def __init__(self, evaluated: EvaluatedModel, pattern: str, folder: Path, device: str = "cpu") -> None:
        self.evaluated, self.pattern, self.device = evaluated, pattern, device
        self._loading = LoadingOptions(dtype="float32", device=device)
        self._folder = folder / f"{evaluated.name}-{pattern.replace(':', 'of').replace('%', '')}"
        options = spp.EvalOptions(
            model=evaluated.model,
            text=evaluated.evaluation,
            window=evaluated.evaluation_window or evaluated.window,
            limit=evaluated.limit,
        )
        folder_of_model = Path(evaluated.model)
        self._text = read_windows(options, folder_of_model).windows
        self.dense = load_model(folder_of_model, self._loading)
        training = spp.TrainOptions.build(
            {
                "model": evaluated.model,
                "out": folder / "none",
                "data": evaluated.calibration,
                "window": evaluated.window,
                "validation": _HELD_OUT,
            }
        )
        examples, _ = training_examples(training, folder_of_model, evaluated.window, self.dense.config.vocab_size)
        items, self._held_out = hold_out(examples, training)
        self._training = [one for _, one in items]
        mean = sum(len(one.input_ids) for one in self._training) / len(self._training)
        self._at_once = max(round(evaluated.tokens_per_step / mean), 1)

    def start(self, *, reconstructed: bool) -> PreTrainedModel:
        """The pruned model, made once."""
        out = self._folder / ("reconstructed" if reconstructed else "pruned")
        if not out.is_dir():
            values = {"model": self.evaluated.model, "out": out, "pattern": self.pattern}
            values |= {
                "calibration": self.evaluated.calibration,
                "samples": self.evaluated.samples,
                "window": self.evaluated.window,
                "device": self.device,
            }
            spp.prune(spp.PruneOptions.build(values | ({"reconstruct": "block"} if reconstructed else {})))
        return load_model(out, self._loading)

    def autocast(self) -> torch.autocast:
        """What training and validation compute in."""
        dtype = self.evaluated.dtype
        return torch.autocast(self.device, dtype, enabled=dtype != torch.float32)

    def perplexity(self, model: nn.Module) -> float:
        """On the text that is reported."""
        return perplexity_of(model.eval(), self._text).perplexity  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def validation(self, model: nn.Module) -> float:
        """Mean loss in nats per token on what was held out."""
        batches = [self._held_out[first : first + 16] for first in range(0, len(self._held_out), 16)]
        with self.autocast():
            sums = [_losses(model.eval(), batch) for batch in batches]
        return sum(float(one) for one, _ in sums) / sum(count for _, count in sums)

    def batches(self, seed: int, steps: int) -> list[list[Example]]:
        """The same for every method."""
        chance = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < steps * self._at_once:
            order += torch.randperm(len(self._training), generator=chance).tolist()
        return [
            [self._training[number] for number in order[step * self._at_once : (step + 1) * self._at_once]]
            for step in range(steps)
        ]


def _losses(
    model: nn.Module, examples: Sequence[Example], teacher: nn.Module | None = None, share: float = 0.0
) -> tuple[torch.Tensor, int]:
    """Sum over predicted tokens of (1 - share) * cross-entropy + share * divergence, and how many there are."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate(examples).items()}
    labels = batch.pop("labels")
    rows = predicted(labels)
    logits = model(**batch).logits[:, :-1][rows]
    total = (1 - share) * F.cross_entropy(logits, labels[:, 1:][rows], reduction="sum")
    if teacher is not None and share:
        with torch.no_grad():
            expected = teacher(**batch).logits[:, :-1][rows]
        total = total + share * divergence(logits, expected, 1.0)
    return total, len(logits)


def fit(
    cell: Cell, method: Method, rate: float, seed: int, steps: int, warm_up: float = _WARM_UP
) -> tuple[nn.Module, dict[str, Any]]:
    """Train; the model in eval mode, and what it took. AdamW, a linear warm-up and fall, gradients clipped at 1."""
    torch.manual_seed(seed)
    model = method.adapt(cell.start(reconstructed=method.reconstructed))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=rate, weight_decay=method.weight_decay)
    warm = math.ceil(warm_up * steps)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warm, 1.0) * (1 - step / steps))
    model.train()
    began = _seconds(cell.device)
    for examples in cell.batches(seed, steps):
        with cell.autocast():
            total, count = _losses(model, examples, cell.dense, method.teacher)
        (total / count).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    found = {
        "trainable": sum(parameter.numel() for parameter in trained),
        "train_seconds": round(_seconds(cell.device) - began, 1),
    }
    return model.eval(), found


def steps_within(cell: Cell, method: Method, seconds: float) -> int:
    """How many steps a method makes in this time, by the time of a few of them."""
    began = _seconds(cell.device)
    fit(cell, method, method.rates[0], 0, 1)  # what happens once, and the first step, which is slower
    once = _seconds(cell.device) - began
    fit(cell, method, method.rates[0], 0, 1 + _TIMED)
    each = (_seconds(cell.device) - began - 2 * once) / _TIMED
    return max(round(seconds / each), 1)


def _seconds(device: str) -> float:
    """A clock; on a CPU the process's own, which runs for each thread, and which other processes hardly change."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(cell: Cell, method: Method, seeds: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """A row for each seed, at the rate that does best on what was held out."""
    tried: dict[float, tuple[float, nn.Module, dict[str, Any]]] = {}
    for rate in dict.fromkeys(method.rates):
        model, found = fit(cell, method, rate, seeds[0], steps)
        loss = cell.validation(model)
        tried[rate] = (loss if math.isfinite(loss) else math.inf, model, found)
    rate = min(tried, key=lambda one: tried[one][0])
    rows = []
    for seed in seeds:
        model, found = tried[rate][1:] if seed == seeds[0] else fit(cell, method, rate, seed, steps)
        rows.append({"learning_rate": rate, "seed": seed, **found, "perplexity": round(cell.perplexity(model), 4)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and append each row to the CSV file as it is there."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        for evaluated in evaluated_models(args.data, Path(scratch), args.model):
            machine = machine_columns(args.device)
            for pattern in args.pattern or PATTERNS:
                asked = args.method or METHODS
                if methods := [name for name in asked if not _is_measured(evaluated, pattern, name, args)]:
                    _measure_cell(Cell(evaluated, pattern, Path(scratch), args.device), methods, machine, args)


def _measure_cell(cell: Cell, methods: Sequence[str], machine: dict[str, Any], args: argparse.Namespace) -> None:
    dense = cell.perplexity(cell.dense)
    pruned = {which: cell.perplexity(cell.start(reconstructed=which)) for which in (False, True)}
    common = {"model": cell.evaluated.name, "pattern": cell.pattern, "protocol": cell.evaluated.protocol}
    print(f"{cell.evaluated.name}, {cell.pattern}: dense {dense:.3f}, pruned {pruned[False]:.3f}, "
          f"reconstructed {pruned[True]:.3f}", flush=True)  # fmt: skip
    for name in methods:
        steps = args.steps if args.seconds is None else steps_within(cell, METHODS[name], args.seconds)
        for found in measure(cell, METHODS[name], args.seeds, steps):
            gap = gap_closed(dense, pruned[False], found["perplexity"])
            row = {
                **machine,
                **common,
                "steps": steps,
                "tokens_per_step": cell.evaluated.tokens_per_step,
                "dense": round(dense, 4),
                "pruned": round(pruned[False], 4),
                "reconstructed": round(pruned[True], 4),
                "method": name,
                **found,
                "gap_closed": "" if gap is None else round(gap, 4),
            }
            append_rows(args.csv, [row])
            print(f"{name}, rate {found['learning_rate']}, seed {found['seed']}: {found['perplexity']}, "
                  f"gap closed {row['gap_closed']}, {found['trainable']:,} parameters", flush=True)  # fmt: skip


def _is_measured(evaluated: EvaluatedModel, pattern: str, method: str, args: argparse.Namespace) -> bool:
    """Whether the file has the rows of an earlier run, which may have been killed after them."""
    if args.seconds is not None:  # how many steps that is cannot be known
        return False
    asked = {
        (evaluated.name, pattern, method, str(args.steps), str(evaluated.tokens_per_step), str(seed))
        for seed in args.seeds
    }
    names = ("model", "pattern", "method", "steps", "tokens_per_step", "seed")
    return asked <= {tuple(row[name] for name in names) for row in read_rows(args.csv)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    add_model_arguments(parser, PATTERNS, METHODS, "quality.csv")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="CPU time of each training, in place of --steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


if __name__ == "__main__":
    main()
