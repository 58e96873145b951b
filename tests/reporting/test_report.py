"""The report's page and the terminal's table: nothing is missing, nothing is fetched, nothing is injected."""

from __future__ import annotations

import io
import math

import pytest
from realistic_results import MODULES, failed, realistic, run_of
from report_page import Page
from rich.console import Console

from spp.errors import SppError
from spp.reporting.key_values import facts
from spp.reporting.report import write_report
from spp.reporting.results import RunResults
from spp.reporting.summary import subject, summary_table, verdict

_LEAST = {"perplexity": {}, "protocol": {}}
"""What results.json has to hold."""
_EVIL = "<script>alert('x')</script>\" onload=\"alert(1)"


@pytest.fixture
def page(tmp_path):
    """Write the report of some results and parse it."""

    def make(results) -> Page:
        write_report([run_of(results)], tmp_path / "report.html")
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return make


def table_text(results) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table(run_of(results).results))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_has_every_tensor_with_its_figures(page):
    results = realistic()
    rows = page(results).rows("42 tensors")
    assert rows[0][:4] == ["Tensor", "Sparsity", "Zeros", "Offenders"]
    assert [row[0] for row in rows[1:-1]] == list(results["sparsity"]["tensors"])
    name = "model.layers.2.self_attn.k_proj.weight"
    proof = results["verification"]["tensors"][name]
    [row] = [row for row in rows if row[0] == name]
    assert row[1:] == [
        "50.0%",
        "13,824",
        "0",
        "0",
        "13,824",
        str(proof["underflowed"]),
        f"{proof['unchanged'] / 13_824:.1%}",
        str(proof["sign_flips"]),
        f"{proof['largest_relative_change']:.1%}",
    ]
    assert rows[-1][:4] == ["All", "50.0%", f"{results['verification']['zeros']:,}", "0"]


def test_the_page_says_what_was_found_and_how(page):
    words = page(realistic()).words
    assert "story, pruned 2:4 by Wanda, fine-tuned with SPP" in words
    assert "Sparsity kept" in words and "Verification failed" not in words
    for part in (
        "72.6%", "9.814", "16.42", "11.30", "5 min 21 s", "1.80 GiB",  # headline
        "tinystories_valid.jsonl", "stride", "float32", "each document by itself", "perplexity is per",  # protocol
        "2.13.0+cpu", "not installed", "AMD EPYC 9B45", "NVIDIA H100 80GB HBM3", "79.65 GiB",  # machine
        "tokens per second 2,868", "trainable parameters 104,448", "evaluate pruned", "--max-steps 150",
    ):  # fmt: skip
        assert part in words, part


def test_the_structure_is_accessible(page):
    found = page(realistic())
    tags = [tag for tag, _ in found.tags]
    assert tags.count("h1") == 1 and tags.count("main") == 1
    assert tags.count("caption") == tags.count("table")
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    references = [name for value in found.values("aria-labelledby") for name in value.split()]
    assert set(references) <= set(ids)
    assert {value.removeprefix("#") for value in found.values("href") if value.startswith("#")} <= set(ids)
    pictures = [attributes for tag, attributes in found.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) == 5 and all(picture["aria-labelledby"] for picture in pictures)
    assert dict(found.tags)["html"]["lang"] == "en"


def test_nothing_is_fetched(page, tmp_path):
    found = page(realistic())
    for attribute in ("src", "href", "xlink:href", "action", "srcset"):
        assert all(value.startswith(("#", "data:")) for value in found.values(attribute)), attribute
    html = (tmp_path / "report.html").read_text()
    for fetch in ("url(", "@import", "http://", "https://", "fetch(", "XMLHttpRequest"):
        assert fetch not in html
    [policy] = [a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a]
    assert policy and policy.startswith("default-src 'none'")


def test_a_failed_verification_is_shown(page):
    found = page(failed())
    name = "model.layers.1.mlp.up_proj.weight"
    assert "Verification failed: sparsity not kept" in found.words and "FAILED with 1 problem" in found.words
    assert f"{name}: 3 of 110592 zeros of BASE are not +0.0 in OTHER (2 of them -0.0)" in found.words
    assert "Sparsity kept" not in found.words
    banner = next(attributes for tag, attributes in found.tags if tag == "section")
    assert banner["class"] == "verdict bad" and banner["role"] == "alert"
    assert [row[0] for row in found.rows("42 tensors") if row[0].endswith(" failed")] == [f"{name} failed"]
    assert [row[3] for row in found.rows("42 tensors") if row[0].startswith(name)] == ["3"]
    assert "FAILED" in table_text(failed())


def test_long_lists_of_problems_are_cut_with_a_count(page):
    results = failed()
    results["verification"]["problems"] = [f"tensor {index}: broken" for index in range(50)]
    words = page(results).words
    assert "tensor 19: broken" in words and "tensor 20: broken" not in words and "and 30 more" in words


def test_the_verdict_follows_the_verification():
    def state(**parts) -> str:
        return verdict(RunResults.model_validate(_LEAST | parts))["state"]

    assert state(verified=True) == "good"
    assert state(verification={"verified": False}) == "bad"
    assert state() == "unknown"


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        ({"criterion": "ria", "criterion_title": "RIA"}, "RIA"),
        ({"criterion": "ria"}, "ria"),  # of an older version
        ({"criterion": None, "criterion_title": None}, None),  # nothing was pruned
    ],
)
def test_a_criterion_is_called_by_its_title_where_there_is_one(protocol, name):
    assert subject(run_of(_LEAST | {"protocol": protocol}).results)["criterion"] == name


