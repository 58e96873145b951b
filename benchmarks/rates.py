"""Which learning rate suits which model: every rate to its end, from the same pruned model, text, order and steps.

    python -m benchmarks.rates --data FOLDER --threads 2 [--model story] [--pattern 2:4] [--steps 100 1000]

FOLDER has the models in benchmarks/evaluated_models.py; without it, there is the bundled one only. What the CSV file
already has is not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import append_rows, machine_columns, read_rows
from benchmarks.evaluated_models import add_model_arguments, evaluated_models
from benchmarks.quality import METHODS, PATTERNS, Cell, Method, fit
from spp.training.learning_rate import scaled_rate
from spp.training.options import TrainingSettings

_WARM_UP = 0.1
_RATES = {
    "SPP": (1e-3, 2e-3, 4e-3, 8e-3, 0.016, 0.032, 0.064),
    "full": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3),
}
_FITTED: dict[str, Method] = {"SPP": METHODS["SPP"], "full": METHODS["masked full"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and append each row to the CSV file as it is there."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        for evaluated in evaluated_models(args.data, Path(scratch), args.model):
            for pattern in args.pattern or PATTERNS:
                _measure_cell(Cell(evaluated, pattern, args.folder or Path(scratch)), args)


def _measure_cell(cell: Cell, args: argparse.Namespace) -> None:
    machine = machine_columns("cpu")
    case: dict[str, Any] = {"model": cell.evaluated.name, "pattern": cell.pattern, "seed": args.seed}
    case["tokens_per_step"] = cell.evaluated.tokens_per_step
    start = round(cell.validation(cell.start(reconstructed=False)), 4)
    for steps in args.steps:
        for method in args.method or _RATES:
            settings = TrainingSettings.build({"method": method.lower()})
            default = round(scaled_rate(settings, cell.dense.config), 5)
            for rate in args.rate or _RATES[method]:
                row = case | {"steps": steps, "method": method, "learning_rate": rate}
                if _is_measured(row, args.csv):
                    continue
                model, found = fit(cell, _FITTED[method], rate, args.seed, steps, _WARM_UP)
                losses = {"default_rate": default, "start_loss": start, "loss": round(cell.validation(model), 4)}
                losses["perplexity"] = round(cell.perplexity(model), 4)
                append_rows(args.csv, [machine | row | found | losses])
                print(row | found | losses, flush=True)


def _is_measured(row: dict[str, Any], csv: Path) -> bool:
    asked = {name: str(value) for name, value in row.items()}
    return any(asked.items() <= known.items() for known in read_rows(csv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=__doc__.split("\n")[0])
    add_model_arguments(parser, PATTERNS, _RATES, "rates.csv")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000], help="default: 100 1000")
    parser.add_argument("--rate", type=float, nargs="+", help="learning rates (default: seven, by method)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for pruned models, which are not made again (default: none)")
    return parser


if __name__ == "__main__":
    main()
