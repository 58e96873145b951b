"""Forward and backward of one linear layer: SPP's back-ends against the GEMM floor, published SPP, and stock PEFT.

python -m benchmarks.layer --shape 4096x4096 --tokens 1024 --dtype bf16 --density 0.5 [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.common import (
    DTYPES,
    TIMES,
    Measured,
    add_run_arguments,
    append_rows,
    machine_columns,
    measure,
    print_table,
    ratio,
    shape_argument,
)
from benchmarks.layer_methods import METHODS, Case, Layer

_SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
_GPU_SHAPES = [*_SHAPES, (8192, 28672)]
_DTYPES = ["bf16", "fp32"]
_DENSITIES = [0.5, 0.25]
_TOKENS = [256, 1024, 2048, 8192]
_MOST_TOKENS_WITHOUT_BF16 = 2048
"""On a CPU, unless asked for: a round over all methods would take minutes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case, print it, and append its rows to the CSV file."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    methods = args.methods or METHODS
    chosen = cases(args)
    if args.json:
        if len(chosen) != 1:
            parser.error(f"--json takes one case, not {len(chosen)}: give one shape, tokens, dtype and density")
        found = measure(Layer(chosen[0]).methods(methods), args.repeats, args.device)
        print(json.dumps({name: one and round(one.median, 4) for name, one in found.items()}))
        return
    machine = machine_columns(args.device)
    for case in chosen:
        found = measure(Layer(case).methods(methods), args.repeats, args.device)
        made = rows(machine, case, found)
        append_rows(args.csv, made)
        title = ", ".join(f"{name} {value}" for name, value in case.columns().items())
        print_table(title, made, TIMES | {"ratio_to_floor": "ratio to floor"})


def cases(args: argparse.Namespace) -> list[Case]:
    """All combinations that the command line asks for."""
    shapes = args.shape or (_GPU_SHAPES if args.device == "cuda" else _SHAPES)
    return [
        Case(shape=shape, tokens=tokens, dtype=dtype, density=density, device=args.device)
        for shape, dtype, density in itertools.product(shapes, args.dtype or _DTYPES, args.density or _DENSITIES)
        for tokens in args.tokens or _default_tokens(dtype, args.device)
    ]


def _default_tokens(dtype: str, device: str) -> list[int]:
    everything = device == "cuda" or dtype == "bf16"
    return [tokens for tokens in _TOKENS if everything or tokens <= _MOST_TOKENS_WITHOUT_BF16]


def rows(machine: Mapping[str, Any], case: Case, found: Mapping[str, Measured | None]) -> list[dict[str, Any]]:
    """The CSV rows of a case, one per method that this machine has."""
    return [
        {
            **machine,
            **case.columns(),
            "method": name,
            **one.columns(),
            "ratio_to_floor": ratio(one, found.get("floor")),
            "extra_bytes": "" if one.extra_bytes is None else one.extra_bytes,
        }
        for name, one in found.items()
        if one
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__.split("\n")[0])
    several = {"action": "extend", "nargs": "+"}
    parser.add_argument("--shape", type=shape_argument, metavar="OxI", **several)
    parser.add_argument("--tokens", type=int, **several)
    parser.add_argument("--dtype", choices=DTYPES, **several)
    parser.add_argument("--density", type=float, help="share of non-zeros", **several)
    parser.add_argument("--methods", choices=METHODS, help="default: all", **several)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_run_arguments(parser, repeats=5, csv_name="layer.csv")
    return parser


if __name__ == "__main__":
    main()
