"""What is published: a wheel and an sdist with all that spp needs, which install where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import spp

ROOT = Path(__file__).resolve().parents[1]
RESOURCES = {
    "spp/py.typed",
    "spp/checkpoints/templates/model_card.md.j2",
    "spp/pipeline/bundled_model/model.safetensors",
    *(f"spp/pipeline/recipes/{name}.yaml" for name in ("demo", "paper", "paper-7b", "paper-135m")),
    *(f"spp/reporting/templates/report.{kind}" for kind in ("css", "html.j2", "js")),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `python -m build` makes of the sources, and nothing else of this checkout."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if files.returncode:
        pytest.skip("this is no git checkout, so what belongs to it is not known")
    for name in files.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "dist"


def test_the_wheel_has_all_that_the_package_needs_and_no_more(built):
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "spp").rglob("*.py")}
    assert sources <= names
    assert names >= RESOURCES
    assert {name.split("/")[0] for name in names} == {"spp", f"spp_llm-{spp.__version__}.dist-info"}
    assert any("licenses/LICENSE" in name for name in names)


def test_the_sdist_can_be_built_and_tested(built):
    [sdist] = built.glob("*.tar.gz")
    top = f"spp_llm-{spp.__version__}/"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(top) for name in archive.getnames()}
    kernels = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "src/spp/ops/native").iterdir()
        if path.suffix in (".cpp", ".h")
    }
    assert kernels and kernels <= names
    assert {f"src/{name}" for name in RESOURCES} | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_works_without_a_compiler_and_without_the_sources(built, tmp_path):
    """In an environment of its own, which borrows the dependencies of this one but not the package."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    [wheel] = built.glob("*.whl")
    where = {**os.environ, "PATH": str(python.parent), "CC": "false", "CXX": "false", "PYTHONPATH": ""}
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env=where)
    borrowed = Path(sysconfig.get_paths()["purelib"])
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    for path in borrowed.iterdir():
        if "spp" not in path.name.split("-")[0]:
            (dependencies / path.name).symlink_to(path)
    where["PYTHONPATH"] = str(dependencies)

    def spp_command(*words: str) -> str:
        command = [python.with_name("spp"), *words]
        done = subprocess.run(command, env=where, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import spp, spp.ops.native as native; print(spp.__file__, native.instructions() is not None)"
    found = subprocess.run([python, "-c", code], env=where, cwd=tmp_path, capture_output=True, text=True, check=True)
    where_from, native = found.stdout.split()
    assert Path(where_from).is_relative_to(tmp_path / "venv")
    assert native == "True"
    assert spp.__version__ in spp_command("--version")
    spp_command("run", "demo", "--effort", "quick", "--max-steps", "2", "--limit", "4", "--out", "demo")
    assert {path.name for path in (tmp_path / "demo").iterdir()} >= {"merged", "results.json", "report.html"}
