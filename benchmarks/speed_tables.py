"""Tables of times and memory: one layer, a step, decoding, criteria, whole models."""

from __future__ import annotations

import pandas as pd
from pandas import DataFrame, Series

from benchmarks.table_cells import (
    RUN,
    by_method,
    gigabytes,
    hardware,
    in_order,
    latest,
    markdown,
    mebibytes,
    number,
    percent,
    with_configuration,
    with_gpu_line,
)

_LAYER_METHODS = {
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
    "full": "full, packed",
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
    "admm": "ADMM",
    "swaps": "swaps",
    "least-squares": "least squares",
}


def layer_table(rows: DataFrame) -> str:
    """One table per dtype: the floor in ms, and every method's ratio to it."""
    configuration = [*RUN, "dtype", "shape", "density", "tokens"]
    made = []
    for dtype, runs in latest(rows, configuration).groupby("dtype"):
        ratios = by_method(runs, configuration, "ratio_to_floor")
        floor = by_method(runs, configuration, "median_ms").get("floor", Series("", ratios.index))
        present = {name: heading for name, heading in _LAYER_METHODS.items() if name in ratios}
        cells = ratios[list(present)].rename(columns=present)
        cells.insert(0, "floor, ms", floor)
        table = with_configuration(cells.map(number), {"shape": "layer", "density": "density", "tokens": "tokens"})
        made.append(f"{dtype}:\n\n" + markdown(with_gpu_line(table, rows)))
    return "\n\n".join(made)


def step_table(rows: DataFrame) -> str:
    """Time and peak memory of a whole step, one line per method."""
    configuration = [*RUN, "size", "sparsity", "batch", "tokens"]
    runs = latest(rows, configuration)
    methods = DataFrame({"method": list(_STEP_METHODS), "heading": list(_STEP_METHODS.values())})
    lines = runs[configuration].drop_duplicates().merge(methods, how="cross")
    runs = lines.merge(runs, on=[*configuration, "method"])
    table = DataFrame(
        {
            "hardware": hardware(runs),
            "model": runs["size"],
            "sparsity": runs["sparsity"],
            "batch": runs["batch"],
            "tokens": runs["tokens"],
            "method": runs["heading"],
            "step, ms": runs["median_ms"].map(number),
            "to LoRA": runs["ratio_to_lora"].map(number),
            "peak MiB": mebibytes(runs["peak_bytes"]),
            "above imports": mebibytes(runs["peak_bytes"].astype(int) - runs["imports_bytes"].astype(int)),
        }
    )
    return markdown(with_gpu_line(table, rows))


def decode_table(rows: DataFrame) -> str:
    """Milliseconds of a product; in parentheses, how many times faster than torch's it is."""
    configuration = [*RUN, "dtype", "shape", "tokens"]
    times = by_method(latest(rows, configuration), configuration, "median_ms")
    times = times.reindex(columns=list(_DECODE_METHODS), fill_value="")
    gains = times.apply(pd.to_numeric, errors="coerce").rdiv(pd.to_numeric(times["torch"]), axis=0)
    gains["torch"] = float("nan")
    cells = times.map(number) + gains.map(lambda gain: "" if pd.isna(gain) else f" ({gain:.2f} x)")
    cells = cells.rename(columns={name: f"{heading}, ms" for name, heading in _DECODE_METHODS.items()})
    table = with_configuration(cells, {"shape": "layer", "dtype": "dtype", "tokens": "tokens"})
    return markdown(with_gpu_line(table, rows))


def criteria_table(rows: DataFrame) -> str:
    """Milliseconds of pruning one weight, `ours / those of plain torch (ratio)`."""
    configuration = [*RUN, "shape", "dtype", "pattern"]
    runs = latest(rows, configuration)
    columns = [name for criterion in _CRITERION_METHODS for name in (criterion, f"{criterion}_plain")]
    times, ratios = (
        by_method(runs, configuration, column).reindex(columns=columns, fill_value="").map(number)
        for column in ("median_ms", "ratio_to_plain")
    )
    cells = DataFrame(index=times.index)
    for name, heading in _CRITERION_METHODS.items():
        ours, plain = times[name], times[f"{name}_plain"]
        cells[f"{heading}, ms"] = ours.where(plain == "–", ours + " / " + plain + " (" + ratios[name] + ")")
    table = with_configuration(cells, {"shape": "layer", "dtype": "dtype", "pattern": "pattern"})
    return markdown(with_gpu_line(table, rows))


def streaming_table(rows: DataFrame) -> str:
    """A whole model, block by block: memory predicted and measured, time by what it went to."""
    runs = _last_of_each(rows, ["blocks", "disk_bytes", "criterion", "pattern", "samples", "window"])
    table = {
        "hardware": hardware(runs),
        "model, GB": gigabytes(runs["disk_bytes"]),
        "blocks": runs["blocks"],
        "criterion": runs["criterion"],
        "pattern": runs["pattern"],
        "calibration": runs["samples"] + " x " + runs["window"],
        "predicted MiB": mebibytes(runs["predicted_bytes"]),
        "peak MiB": mebibytes(runs["peak_bytes"]),
        "peak MiB, resumed": mebibytes(runs["resumed_peak_bytes"]),
        "seconds": runs["seconds"].map(number),
        "in forwards": runs["forward_seconds"].map(number),
        "in the criterion": runs["criterion_seconds"].map(number),
        "the rest": percent(runs["overhead"]),
    }
    return markdown(DataFrame(table))


def merging_table(rows: DataFrame) -> str:
    """Merging a whole model, beside a plain copy of its files."""
    runs = _last_of_each(rows, ["disk_bytes", "files", "merged", "rounding", "dtype"])
    table = {
        "hardware": hardware(runs),
        "model, GB": gigabytes(runs["disk_bytes"]),
        "files": runs["files"],
        "matrices merged": runs["merged"],
        "rounding": runs["rounding"],
        "dtype": runs["dtype"],
        "copy, s": runs["copy_seconds"].map(number),
        "merge, s": runs["merge_seconds"].map(number),
        "of the copy's speed": percent(runs["of_copy_speed"]),
        "peak MiB": mebibytes(runs["peak_bytes"]),
        "after a kill, s": runs["resumed_seconds"].map(number),
        "peak MiB, resumed": mebibytes(runs["resumed_peak_bytes"]),
        "verify, s": runs["verify_seconds"].map(number),
    }
    return markdown(DataFrame(table))


def _last_of_each(rows: DataFrame, case: list[str]) -> DataFrame:
    """The last row of each case on each machine."""
    configuration = [*RUN, *case]
    return in_order(rows.drop_duplicates(configuration, keep="last"), configuration)
