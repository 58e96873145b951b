"""The models that quality is measured on, each with its text and protocol.

The bundled model is always there; the others are small models of other people's, with the text that they were made for,
in a folder: models/story, models/stories260K and models/shakespeare_opt, corpora/tinystories_train.jsonl,
corpora/tinystories_valid.jsonl and corpora/shakespeare.txt.

`--model NAME=FOLDER` adds any other model, a real LLM above all: calibrated and trained on WikiText-2's validation
text, evaluated on the start of its test text (corpora/wikitext2_valid.txt and corpora/wikitext2_test.txt).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import DATA
from spp.pipeline.bundled import bundled_model

_START = 80_000  # characters


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model and its protocol.

    Attributes:
        name: in the table.
        calibration, evaluation: texts.
        window: tokens, for calibration and training.
        evaluation_window: tokens; None for `window`.
        limit: documents that are evaluated; None for all.
        samples: calibration windows.
        tokens_per_step: of training.
        dtype: that training computes in, with weights in fp32; bfloat16 is autocast.
    """

    name: str
    model: str
    calibration: str
    evaluation: str
    window: int
    evaluation_window: int | None = None
    limit: int | None = None
    samples: int = 128
    tokens_per_step: int = 2048
    dtype: torch.dtype = torch.float32

    @property
    def protocol(self) -> str:
        """In words."""
        kind = "each document by itself" if self.evaluation.endswith(".jsonl") else "windows that do not overlap"
        documents = "" if self.limit is None else f"first {self.limit} documents, "
        return f"{Path(self.evaluation).stem}, {documents}{kind}, {self.evaluation_window or self.window} tokens"


def evaluated_models(data: Path | None, scratch: Path, names: Sequence[str] | None) -> list[EvaluatedModel]:
    """The models that there are.

    Args:
        data: folder of other people's models and text.
        scratch: for the parts of texts that are to be divided.
        names: of those that are wanted, and NAME=FOLDER for others; None for all.
    """
    known = [evaluated for evaluated in _all(data, scratch) if names is None or evaluated.name in names]
    added = [name.split("=", 1) for name in names or () if "=" in name]
    if added and data is None:
        raise SystemExit("--model NAME=FOLDER needs the corpora in --data")
    return known + [_added(name, folder, data, scratch) for name, folder in added if data]


def add_model_arguments(
    parser: argparse.ArgumentParser, patterns: Iterable[str], methods: Iterable[str], csv_name: str
) -> None:
    """The options of scripts that measure methods on these models."""
    several = {"action": "extend", "nargs": "+"}
    parser.add_argument("--data", type=Path, help="folder with models/ and corpora/ of other people's")
    parser.add_argument("--model", help="names from the table (default: all), or NAME=FOLDER", **several)
    parser.add_argument("--pattern", help=f"default: {' '.join(patterns).replace('%', '%%')}", **several)
    parser.add_argument("--method", choices=methods, help="default: all", **several)
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--csv", type=Path, default=DATA / csv_name, help="file to append to (default: %(default)s)")


def _added(name: str, folder: str, data: Path, scratch: Path) -> EvaluatedModel:
    """Any other model, on WikiText-2."""
    start = scratch / "wikitext2_test_start.txt"
    start.write_text((data / "corpora" / "wikitext2_test.txt").read_text(encoding="utf-8")[:_START], encoding="utf-8")
    return EvaluatedModel(
        name=name,
        model=folder,
        calibration=str(data / "corpora" / "wikitext2_valid.txt"),
        evaluation=str(start),
        window=512,
        evaluation_window=1024,
        samples=16,
        tokens_per_step=1024,
        dtype=torch.bfloat16,
    )


def _all(data: Path | None, scratch: Path) -> list[EvaluatedModel]:
    found = [
        EvaluatedModel(
            name="bundled",
            model=str(bundled_model()),
            calibration="python-stdlib",
            evaluation="python-stdlib",
            window=256,
            limit=40,
        )
    ]
    if data is None:
        return found
    corpora = data / "corpora"
    for name in ("story", "stories260K"):
        texts = {
            "calibration": str(corpora / "tinystories_train.jsonl"),
            "evaluation": str(corpora / "tinystories_valid.jsonl"),
        }
        found.append(EvaluatedModel(name=name, model=str(data / "models" / name), window=512, limit=600, **texts))
    text = (corpora / "shakespeare.txt").read_text(encoding="utf-8")
    parts = {
        "calibration": scratch / "shakespeare_first_nine_tenths.txt",
        "evaluation": scratch / "shakespeare_last_tenth.txt",
    }
    parts["calibration"].write_text(text[: len(text) // 10 * 9], encoding="utf-8")
    parts["evaluation"].write_text(text[len(text) // 10 * 9 :], encoding="utf-8")
    model = str(data / "models" / "shakespeare_opt")
    return [
        *found,
        EvaluatedModel(
            name="shakespeare_opt", model=model, window=64, **{key: str(path) for key, path in parts.items()}
        ),
    ]
