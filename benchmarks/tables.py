"""The rows in benchmarks/data as tables of a Markdown page, each between two markers.

The markers are `<!-- operator -->` and `<!-- /operator -->`, and the same with step, decode, criteria, streaming,
merging, pruned, start and quality. A page has those that it wants.

python benchmarks/tables.py --write docs/performance.md
python benchmarks/tables.py --check docs/pruning.md      # exit code 1 where the page is not up to date
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Python puts a script's folder first on the path, and there operator.py stands in for the library's `operator`.
    _here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [os.path.dirname(_here), *(entry for entry in sys.path if os.path.realpath(entry) != _here)]

import argparse
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import DATA, read_rows, significant

Row = Mapping[str, str]

_OPERATOR_METHODS = {
    "native": "SPP native",
    "triton": "SPP Triton",
    "packed": "SPP packed",
    "torch": "SPP torch",
    "reference": "SPP reference",
    "floor4": "4 GEMMs",
    "split": "SPP split",
    "split_packed": "SPP split, packed",
    "published1": "published 1",
    "published2": "published 2",
    "peft_hira": "PEFT HiRA",
    "peft_lora": "PEFT LoRA",
    "full": "full",
}
_STEP_METHODS = {
    "spp": "SPP, packed",
    "spp_dense": "SPP, dense",
    "peft_lora": "PEFT LoRA",
    "peft_hira": "PEFT HiRA",
    "masked_lora": "masked LoRA",
    "masked_full": "masked full",
}
_DECODE_METHODS = {
    "torch": "torch dense",
    "own_dense": "our dense kernel",
    "packed_50": "packed 50 %",
    "packed_75": "packed 75 %",
    "packed_90": "packed 90 %",
}
_CRITERION_METHODS = {
    "magnitude": "magnitude",
    "magnitude-matrix": "magnitude, matrix",
    "wanda": "Wanda",
    "ria": "RIA",
    "sparsegpt": "SparseGPT",
    "dsnot": "DSnoT",
}
_RUN = ("device", "hardware", "instructions", "threads")


def tables(folder: Path = DATA) -> dict[str, str]:
    """Name of the marker -> Markdown."""
    pruned = read_rows(folder / "pruned_quality.csv")
    return {
        "operator": operator_table(read_rows(folder / "operator.csv")),
        "step": step_table(read_rows(folder / "step.csv")),
        "decode": decode_table(read_rows(folder / "decode.csv")),
        "criteria": criteria_table(read_rows(folder / "pruning.csv")),
        "streaming": streaming_table(read_rows(folder / "streaming.csv")),
        "merging": merging_table(read_rows(folder / "merging.csv")),
        "pruned": pruned_table(pruned),
        "start": start_table(pruned),
        "quality": quality_table(read_rows(folder / "quality.csv")),
    }


def operator_table(rows: Sequence[Row]) -> str:
    """One table per dtype: the floor in ms, and every method's ratio to it."""
    configurations = _latest(rows, (*_RUN, "dtype", "shape", "density", "tokens"))
    made = []
    for dtype in sorted({row["dtype"] for row in rows}):
        chosen = [methods for methods in configurations if _any(methods)["dtype"] == dtype]
        present = [name for name in _OPERATOR_METHODS if any(name in methods for methods in chosen)]
        heads = ["hardware", "layer", "density", "tokens", "floor, ms", *(_OPERATOR_METHODS[name] for name in present)]
        lines = [
            [
                *_where(methods, "shape", "density", "tokens"),
                _number(methods.get("floor"), "median_ms"),
                *(_number(methods.get(name), "ratio_to_floor") for name in present),
            ]
            for methods in chosen
        ]
        made.append(f"{dtype}:\n\n" + _markdown(heads, lines + _gpu_row(rows)))
    return "\n\n".join(made) or _NOTHING


