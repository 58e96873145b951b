"""The table "To add X, touch Y" of CONTRIBUTING.md is true of the tree: its files exist, and none is missing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {".py", ".h", ".cpp", ".yaml", ".j2", ".md"}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How the files are found that know of a row's example.

    Attributes:
        words: a pattern of its mentions, in the text or the name of a file.
        places: the files and folders that are searched; what the row names elsewhere has only to exist.
    """

    words: str
    places: tuple[str, ...]


PROBES = {
    "a criterion": Probe(words=r"(?i)\bria\b", places=("src/spp",)),
    "an option of `spp train`": Probe(words=r"weight[_-]decay|_FREE_ON_RESUME = .*save_steps", places=("src/spp",)),
    "a packed dtype": Probe(words=r"\bfp16\b|\bfloat16\b", places=("src/spp/ops",)),
    "a model family": Probe(words=r"(?i)\bfalcon\b", places=("tests", "docs")),
    "an adapter format": Probe(words=r"hira_format|\"hira\"|\"HiRA\"", places=("src/spp",)),
    "a section of the report": Probe(
        words=r"\"layers\"|macro layers|parts\.layers|\bskipped\b|^\| layers \|",
        places=("src/spp/reporting", "src/spp/pipeline", "docs/report.md"),
    ),
    "a task format": Probe(words=r"\bpremise\b", places=("src/spp", "tests", "docs")),
    "a benchmark": Probe(
        words=r"decode\.csv|benchmarks\.decode|benchmarks import .*\bdecode\b|decode_table|<!-- decode -->",
        places=("benchmarks", "tests/benchmarks", "docs/performance.md"),
    ),
}


def rows() -> dict[str, list[str]]:
    """What is to be added -> the paths that are to be touched, in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("\n## To add X, touch Y\n")[1].split("\n## ")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {name: re.findall(r"`([^`]*/[^`]*)`", touched) for name, _, touched in table[1:]}


def mentions(probe: Probe) -> set[str]:
    """Paths of the files that know of the example."""
    found = set()
    for place in probe.places:
        path = ROOT / place
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.suffix in TEXTS and file != Path(__file__) and re.search(probe.words, code(file), re.MULTILINE):
                found.add(str(file.relative_to(ROOT)))
    return found


def code(file: Path) -> str:
    """The name and the text of a file, without the comments and docstrings of sources."""
    text = file.read_text()
    if file.suffix == ".py" and file.is_relative_to(ROOT / "src"):
        text = re.sub(r'""".*?"""|#[^\n]*', "", text, flags=re.DOTALL)
    elif file.suffix in (".h", ".cpp"):
        text = re.sub(r"//.*", "", text)
    return f"{file.stem}\n{text}"


@pytest.mark.parametrize("name", PROBES)
def test_the_files_of_a_row_are_all_that_know_of_its_example(name: str) -> None:
    probe = PROBES[name]
    expected = {path for path in rows()[name] if any(Path(path).is_relative_to(place) for place in probe.places)}
    assert expected
    assert mentions(probe) == expected


def test_every_file_of_the_table_exists() -> None:
    paths = [path for touched in rows().values() for path in touched]
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_every_row_has_a_probe() -> None:
    assert list(rows()) == list(PROBES)


def test_no_source_names_a_family_that_is_found_by_its_structure() -> None:
    family = PROBES["a model family"].words
    assert mentions(Probe(words=family, places=("src/spp",))) == set()
