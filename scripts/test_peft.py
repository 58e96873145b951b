"""Run PEFT's own test-suite on SPP, as if SPP were one of PEFT's methods.

    python scripts/test_peft.py [arguments for pytest, such as -k merge or -x]

The tests come from the source distribution of the installed PEFT release, out of the package index, and stay in
`build/peft-suite` with everything else made here. Copies of them get the few edits in `EDITS`; what SPP adds to their
parametrizations is in `peft_suite/cases.py`, and the tiny random models that stand in for the hub's in
`peft_suite/hub.py`. Only cases of SPP run. The summary lists what does not apply, with the reason; a test or a file
that is neither run nor explained there is an error, so that a new PEFT release cannot drop tests silently.

Exit status: that of pytest; 1 if something is unexplained.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
WORK = SCRIPTS.parent / "build" / "peft-suite"

# File, the text in it, what takes its place.
EDITS = (
    # Diffusers is wanted for a class that only image models meet.
    (
        "testing_common.py",
        "from diffusers import StableDiffusionPipeline\n",
        "class StableDiffusionPipeline: ...\n",
    ),
    (
        "test_low_level_api.py",
        "from diffusers import StableDiffusionPipeline\n",
        "class StableDiffusionPipeline: ...\n",
    ),
    # SPP supports Conv1D, so that the tests on GPT-2 need not be skipped.
    (
        "testing_common.py",
        "config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig)",
        "config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig, SppConfig)",
    ),
    # A slip: meant for models without biases and BEFT alone, it skips every method on Llama and Gemma.
    ("test_decoder_models.py", "isinstance(config_cls, BeftConfig)", "config_cls is not BeftConfig"),
    # The learning rate that HiRA has here too: Delta is a product with W, and so is the gradient.
    (
        "test_custom_models.py",
        "issubclass(config_cls, HiraConfig)",
        "issubclass(config_cls, (HiraConfig, SppConfig))",
    ),
    # A table from the method to the prefix of its parameters.
    (
        "test_low_level_api.py",
        '{LoraConfig: "lora_", LoKrConfig: "lokr_"}',
        '{LoraConfig: "lora_", LoKrConfig: "lokr_", SppConfig: "spp_"}',
    ),
)


def main(arguments: list[str]) -> int:
    """Fetch, prepare, run."""
    release = version("peft")
    suite = unpack(fetch(release), WORK / f"peft-{release}")
    edit(suite / "tests")
    environment = {
        **os.environ,
        "HF_HOME": str(WORK / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(SCRIPTS / "peft_suite"),
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # which else skips its tests with torch.compile
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(WORK / "compiled"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for more
    subprocess.run([sys.executable, str(SCRIPTS / "peft_suite" / "hub.py")], env=environment, check=True)
    options = [
        "-p",
        "plugin",
        "-p",
        "no:cacheprovider",
        "--timeout",
        "300",
        "-q",
        "--tb",
        "short",
        "-W",
        "ignore",
        "-o",
        "addopts=",
    ]
    command = [sys.executable, "-m", "pytest", *options, "tests", *arguments]
    return subprocess.run(command, cwd=suite, env=environment, check=False).returncode


def fetch(release: str) -> Path:
    """The source distribution of this PEFT release, from the package index unless it is there already."""
    archive = WORK / f"peft-{release}.tar.gz"
    if not archive.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        wanted = ["--no-deps", "--no-binary", ":all:", f"peft=={release}"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*pip, "--dest", str(WORK), *wanted], check=False).returncode or not archive.exists():
            raise SystemExit(f"PEFT's tests could not be fetched: no {archive.name} from the package index")
    return archive


def unpack(archive: Path, suite: Path) -> Path:
    """A fresh copy of the tests, as a package; PEFT itself is the installed one."""
    shutil.rmtree(suite, ignore_errors=True)
    with tarfile.open(archive) as tar:
        members = [
            member for member in tar if member.name.startswith((f"{suite.name}/tests/", f"{suite.name}/pyproject"))
        ]
        tar.extractall(suite.parent, members=members, filter="data")
    if not (suite / "tests").is_dir():
        raise SystemExit(f"{archive} has no tests/: this PEFT release does not ship its test-suite")
    (suite / "tests" / "__init__.py").touch()
    return suite


def edit(tests: Path) -> None:
    """Apply `EDITS`, each of which must fit in exactly one place, and make SppConfig known where they need it."""
    for name, old, new in EDITS:
        text = (tests / name).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"{name} of this PEFT release has {text.count(old)} times, not once: {old!r}")
        text = text.replace(old, new)
        if "SppConfig" in new and "import SppConfig" not in text:
            text = text.replace("\nfrom peft import (", "\nfrom spp import SppConfig\nfrom peft import (", 1)
        (tests / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
