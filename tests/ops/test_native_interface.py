"""The interface between Python and C++ has a number, and a library with another number is never called."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from spp.ops import native

_SOURCES = Path(native.__file__).parent
# Number -> digest of what the number stands for. Whoever changes a struct, a constant or a signature raises the number
# in kernels.h and in __init__.py, and writes the new digest here.
_DIGESTS = {
    1: "dff543ff320def270f29f78d99d73e70b47cb89b313d9afeb1901c2a3dea1c43",
    2: "3f447848219d1ea4c65f63f18278189f92cc4ac8c53c4abbf9dbd3486f944041",
}


@pytest.fixture
def sources() -> str:
    """The C++ side; an installed wheel has the headers alone."""
    if not (_SOURCES / "api.cpp").is_file():
        pytest.skip("the sources of the native kernels are not here")
    return "".join((_SOURCES / name).read_text(encoding="utf-8") for name in ("kernels.h", "api.cpp"))


def test_both_sides_have_the_same_number(sources):
    assert int(re.findall(r"kAbi = (\d+);", sources)[0]) == native.ABI


def test_a_changed_interface_has_a_new_number(sources):
    assert digest(sources) == _DIGESTS[native.ABI], "raise kAbi and ABI, and note the new digest here"


def digest(sources: str) -> str:
    """SHA-256 of the structs, constants and signatures that Python repeats, without comments and spaces."""
    code = re.sub(r"//[^\n]*", "", sources)
    names = ("Weight", "FewBitWeight", "Factors", "Comparison", "Block")
    structs = [re.findall(rf"struct {name} {{.*?}};", code, re.DOTALL)[0] for name in names]
    constants = re.findall(r"enum class Dtype.*?;|constexpr int64_t kMost\w+ = [^;]*;", code, re.DOTALL)
    signatures = re.findall(r"SPP_API [^{]*", code)
    return hashlib.sha256("".join("".join([*structs, *constants, *signatures]).split()).encode()).hexdigest()


@pytest.mark.parametrize(
    "library",
    [SimpleNamespace(spp_abi=lambda: native.ABI + 1), SimpleNamespace()],
    ids=["another number", "older than the number"],
)
def test_a_library_of_other_sources_is_refused(library):
    reason = native.stale(library)
    assert reason is not None and reason.endswith("reinstall spp")


def test_the_library_that_is_here_fits():
    assert native.why_not_loaded is None or "interface" not in native.why_not_loaded