def step_table(rows: Sequence[Row]) -> str:
    """Time and peak memory of a whole step, one line per method."""
    heads = [
        "hardware",
        "model",
        "sparsity",
        "batch",
        "tokens",
        "method",
        "step, ms",
        "to LoRA",
        "peak MiB",
        "above imports",
    ]
    lines = [
        [
            *_where(methods, "size", "sparsity", "batch", "tokens"),
            heading,
            _number(row, "median_ms"),
            _number(row, "ratio_to_lora"),
            _mebibytes(int(row["peak_bytes"])),
            _mebibytes(int(row["peak_bytes"]) - int(row["imports_bytes"])),
        ]
        for methods in _latest(rows, (*_RUN, "size", "sparsity", "batch", "tokens"))
        for name, heading in _STEP_METHODS.items()
        if (row := methods.get(name))
    ]
    return _markdown(heads, lines + _gpu_row(rows)) if rows else _NOTHING


def decode_table(rows: Sequence[Row]) -> str:
    """Milliseconds of a product; for ours, how many times faster than torch's in parentheses."""
    heads = ["hardware", "layer", "dtype", "tokens", *(f"{heading}, ms" for heading in _DECODE_METHODS.values())]
    lines = [
        [
            *_where(methods, "shape", "dtype", "tokens"),
            *(_with_speedup(methods.get(name), methods.get("torch")) for name in _DECODE_METHODS),
        ]
        for methods in _latest(rows, (*_RUN, "dtype", "shape", "tokens"))
    ]
    return _markdown(heads, lines + _gpu_row(rows)) if rows else _NOTHING


def criteria_table(rows: Sequence[Row]) -> str:
    """Milliseconds of pruning one weight, ours over those of plain torch, and the ratio in parentheses."""
    heads = ["hardware", "layer", "dtype", "pattern", *(f"{heading}, ms" for heading in _CRITERION_METHODS.values())]
    lines = [
        [
            *_where(methods, "shape", "dtype", "pattern"),
            *(_against_plain(methods, name) for name in _CRITERION_METHODS),
        ]
        for methods in _latest(rows, (*_RUN, "shape", "dtype", "pattern"))
    ]
    return _markdown(heads, lines + _gpu_row(rows)) if rows else _NOTHING


def streaming_table(rows: Sequence[Row]) -> str:
    """A whole model, block by block: memory foretold and measured, time by what it went to."""
    case = ("blocks", "disk_bytes", "criterion", "pattern", "samples", "window")
    runs = {tuple(row[key] for key in (*_RUN, *case)): row for row in rows}  # the last of each
    heads = [
        "hardware",
        "model, GB",
        "blocks",
        "criterion",
        "pattern",
        "calibration",
        "predicted MiB",
        "peak MiB",
        "peak MiB, resumed",
        "seconds",
        "in forwards",
        "in the criterion",
        "the rest",
    ]
    lines = [
        [
            _hardware(row),
            f"{int(row['disk_bytes']) / 1e9:.3g}",
            *(row[key] for key in ("blocks", "criterion", "pattern")),
            f"{row['samples']} x {row['window']}",
            *(_mebibytes(int(row[f"{key}_bytes"])) for key in ("predicted", "peak", "resumed_peak")),
            *(_number(row, key) for key in ("seconds", "forward_seconds", "criterion_seconds")),
            f"{float(row['overhead']):.0%}",
        ]
        for _, row in sorted(runs.items(), key=lambda item: _natural(item[0]))
    ]
    return _markdown(heads, lines) if rows else _NOTHING


def merging_table(rows: Sequence[Row]) -> str:
    """Merging a whole model, beside a plain copy of its files."""
    case = ("disk_bytes", "files", "merged", "rounding", "dtype")
    runs = {tuple(row[key] for key in (*_RUN, *case)): row for row in rows}  # the last of each
    heads = ["hardware", "model, GB", "files", "matrices merged", "rounding", "dtype", "copy, s", "merge, s"]
    heads += ["of the copy's speed", "peak MiB", "after a kill, s", "peak MiB, resumed", "verify, s"]
    lines = [
        [
            _hardware(row),
            f"{int(row['disk_bytes']) / 1e9:.3g}",
            *(row[key] for key in ("files", "merged", "rounding", "dtype")),
            *(_number(row, key) for key in ("copy_seconds", "merge_seconds")),
            f"{float(row['of_copy_speed']):.0%}",
            _mebibytes(int(row["peak_bytes"])),
            _number(row, "resumed_seconds"),
            _mebibytes(int(row["resumed_peak_bytes"])),
            _number(row, "verify_seconds"),
        ]
        for _, row in sorted(runs.items(), key=lambda item: _natural(item[0]))
    ]
    return _markdown(heads, lines) if rows else _NOTHING


