"""Build the native kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and run their tests on that build.

The sanitised library takes the place of the ordinary one for as long as the tests run. Needs g++ and its sanitisers'
runtimes. What is found stops the tests with a report.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "src" / "spp" / "ops" / "native"
TESTS = (
    "tests/ops/test_native.py",
    "tests/ops/test_few_bits_native.py",
    "tests/ops/test_zero_proof.py",
    "tests/ops/test_operator.py",
    "tests/models/test_pack_model.py",
)
FLAGS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",
    "-std=c++17",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
)


def main() -> int:
    """Build, test, put the ordinary library back; the exit code is pytest's."""
    library = NATIVE / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    ordinary = library.with_suffix(".ordinary")
    if library.exists():
        library.rename(ordinary)
    try:
        subprocess.run(["g++", *FLAGS, *map(str, sorted(NATIVE.glob("*.cpp"))), "-o", str(library)], check=True)
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
            cwd=ROOT,
            env={
                **os.environ,
                "LD_PRELOAD": " ".join(_runtime(name) for name in ("libasan.so", "libubsan.so")),
                "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks on exit
                "UBSAN_OPTIONS": "print_stacktrace=1",
            },
            check=False,
        ).returncode
    finally:
        library.unlink(missing_ok=True)
        if ordinary.exists():
            ordinary.rename(library)


def _runtime(name: str) -> str:
    """Where the compiler keeps a sanitiser's runtime; it must be loaded before anything else."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
