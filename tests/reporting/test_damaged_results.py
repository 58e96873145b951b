"""Results that no run writes: the page is drawn all the same, or one short error says what is wrong."""

from __future__ import annotations

import json

import pytest
from realistic_results import realistic

from spp.cli.entry_point import main
from spp.errors import UsageError
from spp.reporting.inputs import Run, read_results
from spp.reporting.report import write_report
from spp.reporting.summary import summary_table

HUGE = "9" * 5000
PLACES = [
    ("perplexity", "spp"),
    ("gap_closed",),
    ("seconds", "prune"),
    ("peak_rss_bytes",),
    ("training", "losses"),
    ("training", "validation"),
    ("training", "seconds"),
    ("training", "tokens"),
    ("training", "peak_memory_bytes"),
    ("sparsity", "overall"),
    ("verification", "zeros"),
    ("verification", "tensors"),
    ("environment",),
    ("options",),
]
VALUES = [
    "1e308", "-1e308", "5e-324", "NaN", "1e999", str(2**63 - 1), "1" + "0" * 299, HUGE, "[[1, 1e308], [2, -1e308]]",
    "[[1e308, 1], [2, 3]]", f'{{"layers.{HUGE}.q.weight": {{"zeros": {2**63 - 1}, "largest_relative_change": 1e308}}}}',
    '{"a": {"b": [1e308, {"c": 1e308}]}}', '"\\ud800"', f'"{HUGE}"',
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_no_value_leads_to_a_traceback(tmp_path, place, value):
    results = realistic(1)
    inner = results
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = "HERE"
    (tmp_path / "results.json").write_text(json.dumps(results).replace('"HERE"', value))
    try:
        found = read_results(tmp_path)
    except Exception as error:
        assert type(error).__name__ in ("UsageError", "SppError") and len(str(error)) < 1000
        return
    write_report([Run("a", found), Run("b", found)], tmp_path / "page.html")
    summary_table(found)


def test_losses_too_large_to_draw_are_counted(tmp_path):
    results = realistic(1)
    results["training"]["losses"] = [[1, 3.0], [2, 1e308], [3, -1e308], [4, 2.0]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_report([Run("a", read_results(tmp_path))], tmp_path / "page.html")
    assert "2 of 4 losses are not finite" in (tmp_path / "page.html").read_text()


def test_a_layer_with_thousands_of_digits_is_in_the_table_but_not_in_the_map(tmp_path):
    results = realistic(1)
    results["sparsity"]["tensors"][f"model.layers.{HUGE}.q_proj.weight"] = {"sparsity": 0.5}
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_report([Run("a", read_results(tmp_path))], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count(HUGE) == 1


def test_a_count_beyond_64_bits_is_named(tmp_path):
    results = realistic(1)
    results["verification"]["zeros"] = 2**63
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UsageError, match="verification.zeros: input should be less than"):
        read_results(tmp_path)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
