"""Tables of perplexity: after pruning, as a start for SPP, and what fine-tuning wins back."""

from __future__ import annotations

import statistics

from pandas import DataFrame, Series, isna

from benchmarks.common import significant
from benchmarks.table_cells import markdown, number

SPARSE_ADAPTERS = ("SPP", "HiRA", "masked LoRA", "LoRA*", "SPP, published", "SPP, K = 1")
"""What is compared. What starts from a better model, or learns from the dense one, is not compared with these."""


def pruned_table(rows: DataFrame) -> str:
    """One table per model: perplexity by method and pattern."""
    made = []
    for model, of_model in rows.groupby("model", sort=False):
        last = of_model.drop_duplicates(["method", "pattern"], keep="last")
        cells = last.pivot(index="method", columns="pattern", values="perplexity")
        cells = (
            cells.reindex(index=last["method"].unique(), columns=of_model["pattern"].unique())
            .astype(object)
            .fillna("")
            .map(number)
        )
        case = of_model.iloc[-1]
        title = f"{model}, dense {number(case['dense'])} ({case['protocol']}):\n\n"
        made.append(title + markdown(cells.reset_index()))
    return "\n\n".join(made)


def bits_table(rows: DataFrame) -> str:
    """One table per model, by falling bits per weight: perplexity, mean over seeds, and how much that is above dense.

    In bold: what nothing else reaches with as many bits or fewer.
    """
    made = []
    for model, of_model in rows.groupby("model", sort=False):
        case = of_model.iloc[-1]
        made.append(f"{model} ({case['protocol']}):\n\n{markdown(_bits_lines(of_model))}")
    return "\n\n".join(made)


def bits_cells(rows: DataFrame) -> DataFrame:
    """The measurements of one model by rising bits per weight: mean perplexity over seeds, and how far above dense."""
    last = rows.drop_duplicates(["pattern", "method", "bits", "seed"], keep="last")
    numbers = last.astype({"bits": int, "bits_per_weight": float, "perplexity": float})
    keys = ["bits_per_weight", "pattern", "method", "bits"]
    cells = numbers.groupby(keys, sort=False)["perplexity"].mean().reset_index()
    dense = cells[(cells["pattern"] == "dense") & (cells["method"] == "float")]["perplexity"]
    cells["above"] = cells["perplexity"] / (dense.iloc[0] if len(dense) else float("nan")) - 1
    return cells.sort_values(["bits_per_weight", "perplexity"]).reset_index(drop=True)


def _bits_lines(rows: DataFrame) -> DataFrame:
    cells = bits_cells(rows)
    best = cells["perplexity"] < cells["perplexity"].cummin().shift(fill_value=float("inf"))
    lines = {
        "bits a weight": cells["bits_per_weight"].map("{:.2f}".format),
        "weights": cells["pattern"],
        "stored as": [_stored(method, bits) for method, bits in zip(cells["method"], cells["bits"], strict=True)],
        "perplexity": cells["perplexity"].map(significant).where(~best, cells["perplexity"].map("**{:.4g}**".format)),
        "above dense": cells["above"].map("{:+.1%}".format),
    }
    return DataFrame(lines)[::-1]


def _stored(method: str, bits: int) -> str:
    if method == "float":
        return "bf16"
    return f"{bits} bit, {'error feedback' if method == 'feedback' else 'nearest'}"


def start_table(rows: DataFrame) -> str:
    """Perplexity before and after SPP fine-tuning, by what it started from."""
    trained = rows[rows["trained_perplexity"] != ""]
    last = trained.groupby(["model", "pattern", "method"], sort=False, as_index=False).last()
    table = {
        "model": last["model"],
        "pattern": last["pattern"],
        "dense": last["dense"].map(number),
        "start": last["method"],
        "pruned": last["perplexity"].map(number),
        "steps": last["trained_steps"],
        "after SPP": last["trained_perplexity"].map(number),
    }
    return markdown(DataFrame(table))


def rates_table(rows: DataFrame) -> str:
    """The loss on held-out examples by learning rate; the lowest of each line is in bold."""
    case = ["model", "pattern", "method", "steps", "default_rate", "start_loss"]
    last = rows.drop_duplicates([*case, "learning_rate"], keep="last")
    losses = last.pivot(index=case, columns="learning_rate", values="loss").astype(float)
    lowest = losses.min(axis="columns")
    texts = losses.apply(lambda column: [
        "" if isna(loss) else f"**{loss:.3f}**" if loss == lowest[line] else f"{loss:.3f}"
        for line, loss in column.items()
    ])  # fmt: skip
    lines = texts[sorted(texts.columns, key=float)].reindex(index=lowest.index).reset_index()
    return markdown(lines.rename(columns={"default_rate": "default", "start_loss": "before"}))


def quality_table(rows: DataFrame) -> str:
    """One table per model: share of the gap closed in percent, mean and spread over seeds, by method and pattern.

    The best of `SPARSE_ADAPTERS` at each pattern is in bold.
    """
    return "\n\n".join(
        _quality_title(model, of_model) + markdown(_quality_lines(of_model))
        for model, of_model in rows.groupby("model", sort=False)
    )


def _quality_title(model: str, rows: DataFrame) -> str:
    first, by_pattern = rows.iloc[0], rows.groupby("pattern", sort=False)
    pruned, reconstructed = (
        ", ".join(by_pattern[column].first().map(number)) for column in ("pruned", "reconstructed")
    )
    return (
        f"{model}, {first['protocol']}; {first['steps']} steps of {first['tokens_per_step']} tokens; dense "
        f"{number(first['dense'])}, pruned {pruned}, and after reconstruction {reconstructed}:\n\n"
    )


def _quality_lines(rows: DataFrame) -> DataFrame:
    cells = quality_cells(rows)
    compared = cells[cells.index.get_level_values("method").isin(SPARSE_ADAPTERS)]
    best = set(compared.groupby("pattern")["mean"].idxmax())
    texts = Series([_percent(cell, bold=cell.Index in best) for cell in cells.itertuples()], cells.index)
    lines = texts.unstack("pattern").reindex(index=rows["method"].unique(), columns=rows["pattern"].unique())
    methods = cells.groupby("method")
    lines.insert(0, "trained", methods["trainable"].first().map("{:,}".format))
    lines.insert(1, "seconds", methods["seconds"].mean().astype(str).map(number))
    return lines.fillna("–").reset_index()


def quality_cells(rows: DataFrame) -> DataFrame:
    """The measurements of one model, by method and pattern.

    Returns:
        mean and spread (the standard deviation, 0 for one seed) over seeds of the share of the gap closed, the number
        of parameters that are trained, and seconds.
    """
    numbers = rows.astype({"gap_closed": float, "trainable": int, "train_seconds": float})
    cells = numbers.groupby(["method", "pattern"], sort=False).agg(
        mean=("gap_closed", statistics.fmean),  # a sum without rounding errors
        spread=("gap_closed", "std"),
        trainable=("trainable", "first"),
        seconds=("train_seconds", "mean"),
    )
    return cells.fillna({"spread": 0.0})


def _percent(cell: tuple, *, bold: bool) -> str:
    mark = "**" if bold else ""
    return f"{mark}{100 * cell.mean:.1f}{mark} ± {100 * cell.spread:.1f}"