def pruned_table(rows: Sequence[Row]) -> str:
    """One table per model: perplexity by method and pattern."""
    cells = {(row["model"], row["method"], row["pattern"]): row for row in rows}
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    made = []
    for model in dict.fromkeys(row["model"] for row in rows):
        last = next(row for row in reversed(rows) if row["model"] == model)
        methods = list(dict.fromkeys(row["method"] for row in rows if row["model"] == model))
        lines = [
            [method, *(_number(cells.get((model, method, pattern)), "perplexity") for pattern in patterns)]
            for method in methods
        ]
        title = f"{model}, dense {significant(float(last['dense']))} ({last['protocol']}):\n\n"
        made.append(title + _markdown(["method", *patterns], lines))
    return "\n\n".join(made) or _NOTHING


def start_table(rows: Sequence[Row]) -> str:
    """Perplexity before and after SPP fine-tuning, by what it started from."""
    cells = {(row["model"], row["pattern"], row["method"]): row for row in rows if row["trained_perplexity"]}
    lines = [
        [
            model,
            pattern,
            significant(float(row["dense"])),
            method,
            _number(row, "perplexity"),
            row["trained_steps"],
            _number(row, "trained_perplexity"),
        ]
        for (model, pattern, method), row in cells.items()
    ]
    heads = ["model", "pattern", "dense", "start", "pruned", "steps", "after SPP"]
    return _markdown(heads, lines) if lines else _NOTHING


def quality_table(rows: Sequence[Row]) -> str:
    """One table per model: share of the gap closed in percent, mean and spread over seeds, by method and pattern.

    The best of those that keep zeros and train no more parameters than HiRA is in bold.
    """
    made = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        patterns = list(dict.fromkeys(row["pattern"] for row in of_model))
        cells = quality_cells(of_model)
        best = {pattern: _best_of(cells, pattern) for pattern in patterns}
        lines = []
        for method in dict.fromkeys(row["method"] for row in of_model):
            measured = [cells.get((method, pattern)) for pattern in patterns]
            found = next(cell for cell in measured if cell)
            texts = [
                _quality(cell, bold=cell is best[pattern]) for cell, pattern in zip(measured, patterns, strict=True)
            ]
            lines.append([method, f"{found.trainable:,}", _seconds(measured), *texts])
        first = of_model[0]
        title = (
            f"{model}, {first['protocol']}; {first['steps']} steps of {first['tokens_per_step']} tokens; dense "
            f"{significant(float(first['dense']))}, pruned {_by_pattern(of_model, patterns, 'pruned')}, and after "
            f"reconstruction {_by_pattern(of_model, patterns, 'reconstructed')}:\n\n"
        )
        made.append(title + _markdown(["method", "trained", "seconds", *patterns], lines))
    return "\n\n".join(made) or _NOTHING


class QualityCell(NamedTuple):
    """A method on a pruned model: share of the gap closed, by seed, and what it took."""

    gaps: list[float]
    trainable: int
    seconds: float

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.gaps)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 where there is one."""
        return statistics.stdev(self.gaps) if len(self.gaps) > 1 else 0.0


# What starts from a better model, or learns from the dense one, is not compared with what does not.
SPARSE_ADAPTERS = ("SPP", "HiRA", "masked LoRA", "LoRA*", "SPP, published", "SPP, K = 1")


def quality_cells(rows: Iterable[Row]) -> dict[tuple[str, str], QualityCell]:
    """(method, pattern) -> the measurements of one model."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["method"], row["pattern"]), []).append(row)
    return {
        key: QualityCell(
            [float(row["gap_closed"]) for row in of_cell],
            int(of_cell[0]["trainable"]),
            statistics.fmean(float(row["train_seconds"]) for row in of_cell),
        )
        for key, of_cell in found.items()
    }


def _best_of(cells: Mapping[tuple[str, str], QualityCell], pattern: str) -> QualityCell | None:
    compared = [cell for (method, own), cell in cells.items() if own == pattern and method in SPARSE_ADAPTERS]
    return max(compared, key=lambda cell: cell.mean, default=None)


def _quality(cell: QualityCell | None, *, bold: bool) -> str:
    if cell is None:
        return "–"
    mark = "**" if bold else ""
    return f"{mark}{100 * cell.mean:.1f}{mark} ± {100 * cell.spread:.1f}"


