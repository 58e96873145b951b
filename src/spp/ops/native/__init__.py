"""C++ kernels, called through ctypes: expand packed weights, form W', reduce gradients, multiply few tokens.

The library is optional: it is built when spp is installed, if there is a C++ compiler. It has a plain C interface, does
not depend on torch, and uses the threads of the OpenMP runtime that torch has loaded. When it runs, it picks AVX-512
(VBMI2), AVX2 or portable code for the CPU.

Functions that are also in `spp.ops.torch_kernels` have the same signature and result here.
"""

from __future__ import annotations

import ctypes
import logging
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.ops.dtypes import KERNEL_DTYPE_NAMES, KERNEL_DTYPES
from spp.ops.packed import DamagedWeightError, PackedWeight, Weight, require_all_values, require_packable, word_count
from spp.ops.reference import MOST_DIRECTIONS

logger = logging.getLogger("spp")

ABI = 2
"""Version of the interface between this file and kernels.h, there `kAbi`; raise both with every change to it."""

_BEST = -1
_BLOCK_ROWS = 32
_MOST_COMPARED = 2**16  # entries in a block of compare


class _Weight(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        ("bitmask", ctypes.c_void_p),
        ("row_offsets", ctypes.c_void_p),
        ("nonzeros", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class _Factors(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("directions", ctypes.c_int64),
    ]


class _Block(ctypes.Structure):
    _fields_ = [("first", ctypes.c_int64), ("last", ctypes.c_int64), ("group", ctypes.c_int64)]


class _Comparison(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("zeros", "offenders", "negative_zeros", "survivors")),
        *((name, ctypes.c_int64) for name in ("underflowed", "unchanged", "sign_flips", "non_finite")),
        ("largest_relative_change", ctypes.c_float),
        ("unused", ctypes.c_int32),
    ]


def _torch_openmp() -> tuple[ctypes.c_void_p, ...] | None:
    """torch's OpenMP functions that start a team, return a thread's number, and the team's size; None if unknown."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_global_deps.*"))
    try:
        runtime = ctypes.CDLL(str(found[0]))  # its dependencies are searched for symbols, too
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        return tuple(ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names)
    except (IndexError, OSError, AttributeError):
        return None


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, set up with torch's threads, and None; or None, and why there is no library."""
    path = Path(__file__).with_name("_kernels" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
    if not path.is_file():
        return None, "it was not built when spp was installed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"it does not load ({error})"
    if reason := stale(library):
        logger.warning("the native kernels are not used: %s", reason)
        return None, reason
    library.spp_instructions.restype = ctypes.c_char_p
    for sized in (library.spp_blocks, library.spp_most_tokens, library.spp_rounded_bytes):
        sized.restype = ctypes.c_int64
    if threading := _torch_openmp():
        library.spp_use_threads_of(*threading)
    return library, None


def stale(library: Any) -> str | None:
    """Why a library must not be called: it was built from other sources than this file's; None if it may."""
    try:
        abi = library.spp_abi()
    except AttributeError:  # older than the number
        abi = None
    if abi == ABI:
        return None
    return f"the library was built from another version of spp (interface {abi}, and this is {ABI}); reinstall spp"


_LIBRARY, why_not_loaded = _load()
"""The library, or None and why there is none."""


def instructions(level: int = _BEST) -> str | None:
    """The instruction set that is used: avx512_bf16, avx512, avx2 or portable; None without the library.

    Args:
        level: 0 is portable, 1 to 3 are those above it; None is returned for one that this machine lacks.
    """
    name = _LIBRARY.spp_instructions(level) if _LIBRARY else None
    return name.decode() if name else None


def library_for(level: int) -> ctypes.CDLL:
    """The library, for calls at a level; see `instructions`.

    Raises:
        ValueError: there is no library, or this CPU lacks the level.
    """
    if _LIBRARY is None:
        raise ValueError(f"the back-end native cannot be used: {why_not_loaded}")
    if instructions(level) is None:
        raise ValueError(f"this CPU has no instruction set of level {level}")
    return _LIBRARY


def multithreaded() -> bool:
    """Whether torch's threads were found; without them the kernels use a single one."""
    return _torch_openmp() is not None


def why_not(weight: Weight, *others: Tensor) -> str | None:
    """Why the kernels cannot compute with this weight and these other tensors, as a phrase; None if they can."""
    if _LIBRARY is None:
        return why_not_loaded
    for tensor in (weight, *others):
        if tensor.device.type != "cpu":
            return f"it runs on the CPU, and a tensor is on {tensor.device}"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"it computes in {KERNEL_DTYPE_NAMES}, and a tensor is {tensor.dtype}"
    if isinstance(weight, Tensor) and weight.stride(-1) != 1 and weight.shape[-1] > 1:
        return "it needs rows that are contiguous, and the weight is transposed"
    return None


def effective_weight(weight: Weight, A: Tensor, B: Tensor, out: Tensor, *, with_base: bool, level: int = _BEST) -> None:
    """As `torch_kernels.effective_weight`, in fp32.

    Raises:
        SppError: a packed weight whose bitmask and offsets disagree.
    """
    _effective(weight, A, B, out, with_base, level)


def expand(weight: PackedWeight, out: Tensor, *, level: int = _BEST) -> None:
    """As `torch_kernels.expand`.

    Raises:
        SppError: the bitmask and the offsets disagree.
    """
    _effective(weight, None, None, out, True, level)


def _effective(weight: Weight, A: Tensor | None, B: Tensor | None, out: Tensor, with_base: bool, level: int) -> None:
    library, described = _described(weight, level)
    factors, _keep = _factors(weight, A, B)
    require(out.shape == tuple(weight.shape) and out.is_contiguous(), "out", out)
    failed = library.spp_effective(
        level,
        torch.get_num_threads(),
        ctypes.byref(described),
        ctypes.byref(factors),
        int(with_base),
        ctypes.c_void_p(out.data_ptr()),
        KERNEL_DTYPES[out.dtype],
    )
    _require_sound(failed)


def add_factor_gradients(
    G: Tensor, first: int, weight: Weight, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, *, level: int = _BEST
) -> None:
    """As `torch_kernels.add_factor_gradients`, in fp32; the sums do not depend on the number of threads.

    Raises:
        SppError: a packed weight whose bitmask and offsets disagree.
    """
    library, described = _described(weight, level)
    factors, _keep = _factors(weight, A, B)
    out_features, in_features = weight.shape
    fits = G.shape[1:] == (in_features,) and first >= 0 and first + len(G) <= out_features and G.is_contiguous()
    require(fits, "G", G)
    for name, tensor, like in (("dA", dA, A), ("dB", dB, B)):
        ready = tensor.shape == like.shape and tensor.dtype == torch.float32 and tensor.is_contiguous()
        require(ready, name, tensor)
    shape = [ctypes.c_int64(number) for number in (first, len(G), factors.groups, out_features, _BLOCK_ROWS)]
    count = library.spp_blocks(*shape, None)
    blocks = (_Block * count)()
    library.spp_blocks(*shape, blocks)
    partial = torch.empty(count, factors.directions, in_features)
    failed = library.spp_reduce(
        level,
        torch.get_num_threads(),
        ctypes.byref(described),
        ctypes.byref(factors),
        ctypes.c_void_p(G.data_ptr()),
        KERNEL_DTYPES[G.dtype],
        ctypes.c_int64(first),
        blocks,
        ctypes.c_int64(count),
        ctypes.c_void_p(partial.data_ptr()),
        ctypes.c_void_p(dA.data_ptr()),
        ctypes.c_void_p(dB.data_ptr()),
    )
    _require_sound(failed)


def most_tokens(weight: Weight, dtype: torch.dtype, *, level: int = _BEST) -> int:
    """Tokens in this dtype that `matvec` takes at once: 64 in bf16 with AVX512_BF16 and a packed weight, else 4."""
    library, described = _described(weight, level)
    return library.spp_most_tokens(level, ctypes.byref(described), KERNEL_DTYPES[dtype])


def matvec(x: Tensor, weight: Weight, bias: Tensor | None, *, level: int = _BEST) -> Tensor:
    """y = x W^T + bias for up to `most_tokens` tokens, reading each weight once: (T, O) in x's dtype.

    Sums are in fp32. On a CPU with AVX512_BF16, denormals count as zeros where W and x are bf16.

    Args:
        x: (T, I), contiguous.
        weight: (O, I).
        bias: (O,) or None.
        level: see `instructions`.

    Raises:
        SppError: a packed weight whose bitmask and offsets disagree.
    """
    library, described = _described(weight, level)
    out_features, in_features = weight.shape
    tokens = len(x)
    most = library.spp_most_tokens(level, ctypes.byref(described), KERNEL_DTYPES[x.dtype])
    require(x.shape[1:] == (in_features,) and 1 <= tokens <= most and x.is_contiguous(), "x", x)
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    require(bias is None or bias.shape == (out_features,), "bias", bias)
    arranged = torch.empty(tokens * word_count(in_features) * 32)
    y = torch.empty(tokens, out_features, dtype=x.dtype)
    failed = library.spp_matvec(
        level,
        torch.get_num_threads(),
        ctypes.byref(described),
        ctypes.c_void_p(x.data_ptr()),
        KERNEL_DTYPES[x.dtype],
        ctypes.c_int64(tokens),
        None if bias is None else ctypes.c_void_p(bias.data_ptr()),
        ctypes.c_void_p(arranged.data_ptr()),
        ctypes.c_void_p(y.data_ptr()),
    )
    _require_sound(failed)
    return y


def pack(weight: Tensor, *, level: int = _BEST) -> PackedWeight:
    """As `spp.ops.packed.pack`."""
    require_packable(weight)
    library, described = _described(weight, level)
    out_features, in_features = weight.shape
    bitmask = torch.empty(out_features, word_count(in_features), dtype=torch.int32)
    row_offsets = torch.zeros(out_features + 1, dtype=torch.int64)
    counts = row_offsets[1:]
    arguments = (level, torch.get_num_threads(), ctypes.byref(described), ctypes.c_void_p(bitmask.data_ptr()))
    library.spp_scan(*arguments, ctypes.c_void_p(counts.data_ptr()))
    torch.cumsum(counts, dim=0, out=counts)
    values = torch.empty(int(row_offsets[-1]), dtype=weight.dtype)
    library.spp_gather(*arguments, ctypes.c_void_p(row_offsets.data_ptr()), ctypes.c_void_p(values.data_ptr()))
    return PackedWeight(values, bitmask, row_offsets, in_features)


def compress(G: Tensor, first: int, weight: PackedWeight, *, level: int = _BEST) -> None:
    """As `torch_kernels.compress`."""
    library, described = _described(G, level)
    fits = G.shape[1:] == (weight.in_features,) and first >= 0 and first + len(G) <= len(weight) and G.is_contiguous()
    require(fits, "G", G)
    _described(weight, level)  # checks the lengths
    offsets, bitmask = weight.row_offsets[first : first + len(G) + 1], weight.bitmask[first:]
    start, end = int(offsets[0]), int(offsets[-1])
    offsets, values = offsets - start, weight.values[start:end]
    gathered = values if values.dtype == G.dtype else torch.empty(len(values), dtype=G.dtype)
    library.spp_gather(
        level,
        torch.get_num_threads(),
        ctypes.byref(described),
        ctypes.c_void_p(bitmask.data_ptr()),
        ctypes.c_void_p(offsets.data_ptr()),
        ctypes.c_void_p(gathered.data_ptr()),
    )
    if gathered is not values:
        values.copy_(gathered)


def compare(base: Tensor, other: Tensor, *, level: int = _BEST) -> dict[str, int | float]:
    """The fields of `spp.ops.zero_proof.TensorProof`, in one pass over both tensors.

    Args:
        base, other: of one shape; both contiguous.
        level: see `instructions`.

    Raises:
        ValueError: the kernels cannot take them.
    """
    if reason := why_not(base, other):
        raise ValueError(f"the back-end native cannot be used: {reason}")
    loaded = library_for(level)
    require(base.is_contiguous(), "base", base)
    require(other.is_contiguous() and other.shape == base.shape, "other", other)
    found = _Comparison()
    parts = (_Comparison * -(-base.numel() // _MOST_COMPARED))()
    loaded.spp_compare(
        level,
        torch.get_num_threads(),
        ctypes.c_void_p(base.data_ptr()),
        KERNEL_DTYPES[base.dtype],
        ctypes.c_void_p(other.data_ptr()),
        KERNEL_DTYPES[other.dtype],
        ctypes.c_int64(base.numel()),
        parts,
        ctypes.byref(found),
    )
    return {name: getattr(found, name) for name, *_ in _Comparison._fields_ if name != "unused"}


def _described(weight: Weight, level: int) -> tuple[ctypes.CDLL, _Weight]:
    """The library, and the weight as its argument. Lengths are checked here, for all functions; rows in C++."""
    if reason := why_not(weight):
        raise ValueError(f"the back-end native cannot be used: {reason}")
    loaded = library_for(level)
    out_features, in_features = weight.shape
    described = _Weight(out_features=out_features, in_features=in_features, dtype=KERNEL_DTYPES[weight.dtype])
    if isinstance(weight, Tensor):
        described.values, described.row_stride = weight.data_ptr(), weight.stride(0)
        return loaded, described
    lengths = weight.bitmask.shape == (out_features, word_count(in_features)) and weight.bitmask.dtype == torch.int32
    offsets = weight.row_offsets.shape == (out_features + 1,) and weight.row_offsets.dtype == torch.int64
    if not (
        lengths and offsets and all(t.is_contiguous() for t in (weight.values, weight.bitmask, weight.row_offsets))
    ):
        raise DamagedWeightError("a packed weight's bitmask or row offsets have a wrong length or dtype")
    require_all_values(weight)
    described.values, described.nonzeros = weight.values.data_ptr(), len(weight.values)
    described.bitmask, described.row_offsets = weight.bitmask.data_ptr(), weight.row_offsets.data_ptr()
    return loaded, described


def _factors(weight: Weight, A: Tensor | None, B: Tensor | None) -> tuple[_Factors, list[Tensor]]:
    """The factors as the library's arguments, and the tensors that must be kept alive while they are used."""
    if A is None or B is None:
        return _Factors(), []
    out_features, in_features = weight.shape
    require(A.ndim == 2 and A.shape[1] == in_features and 1 <= len(A) <= out_features, "A", A)
    require(B.ndim == 2 and len(B) == out_features and 1 <= B.shape[1] <= MOST_DIRECTIONS, "B", B)
    directions = B.shape[1]
    require(len(A) % directions == 0, "A", A)
    keep = [factor.detach().to(torch.float32).contiguous() for factor in (A, B)]
    factors = _Factors(a=keep[0].data_ptr(), b=keep[1].data_ptr(), groups=len(A) // directions, directions=directions)
    return factors, keep


def require(holds: bool, name: str, tensor: Tensor | None) -> None:
    """Raise a ValueError that names a tensor, and its shape, unless what is said of it holds."""
    if not holds:
        found = None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype)
        raise ValueError(f"{name} does not fit the weight, or is not contiguous: {found}")


def _require_sound(failed: int) -> None:
    if failed:
        raise DamagedWeightError("a packed weight is damaged: the bits of a row and its row offsets disagree")
