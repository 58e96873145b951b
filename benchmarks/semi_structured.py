"""2:4 weights on CUDA's sparse tensor cores against torch's dense product: large GEMMs, and decoding at batch 1.

python -m benchmarks.semi_structured --shape 4096x4096 --tokens 1 4096 --dtype bf16 [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

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
from spp.errors import UsageError
from spp.models.semi_structured import to_semi_structured
from spp.patterns import NM

_SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672)]
_TOKENS = [1, 16, 256, 4096, 16384]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case, print it, and append its rows to the CSV file."""
    parser = _parser()
    args = parser.parse_args(arguments)
    layers = list(itertools.product(args.shape or _SHAPES, args.dtype or ["bf16"]))
    tokens = args.tokens or _TOKENS
    if args.json and len(layers) * len(tokens) != 1:
        parser.error("--json takes one case: give one shape, tokens and dtype")
    if not torch.cuda.is_available():
        parser.error("needs CUDA: sparse tensor cores are on NVIDIA GPUs of compute capability 8.0 and above")
    machine = {} if args.json else machine_columns("cuda")
    for shape, dtype in layers:
        try:
            dense, sparse = pair(shape, dtype)
        except UsageError as error:
            parser.error(str(error))
        for count in tokens:
            x = torch.randn(count, shape[1], dtype=DTYPES[dtype], device="cuda")
            found = measure(methods(dense, sparse, x), args.repeats, "cuda")
            if args.json:
                print(json.dumps({name: one and round(one.median, 4) for name, one in found.items()}))
                return
            made = rows(machine, shape, count, dtype, found)
            append_rows(args.csv, made)
            title = f"{made[0]['shape']}, {count} tokens, {dtype}"
            print_table(title, made, TIMES | {"ratio_to_dense": "ratio to dense"})


def pair(shape: tuple[int, int], dtype: str) -> tuple[nn.Linear, nn.Linear]:
    """A 2:4 layer on the GPU as it is, and the same one semi-structured."""
    layer = sparse_layer(shape, DTYPES[dtype], "cuda")
    holder = nn.Sequential(sparse_layer(shape, DTYPES[dtype], "cuda"))
    to_semi_structured(holder)
    return layer, holder[0]  # pyright: ignore[reportReturnType]


def sparse_layer(shape: tuple[int, int], dtype: torch.dtype, device: str) -> nn.Linear:
    """A layer without a bias whose random weight is 2:4; the same one for the same shape."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    layer = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
    weight = torch.where(NM(2, 4).keep_mask(drawn.abs()), drawn, 0.0).to(device, dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def methods(dense: nn.Module, sparse: nn.Module, x: torch.Tensor) -> dict[str, Step | None]:
    """Name -> one product x W^T."""
    return {"dense": partial(_product, dense, x), "semi_structured": partial(_product, sparse, x)}


def _product(layer: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        layer(x)


def rows(
    machine: Mapping[str, Any],
    shape: tuple[int, int],
    tokens: int,
    dtype: str,
    found: Mapping[str, Measured | None],
) -> list[dict[str, Any]]:
    """The CSV rows of a case, one per method; a ratio below 1 is where the sparse product helps."""
    return [
        {
            **machine,
            "shape": f"{shape[0]}x{shape[1]}",
            "tokens": tokens,
            "dtype": dtype,
            "method": name,
            **one.columns(),
            "ratio_to_dense": ratio(one, found["dense"]),
        }
        for name, one in found.items()
        if one
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.semi_structured", description=__doc__.split("\n")[0])
    several = {"action": "extend", "nargs": "+"}
    parser.add_argument("--shape", type=shape_argument, metavar="OxI", **several)
    parser.add_argument("--tokens", type=int, **several)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), **several)
    add_run_arguments(parser, repeats=30, csv_name="semi_structured.csv")
    return parser


if __name__ == "__main__":
    main()
