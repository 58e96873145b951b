"""Every command and every block of Python that the README and the docs show is run, on a tiny model."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import DOCS, PAGES, README, ROOT, Shown, commands_in_tables, shown
from sandbox import SMALL, examples_of_the_help, fill, run, run_python

from spp.cli.commands import COMMANDS

SHOWN = {str(page.relative_to(ROOT)): shown(page.read_text()) for page in PAGES}
SHOWN["docs/migration.md"] = commands_in_tables((DOCS / "migration.md").read_text())
SHOWN["spp COMMAND --help"] = [Shown("shell", example) for example in examples_of_the_help()]
_done: set[Shown] = set()
"""Pages repeat each other; what ran once need not run again."""


@pytest.fixture(scope="module")
def stock(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    """Everything that pages mention, made once."""
    folder, here = tmp_path_factory.mktemp("stock"), Path.cwd()
    os.chdir(folder)
    try:
        fill(folder, tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer)
    finally:
        os.chdir(here)
    return folder


@pytest.mark.parametrize("page", [name for name, found in SHOWN.items() if found])
def test_everything_that_a_page_shows_runs(page, stock, tmp_path, monkeypatch, capfd):
    shutil.copytree(stock, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    problems = []
    for one in SHOWN[page]:
        if one in _done:
            continue
        _done.add(one)
        if one.language == "python":
            run_python(one.text, page)
            continue
        try:
            outcome = run(one.text)
        except SystemExit as stop:  # it does not parse
            outcome = int(stop.code or 0)
        said = capfd.readouterr().err
        if outcome != 0:
            problems.append(f"{one.text}\n    {outcome}: {said}")
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_a_documented_torchrun_command_runs_with_two_processes(stock, tmp_path, monkeypatch):
    """As it is shown but for the number of processes; all others run as one process above."""
    commands = [one.text for one in SHOWN["docs/distributed.md"] if one.text.startswith("torchrun --nproc-per-node 8 ")]
    [sharded] = [command for command in commands if command.endswith("--sharding fsdp")]
    shutil.copytree(stock, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    shutil.rmtree("adapter")
    words = shlex.split(sharded.replace("--nproc-per-node 8", "--nproc-per-node 2"))[1:]
    command = [sys.executable, "-m", "torch.distributed.run", *words, *SMALL["train"].split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("adapter/adapter_model.safetensors").is_file()


def test_the_tables_of_migration_have_commands_for_each_tool():
    sections = (DOCS / "migration.md").read_text().split("\n## ")[1:]
    counts = {section.splitlines()[0]: len(commands_in_tables(section)) for section in sections}
    assert len(counts) == 4 and min(counts.values()) >= 4


def test_every_command_is_shown():
    words = {one.text.split()[1] for found in SHOWN.values() for one in found if one.text.startswith("spp ")}
    assert words >= set(COMMANDS)


def test_the_example_of_the_readme_is_short():
    [example] = [one.text for one in SHOWN[README.name] if one.language == "python"]
    assert len(example.strip().splitlines()) <= 12


def test_commands_are_told_from_formulas_and_python():
    page = """
    W' = W + Delta
    spp prune a b \\
        --pattern 2:4
    other-tool --flag a

```bash
#!/bin/bash
# a comment
first=$(hostname)
srun spp doctor
some-tool a
```

```python
import spp
```

    model.save("x")
"""
    found = [(one.language, one.text) for one in shown(page)]
    assert found == [
        ("shell", "spp prune a b --pattern 2:4"),
        ("shell", "other-tool --flag a"),
        ("shell", "srun spp doctor"),
        ("shell", "some-tool a"),
        ("python", "import spp\n"),
    ]


@pytest.mark.parametrize(
    "command",
    [
        "some-tool a",
        "make nothing-of-the-kind",
        'pip install "spp-llm[nothing]"',
        "python -m benchmarks.nothing",
        ".venv/bin/python -m benchmarks.step --nothing",
        "spp inspect nothing-there",
        "spp eval a --tasks paper --compare",
    ],
)
def test_a_command_that_does_not_work_is_found(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(command) != 0
