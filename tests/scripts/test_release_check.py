"""The check of a release sees what is wrong with a package."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from scripts import release_check
from scripts.release_check import ROOT, problems

GOOD = "Metadata-Version: 2.4\nName: spp-llm\nVersion: 9.9\nLicense-Expression: Apache-2.0\nRequires-Dist: torch>=2\n"


def sdist(folder: Path, content: str) -> Path:
    path = folder / "spp_llm-9.9.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("spp_llm-9.9/PKG-INFO")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content.encode()))
    return path


@pytest.fixture(autouse=True)
def _released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 9.9 (2030-01-01)\n")
    monkeypatch.setattr(release_check, "ROOT", tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("", "", []),
        ("spp-llm", "spp", ["Name is 'spp', not 'spp-llm'"]),
        ("9.9", "9.8", ["Version is '9.8', not '9.9'"]),
        ("torch>=2", "spp[eval]", ["it needs 'spp[eval]' of itself"]),
    ],
)
def test_wrong_metadata_is_named(tmp_path: Path, before: str, after: str, words: list[str]) -> None:
    assert problems(sdist(tmp_path, GOOD.replace(before, after, 1) if before else GOOD), "9.9") == words


def test_an_unreleased_section_is_named(tmp_path: Path) -> None:
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 9.9 (unreleased)\n")
    assert problems(sdist(tmp_path, GOOD), "9.9") == ["CHANGELOG.md says that 9.9 is unreleased"]


def test_every_hint_to_install_names_the_distribution() -> None:
    """`spp` on the package index is another project."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    ends = (".md", ".toml", ".py", "Makefile", ".ipynb")
    texts = [ROOT / name for name in tracked if name.endswith(ends)]
    wrong = [str(path) for path in texts if re.search(r'pip install "?spp(\[|\s|"|$)', path.read_text())]
    assert [one for one in wrong if Path(one) != Path(__file__)] == []
