"""Prune one weight, from statistics that are ready to its zeros: our criteria against plain torch.

python -m benchmarks.pruning --shape 4096x4096 --pattern 2:4 --threads 2 [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.baselines import pruning as plain
from benchmarks.common import (
    DTYPES,
    TIMES,
    Measured,
    Step,
    add_run_arguments,
    append_rows,
    machine_columns,
    measure,
    print_table,
    ratio,
    shape_argument,
)
from spp.patterns import NM, Pattern, parse_pattern
from spp.pruning import dsnot, least_squares, swaps
from spp.pruning.calibration.input_statistics import Gram, Moments
from spp.pruning.criteria import admm, magnitude, ria, sparsegpt, wanda

_SHAPES = [(4096, 4096)]
_PATTERNS = ["50%", "2:4"]
CRITERIA = ("magnitude-matrix", "magnitude", "wanda", "ria", "sparsegpt", "dsnot")
STEPS = (*CRITERIA, "admm", "swaps", "least-squares")
"""What can be timed; of what is not in CRITERIA there is no plain version."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case, print it, and append its rows to the CSV file."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    layers = list(itertools.product(args.shape or _SHAPES, args.dtype or ["fp32"]))
    patterns = args.pattern or _PATTERNS
    criteria = args.criteria or STEPS
    if args.json:
        if len(layers) * len(patterns) != 1:
            parser.error("--json takes one case: give one shape, dtype and pattern")
        found = measure(Layer(*layers[0], args.device).methods(patterns[0], criteria), args.repeats, args.device)
        print(json.dumps({name: one and round(one.median, 4) for name, one in found.items()}))
        return
    machine = machine_columns(args.device)
    for shape, dtype in layers:
        layer = Layer(shape, dtype, args.device)
        for pattern in patterns:
            found = measure(layer.methods(pattern, criteria), args.repeats, args.device)
            case = {"shape": f"{shape[0]}x{shape[1]}", "dtype": dtype, "pattern": str(pattern)}
            made = rows(machine | case, found)
            append_rows(args.csv, made)
            title = ", ".join(f"{name} {value}" for name, value in case.items())
            print_table(title, made, TIMES | {"ratio_to_plain": "ratio to plain torch"})


class Layer:
    """A random weight, and the statistics of correlated inputs whose features have sizes and means of their own."""

    def __init__(self, shape: tuple[int, int], dtype: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, columns = shape
        self.weight = (torch.randn(rows, columns, generator=generator) * 0.02).to(device, DTYPES[dtype])
        gram, moments = Gram(columns), Moments(columns)
        sizes, means = torch.rand(columns, generator=generator) + 0.1, torch.randn(columns, generator=generator) / 4
        shared = torch.randn(64, columns, generator=generator) / 8
        for _ in range(4):
            own, common = (torch.randn(columns // 2 + 1, size, generator=generator) for size in (columns, 64))
            inputs = ((own + common @ shared) * sizes + means).to(device)
            gram.update(inputs)
            moments.update(inputs)
        self._moments, self._hessian = moments.value(), gram.value()

    def methods(self, text: str, criteria: Sequence[str]) -> dict[str, Step | None]:
        """What is timed for a pattern: each step as `name`, and its plain version, if there is one, as `name_plain`."""
        pattern = parse_pattern(text)
        found: dict[str, Step | None] = {}
        for name in criteria:
            ours, theirs = self._pair(name, pattern)
            found |= {name: ours, f"{name}_plain": theirs}
        return found

    def _pair(self, name: str, pattern: Pattern) -> tuple[Step, Step | None]:
        weight, norm, hessian = self.weight, self._moments.norm, self._hessian
        match name:
            case "magnitude":
                return lambda: magnitude.prune(weight, None, pattern), lambda: plain.magnitude(weight, pattern)
            case "magnitude-matrix":
                return (
                    lambda: magnitude.prune_whole_matrix(weight, None, pattern),
                    lambda: plain.magnitude_matrix(weight, pattern),
                )
            case "wanda":
                return lambda: wanda.prune(weight, norm, pattern), lambda: plain.wanda(weight, norm, pattern)
            case "ria":
                return lambda: ria.prune(weight, norm, pattern), lambda: plain.ria(weight, norm, pattern)
            case "sparsegpt":
                return (
                    lambda: sparsegpt.prune(weight, sparsegpt.damped_inverse(hessian), pattern),
                    lambda: plain.sparsegpt(weight, hessian, pattern),
                )
            case "admm":
                return lambda: admm.prune(weight, admm.scaled_inverse(hessian), pattern), None
            case "swaps":
                start = wanda.prune(weight, norm, pattern)
                return lambda: swaps.refine(weight, start, hessian, pattern), None
            case "least-squares":
                start = wanda.prune(weight, norm, pattern)
                return lambda: least_squares.update(weight, start.mask, least_squares.damped(hessian)), None
        return self._refinement(pattern)

    def _refinement(self, pattern: Pattern) -> tuple[Step, Step | None]:
        """DSnoT on Wanda's mask; the plain version is of the unstructured algorithm only."""
        weight, moments = self.weight, self._moments
        pruned = wanda.prune(weight, moments.norm, pattern)
        values = (moments.mean, moments.variance, moments.norm)
        theirs = None if isinstance(pattern, NM) else lambda: plain.dsnot(weight, pruned.mask, *values, dsnot.THRESHOLD)
        return lambda: dsnot.refine(weight, pruned, moments, pattern), theirs


def rows(case: Mapping[str, Any], found: Mapping[str, Measured | None]) -> list[dict[str, Any]]:
    """The CSV rows of a case, one per method that there is."""
    return [
        {
            **case,
            "method": name,
            **one.columns(),
            "ratio_to_plain": ratio(one, found.get(f"{name.removesuffix('_plain')}_plain")),
            "extra_bytes": "" if one.extra_bytes is None else one.extra_bytes,
        }
        for name, one in found.items()
        if one
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__.split("\n")[0])
    several = {"action": "extend", "nargs": "+"}
    parser.add_argument("--shape", type=shape_argument, metavar="OxI", **several)
    parser.add_argument("--dtype", choices=DTYPES, **several)
    parser.add_argument("--pattern", help="default: 50%% and 2:4", **several)
    parser.add_argument("--criteria", choices=STEPS, help="default: all", **several)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_run_arguments(parser, repeats=5, csv_name="pruning.csv")
    return parser


if __name__ == "__main__":
    main()
