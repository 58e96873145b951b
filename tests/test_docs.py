"""What the README and the docs show is tried: every command line parses, the Python example runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from spp.cli import build_parser
from spp.options import PruneOptions
from spp.stages.prune import prune

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    lines = [line.strip() for page in PAGES for line in page.read_text().splitlines() if line.startswith("    spp ")]
    return sorted(set(lines))


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command):
    build_parser().parse_args(shlex.split(command)[1:])


def test_commands_are_found_at_all():
    assert {shlex.split(command)[1] for command in commands()} >= {"run", "prune", "train", "merge", "verify", "eval"}


def test_the_python_example_runs(tmp_path, tiny_checkpoint, monkeypatch):
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    prune(PruneOptions.build({"model": str(tiny_checkpoint), "out": "runs/demo/pruned", "criterion": "magnitude"}))
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert len(example.strip().splitlines()) <= 12


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path, monkeypatch, capsys):
    """All code cells in one process, with fewer steps."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    short = code.replace("STEPS, WINDOW = 60, 256", "STEPS, WINDOW = 12, 64")
    assert short != code
    monkeypatch.chdir(tmp_path)
    exec(compile(short, str(notebook), "exec"), {})
    assert "True" in capsys.readouterr().out
    assert (tmp_path / "runs" / "notebook" / "merged" / "model.safetensors").is_file()


def test_links_and_images_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tree_in_the_readme_is_the_tree():
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "src" / "spp").iterdir():
        if path.name.startswith("_") or path.name in {"py.typed", "templates"}:
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert name in readme, f"the README's tree does not show {name}"
