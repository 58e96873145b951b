"""Products with few tokens, as in decoding: packed weights against torch's dense product and our own dense kernel.

python -m benchmarks.decode --shape 11008x4096 --tokens 1 --dtype bf16 [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
    sparse_weight,
)
from spp import ops
from spp.ops import native
from spp.ops.packed import PackedWeight

_SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
_TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]
_SPARSITIES = (50, 75, 90)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case, print it, and append its rows to the CSV file."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    layers = list(itertools.product(args.shape or _SHAPES, args.dtype or ["bf16"]))
    tokens = args.tokens or _TOKENS
    if args.json:
        if len(layers) * len(tokens) != 1:
            parser.error("--json takes one case: give one shape, tokens and dtype")
        ((shape, dtype),) = layers
        found = measure(Weights(shape, dtype).methods(tokens[0]), args.repeats)
        print(json.dumps({name: one and round(one.median, 4) for name, one in found.items()}))
        return
    machine = machine_columns("cpu")
    for shape, dtype in layers:
        weights = Weights(shape, dtype)
        for count in tokens:
            case = {"shape": f"{shape[0]}x{shape[1]}", "tokens": count, "dtype": dtype}
            made = rows(machine | case, measure(weights.methods(count), args.repeats), weights.nbytes)
            append_rows(args.csv, made)
            title = ", ".join(f"{name} {value}" for name, value in case.items())
            print_table(title, made, TIMES | {"ratio_to_torch": "ratio to torch", "weight_bytes": "weight MiB"})


class Weights:
    """A weight of one shape, dense and packed at every sparsity. The dense one is the 50 % one, zeros and all."""

    def __init__(self, shape: tuple[int, int], dtype: str) -> None:
        self.dtype = DTYPES[dtype]
        self.dense = sparse_weight(*shape, 0.5, self.dtype)
        self.packed = {sparsity: _packed(shape, sparsity, self.dtype) for sparsity in _SPARSITIES}

    @property
    def nbytes(self) -> dict[str, int]:
        """Of the weight that each method reads."""
        packed = {f"packed_{sparsity}": weight.nbytes for sparsity, weight in self.packed.items()}
        return {"torch": self.dense.nbytes, "own_dense": self.dense.nbytes, **packed}

    def methods(self, tokens: int) -> dict[str, Step | None]:
        """Name -> one product x W^T; None where our kernels are missing, or do not take so many tokens."""
        x = torch.randn(tokens, self.dense.shape[1], generator=torch.Generator().manual_seed(1)).to(self.dtype)
        own = not native.why_not(self.dense, x) and tokens <= native.most_tokens(self.dense, x.dtype)
        return {
            "torch": partial(_torch_product, x, self.dense),
            "own_dense": partial(native.matvec, x, self.dense, None) if own else None,
            **{f"packed_{sparsity}": partial(_product, x, weight) for sparsity, weight in self.packed.items()},
        }


def _packed(shape: tuple[int, int], sparsity: int, dtype: torch.dtype) -> PackedWeight:
    return ops.pack(sparse_weight(*shape, 1 - sparsity / 100, dtype))


def _torch_product(x: Tensor, weight: Tensor) -> None:
    with torch.no_grad():
        F.linear(x, weight)


def _product(x: Tensor, weight: PackedWeight) -> None:
    with torch.no_grad():
        ops.packed_linear(x, weight)


def rows(
    columns: Mapping[str, Any], found: Mapping[str, Measured | None], nbytes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The CSV rows of a case, one per method that can do it."""
    return [
        {
            **columns,
            "method": name,
            **one.columns(),
            "ratio_to_torch": ratio(one, found["torch"]),
            "weight_bytes": nbytes[name],
        }
        for name, one in found.items()
        if one
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.split("\n")[0])
    several = {"action": "extend", "nargs": "+"}
    parser.add_argument("--shape", type=shape_argument, metavar="OxI", **several)
    parser.add_argument("--tokens", type=int, **several)
    parser.add_argument("--dtype", choices=DTYPES, **several)
    add_run_arguments(parser, repeats=30, csv_name="decode.csv")
    return parser


if __name__ == "__main__":
    main()
