"""The site builds strictly: no broken link or anchor, no page without a place, and its references are the sources'."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import DOCS, ROOT

from spp.cli.commands import COMMANDS
from spp.training.options import TrainOptions

pytest.importorskip("mkdocs", reason="needs the extra docs: pip install spp-llm[docs]")
pytest.importorskip("material", reason="needs the extra docs: pip install spp-llm[docs]")
pytest.importorskip("mkdocstrings", reason="needs the extra docs: pip install spp-llm[docs]")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def text_of(page: Path) -> str:
    """What a reader sees of a page."""
    article = page.read_text().split("<article", 1)[1].split("</article>", 1)[0]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", article)).split())


def test_the_site_has_every_page(site):
    for page in DOCS.glob("*.md"):
        assert (site / ("" if page.stem == "index" else page.stem) / "index.html").is_file()
    assert (site / "images" / "method.svg").is_file()


def test_no_marker_is_left(site):
    for page in site.glob("**/index.html"):
        assert not re.search(r"<!-- (options|recipe|fields|table|notebook): ", page.read_text()), page


def test_every_option_is_on_the_page_of_commands(site):
    page = site / "commands" / "index.html"
    text = text_of(page)
    for name, command in COMMANDS.items():
        assert f'id="spp-{name}"' in page.read_text()
        for option in command.options.model_fields:
            assert (
                option.upper().removesuffix("S") in text
                if option in command.positional
                else f"--{option.replace('_', '-')}" in text
            )
    assert str(TrainOptions.model_fields["warmup_ratio"].description) in text
    assert "--criterion magnitude|magnitude-matrix|wanda" in text and "runs/<date-time>" in text
    assert "--prompt TEXT text to continue (required)" in text
    assert "--benchmarks FILE [FILE ...]" in text and "RUN [RUN ...]" in text and "--seed N" in text
    assert "The SPP adapter: W' = W + scale * W * (A[group] B)" in text


def test_generated_parts_are_those_of_the_sources(site):
    recipe = (ROOT / "src" / "spp" / "pipeline" / "recipes" / "paper.yaml").read_text()
    assert all(line.strip() in text_of(site / "recipes" / "index.html") for line in re.findall(r"#(.*)", recipe))
    assert "row groups R, at most a layer's output features" in text_of(site / "api" / "index.html")
    assert "PEFT HiRA" in text_of(site / "memory" / "index.html")
    assert "spp.PruneOptions.build" in text_of(site / "notebook" / "index.html").replace(" ", "")


def test_pages_ask_nothing_of_other_hosts(site):
    for page in site.glob("**/index.html"):
        loads = re.findall(
            r'<(?:script|img|iframe)[^>]+src="([^"]+)"|<link[^>]+rel="stylesheet"[^>]+href="([^"]+)"', page.read_text()
        )
        assert not [one for pair in loads for one in pair if one.startswith(("http", "//"))], page


def test_an_unknown_marker_stops_the_build():
    from mkdocs.exceptions import PluginError

    from scripts.site_hook import filled

    for marker in (
        "options: no",
        "recipe: no",
        "fields: adapters/tuner/config.py No",
        "table: no of pruning.md",
        "notebook: no",
    ):
        with pytest.raises(PluginError):
            filled(f"<!-- {marker} -->")


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(re.findall(r"[\w-]+\.md", str(nav)))
    assert listed == {page.name for page in DOCS.glob("*.md")}
