"""One layer with few tokens: few-bit survivors against ggml's kernels (llama.cpp), torch, and packed bf16.

python -m benchmarks.deploy --layer 11008x4096 --threads 1 --repeats 9 [--tokens 1] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import ggml_kernels
from benchmarks.common import (
    TIMES,
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
from spp.ops.few_bit_matmul import few_bit_matmul
from spp.ops.few_bits import COLUMNS, FewBitWeight

_GROUP = 128
_BASELINE = "q4_0_repacked"  # what llama.cpp runs a Q4_0 file with


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every method, and print the medians as one object, or a table whose rows go to the CSV file."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    steps, nbytes = methods(args.layer, args.tokens, args.ggml)
    clock = time.process_time if args.cpu_time else time.perf_counter
    found = measure(steps, args.repeats, clock=clock)
    if args.json:
        print(json.dumps({name: one and round(one.median, 4) for name, one in found.items()}))
        return
    entries = args.layer[0] * args.layer[1]
    columns = machine_columns("cpu") | {
        "shape": f"{args.layer[0]}x{args.layer[1]}",
        "tokens": args.tokens,
        "clock": clock.__name__,
    }
    rows = [
        columns
        | {"method": name, "bits_per_weight": round(nbytes[name] * 8 / entries, 3), "weight_bytes": nbytes[name]}
        | one.columns()
        | {"ratio_to_q4_0": ratio(one, found[_BASELINE])}
        for name, one in found.items()
        if one
    ]
    append_rows(args.csv, rows)
    headings = {"bits_per_weight": "bits a weight", "weight_bytes": "MiB", "ratio_to_q4_0": "ratio to Q4_0"}
    print_table(f"{columns['shape']}, {args.tokens} tokens, {columns['threads']} threads", rows, TIMES | headings)


def methods(shape: tuple[int, int], tokens: int, library: Path | None) -> tuple[dict[str, Step | None], dict[str, int]]:
    """Name -> one product with a weight of its own, and name -> bytes of the weight. What is missing is None."""
    dense = sparse_weight(*shape, 1.0, torch.bfloat16)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1))
    steps, nbytes = _ggml_methods(dense, x, library)
    steps["torch_bf16"], nbytes["torch_bf16"] = partial(_quietly, F.linear, x.bfloat16(), dense), dense.nbytes
    half = sparse_weight(*shape, 0.5, torch.bfloat16)
    packed = ops.pack(half)
    steps["packed_bf16_50"] = partial(_quietly, ops.packed_linear, x.bfloat16(), packed)
    nbytes["packed_bf16_50"] = packed.nbytes
    quarter = sparse_weight(*shape, 0.25, torch.bfloat16)
    cases = {
        "packed_8_50": (half, 8),
        "packed_4_50": (half, 4),
        "packed_8_75": (quarter, 8),
        "packed_4_75": (quarter, 4),
    }
    if shape[1] % COLUMNS == 0:
        cases["packed_4_32of64"] = (_fixed_count(dense, COLUMNS // 2), 4)
    else:
        steps["packed_4_32of64"] = None
        print(f"packed_4_32of64: {shape[1]} columns are no multiple of {COLUMNS}", file=sys.stderr)
    for name, (weight, bits) in cases.items():
        few = few_bits(weight, bits)
        steps[name], nbytes[name] = partial(_quietly, few_bit_matmul, x.bfloat16(), few), few.nbytes
    return steps, nbytes


def _ggml_methods(dense: Tensor, x: Tensor, library: Path | None) -> tuple[dict[str, Step | None], dict[str, int]]:
    """The products by ggml, or None and, on stderr, why there is none."""
    steps: dict[str, Step | None] = {}
    nbytes = {}
    try:
        loaded, missing = ggml_kernels.load(library), ""
    except ggml_kernels.MissingError as error:
        loaded, missing = None, str(error)
        print(missing, file=sys.stderr)
    for name in ("q8_0", "q4_0", "q4_0_repacked", "q4_k", "q4_k_repacked", "q2_k_repacked"):
        steps[name] = None
        if loaded is None:
            continue
        format_, repacked = name.removesuffix("_repacked"), name.endswith("_repacked")
        try:
            made = ggml_kernels.product(loaded, dense, x, format_, repacked=repacked, threads=torch.get_num_threads())
        except ggml_kernels.MissingError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        steps[name], nbytes[name] = made.run, made.nbytes
    return steps, nbytes


def few_bits(weight: Tensor, bits: int) -> FewBitWeight:
    """A weight's survivors rounded to the nearest level; levels are evenly spaced, as is enough for speed."""
    columns = -(-weight.shape[1] // _GROUP)
    wide = F.pad(weight.float(), (0, columns * _GROUP - weight.shape[1])).view(len(weight), columns, _GROUP)
    scales = (wide.abs().amax(dim=2) / 127).clamp(min=1e-4).half()
    values = (wide / scales.float()[..., None]).flatten(1)[:, : weight.shape[1]].clamp(-127, 127)
    if bits == 8:
        rounded = values.round()
        indices, codebook = torch.where(rounded == 0, values.sign(), rounded).to(torch.int8), None
    else:
        levels = torch.linspace(-127, 127, 2**bits).round()
        indices = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        codebook = levels.to(torch.int8)
    return FewBitWeight.from_codes(indices, weight != 0, scales, codebook, bits, _GROUP)


def _fixed_count(weight: Tensor, kept: int) -> Tensor:
    """The weight with the `kept` largest entries of every 64 columns, and zeros elsewhere."""
    words = weight.view(-1, COLUMNS)
    largest = words.abs().float().topk(kept, dim=1).indices
    return torch.zeros_like(words).scatter_(1, largest, words.gather(1, largest)).view(weight.shape)


def _quietly(product: Callable[..., Tensor], x: Tensor, weight: object) -> None:
    with torch.no_grad():
        product(x, weight)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deploy", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--layer", type=shape_argument, metavar="OxI", default=(11008, 4096), help="default: 11008x4096"
    )
    parser.add_argument("--tokens", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--ggml", type=Path, metavar="FILE", help="ggml's library (default: that of xllamacpp)")
    parser.add_argument("--cpu-time", action="store_true", help="time of the processor: for a machine that others use")
    add_run_arguments(parser, repeats=9, csv_name="deploy.csv")
    return parser


if __name__ == "__main__":
    main()
