"""A whole training step of a random pruned Llama, and its peak memory: SPP, and full in packed memory, against others.

    python -m benchmarks.step --size 300m --sparsity 0.75 --batch 1 --tokens 512 [--json]

Every method runs in processes of its own (`step_worker.py`), so that no method's memory counts for another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.common import (
    TIMES,
    Measured,
    add_run_arguments,
    append_rows,
    machine_columns,
    print_table,
    ratio,
    run_worker,
)
from benchmarks.step_worker import METHODS, SIZES, Settings

_MEMORY = ("imports_bytes", "built_bytes", "peak_bytes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the methods at one size, and print it, or append it to the CSV file."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    case = {name: getattr(args, name) for name in ("size", "sparsity", "batch", "tokens")}
    settings = Settings(method="", steps=args.steps, threads=args.threads, **case)
    found = collect(settings, args.methods or list(METHODS), args.repeats)
    if args.json:
        print(json.dumps({name: _numbers(runs) for name, runs in found.items()}))
        return
    made = rows(machine_columns("cpu") | case, found)
    append_rows(args.csv, made)
    memory = {name: name.replace("_bytes", " MiB") for name in _MEMORY}
    title = ", ".join(f"{name} {value}" for name, value in case.items())
    print_table(title, made, TIMES | {"ratio_to_lora": "to LoRA"} | memory)


def collect(settings: Settings, methods: Sequence[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Method -> what its processes reported, one per round. Every other round goes backwards."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for round_ in range(rounds):
        for name in methods if round_ % 2 == 0 else reversed(methods):
            print(f"round {round_ + 1} of {rounds}: {name}", file=sys.stderr)
            found[name].append(_in_a_process(replace(settings, method=name)))
    return found


def _in_a_process(settings: Settings) -> dict[str, Any]:
    done = run_worker("step_worker", asdict(settings))
    if done.returncode:
        raise SystemExit(f"{settings.method} failed with exit code {done.returncode} (-9: out of memory)")
    return json.loads(done.stdout.splitlines()[-1])


def rows(columns: Mapping[str, Any], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The CSV rows, one per method: times of all steps of all rounds, medians of the rounds' memory."""
    lora = _times(found["peft_lora"]) if "peft_lora" in found else None
    return [
        {
            **columns,
            "method": name,
            "rounds": len(runs),
            **_times(runs).columns(),
            "ratio_to_lora": ratio(_times(runs), lora),
            "trained_parameters": runs[0]["trained_parameters"],
            **_memory(runs),
        }
        for name, runs in found.items()
    ]


def _times(runs: Sequence[Mapping[str, Any]]) -> Measured:
    return Measured(times=[time for run in runs for time in run["step_ms"]])


def _memory(runs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: int(statistics.median(run[name] for run in runs)) for name in _MEMORY}


def _numbers(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return _times(runs).columns() | _memory(runs) | {"last_loss": runs[-1]["losses"][-1]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="300m", help="default: %(default)s")
    parser.add_argument("--sparsity", type=float, default=0.75, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="sequences per step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="in each sequence (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process (default: %(default)s)")
    parser.add_argument("--methods", choices=METHODS, action="extend", nargs="+", help="default: all")
    add_run_arguments(parser, repeats=3, csv_name="step.csv")
    return parser


if __name__ == "__main__":
    main()
