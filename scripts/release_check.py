"""Check what would be released: build it, look at its metadata, install it where nothing else is, and run the demo.

    python scripts/release_check.py [--quick]

In `build/release`: an sdist and a wheel are built from the files that git knows; twine checks them; the sdist, which is
what is uploaded, and the wheel are each installed into an environment of their own, with the versions of
`constraints.txt`; in each, `spp doctor` and the demo run. `--quick` runs two steps of the demo instead of all.

Why the sdist is uploaded: the wheel has kernels for the machine that built it, which indexes refuse (`linux_...`)
unless auditwheel repairs it in an old image, for each platform. The sdist builds the kernels where it is installed, in
half a minute, and installs without them where there is no C++ compiler.
"""

from __future__ import annotations

import argparse
import email.parser
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "release"
NAME = "spp-llm"


def built() -> list[Path]:
    """The sdist and the wheel, made of nothing but what git knows."""
    source = WORK / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    run(_python("tools", "build", "twine"), "-m", "build", "--outdir", str(WORK / "dist"), str(source))
    return sorted((WORK / "dist").iterdir())


def problems(sdist: Path, version: str) -> list[str]:
    """What is wrong with the metadata of an sdist."""
    with tarfile.open(sdist) as archive:
        file = archive.extractfile(f"{NAME.replace('-', '_')}-{version}/PKG-INFO")
        assert file is not None
        about = email.parser.Parser().parsestr(file.read().decode())
    expected = {"Name": NAME, "Version": version, "License-Expression": "Apache-2.0"}
    wrong = [f"{key} is {about[key]!r}, not {value!r}" for key, value in expected.items() if about[key] != value]
    needed = about.get_all("Requires-Dist") or []
    wrong += [f"it needs {one!r} of itself" for one in needed if one.split("[")[0] == "spp"]
    if "(unreleased)" in (ROOT / "CHANGELOG.md").read_text().partition(version)[2].splitlines()[0]:
        wrong.append(f"CHANGELOG.md says that {version} is unreleased")
    return wrong


def try_out(name: str, package: Path, words: Sequence[str]) -> None:
    """Install a package into an environment of its own, and run it, away from the sources."""
    python = _python(name, "--constraint", str(ROOT / "constraints.txt"), str(package))
    away = WORK / f"{name}-run"
    away.mkdir()
    found = json.loads(run(python, "-m", "spp", "doctor", "--json", cwd=away))
    assert not found["problems"], found["problems"]
    run(python, "-m", "spp", "run", *words, "--out", "demo", cwd=away)
    results = json.loads((away / "demo" / "results.json").read_text())
    assert results["verified"] is True, "the demo's zeros were not proved"
    print(f"{name}: installed; the demo's perplexities are {results['perplexity']}")


def _python(name: str, *packages: str) -> Path:
    """The Python of a new environment with these packages."""
    venv.create(WORK / name, with_pip=True)
    python = WORK / name / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
    return python


def run(python: Path, *words: str, cwd: Path = ROOT) -> str:
    """Run a command without this checkout in its path, and return what it prints."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, *words], cwd=cwd, env=clean, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"release check: {' '.join(words)} failed ({done.returncode})\n{done.stdout[-2000:]}")
    return done.stdout


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="check what would be released")
    parser.add_argument("--quick", action="store_true", help="two steps of the demo instead of all")
    quick = parser.parse_args().quick
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    sdist, wheel = sorted(built(), key=lambda path: path.suffix != ".gz")
    run(WORK / "tools" / "bin" / "python", "-m", "twine", "check", "--strict", str(sdist), str(wheel))
    version = wheel.name.split("-")[1]
    wrong = problems(sdist, version)
    demo = ["demo", "--effort", "quick", "--max-steps", "2", "--limit", "4"] if quick else ["demo"]
    for name, package in (("sdist", sdist), ("wheel", wheel)):
        try_out(name, package, demo)
    sys.exit("release check: " + "; ".join(wrong) if wrong else f"{NAME} {version} may be released")


if __name__ == "__main__":
    main()