def _seconds(cells: Iterable[QualityCell | None]) -> str:
    """Mean over patterns."""
    return significant(statistics.fmean(cell.seconds for cell in cells if cell))


def _by_pattern(rows: Sequence[Row], patterns: Sequence[str], column: str) -> str:
    values = [next(row[column] for row in rows if row["pattern"] == pattern) for pattern in patterns]
    return ", ".join(significant(float(value)) for value in values)


def replaced(page: str, made: Mapping[str, str]) -> str:
    """The page with its tables between their markers.

    Raises:
        ValueError: there are none, or one has no end.
    """
    wanted = [name for name in made if f"<!-- {name} -->" in page]
    if not wanted:
        raise ValueError(f"the page has no marker: <!-- {' -->, <!-- '.join(made)} -->")
    for name in wanted:
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not between.search(page):
            raise ValueError(f"the page has no <!-- {name} --> on a line of its own with <!-- /{name} --> after it")
        page = between.sub(lambda found, table=made[name]: f"{found[1]}\n{table}\n\n{found[2]}", page, count=1)
    return page


_NOTHING = "Not measured."


def _latest(rows: Iterable[Row], keys: Sequence[str]) -> list[dict[str, Row]]:
    """For every configuration the rows of its last run, by method, so that a line's numbers were measured together."""
    runs: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:  # in the order they were appended
        found = runs.setdefault(tuple(row[key] for key in keys), {})
        if found and row["date"] != _any(found)["date"]:
            found.clear()
        found[row["method"]] = row
    return [runs[key] for key in sorted(runs, key=_natural)]


def _natural(key: Iterable[str]) -> list[tuple[float, str]]:
    """Sorts numbers as numbers, also those in front of an x: 256 before 1024, 4096x11008 before 11008x4096."""
    return [(float(found[0]) if (found := re.match(r"\d+(\.\d+)?", part)) else 0.0, part) for part in key]


def _any(methods: Mapping[str, Row]) -> Row:
    return next(iter(methods.values()))


def _where(methods: Mapping[str, Row], *columns: str) -> list[str]:
    row = _any(methods)
    return [_hardware(row), *(row[column] for column in columns)]


def _hardware(row: Row) -> str:
    if row["device"] == "cuda":
        return row["hardware"]
    return f"{row['hardware']} ({row['instructions']}), {row['threads']} threads"


def _number(row: Row | None, column: str) -> str:
    """A number, or a dash where there is none."""
    return significant(float(row[column])) if row and row[column] else "–"


def _with_speedup(row: Row | None, torch: Row | None) -> str:
    text = _number(row, "median_ms")
    if row is None or torch is None or row is torch:
        return text
    return f"{text} ({float(torch['median_ms']) / float(row['median_ms']):.2f} x)"


def _against_plain(methods: Mapping[str, Row], name: str) -> str:
    """`ours / theirs (ratio)`."""
    ours, plain = methods.get(name), methods.get(f"{name}_plain")
    if plain is None:
        return _number(ours, "median_ms")
    return f"{_number(ours, 'median_ms')} / {_number(plain, 'median_ms')} ({_number(ours, 'ratio_to_plain')})"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}"


def _gpu_row(rows: Iterable[Row]) -> list[list[str]]:
    return [] if any(row["device"] == "cuda" for row in rows) else [["NVIDIA H100", "not measured"]]


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    filled = [[*line, *[""] * (len(heads) - len(line))] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *filled])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write or check a page."""
    parser = argparse.ArgumentParser(prog="benchmarks/tables.py", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="PATH", help="put the tables into this page")
    what.add_argument("--check", type=Path, metavar="PATH", help="only say whether its tables are these")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the CSV files (default: %(default)s)")
    args = parser.parse_args(arguments)
    path = args.write or args.check
    page = path.read_text(encoding="utf-8")
    try:
        new = replaced(page, tables(args.data))
    except ValueError as error:
        parser.error(f"{path}: {error}")
    if args.write:
        path.write_text(new, encoding="utf-8")
    elif new != page:
        sys.exit(f"{path} is not up to date; run: python benchmarks/tables.py --write {path}")


if __name__ == "__main__":
    main()
