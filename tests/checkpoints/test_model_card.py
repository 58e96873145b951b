"""Model cards: complete, readable by the hub's own reader, and deaf to what names may contain."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from spp.checkpoints.json_files import write_json
from spp.checkpoints.model_card import CARD, as_code, model_card, read_licence, write_model_card
from spp.errors import SppError, UsageError

VERIFICATION = {
    "verified": True,
    "zeros": 1_234_567,
    "underflowed": 3,
    "unchanged_share": 0.125,
    "dtype": "auto",
    "rounding": "nearest",
    "copied": 5,
    "tensors": {"a": {}, "b": {}},
    "converted": {},
}
MANIFEST = {
    "version": "9.9",
    "name": "tuned",
    "base": "./pruned",
    "pattern": "2:4",
    "criterion": "wanda",
    "sparsity": 0.5,
    "licence": {"license": "apache-2.0", "language": ["en"]},
    "training": {"data": "alpaca.json", "steps": 150, "tokens": 614_400, "settings": {"learning_rate": 0.004}},
}
FIGURES = {
    "perplexity": {"dense": 13.891, "pruned": 17.82, "spp": 14.42},
    "evaluation": {
        "unit": "token", "source": "wiki.txt", "window": 512, "stride": 512, "per_document": False, "dtype": "float32",
    },
}  # fmt: skip


def merged(folder: Path, **changes) -> Path:
    folder.mkdir()
    write_json(folder / "spp.json", MANIFEST | changes)
    write_json(folder / "verification.json", VERIFICATION)
    return folder


def test_a_card_says_all_that_is_known(tmp_path):
    folder = merged(tmp_path / "tuned")
    write_model_card(folder, FIGURES)
    card = ModelCard.load(folder / CARD)
    assert card.data.license == "apache-2.0" and card.data.language == ["en"]
    assert {"sparse", "2:4"} <= set(card.data.tags)
    for word in (
        "1,234,567",
        "`2:4`",
        "`wanda`",
        "50.00%",
        "`alpaca.json`",
        "614400",
        "12.5%",
        "14.4200",
        "window 512",
    ):
        assert word in card.text, word
    assert model_card(folder) == (folder / CARD).read_text()


def test_without_figures_a_card_says_so(tmp_path):
    folder = merged(tmp_path / "tuned", training={}, licence={})
    write_model_card(folder)
    text = (folder / CARD).read_text()
    assert "None were measured" in text and "perplexity" not in text.lower()


def test_names_mean_nothing_in_markdown(tmp_path):
    hostile = 'x` <script>alert(1)</script> | [a](javascript:b)\n# "title"'
    folder = merged(tmp_path / "tuned", name=hostile, base=hostile, training={"data": hostile})
    lines = model_card(folder).split("---", 2)[2].splitlines()
    carrying = [line for line in lines if "script" in line]
    assert carrying
    for line in carrying:
        if "from_pretrained(" in line:
            continue  # within a block of code
        [code] = [part for index, part in enumerate(line.split("`")) if index % 2]
        assert "alert" in code
        assert line.replace("\\|", "").count("|") in (0, 3)
    assert as_code("a`b|c\nd") == "`a'b\\|c d`"


@pytest.mark.parametrize("text", ["", "no front matter", "---\n: [\n---\n", "---\n- a\n---\n"])
def test_a_base_whose_card_cannot_be_read_has_no_licence(tmp_path, text):
    (tmp_path / CARD).write_text(text)
    assert read_licence(tmp_path) == {}


def test_the_licence_is_the_bases(tmp_path):
    (tmp_path / CARD).write_text("---\nlicense: other\nlicense_name: mine\ntags: [a]\n---\ntext\n")
    assert read_licence(tmp_path) == {"license": "other", "license_name": "mine"}


def test_what_is_no_merged_model_has_no_card(tmp_path):
    with pytest.raises(UsageError, match="only what spp merge or full training wrote has a card"):
        model_card(tmp_path)


def test_the_licence_of_a_model_without_a_card_is_in_its_side_file(tmp_path):
    write_json(tmp_path / "spp.json", {"licence": {"license": "mit", "tags": ["a"]}})
    assert read_licence(tmp_path) == {"license": "mit"}


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "2:4\n\n<script>alert(1)</script>"},
        {"pattern": ["2:4"], "sparsity": "half"},
        {"training": ["a"]},
        {"training": {"data": "a", "settings": "b"}},
    ],
    ids=["HTML", "other kinds", "a list", "no settings"],
)
def test_a_base_may_say_anything_of_itself(tmp_path, changes):
    text = model_card(merged(tmp_path / "tuned", **changes))
    assert "<script>" not in text and "1,234,567" in text


@pytest.mark.parametrize(
    ("file", "content"),
    [("spp.json", {}), ("verification.json", {"verified": True}), ("verification.json", []), ("spp.json", [])],
)
def test_side_files_of_something_else_are_one_error(tmp_path, file, content):
    folder = merged(tmp_path / "tuned")
    write_json(folder / file, content)
    with pytest.raises(SppError, match=r"merge it again|a JSON object is expected"):
        model_card(folder)
