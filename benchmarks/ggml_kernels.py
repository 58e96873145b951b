"""Products with ggml's own CPU kernels, those of llama.cpp, through ctypes: for `benchmarks/deploy.py`.

The library is that of an installed package (`pip install xllamacpp`), or a given file that exports the C functions. The
package's is built for AVX2; on a CPU with AVX-512, one that was built on the machine has more kernels, and faster ones.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12}
"""Name of a format -> its number in ggml.h."""

_PACKAGE = "xllamacpp"
_CONTEXT_BYTES = 2**20


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class MissingError(Exception):
    """There is no library, or it has no kernel for what is asked."""


def load(path: Path | None = None) -> ctypes.CDLL:
    """ggml's library: that file, or the one of an installed package.

    Raises:
        MissingError: there is none, or it lacks functions.
    """
    if path is None:
        spec = importlib.util.find_spec(_PACKAGE)
        found = [
            one for place in (spec.submodule_search_locations or () if spec else ()) for one in Path(place).glob("*.so")
        ]
        if not found:
            raise MissingError(
                f"ggml is not here; install it (pip install {_PACKAGE}), or give its library (--ggml FILE)"
            )
        path = found[0]
    try:
        library = ctypes.CDLL(str(path))
        for name, result in _RESULTS.items():
            getattr(library, name).restype = result
    except (OSError, AttributeError) as error:
        raise MissingError(f"{path} cannot be used as ggml's library: {error}") from error
    return library


_POINTERS = (
    *("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data"),
    *("ggml_backend_cpu_init", "ggml_backend_cpu_buffer_type", "ggml_backend_cpu_reg", "ggml_backend_reg_dev_get"),
    *("ggml_backend_reg_get_proc_address", "ggml_backend_alloc_ctx_tensors_from_buft"),
)
_RESULTS: dict[str, Any] = {name: ctypes.c_void_p for name in _POINTERS} | {
    "ggml_nbytes": ctypes.c_size_t,
    "ggml_quantize_chunk": ctypes.c_size_t,
    "ggml_backend_buft_name": ctypes.c_char_p,
    "ggml_backend_dev_supports_op": ctypes.c_bool,
    "ggml_backend_graph_compute": ctypes.c_int,
}


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product y = W x. Its tensors live as long as the process.

    Attributes:
        run: computes it once.
        result: y (T, O), after a run.
        nbytes: of the weight.
    """

    run: Callable[[], object]
    result: Tensor
    nbytes: int


def product(
    library: ctypes.CDLL, weight: Tensor, x: Tensor, type_name: str, *, repacked: bool, threads: int
) -> Product:
    """x W^T with W (O, I) quantized by ggml, in its ordinary layout or, `repacked`, the one that llama.cpp runs.

    Raises:
        MissingError: ggml has no kernel for the repacked format on this CPU.
    """
    buffers = _buffer_type(library, repacked)
    (out_features, in_features), tokens = weight.shape, len(x)
    held, used = _context(library), _context(library)
    w = _tensor(library, held, TYPES[type_name], in_features, out_features)
    inputs = _tensor(library, used, TYPES["f32"], in_features, tokens)
    y = _pointer(library.ggml_mul_mat(used, w, inputs))
    for context, place in ((held, buffers), (used, _buffer_type(library, repacked=False))):
        _pointer(library.ggml_backend_alloc_ctx_tensors_from_buft(context, place))
    device = _pointer(library.ggml_backend_reg_dev_get(_pointer(library.ggml_backend_cpu_reg()), ctypes.c_size_t(0)))
    if not library.ggml_backend_dev_supports_op(device, y):
        raise MissingError(f"ggml has no repacked kernel for {type_name} on this CPU")
    data = _quantized(library, weight, TYPES[type_name], library.ggml_nbytes(w))
    _set(library, w, data)
    _set(library, inputs, x.float().contiguous())
    graph = _pointer(library.ggml_new_graph(used))
    library.ggml_build_forward_expand(graph, y)
    backend = _pointer(library.ggml_backend_cpu_init())
    library.ggml_backend_cpu_set_n_threads(backend, ctypes.c_int(threads))
    size = tokens * out_features
    result = (ctypes.c_float * size).from_address(library.ggml_get_data(y))
    return Product(
        run=partial(library.ggml_backend_graph_compute, backend, graph),
        result=torch.frombuffer(result, dtype=torch.float32).view(tokens, out_features),
        nbytes=data.nbytes,
    )


def _pointer(address: int | None) -> ctypes.c_void_p:
    if not address:
        raise MissingError("ggml returned a null pointer")
    return ctypes.c_void_p(address)


def _context(library: ctypes.CDLL) -> ctypes.c_void_p:
    return _pointer(library.ggml_init(_InitParams(mem_size=_CONTEXT_BYTES, mem_buffer=None, no_alloc=True)))


def _tensor(library: ctypes.CDLL, context: ctypes.c_void_p, number: int, columns: int, rows: int) -> ctypes.c_void_p:
    return _pointer(library.ggml_new_tensor_2d(context, number, ctypes.c_int64(columns), ctypes.c_int64(rows)))


def _buffer_type(library: ctypes.CDLL, repacked: bool) -> ctypes.c_void_p:
    """Where a weight is put, which decides on its layout."""
    if not repacked:
        return _pointer(library.ggml_backend_cpu_buffer_type())
    registry = _pointer(library.ggml_backend_cpu_reg())
    device = _pointer(library.ggml_backend_reg_dev_get(registry, ctypes.c_size_t(0)))
    address = library.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if address:
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        for one in extra or ():
            if not one:
                break
            if library.ggml_backend_buft_name(ctypes.c_void_p(one)) == b"CPU_REPACK":
                return ctypes.c_void_p(one)
    raise MissingError("this build of ggml does not repack weights")


def _quantized(library: ctypes.CDLL, weight: Tensor, number: int, nbytes: int) -> Tensor:
    dense, data = weight.float().contiguous(), torch.empty(nbytes, dtype=torch.uint8)
    sizes = [ctypes.c_int64(one) for one in (0, *weight.shape)]
    library.ggml_quantize_chunk(
        number, ctypes.c_void_p(dense.data_ptr()), ctypes.c_void_p(data.data_ptr()), *sizes, None
    )
    return data


def _set(library: ctypes.CDLL, tensor: ctypes.c_void_p, data: Tensor) -> None:
    source = ctypes.c_void_p(data.data_ptr())
    library.ggml_backend_tensor_set(tensor, source, ctypes.c_size_t(0), ctypes.c_size_t(data.nbytes))
