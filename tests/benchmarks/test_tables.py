"""Tables for the page on performance: the last run of each configuration, between markers."""

from __future__ import annotations

import pytest

from benchmarks import bits_plot, common, plots, tables

MACHINE = {"device": "cpu", "hardware": "A CPU", "instructions": "AVX2", "threads": 2}
PAGE = "".join(f"Text.\n\n<!-- {name} -->\nold\n<!-- /{name} -->\n\n" for name in ("layer", "step", "decode"))


def layer_rows(date, times, machine=None, tokens=256):
    case = {"date": date, **(machine or MACHINE), "shape": "64x48", "tokens": tokens, "dtype": "bf16", "density": 0.5}
    floor = times["floor"]
    return [case | {"method": name, "median_ms": ms, "ratio_to_floor": ms / floor} for name, ms in times.items()]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    common.append_rows(folder / "layer.csv", layer_rows("1", {"floor": 1.0, "native": 9.0, "full": 9.0}))
    common.append_rows(folder / "layer.csv", layer_rows("2", {"floor": 2.0, "native": 2.2}))
    common.append_rows(folder / "layer.csv", layer_rows("1", {"floor": 0.123456, "published1": 0.3}, tokens=64))
    decode = {"date": "1", **MACHINE, "shape": "64x48", "tokens": 1, "dtype": "bf16"}
    times = {"torch": 3.28, "packed_50": 1.17}
    common.append_rows(
        folder / "decode.csv", [decode | {"method": name, "median_ms": ms} for name, ms in times.items()]
    )
    return folder


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


def test_layer_table_has_the_last_run(data):
    head, _, *lines = cells(tables.tables(data)["layer"])
    assert head == ["hardware", "layer", "density", "tokens", "floor, ms", "SPP native", "published 1"]
    assert lines == [
        ["A CPU (AVX2), 2 threads", "64x48", "0.5", "64", "0.123", "–", "2.43"],
        ["A CPU (AVX2), 2 threads", "64x48", "0.5", "256", "2.00", "1.10", "–"],
        ["NVIDIA H100", "not measured", "", "", "", "", ""],
    ]


def test_a_measured_gpu_has_rows(data):
    gpu = {"device": "cuda", "hardware": "NVIDIA H100 80GB HBM3", "instructions": "", "threads": 8}
    common.append_rows(data / "layer.csv", layer_rows("3", {"floor": 1.0, "native": 1.05}, gpu))
    table = tables.tables(data)["layer"]
    assert "not measured" not in table and "| NVIDIA H100 80GB HBM3 | 64x48 |" in table


def test_decode_table_shows_times_and_gains(data):
    _, _, line, gpu = cells(tables.tables(data)["decode"])
    assert line == ["A CPU (AVX2), 2 threads", "64x48", "bf16", "1", "3.28", "–", "1.17 (2.80 x)", "–", "–"]
    assert gpu[:2] == ["NVIDIA H100", "not measured"]


def test_step_table(data):
    case = {"date": "1", **MACHINE, "size": "1b", "sparsity": 0.75, "batch": 1, "tokens": 512}
    memory = {"imports_bytes": 100 * 2**20, "peak_bytes": 350 * 2**20}
    common.append_rows(data / "step.csv", [case | {"method": "spp", "median_ms": 1234.5, "ratio_to_lora": ""} | memory])
    _, _, line, _ = cells(tables.tables(data)["step"])
    assert line == ["A CPU (AVX2), 2 threads", "1b", "0.75", "1", "512", "SPP, packed", "1234", "–", "350", "250"]