@pytest.mark.parametrize(
    ("perplexity", "gap", "words"),
    [
        ({"dense": 10.0, "pruned": 10.0, "spp": 9.0}, None, "pruning raised the perplexity by less than 1%"),
        ({"dense": 10.0, "pruned": math.inf, "spp": 9.0}, math.nan, "perplexities are not finite"),
        ({"dense": 10.0, "spp": 9.0}, None, "perplexities are missing"),
    ],
)
def test_a_gap_that_is_not_defined_is_explained(page, perplexity, gap, words):
    results = realistic() | {"perplexity": perplexity, "gap_closed": gap}
    assert f"not defined {words}" in page(results).words
    assert f"not defined ({words})" in table_text(results)


def test_a_gap_that_widened_is_called_so(page):
    assert "-12.5% fine-tuning made the model worse" in page(realistic() | {"gap_closed": -0.125}).words


def test_hostile_names_are_text(page):
    results = realistic(1)
    results["protocol"] |= {"model": _EVIL, "criterion_title": _EVIL, "extra": {_EVIL: _EVIL}}
    results["command"] = _EVIL
    results["seconds"][_EVIL] = 1.0
    results["options"][_EVIL] = _EVIL
    results["sparsity"]["skipped"] = [_EVIL]
    results["sparsity"]["tensors"][f"layers.0.{_EVIL}.weight"] = {"sparsity": 0.5, "transposed": False}
    results["verification"] |= {"problems": [_EVIL], "verified": False}
    results["verified"] = False
    honest = page(realistic(1))
    found = page(results)
    assert [tag for tag, _ in found.tags].count("script") == [tag for tag, _ in honest.tags].count("script") == 1
    assert "onload" not in {name for _, attributes in found.tags for name in attributes}
    assert found.words.count("<script>alert('x')</script>") >= 8


@pytest.mark.parametrize("part", sorted(realistic(1).keys() - _LEAST))
def test_a_part_that_is_missing_is_left_out(page, part):
    results = realistic(1)
    del results[part]
    assert "Reproduce" in page(results).words
    assert table_text(results)
    assert "Reproduce" in page(realistic(1) | {part: None}).words


def test_empty_results_make_a_page(page):
    words = page(_LEAST).words
    assert "Not verified" in words and "not defined" in words and "The command was not recorded." in words


def test_losses_that_are_not_finite_are_left_out_and_counted(page):
    results = realistic(1)
    results["training"]["losses"][3:5] = [[4, math.nan], [5, math.inf]]
    assert "2 of 150 losses are not finite" in page(results).words
    results["training"]["losses"] = [[1, math.nan]]
    assert "1 of 1 losses are not finite" in page(results).words
    results["training"]["losses"] = []
    assert "No losses were recorded" in page(results).words


def test_changes_that_are_not_finite_are_drawn(page):
    results = realistic(1)
    for value, proof in zip((math.inf, 12.0, 0.0), results["verification"]["tensors"].values(), strict=False):
        proof["largest_relative_change"] = value
    found = page(results)
    assert "infinite" in found.words and "1,200.0%" in found.words


def test_names_of_every_family_are_drawn(page):
    results = realistic(1)
    names = ["transformer.h.3.attn.c_attn.weight", "m.layers.4.mlp.experts.7.w1.weight", "lm_head.weight"]
    results["sparsity"]["tensors"] = {name: {"sparsity": 0.5, "transposed": False} for name in names}
    words = page(results).words
    assert "layer 3, attn.c_attn: 50.0%" in words
    assert "layer 4, mlp.experts.*.w1: 50.0%" in words and "Experts of a layer share a cell" in words
    assert "lm_head.weight" in words and ", lm_head" not in words


def test_both_maps_have_their_rows_in_one_order(page):
    results = realistic(1)
    results["verification"]["tensors"] = dict(sorted(results["verification"]["tensors"].items()))
    labels = [text for text in page(results).text if text in MODULES]
    assert labels == [*MODULES, *MODULES]


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(*_):
        raise SppError("disk full")

    monkeypatch.setattr("spp.checkpoints.json_files.sync", full_disk)
    with pytest.raises(SppError, match="disk full"):
        write_report([run_of(realistic(1))], path)
    assert path.read_text() == "old"


def test_facts_read_any_nesting():
    values = {"a_b": None, "on": True, "size_bytes": 2048, "rate": 0.004, "list": [1, 2], "in": {"seconds": 3.0}}
    assert list(facts(values, skip={"on"})) == [
        ("a b", "none"),
        ("size", "2 KiB"),
        ("rate", "0.004"),
        ("list", "1, 2"),
        ("in: time", "3.00 s"),
    ]


def test_the_summary_for_the_terminal_has_the_main_figures():
    text = table_text(realistic())
    for part in ("dense perplexity", "16.42", "72.6%", "Proved: all 2,654,208 zeros", "50.0%", "5 min 21 s", "1.80"):
        assert part in text
