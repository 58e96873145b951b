"""What a run of a six-layer model leaves in results.json, made up but consistent."""

from __future__ import annotations

import math
import random
from typing import Any

from spp.reporting.inputs import Run
from spp.reporting.results import RunResults

MODULES = {
    "self_attn.q_proj": 288 * 288,
    "self_attn.k_proj": 96 * 288,
    "self_attn.v_proj": 96 * 288,
    "self_attn.o_proj": 288 * 288,
    "mlp.gate_proj": 768 * 288,
    "mlp.up_proj": 768 * 288,
    "mlp.down_proj": 288 * 768,
}


def run_of(results: dict[str, Any], name: str = "run") -> Run:
    """The run that left these results."""
    return Run(name, RunResults.model_validate(results))


def realistic(layers: int = 6) -> dict[str, Any]:
    """Results of a verified 2:4 run; the same every time."""
    chance = random.Random(0)
    names = {f"model.layers.{i}.{module}.weight": size for i in range(layers) for module, size in MODULES.items()}
    proofs = {
        name: {
            "zeros": size // 2,
            "offenders": 0,
            "negative_zeros": 0,
            "survivors": size // 2,
            "underflowed": chance.choice([0, 0, 0, 1]),
            "unchanged": int(size * chance.uniform(0.02, 0.12)),
            "sign_flips": chance.randrange(40),
            "non_finite": 0,
            "largest_relative_change": chance.uniform(0.05, 0.9),
        }
        for name, size in names.items()
    }
    return {
        "perplexity": {"dense": 9.8137, "pruned": 16.421, "spp": 11.302},
        "gap_closed": math.log(16.421 / 11.302) / math.log(16.421 / 9.8137),
        "verified": True,
        "seconds": {
            "evaluate_dense": 21.4, "prune": 38.92, "evaluate_pruned": 21.1, "train": 216.7,
            "merge": 0.83, "verify": 0.41, "evaluate_spp": 21.2,
        },
        "peak_rss_bytes": 1_934_000_000,
        "protocol": {
            "model": "/home/someone/models/story",
            "pattern": "2:4",
            "criterion": "wanda",
            "criterion_title": "Wanda",
            "calibration": {
                "source": "python-stdlib", "samples": 128, "window": 512, "seed": 0, "sha256": "9f2c" * 16,
                "kind": "random windows of long documents",
            },
            "train": "tinystories_train.jsonl",
            "evaluation": {
                "unit": "token", "tokens": 73214, "documents": 300, "windows": 311, "window": 512, "stride": 512,
                "per_document": True, "dtype": "float32", "source": "tinystories_valid.jsonl", "seconds": 21.3,
            },
            "seed": 0,
        },
        "versions": {
            "spp": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.17.0", "lm_eval": None,
        },
        "environment": {
            "system": "Linux x86_64", "cpu": "AMD EPYC 9B45", "cpu_instructions": "AVX512", "cores": 2, "threads": 2,
            "memory_bytes": 25_276_063_744,
            "accelerators": [{"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_520_809_984}],
        },
        "options": {"model": "/home/someone/models/story", "pattern": "2:4", "max_steps": 150, "limit": None},
        "command": "spp run --model /home/someone/models/story --pattern 2:4 --train tinystories_train.jsonl "
        "--eval tinystories_valid.jsonl --out runs/story --max-steps 150",
        "training": {
            "out": "runs/story/adapter", "data": "tinystories_train.jsonl", "steps": 150, "examples": 4800,
            "tokens": 614_400, "window": 512, "join_documents": True, "seconds": 214.2, "tokens_per_second": 2868.0,
            "trainable_parameters": 104_448, "sparsity": 0.5, "learning_rate": 0.02, "batch_size": 8,
            "peak_memory_bytes": 1_901_000_000,
            "losses": [[i, 2.43 + 0.62 * math.exp(-i / 25) + chance.gauss(0, 0.05)] for i in range(1, 151)],
        },
        "sparsity": {
            "overall": 0.5,
            "tensors": {name: {"sparsity": 0.5, "transposed": False} for name in names},
            "skipped": [],
        },
        "verification": {
            "verified": True, "base": "runs/story/pruned", "other": "runs/story/merged", "pattern": None,
            "zeros": sum(proof["zeros"] for proof in proofs.values()), "tensors": proofs, "problems": [],
        },
    }  # fmt: skip


def failed(layers: int = 6) -> dict[str, Any]:
    """The same run, with a broken proof in one tensor."""
    results = realistic(layers)
    name = "model.layers.1.mlp.up_proj.weight"
    proof = results["verification"]["tensors"][name]
    proof |= {"offenders": 3, "negative_zeros": 2}
    problem = f"{name}: 3 of {proof['zeros']} zeros of BASE are not +0.0 in OTHER (2 of them -0.0)"
    results["verification"] |= {"verified": False, "problems": [problem]}
    return results | {"verified": False}