def test_page_is_written_once_and_checked(data, tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(PAGE)
    with pytest.raises(SystemExit, match="not up to date"):
        tables.main(["--check", str(page), "--data", str(data)])
    tables.main(["--write", str(page), "--data", str(data)])
    tables.main(["--check", str(page), "--data", str(data)])
    text = page.read_text()
    assert text.count("Text.") == 3 and "old" not in text and "Not measured." in text  # no step was measured


def test_page_without_markers(data, tmp_path, capsys):
    page = tmp_path / "performance.md"
    page.write_text("Nothing.\n")
    with pytest.raises(SystemExit):
        tables.main(["--write", str(page), "--data", str(data)])
    assert "no marker: <!-- layer -->" in capsys.readouterr().err and page.read_text() == "Nothing.\n"
    page.write_text("<!-- step -->\n")
    with pytest.raises(SystemExit):
        tables.main(["--write", str(page), "--data", str(data)])
    assert "with <!-- /step --> after it" in capsys.readouterr().err


def test_a_page_has_the_tables_that_it_wants(data, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- decode -->\n<!-- /decode -->\n")
    tables.main(["--write", str(page), "--data", str(data)])
    assert "1.17 (2.80 x)" in page.read_text() and "published" not in page.read_text()


def test_criteria_table_shows_both_times_and_their_ratio(data):
    case = {"date": "1", **MACHINE, "shape": "8x16", "dtype": "fp32", "pattern": "2:4"}
    rows = [
        {"method": "wanda", "median_ms": 2.0, "ratio_to_plain": 0.25},
        {"method": "wanda_plain", "median_ms": 8.0, "ratio_to_plain": 1.0},
        {"method": "dsnot", "median_ms": 3.0, "ratio_to_plain": ""},
    ]
    common.append_rows(data / "pruning.csv", [case | row for row in rows])
    _, _, line, gpu = cells(tables.tables(data)["criteria"])
    shown = ["–", "–", "2.00 / 8.00 (0.250)", "–", "–", "3.00", "–", "–", "–"]
    assert line == ["A CPU (AVX2), 2 threads", "8x16", "fp32", "2:4", *shown]
    assert gpu[:2] == ["NVIDIA H100", "not measured"]


def test_streaming_table_has_the_last_run_of_a_case(data):
    case = {**MACHINE, "criterion": "wanda", "pattern": "2:4", "samples": 4, "window": 512, "blocks": 48}
    sizes = {"disk_bytes": 19_950_000_000, "predicted_bytes": 2**31, "peak_bytes": 2**30, "resumed_peak_bytes": 2**29}
    seconds = {"forward_seconds": 60.0, "criterion_seconds": 20.0, "overhead": 0.2}
    for date, total in (("1", 999.0), ("2", 100.0)):
        row = {"date": date, **case, **sizes, "seconds": total, **seconds}
        common.append_rows(data / "streaming.csv", [row])
    _, _, line = cells(tables.tables(data)["streaming"])
    assert line == [
        *("A CPU (AVX2), 2 threads", "19.9", "48", "wanda", "2:4", "4 x 512"),
        *("2048", "1024", "512", "100", "60.0", "20.0", "20%"),
    ]


def test_merging_table_has_the_last_run_of_a_case(data):
    case = {**MACHINE, "rounding": "nearest", "dtype": "auto", "files": 20, "disk_bytes": 19_950_000_000, "merged": 336}
    figures = {"copy_seconds": 60.0, "of_copy_speed": 0.75, "peak_bytes": 2**30, "resumed_peak_bytes": 2**29}
    figures |= {"resumed_seconds": 44.0, "verify_seconds": 90.0}
    for date, seconds in (("1", 999.0), ("2", 80.0)):
        common.append_rows(data / "merging.csv", [{"date": date, **case, **figures, "merge_seconds": seconds}])
    _, _, line = cells(tables.tables(data)["merging"])
    assert line == [
        *("A CPU (AVX2), 2 threads", "19.9", "20", "336", "nearest", "auto"),
        *("60.0", "80.0", "75%", "1024", "44.0", "512", "90.0"),
    ]


def test_the_table_of_bits_marks_what_nothing_smaller_reaches(data):
    case = {"date": "1", **MACHINE, "model": "small", "protocol": "a text", "samples": 8, "group": 64}
    for pattern, method, bits, size, seed, perplexity in (
        ("dense", "float", 16, 16.0, 0, 10.0),
        ("dense", "nearest", 4, 4.25, 0, 11.0),
        ("dense", "nearest", 4, 4.25, 1, 13.0),
        ("2:4", "feedback", 4, 3.25, 0, 99.0),
        ("2:4", "feedback", 4, 3.25, 0, 11.5),
        ("50%", "feedback", 8, 5.25, 0, 14.0),
        ("dense", "feedback", 8, 8.25, 0, 10.0),
    ):
        row = {"seed": seed, "pattern": pattern, "method": method, "bits": bits}
        common.append_rows(data / "bits.csv", [case | row | {"bits_per_weight": size, "perplexity": perplexity}])
    made = tables.tables(data)["bits"]
    assert made.startswith("small (a text):")
    assert cells(made)[2:] == [
        ["16.00", "dense", "bf16", "10.0", "+0.0%"],
        ["8.25", "dense", "8 bit, error feedback", "**10**", "+0.0%"],
        ["5.25", "50%", "8 bit, error feedback", "14.0", "+40.0%"],
        ["4.25", "dense", "4 bit, nearest", "12.0", "+20.0%"],
        ["3.25", "2:4", "4 bit, error feedback", "**11.5**", "+15.0%"],
    ]
    bits_plot.main(["--csv", str(data / "bits.csv"), "--out", str(data / "bits.svg")])
    drawn = (data / "bits.svg").read_text()
    assert all(f">{text}<" in drawn for text in ("small", "2:4", "50%", "dense", "bits per weight"))


def test_tables_of_pruned_models(data):
    case = {"date": "1", **MACHINE, "model": "small", "protocol": "a text", "dense": 10.0}
    for method, pattern, before, steps, after in (
        ("wanda", "50%", 20.0, 0, ""),
        ("wanda", "2:4", 99.0, 0, ""),
        ("wanda", "2:4", 30.0, 7, 15.0),
        ("ria", "2:4", 29.0, 0, ""),
    ):
        row = {"pattern": pattern, "method": method, "perplexity": before, "trained_steps": steps}
        common.append_rows(data / "pruned_quality.csv", [case | row | {"trained_perplexity": after}])
    made = tables.tables(data)
    assert made["pruned"].startswith("small, dense 10.0 (a text):")
    assert cells(made["pruned"])[2:] == [["wanda", "20.0", "30.0"], ["ria", "–", "29.0"]]
    assert cells(made["start"])[2:] == [["small", "2:4", "10.0", "wanda", "30.0", "7", "15.0"]]


def quality_rows(path):
    case = {"date": "1", **MACHINE, "model": "m", "protocol": "text, 64 tokens", "steps": 9, "tokens_per_step": 2048}
    case |= {"dense": 3.0, "pruned": 9.0, "reconstructed": 5.0}
    measured = {
        ("SPP", "2:4"): (0.70, 0.72),
        ("HiRA", "2:4"): (0.69, 0.69),
        ("HiRA", "50%"): (0.5, 0.5),
        ("SPP + both", "2:4"): (0.9, 0.9),
    }
    for (method, pattern), gaps in measured.items():
        found = {"trainable": 1234 if method == "HiRA" else 1200, "train_seconds": 10.0, "perplexity": 4.0}
        rows = [
            {**case, "pattern": pattern, "method": method, **found, "seed": i, "gap_closed": gap}
            for i, gap in enumerate(gaps)
        ]
        common.append_rows(path, rows)


def test_quality_table(data):
    quality_rows(data / "quality.csv")
    table = tables.tables(data)["quality"]
    assert (
        "m, text, 64 tokens; 9 steps of 2048 tokens; dense 3.00, pruned 9.00, 9.00, and after reconstruction 5.00"
        in table
    )
    head, _, *lines = cells(table)
    assert head == ["method", "trained", "seconds", "2:4", "50%"]
    assert lines == [
        ["SPP", "1,200", "10.0", "**71.0** ± 1.4", "–"],
        ["HiRA", "1,234", "10.0", "69.0 ± 0.0", "**50.0** ± 0.0"],
        ["SPP + both", "1,200", "10.0", "90.0 ± 0.0", "–"],  # not compared: it learns from the dense model
    ]


def test_the_plot_has_every_method_and_model(data, tmp_path):
    quality_rows(data / "quality.csv")
    plots.main(["--csv", str(data / "quality.csv"), "--out", str(tmp_path / "plot.svg")])
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f">{text}<" in drawn for text in ("SPP", "HiRA", "SPP + both", "m", "2:4", "50%"))


def test_nothing_to_draw(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        plots.main(["--csv", str(tmp_path / "none.csv"), "--out", str(tmp_path / "plot.svg")])
    assert "has no rows; run python -m benchmarks.quality first" in capsys.readouterr().err
