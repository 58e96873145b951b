"""The Triton kernels against the plain ones: in Triton's interpreter, on a GPU (-m gpu), and compiled without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spp.errors import SppError
from spp.ops import spp_linear, torch_kernels
from spp.ops import triton_kernels as ours
from spp.ops.packed import PackedWeight, pack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
FOLDER = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# (O, I, R): R divides O; it does not; one group; a group per row; all ones; whole words, two pieces; blocks of columns.
# (O, I, R), and K where it is not 1.
SIZES = [(8, 12, 4), (7, 5, 3), (5, 33, 1), (6, 4, 6), (1, 1, 1), (20, 64, 2), (7, 1100, 2)]
SIZES += [(8, 12, 4, 2), (7, 70, 2, 3), (5, 33, 1, 5), (20, 64, 2, 4), (9, 1100, 2, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def example(out_features, in_features, groups, directions=1, dtype=torch.float32, density=0.5, seed=0):
    """Sparse W with zeros of both signs, A, B."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight = weight * (torch.rand(out_features, in_features, generator=generator) < density)
    A = torch.randn(groups * directions, in_features, generator=generator)
    B = torch.randn(out_features, directions, generator=generator)
    return weight.to(DEVICE, dtype), A.to(DEVICE), B.to(DEVICE)


def forms(weight):
    """The same weight as the kernels may get it."""
    return weight, weight.T.contiguous().T, pack(weight)


def assert_same(found, expected):
    """The same bits, and NaN in the same places. The interpreter truncates to bf16 instead of rounding."""
    assert found.dtype == expected.dtype
    if INTERPRETED and found.dtype == torch.bfloat16:
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        return
    assert found.isnan().equal(expected.isnan())
    found, expected = (tensor.nan_to_num(7.0, torch.inf, -torch.inf) for tensor in (found, expected))
    assert found.view(INTEGERS[found.dtype]).equal(expected.view(INTEGERS[found.dtype]))


def assert_effective(weight, A, B, out_dtype):
    for with_base in (True, False):
        found, expected = (torch.full(tuple(weight.shape), 9.0, dtype=out_dtype, device=DEVICE) for _ in range(2))
        ours.effective_weight(weight, A, B, found, with_base=with_base)
        torch_kernels.effective_weight(weight, A, B, expected, with_base=with_base)
        assert_same(found, expected)


def reduced(module, G, weight, A, B, rows):
    """dA and dB, reduced over blocks of rows, on top of what dA held."""
    dA, dB = torch.ones_like(A), torch.full_like(B, torch.nan)
    for first in range(0, len(B), rows):
        block = G[first : first + rows].clone()  # the plain kernel computes in it
        module.add_factor_gradients(block, first, weight, A, B, dA, dB)
    return dA, dB


NOT_PACKED = {"bitmask": None, "row_offsets": None}


