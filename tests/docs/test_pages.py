"""What pages say about the project is so: links, the tree, messages, the places of equations, the notebook."""

from __future__ import annotations

import ast
import json
import re
from functools import cache

import pytest
from pages import DOCS, PAGES, README, ROOT, anchors, links

import spp
from benchmarks.tables import tables
from spp.cli.commands import COMMANDS
from spp.pipeline.recipes import shipped_recipes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page.read_text()):
        if "://" in link:
            assert re.fullmatch(r"https://[\w.-]+(/[\w./%#~:+-]*)?", link), link
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file.read_text()), link


def test_every_command_is_two_clicks_from_the_readme():
    page = DOCS / "commands.md"
    assert "docs/commands.md" in links(README.read_text())
    text = page.read_text()
    for command in COMMANDS:
        assert f"#spp-{command}" in links(text), f"the table of docs/commands.md does not link to spp {command}"
        assert f"spp-{command}" in anchors(text)
        assert f"<!-- options: {command} -->" in text


def test_every_recipe_and_every_public_name_has_its_place():
    recipes, api = (DOCS / "recipes.md").read_text(), (DOCS / "api.md").read_text()
    assert set(re.findall(r"<!-- recipe: ([\w-]+) -->", recipes)) == set(shipped_recipes())
    assert set(re.findall(r"^::: spp\.(\w+)$", api, re.MULTILINE)) == set(spp._HOMES)


def test_figures_of_the_guide_are_the_measured_ones():
    measured = (DOCS / "pruning.md").read_text() + tables()["rates"]
    rows = [line for line in (DOCS / "choosing.md").read_text().splitlines() if re.match(r"\| .* \| [\d.]+ \|", line)]
    assert len(rows) >= 7
    assert all(row in measured for row in rows)


def troubles() -> list[str]:
    """The messages that the page explains."""
    return re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


@cache
def sources() -> str:
    """All text in the package's code, with what differs as an ellipsis; and what the system says in its stead."""
    found = ["Bus error"]
    for path in (ROOT / "src" / "spp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-\d.]*[sdrfg]", "…", node.value).replace("%%", "%"))
    return "\n".join(found)


@pytest.mark.parametrize("message", troubles())
def test_every_message_of_the_troubleshooting_page_is_one_of_ours(message):
    assert message in sources()


def test_the_troubleshooting_page_explains_many_messages_of_every_command_that_has_its_own():
    text = (DOCS / "troubleshooting.md").read_text()
    assert len(troubles()) == len(set(troubles())) >= 60
    for command in COMMANDS.keys() - {"cache-teacher", "unpack", "inspect", "doctor"}:
        assert re.search(rf"^## .*spp {command}", text, re.MULTILINE)


def test_the_places_of_equations_exist():
    found = re.findall(r"`((?:src|benchmarks)/[\w./]+)`(?:: ((?:`\w+`(?:, )?)+))?", (DOCS / "papers.md").read_text())
    assert len(found) > 25
    for path, names in found:
        assert (ROOT / path).is_file(), path
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE), f"{path}: {name}"


def test_the_citation_and_the_changelog_have_the_version():
    assert f"\nversion: {spp.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {spp.__version__} (" in (ROOT / "CHANGELOG.md").read_text()


def test_images_say_what_is_on_them():
    for page in PAGES:
        for text in re.findall(r"!\[(.*?)\]\(", page.read_text()):
            assert len(text.split()) > 2, f"{page.name}: {text!r}"
    figure = (DOCS / "images" / "method.svg").read_text()
    assert "<title" in figure and "<desc" in figure


STEPS = "STEPS, WINDOW = 60, 256"


@pytest.mark.parametrize("notebook", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
@pytest.mark.parametrize("data", ["stories", pytest.param("python-stdlib", marks=pytest.mark.slow)])
def test_notebooks_run(notebook, data, stories, tmp_path, monkeypatch, capsys):
    """All code cells in one process, with fewer steps; by default on less text, too."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    short = code.replace(STEPS, "STEPS, WINDOW = 12, 64" if data == "python-stdlib" else "STEPS, WINDOW = 2, 32")
    assert short != code and '"python-stdlib"' in code
    if data == "stories":
        short = short.replace('"python-stdlib"', repr(str(stories)))
    monkeypatch.chdir(tmp_path)
    exec(compile(short, str(notebook), "exec"), {})
    assert "True" in capsys.readouterr().out
    assert (tmp_path / "runs" / "notebook" / "merged" / "model.safetensors").is_file()
