"""One page for several runs: figures side by side, what differs called out, and the same sections as of one run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from realistic_results import failed, realistic, run_of
from report_page import Page

from spp.reporting.inputs import Benchmark, read_benchmark, run_names
from spp.reporting.report import write_report

_EVIL = "<script>alert('x')</script>\" onload=\"alert(1)"
_DATA = Path(__file__).resolve().parents[2] / "benchmarks" / "data"


@pytest.fixture
def page(tmp_path):
    """Write the report of some runs, by name, and parse it."""

    def make(runs, benchmarks=()) -> Page:
        path = tmp_path / "report.html"
        write_report([run_of(results, name) for name, results in runs.items()], path, benchmarks)
        return Page(path.read_text(encoding="utf-8"))

    return make


def other(**evaluation) -> dict:
    """A run by another criterion, and evaluated in another way where that is said."""
    results = realistic(2)
    evaluated = results["protocol"]["evaluation"] | evaluation
    results["protocol"] |= {"criterion": "sparsegpt", "criterion_title": "SparseGPT", "evaluation": evaluated}
    results["perplexity"] = {"dense": 9.8137, "pruned": 12.0, "spp": 10.5}
    return results | {"gap_closed": 0.664, "peak_rss_bytes": 3 * 2**30}


def test_the_quality_table_has_a_row_for_every_run(page):
    heading, first, second = page({"a": realistic(2), "b": other()}).rows("2 runs")
    assert heading == [
        "Run", "Model", "Pattern", "Criterion", "Sparsity", "Dense", "Pruned", "SPP", "Gap closed", "Trainable", "Time",
        "Peak memory", "Verified",
    ]  # fmt: skip
    assert first[:9] == ["1 a", "story", "2:4", "Wanda", "50.0%", "9.814", "16.42", "11.30", "72.6%"]
    assert first[9:] == ["104,448", "5 min 21 s", "1.80 GiB", "yes"]
    assert second[3:9] == ["SparseGPT", "50.0%", "9.814", "12.00", "10.50", "66.4%"]
    assert second[11] == "3.00 GiB"


def test_runs_that_were_evaluated_alike_compare(page):
    found = page({"a": realistic(2), "b": other()})
    assert "cannot be compared" not in found.words.replace("different machines cannot be compared", "")
    assert found.rows("Differs between the runs") == [["Fact", "1 a", "2 b"], ["criterion", "wanda", "sparsegpt"]]
    assert ["window", "512"] in found.rows("Evaluation, the same in all runs")


def test_time_is_no_part_of_a_protocol(page):
    assert "These perplexities" not in page({"a": realistic(2), "b": other(seconds=1.0)}).words


@pytest.mark.parametrize(
    ("name", "value", "row"),
    [
        ("source", "wiki.txt", ["text", "tinystories_valid.jsonl", "wiki.txt"]),
        ("window", 2048, ["window", "512", "2,048"]),
        ("dtype", "bfloat16", ["dtype", "float32", "bfloat16"]),
        ("tokens", 70_000, ["tokens", "73,214", "70,000"]),  # another tokenizer
        ("per_document", False, ["each document by itself", "yes", "no"]),
    ],
)
def test_another_protocol_is_called_out(page, name, value, row):
    found = page({"a": realistic(2), "b": other(**{name: value})})
    assert (2, "These perplexities cannot be compared") in found.headings
    assert found.rows("How the runs were evaluated") == [["Fact", "1 a", "2 b"], row]
    assert "Those of different runs cannot be compared" in found.words


def test_a_protocol_that_one_run_lacks_is_called_out(page):
    results = other()
    del results["protocol"]["evaluation"]
    assert ["window", "512", "none"] in page({"a": realistic(2), "b": results}).rows("How the runs were evaluated")


def test_a_part_that_one_run_has_not_is_compared_fact_by_fact(page):
    results = other()
    results["protocol"]["calibration"] = None  # magnitude needs none
    rows = page({"a": realistic(2), "b": results}).rows("Differs between the runs")
    assert ["calibration: samples", "128", "none"] in rows and "calibration" not in {row[0] for row in rows}


def test_machines_that_differ_are_shown_side_by_side(page):
    results = other()
    results["environment"] = results["environment"] | {"cpu": "Xeon"}
    found = page({"a": realistic(2), "b": results})
    assert found.rows("Hardware, different")[1:] == [["cpu", "AMD EPYC 9B45", "Xeon"]]
    assert "only be compared on the same hardware" in found.words
    assert "only be compared on the same hardware" not in page({"a": realistic(2), "b": other()}).words


def test_every_run_has_its_sections(page):
    found = page({"a": realistic(2), "b": other()})
    for number, name in ((1, "a"), (2, "b")):
        assert (2, f"{number} {name}") in found.headings
        for part in ("perplexity", "training", "layers", "verification", "time", "reproduce"):
            assert f"run-{number}-{part}" in found.values("id")
    assert [text for text, _ in found.tables if text.endswith("tensors")] == ["14 tensors"] * 2
    pictures = [attributes for tag, attributes in found.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) == 2 + 2 * 5


def test_curves_have_a_legend_and_runs_without_losses_are_counted(page):
    without = other()
    without["training"] = without["training"] | {"losses": []}
    found = page({"a": realistic(2), "b": without, "c": other()})
    assert [row[0].split() for row in found.rows("Lines of the chart")[1:]] == [["1", "a"], ["3", "c"]]
    assert "1 of 3 runs recorded no losses" in found.words


def test_one_run_that_failed_fails_the_page(page):
    found = page({"good": realistic(2), "broken": failed(2)})
    assert (2, "Verification failed in 1 of 2 runs") in found.headings
    assert [row[-1] for row in found.rows("2 runs")[1:]] == ["yes", "FAILED"]
    banner = next(attributes for tag, attributes in found.tags if tag == "section")
    assert banner["class"] == "verdict bad" and banner["role"] == "alert"
    unproved = realistic(2) | {"verified": None, "verification": None}
    assert (2, "Not verified: 1 of 2 runs") in page({"good": realistic(2), "old": unproved}).headings


def test_runs_of_which_little_is_known_are_shown(page):
    little = {"perplexity": {"dense": float("nan")}, "protocol": {}}
    found = page({"a": {"perplexity": {}, "protocol": {}}, "b": little, "c": realistic(1)})
    assert found.rows("3 runs")[1][:2] == ["1 a", "a model"] and "not defined" in found.rows("3 runs")[1]


@pytest.mark.parametrize("closed", [None, float("nan"), float("inf"), float("-inf")])
def test_a_gap_that_is_not_defined_is_no_number(page, tmp_path, closed):
    """Neither in the order of rows nor as a bar."""
    found = page({"a": realistic(1), "b": realistic(1) | {"gap_closed": closed}})
    assert found.rows("2 runs")[2][8] == "not defined"
    html = (tmp_path / "report.html").read_text()
    assert '<td class="number" data-key="">not defined</td>' in html
    gaps = html[html.index('id="gaps-title"') :].split("</svg>")[0]
    assert gaps.split("<rect")[-1].count('width="0.0"') == 1


def test_the_structure_is_accessible(page):
    found = page({"a": realistic(2), "b": other(window=1), "c": failed(2)}, [read_benchmark(_DATA / "step.csv")])
    tags = [tag for tag, _ in found.tags]
    assert [tags.count(tag) for tag in ("h1", "main", "header", "footer", "nav")] == [1] * 5
    levels = [level for level, _ in found.headings]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert tags.count("caption") == tags.count("table") and all(text.strip() for text, _ in found.tables)
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in found.tags if tag == "th")
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    references = [name for value in found.values("aria-labelledby") for name in value.split()]
    assert set(references) <= set(ids)
    assert {value.removeprefix("#") for value in found.values("href") if value.startswith("#")} <= set(ids)
    regions = [attributes for _, attributes in found.tags if attributes.get("role") == "region"]
    assert all(region["tabindex"] == "0" for region in regions)  # what scrolls can be reached and is named
    assert all(region.get("aria-label") or region.get("aria-labelledby") for region in regions)


def test_hostile_names_are_text(page):
    results = realistic(1)
    results["protocol"] |= {"model": _EVIL, "evaluation": {_EVIL: _EVIL}}
    rows = [{"date": _EVIL, "device": _EVIL, _EVIL: "1"}, {"date": "b", "device": _EVIL, _EVIL: "2"}]
    found = page({_EVIL: results, "b": realistic(1)}, [Benchmark(_EVIL, rows)])
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert "onload" not in {name for _, attributes in found.tags for name in attributes}
    assert found.words.count("<script>alert('x')</script>") >= 12


def test_benchmark_rows_are_shown_with_what_they_share(page):
    rows = [
        {"date": "today", "device": "cpu", "method": "a", "median_ms": "1234.5", "peak_bytes": "2048", "count": "3"},
        {"date": "today", "device": "cpu", "method": "b", "median_ms": "7.125", "peak_bytes": "", "count": "4000"},
    ]
    found = page({"run": realistic(1)}, [Benchmark("speed", rows)])
    assert found.rows("speed, 2 rows") == [
        ["method", "median, ms", "peak", "count"],
        ["a", "1,234.50", "2 KiB", "3"],
        ["b", "7.12", "", "4,000"],
    ]
    assert "All rows of speed: date today, device cpu." in found.words


@pytest.mark.parametrize("file", sorted(_DATA.glob("*.csv")), ids=lambda path: path.stem)
def test_rows_of_every_benchmark_are_shown(page, file):
    benchmark = read_benchmark(file)
    assert len(page({"run": realistic(1)}, [benchmark]).rows(f"{file.stem}, ")) == len(benchmark.rows) + 1


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    for folder in ("x/run", "y/run", "y/other"):
        (tmp_path / folder).mkdir(parents=True)
    paths = [tmp_path / "x/run", tmp_path / "y/run/results.json", tmp_path / "y/other", tmp_path / "copy.json"]
    assert run_names(paths) == ["x/run", "y/run", "other", "copy.json"]


def test_the_results_are_left_as_they_were(page):
    results = realistic(1)
    before = copy.deepcopy(results)
    page({"a": results, "b": results})
    assert results == before
