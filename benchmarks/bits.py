"""Whether sparsity pays: perplexity against bits per weight, dense and sparse, with survivors in few bits.

    python -m benchmarks.bits --data FOLDER --threads 1 [--model story] [--smollm2 FOLDER] [--seed 1]

FOLDER has the models in benchmarks/evaluated_models.py; without it, there is the bundled one only.

Sparse models come from the best one-shot pipeline of `spp prune`. All weights in the decoder blocks are quantized,
dense ones by the same functions as survivors: codebooks fitted to each matrix, searched scales for groups of 64
columns, and the nearest value (nearest), or error feedback and descent on codes (feedback), as `spp pack --bits
--calibration` does. They are computed with as floats, so that nothing but their values is measured. What is in the file
already is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import spp
from benchmarks.common import append_rows, machine_columns, read_rows
from benchmarks.evaluated_models import EvaluatedModel, add_model_arguments, evaluated_models
from benchmarks.pruned_quality import perplexity
from spp.data.calibration import calibration_windows
from spp.errors import UsageError
from spp.models.architecture import decoder_blocks, prunable_matrices
from spp.ops.packed import zero_share
from spp.pruning.few_bits.quantize import round_to_nearest
from spp.pruning.in_memory import LoadedBlocks, MemoryJournal
from spp.pruning.quantize_blocks import quantize_blocks

DENSE = "dense"
PATTERNS = (DENSE, "50%", "2:4", "32:64", "75%", "16:64")
BITS = {DENSE: (8, 6, 4, 3, 2), "sparse": (8, 6, 5, 4, 3)}
METHODS = ("nearest", "feedback")
FLOAT = "float"
"""Of rows whose weights are as they were."""

GROUP = 64
SAMPLES = 128
_FLOAT_BITS = 16
_CHARACTERS = 20_000
_PIPELINE = {"criterion": "admm", "refine": "swaps", "update": "least-squares"}


def bits_per_weight(model: PreTrainedModel, bits: int) -> float:
    """Bits per entry of the matrices in the blocks: codes of survivors, scales, and for sparse ones a bit per entry.

    Not counted are codebooks and what says where rows begin: a hundredth of a bit or so in matrices of usual size.
    """
    total = entries = 0
    for weight in _weights(model):
        sparse = zero_share(weight) > 0.01
        total += int(weight.count_nonzero() if sparse else weight.numel()) * bits + sparse * weight.numel()
        if bits < _FLOAT_BITS:
            total += len(weight) * -(-weight.shape[1] // GROUP) * 16
        entries += weight.numel()
    return total / entries


def quantized(
    model: PreTrainedModel, evaluated: EvaluatedModel, method: str, bits: int, samples: int, seed: int
) -> PreTrainedModel:
    """A copy of the model, with fewer bits in its blocks, as floats."""
    model = copy.deepcopy(model)
    if method == "nearest":
        for weight in _weights(model):
            weight.copy_(round_to_nearest(weight, bits, GROUP).values())
        return model
    windows = calibration_windows(
        AutoTokenizer.from_pretrained(evaluated.model),
        evaluated.calibration,
        samples=samples,
        window=evaluated.window,
        seed=seed,
    ).windows
    quantize_blocks(
        LoadedBlocks(model), windows, MemoryJournal(), lambda *_: None, bits=bits, group=GROUP, least_zeros=0
    )
    return model


def _weights(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """All matrices in the blocks, (O, I)."""
    prefix, blocks = decoder_blocks(model)
    for index, block in enumerate(blocks):
        yield from (matrix.weight for matrix in prunable_matrices(f"{prefix}.{index}", block))


def _pruned(evaluated: EvaluatedModel, pattern: str, folder: Path, samples: int, seed: int) -> str | None:
    """The folder of the model with a pattern; None where the model has no such pattern."""
    if pattern == DENSE:
        return evaluated.model
    options = {
        "model": evaluated.model,
        "out": folder,
        "pattern": pattern,
        "calibration": evaluated.calibration,
        "samples": samples,
        "window": evaluated.window,
        "seed": seed,
        "dtype": "float32",
        "overwrite": True,
    }
    try:
        spp.prune(spp.PruneOptions.build(options | _PIPELINE))
    except UsageError as error:
        if "does not divide" not in str(error):
            raise
        return None
    return str(folder)


def measure(
    evaluated: EvaluatedModel, pattern: str, cells: Sequence[tuple[str, int]], scratch: Path, samples: int, seed: int
) -> Iterator[dict[str, Any]]:
    """The rows of a pattern: one for each method and number of bits; float and 16 for the weights as they are."""
    if not cells or (folder := _pruned(evaluated, pattern, scratch / "pruned", samples, seed)) is None:
        return
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(evaluated.model)
    for method, bits in cells:
        with torch.no_grad():
            changed = model if method == FLOAT else quantized(model, evaluated, method, bits, samples, seed)
        out = scratch / "quantized"
        changed.save_pretrained(out)
        tokenizer.save_pretrained(out)
        yield {
            "pattern": pattern,
            "method": method,
            "bits": bits,
            "bits_per_weight": round(bits_per_weight(model, bits), 4),
            "perplexity": round(perplexity(evaluated, str(out)), 4),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and append each row to the CSV file as it is there."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = evaluated_models(args.data, folder, args.model)
        if args.smollm2:
            models.append(_smollm2(args.smollm2, args.data, folder))
        for evaluated in models:
            machine = machine_columns("cpu")
            case = {"model": evaluated.name, "protocol": evaluated.protocol, "samples": args.samples, "seed": args.seed}
            for pattern in args.pattern or PATTERNS:
                wanted = [(FLOAT, _FLOAT_BITS)]
                for bits in args.bits or BITS.get(pattern, BITS["sparse"]):
                    wanted += [(method, bits) for method in args.method or METHODS]
                done = _done(args.csv, case | {"pattern": pattern})
                cells = [cell for cell in wanted if cell not in done]
                for row in measure(evaluated, pattern, cells, folder, args.samples, args.seed):
                    append_rows(args.csv, [machine | case | {"group": GROUP} | row])
                    print(evaluated.name, *row.values(), flush=True)


def _done(csv: Path, case: dict[str, Any]) -> set[tuple[str, int]]:
    """Method and bits of the cells that a file has of a case."""
    rows = [row for row in read_rows(csv) if all(row[name] == str(value) for name, value in case.items())]
    return {(row["method"], int(row["bits"])) for row in rows}


def _smollm2(model: Path, data: Path, scratch: Path) -> EvaluatedModel:
    corpora, text = data / "corpora", scratch / f"wikitext2_test_{_CHARACTERS}_characters.txt"
    text.write_text((corpora / "wikitext2_test.txt").read_text(encoding="utf-8")[:_CHARACTERS], encoding="utf-8")
    return EvaluatedModel(
        name="SmolLM2-135M",
        model=str(model),
        calibration=str(corpora / "wikitext2_valid.txt"),
        evaluation=str(text),
        window=512,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits", description=__doc__.split("\n")[0])
    add_model_arguments(parser, PATTERNS, METHODS, "bits.csv")
    parser.add_argument("--bits", type=int, action="extend", nargs="+", help="default: 8 6 5 4 3 (dense: 8 6 4 3 2)")
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", help="the model SmolLM2-135M; it needs --data")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
