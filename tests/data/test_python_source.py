"""The standard library as a corpus: disjoint parts, stable by path."""

from __future__ import annotations

from spp.data.python_source import part_of, source_files, standard_library


def test_parts_are_disjoint_and_all_there():
    parts = {part: set(standard_library(part)) for part in ("train", "calibration", "evaluation")}
    assert not parts["train"] & parts["evaluation"]
    assert not parts["train"] & parts["calibration"]
    assert not parts["calibration"] & parts["evaluation"]
    sizes = {part: sum(map(len, texts)) for part, texts in parts.items()}
    assert sizes["train"] > 5_000_000
    assert min(sizes["calibration"], sizes["evaluation"]) > 100_000


def test_a_file_keeps_its_part_wherever_it_lies():
    # Frozen on purpose: the bundled model never saw the evaluation files, so a path must not change sides.
    paths = ("argparse.py", "operator.py", "asyncio/locks.py", "json/decoder.py")
    assert [part_of(path) for path in paths] == ["train", "evaluation", "evaluation", "train"]


def test_tests_links_and_stubs_of_files_are_left_out(tmp_path):
    for name in ("pkg/a.py", "pkg/test/b.py", "site-packages/c.py", "d.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#" * 600)
    (tmp_path / "tiny.py").write_text("x = 1")
    (tmp_path / "link.py").symlink_to(tmp_path / "pkg" / "a.py")
    assert source_files(tmp_path) == [tmp_path / "pkg" / "a.py"]