def compiled(kernel, capability, pointers, constants):
    """The kernel for a GPU that need not be there, with other pointers' types than the usual and with constants."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("A", "B", "dA", "dB"), "*fp32") | dict.fromkeys(("G", "out", "values"), "*bf16")
    types |= {"bitmask": "*i32", "row_offsets": "*i64"} | pointers
    blocks = {"ROWS": 8, "WORDS": 32, "ROW_WORDS": 128, "WITH_BASE": True}
    # A pointer is a constant only where it is None.
    constants = {name: value for name, value in constants.items() if value is None or name not in types} | blocks
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def damaged():
    """A packed weight (8, 70) whose bits and offsets would have everything beside its three values read: NaN."""
    values = torch.full((1000,), torch.nan, device=DEVICE)[500:503].fill_(1.0)
    bitmask = torch.full((8, 3), -1, dtype=torch.int32, device=DEVICE)
    offsets = torch.tensor([0, 1, 3, 4, -1, -(2**62), 2**33, 2**33 + 3, 2**62], device=DEVICE)
    return PackedWeight(values, bitmask, offsets, in_features=70)


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="it starts the interpreter itself")
def test_the_kernels_pass_in_the_interpreter():
    tests = f"{__file__}::TestKernels"
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", tests]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@needs_triton
@(lambda tests: tests if INTERPRETED else pytest.mark.gpu(needs_gpu(tests)))
class TestKernels:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_effective_weight_has_the_bits_of_torch(self, size, dtype):
        weight, A, B = example(*size, dtype=dtype)
        for form in forms(weight):
            for out_dtype in {dtype, torch.float32}:
                assert_effective(form, A, B, out_dtype)

    @pytest.mark.parametrize("density", [0.0, 1.0])
    def test_all_zero_and_all_dense_weights_give_the_same(self, density):
        weight, A, B = example(6, 70, 4, density=density)
        for form in forms(weight):
            assert_effective(form, A, B, torch.float32)
            found = reduced(ours, torch.ones_like(weight), form, A, B, 6)
            torch.testing.assert_close(found, reduced(torch_kernels, torch.ones_like(weight), form, A, B, 6))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_special_values_give_the_same(self, dtype):
        if INTERPRETED and dtype == torch.bfloat16:
            pytest.skip("the interpreter widens bf16 denormals wrongly and truncates to bf16")
        weight, A, B = example(9, 70, 3, dtype=dtype)
        info = torch.finfo(dtype)
        odd = [torch.nan, torch.inf, -torch.inf, -0.0, 0.0, info.max, -info.max, info.tiny, info.smallest_normal / 4]
        weight[0, :9] = weight[3, 31:40] = torch.tensor(odd)
        weight[5] = 0.0
        A[0, 5:9], A[1, 33:36], B[4], B[8] = -1.0, torch.inf, torch.nan, 0.0
        packed = pack(weight)
        values = packed.values.clone()
        values[20:22], values[22:24] = -0.0, 0.0
        for form in (*forms(weight), replace(packed, values=values)):
            for out_dtype in (torch.float32, dtype):
                assert_effective(form, A, B, out_dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_expand_gives_the_very_bits(self, dtype):
        patterns = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16)
        if dtype == torch.float32:
            patterns = patterns.int() * 65537 + 12345
        packed = pack(patterns.view(dtype).reshape(64, 1024)[:, :1000])
        out, expected = (torch.empty(64, 1000, dtype=dtype, device=DEVICE) for _ in range(2))
        ours.expand(packed, out)
        torch_kernels.expand(packed, expected)
        assert out.view(INTEGERS[dtype]).equal(expected.view(INTEGERS[dtype]))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_expand_rounds_to_another_dtype(self, dtype):
        packed = pack(example(7, 45, 1, dtype=dtype)[0])
        for out_dtype in DTYPES:
            out, expected = (torch.empty(7, 45, dtype=out_dtype, device=DEVICE) for _ in range(2))
            ours.expand(packed, out)
            torch_kernels.expand(packed, expected)
            assert_same(out, expected)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_compressing_rows_has_the_bits_of_torch(self, size, dtype):
        packed = pack(example(*size)[0])
        G = example(*size, dtype=dtype, density=1.0, seed=1)[0]
        for rows in (5, len(G)):
            found, expected = (replace(packed, values=torch.full_like(packed.values, torch.nan)) for _ in range(2))
            for first in range(0, len(G), rows):
                ours.compress(G[first : first + rows], first, found)
                torch_kernels.compress(G[first : first + rows], first, expected)
            assert_same(found.values, expected.values)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_factor_gradients_are_near_those_of_torch(self, size, dtype):
        weight, A, B = example(*size, dtype=dtype)
        G = example(*size, dtype=dtype, density=1.0, seed=1)[0]
        G[weight == 0] = torch.nan  # where W is zero, G does not matter
        for form in forms(weight):
            for rows in (5, len(B)):
                found, expected = reduced(ours, G, form, A, B, rows), reduced(torch_kernels, G, form, A, B, rows)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_the_same_arguments_give_the_same_bits(self):
        weight, A, B = example(20, 600, 2)
        once, again = (reduced(ours, weight, pack(weight), A, B, 20) for _ in range(2))
        assert once[0].equal(again[0]) and once[1].equal(again[1])

    def test_no_rows_change_nothing(self):
        weight, A, B = example(6, 4, 2)
        dA, dB = torch.ones_like(A), torch.ones_like(B)
        ours.add_factor_gradients(weight[:0], 3, weight, A, B, dA, dB)
        assert dA.eq(1).all() and dB.eq(1).all()

    def test_nothing_is_read_outside_the_values_of_a_damaged_weight(self):
        weight = damaged()
        A, B = torch.ones(2, 70, device=DEVICE), torch.ones(8, 1, device=DEVICE)
        out = torch.full((8, 70), torch.nan, device=DEVICE)
        ours.expand(weight, out)
        assert out.isfinite().all() and out[0].sum() == 3 and out[1].sum() == 2 and not out[2:].any()
        ours.effective_weight(weight, A, B, out.fill_(torch.nan), with_base=True)
        assert out.isfinite().all()
        dA, dB = reduced(ours, out, weight, A, B, 8)
        assert dA.isfinite().all() and dB.isfinite().all()
        ours.compress(torch.zeros(8, 70, device=DEVICE), 0, weight)
        around = weight.values.as_strided((1000,), (1,), 0)
        assert not weight.values.any() and int(around.isnan().sum()) == 997

    def test_tensors_that_do_not_fit_are_refused(self):
        weight, A, B = example(6, 40, 2)
        assert ours.why_not(weight, pack(weight)) is None
        assert "float64" in (ours.why_not(weight.double()) or "")
        assert "meta" in (ours.why_not(weight, weight.to("meta")) or "")
        with pytest.raises(ValueError, match="float64"):
            ours.effective_weight(weight, A, B, weight.double(), with_base=True)
        with pytest.raises(ValueError, match="out does not fit"):
            ours.effective_weight(weight, A, B, weight[1:].clone(), with_base=True)
        with pytest.raises(ValueError, match="G does not fit"):
            ours.add_factor_gradients(weight, 1, weight, A, B, A, B)
        packed = pack(weight)
        for wrong in (
            replace(packed, bitmask=packed.bitmask[:, :1]),
            replace(packed, bitmask=packed.bitmask.long()),
            replace(packed, row_offsets=packed.row_offsets[1:]),
            replace(packed, values=packed.values.repeat_interleave(2)[::2]),
        ):
            with pytest.raises(SppError, match="another length"):
                ours.expand(wrong, weight)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3)])
    @pytest.mark.parametrize("mode", ["fused", "split"])
    def test_the_operator_is_near_float64(self, dtype, tolerance, mode):
        weight, A, B = example(21, 50, 4, dtype=dtype)
        x = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
        bias = torch.linspace(-1, 1, 21, device=DEVICE, dtype=dtype)

        def gradients(backend, weight, *inputs):
            x, A, B, bias = (tensor.clone().requires_grad_() for tensor in inputs)
            y = spp_linear(x, weight, A, B, 1.5, bias, backend, mode=mode)
            return [y, *torch.autograd.grad(y, (x, A, B, bias), torch.linspace(-1, 1, 21).to(y).expand_as(y))]

        exact = gradients("reference", weight.double(), *(tensor.double() for tensor in (x, A, B, bias)))
        for form in (weight, pack(weight)):
            for found, expected in zip(gradients("triton", form, x, A, B, bias), exact, strict=True):
                assert (found.double() - expected).norm() / expected.norm() < tolerance


@needs_triton
@needs_gpu
@pytest.mark.gpu
class TestLarge:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("size", [(11008, 4096, 16), (4096, 14336, 16), (1003, 4099, 16), (11008, 4096, 14, 4)])
    def test_layers_of_real_size_are_near_float64(self, size, dtype):
        weight, A, B = example(*size, dtype=dtype)
        G = example(*size, dtype=dtype, density=1.0, seed=1)[0]
        exact = reduced(torch_kernels, G.double(), weight.double(), A.double(), B.double(), 1024)
        for form in forms(weight):
            assert_effective(form, A, B, dtype)
            for found, expected in zip(reduced(ours, G, form, A, B, 1024), exact, strict=True):
                assert (found - expected).norm() / expected.norm() < 1e-5

    def test_more_values_than_int32_counts_are_addressed(self):
        weight, A, B = example(9, 70, 3, dtype=torch.float16)
        packed = pack(weight)
        skipped = 2**31 + 5
        values = torch.zeros(skipped + len(packed.values), dtype=torch.float16, device=DEVICE)
        values[skipped:] = packed.values
        far = replace(packed, values=values, row_offsets=packed.row_offsets + skipped)
        for with_base in (True, False):
            found, expected = torch.empty_like(weight), torch.empty_like(weight)
            ours.effective_weight(far, A, B, found, with_base=with_base)
            torch_kernels.effective_weight(packed, A, B, expected, with_base=with_base)
            assert found.equal(expected)

    def test_more_entries_than_int32_counts_are_addressed(self):
        row, A, _ = example(1, 65536, 1, dtype=torch.float16)
        weight = row.expand(2**15 + 1, -1)
        B = torch.linspace(-1, 1, len(weight), device=DEVICE)[:, None]
        out = torch.empty(weight.shape, dtype=torch.float16, device=DEVICE)
        ours.effective_weight(weight, A, B, out, with_base=True)
        expected = torch.empty_like(row)
        torch_kernels.effective_weight(row, A, B[-1:], expected, with_base=True)
        assert out[-1:].equal(expected)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("ones", [False, True], ids=["usual", "ones"])
def test_the_kernels_compile_without_a_gpu(tmp_path, monkeypatch, capability, packed, ones, directions):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (ours._form, ours._reduce, *([ours._gather] if packed else [])):
        # Triton makes a constant of an argument that is 1.
        constants = dict.fromkeys(kernel.arg_names, 1) if ones else {}
        constants |= {"DIRECTIONS": directions, "PADDED": directions} | ({} if packed else NOT_PACKED)
        made = compiled(kernel, capability, {}, constants)
        assert made.asm["cubin"]
        assert ones or ("popc.b32" in made.asm["ptx"]) == packed
        # A fused product and sum, or denormals flushed to zero, would not be the reference's bits.
        assert "fma." not in made.asm["ptx"] and ".ftz" not in made.asm["ptx"]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_expanding_converts_nothing_where_the_dtypes_are_the_same(tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compiled(ours._form, 90, {"values": f"*{dtype}", "out": f"*{dtype}"}, {"A": None, "B": None}).asm["ptx"]
    assert "cvt.rn" not in ptx and "f32" not in ptx


def test_without_triton_it_can_be_imported_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("spp_ops_triton_alone", ours.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.why_not(torch.zeros(1)) == "triton is not installed"


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of the CPU")
def test_it_refuses_tensors_of_the_cpu():
    weight = torch.ones(2, 3)
    assert ours.why_not(weight) == "it runs on a GPU, and a tensor is on cpu"
    with pytest.raises(ValueError, match="on cpu"):
        ours.expand(pack(weight), weight)
