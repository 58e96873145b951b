"""The C++ kernels, at every instruction set of this machine, against the readable `spp.ops.torch_kernels`."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spp.errors import SppError
from spp.ops import native, torch_kernels
from spp.ops import packed as readable
from spp.ops.packed import PackedWeight

LEVELS = [level for level in range(4) if native.instructions(level)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NASTY = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 6e-8, 3e38, 65504.0, 1.0, -2.5]

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native kernels were not built")
every_level = pytest.mark.parametrize("level", LEVELS, ids=native.instructions)

shapes = st.tuples(st.integers(1, 9), st.integers(1, 140))
densities = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
seeds = st.integers(0, 10**6)


def draw_weight(shape, density, dtype, seed, *, nasty=False):
    """A sparse matrix with zeros of both signs, and maybe with values that are hard to handle; one row may be empty."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if nasty:
        weight = torch.tensor(NASTY)[torch.randint(len(NASTY), shape, generator=generator)]
    weight = weight * (torch.rand(shape, generator=generator) < density)
    weight[seed % shape[0]] *= seed % 2
    return weight.nan_to_num(1.0).to(dtype) if not nasty else weight.to(dtype)


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


def draw_factors(shape, seed):
    """A and B of some groups with some directions."""
    directions = 1 + seed % min(shape[0], 5)
    groups = 1 + seed % (shape[0] // directions)
    return draw((groups * directions, shape[1]), seed), draw((shape[0], directions), seed + 1)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def canonical(weight):
    return torch.where(weight == 0, torch.zeros_like(weight), weight)


@every_level
@settings(max_examples=60, deadline=None)
@given(shapes, densities, st.sampled_from(DTYPES), seeds, st.booleans())
def test_packing_and_expanding_are_exact(level, shape, density, dtype, seed, nasty):
    weight = draw_weight(shape, density, dtype, seed, nasty=nasty)
    packed = native.pack(weight, level=level)
    plain = readable.pack(weight)
    assert bits(packed.values).equal(bits(plain.values))
    assert packed.bitmask.equal(plain.bitmask) and packed.row_offsets.equal(plain.row_offsets)
    out = torch.full_like(weight, 7.0)
    native.expand(packed, out, level=level)
    assert bits(out).equal(bits(canonical(weight)))
    assert bits(readable.unpack(packed)).equal(bits(canonical(weight)))


@every_level
@settings(max_examples=60, deadline=None)
@given(shapes, densities, st.sampled_from(DTYPES), st.sampled_from(DTYPES), seeds, st.booleans(), st.booleans())
def test_the_effective_weight_has_the_bits_of_torch(level, shape, density, dtype, out_dtype, seed, with_base, packed):
    weight = draw_weight(shape, density, dtype, seed)
    A, B = draw_factors(shape, seed)
    B *= 3
    held = native.pack(weight, level=level) if packed else weight
    ours, theirs = (torch.full(shape, 7.0, dtype=out_dtype) for _ in range(2))
    native.effective_weight(held, A, B, ours, with_base=with_base, level=level)
    torch_kernels.effective_weight(weight, A, B, theirs, with_base=with_base)
    assert bits(ours).equal(bits(theirs))


@every_level
@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(DTYPES), seeds, st.booleans())
def test_special_values_give_nan_and_infinity_where_torch_does(level, shape, dtype, out_dtype, seed, packed):
    """Zeros are +0.0 whatever the factors hold; NaN and infinity where the readable version has them."""
    weight = draw_weight(shape, 0.7, dtype, seed, nasty=True)
    generator = torch.Generator().manual_seed(seed)
    A, B = (
        torch.tensor(NASTY)[torch.randint(len(NASTY), s.shape, generator=generator)] for s in draw_factors(shape, seed)
    )
    held = native.pack(weight, level=level) if packed else weight
    ours, theirs = (torch.full(shape, 7.0, dtype=out_dtype) for _ in range(2))
    native.effective_weight(held, A, B, ours, with_base=True, level=level)
    torch_kernels.effective_weight(weight, A, B, theirs, with_base=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert not bits(ours)[weight == 0].any()


@every_level
@settings(max_examples=60, deadline=None)
@given(shapes, densities, st.sampled_from(DTYPES), st.sampled_from(DTYPES), seeds, st.booleans())
def test_factor_gradients_are_near_float64(level, shape, density, dtype, gradient_dtype, seed, packed):
    weight = draw_weight(shape, density, dtype, seed)
    first = seed % shape[0]
    G = draw((shape[0] - first, shape[1]), seed).to(gradient_dtype)
    G[:, 0] = math.inf
    weight[:, 0] = 0.0  # so that no infinity comes through
    A, B = draw_factors(shape, seed + 2)
    held = native.pack(weight, level=level) if packed else weight
    start_A, start_B = draw(A.shape, seed + 4), draw(B.shape, seed + 5)
    dA, dB = start_A.clone(), start_B.clone()
    native.add_factor_gradients(G, first, held, A, B, dA, dB, level=level)
    exact_A, exact_B = start_A.double(), start_B.double()
    torch_kernels.add_factor_gradients(G, first, weight, A.double(), B.double(), exact_A, exact_B)
    torch.testing.assert_close(dA.double(), exact_A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dB.double(), exact_B, rtol=1e-5, atol=1e-5)
    assert dB[:first].equal(start_B[:first])


@every_level
@pytest.mark.parametrize("packed", [True, False])
@settings(max_examples=60, deadline=None)
@given(shapes, densities, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.floats(0, 1), seeds)
def test_products_of_few_tokens_are_near_float64(level, packed, shape, density, dtype, x_dtype, share, seed):
    weight = draw_weight(shape, density, dtype, seed)
    held = native.pack(weight) if packed else weight
    tokens = 1 + round(share * (native.most_tokens(held, x_dtype, level=level) - 1))
    x, bias = draw((tokens, shape[1]), seed).to(x_dtype), draw((shape[0],), seed + 1)
    y = native.matvec(x, held, bias, level=level)
    exact = x.double() @ weight.double().T + bias.double()
    scale = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    step = torch.finfo(x_dtype).eps + 2 * torch.finfo(torch.float32).eps * math.sqrt(shape[1])
    assert y.dtype == x_dtype
    assert ((y.double() - exact).abs() <= step * scale + 1e-7).all()


@every_level
@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from([1, 2, 4]), seeds)
def test_products_of_special_values_are_not_finite_where_the_dense_ones_are_not(level, shape, dtype, tokens, seed):
    """No finite number where the dense product has NaN or infinity, and the other way round."""
    weight = draw_weight(shape, 0.7, dtype, seed, nasty=True)
    x = torch.tensor(NASTY)[
        torch.randint(len(NASTY), (tokens, shape[1]), generator=torch.Generator().manual_seed(seed))
    ]
    x = x.to(dtype)
    y = native.matvec(x, native.pack(weight), None, level=level)
    exact = x.double() @ weight.double().T
    assert y.isnan()[exact.isnan()].all()
    # Infinity may be NaN: a denormal may count as zero, and zero times infinity is NaN.
    assert not y[exact.isinf()].isfinite().any()
    scale = x.double().abs() @ weight.double().abs().T
    tame = exact.isfinite() & (scale < torch.finfo(dtype).max / 4)
    error = (y.double() - exact).abs()[tame]
    # A denormal weight may count as zero: it is worth at most 2^-126 times the largest x.
    assert (error <= 2 * torch.finfo(dtype).eps * scale[tame] + 2.0**-126 * 3.4e38 * shape[1]).all()


@every_level
def test_sums_do_not_depend_on_the_number_of_threads(level):
    weight = draw_weight((333, 250), 0.5, torch.bfloat16, 1)
    packed = native.pack(weight)
    G, A, B = draw((333, 250), 0), draw((7, 250), 1), draw((333, 1), 2)
    x = draw((3, 250), 3).bfloat16()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            dA, dB = torch.zeros(7, 250), torch.zeros(333, 1)
            native.add_factor_gradients(G, 0, packed, A, B, dA, dB, level=level)
            results.append((dA, dB, native.matvec(x, packed, None, level=level)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def at_the_edge(tensor):
    """The same tensor in memory whose next page may not be touched: reading one entry too many kills the process."""
    page = mmap.PAGESIZE
    size = tensor.nbytes
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + room), page, 0) == 0
    buffer = torch.frombuffer(memory, dtype=torch.uint8, count=room)
    placed = buffer[room - size :].view(tensor.dtype).view(tensor.shape)
    return placed.copy_(tensor)


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 31, 33, 64, 95])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_nothing_is_read_beyond_the_end(level, dtype, columns, density):
    weight = draw_weight((3, columns), density, dtype, 1)
    packed = native.pack(weight)
    edged = PackedWeight(
        at_the_edge(packed.values) if len(packed.values) else packed.values,
        at_the_edge(packed.bitmask),
        at_the_edge(packed.row_offsets),
        columns,
    )
    A, B = at_the_edge(draw((2, columns), 0)), at_the_edge(draw((3, 1), 0))
    for held in (edged, at_the_edge(weight)):
        out = at_the_edge(torch.zeros(3, columns, dtype=dtype))
        native.effective_weight(held, A, B, out, with_base=True, level=level)
        native.add_factor_gradients(
            at_the_edge(draw((3, columns), 1).to(dtype)), 0, held, A, B, at_the_edge(A), at_the_edge(B), level=level
        )
        for tokens in (1, 3, native.most_tokens(held, dtype, level=level)):
            native.matvec(at_the_edge(draw((tokens, columns), 2).to(dtype)), held, None, level=level)
        native.pack(at_the_edge(weight), level=level)
    out = at_the_edge(torch.zeros(3, columns, dtype=dtype))
    native.expand(edged, out, level=level)
    assert out.equal(canonical(weight))


DAMAGE = {
    "a bit too many": lambda p: {"bitmask": p.bitmask.index_fill(0, torch.tensor([1]), -1)},
    "a bit too few": lambda p: {"bitmask": p.bitmask.index_fill(0, torch.tensor([2]), 0)},
    "values cut off": lambda p: {"values": p.values[:-5].clone()},
    "offsets beyond the values": lambda p: {"row_offsets": p.row_offsets + 1000},
    "negative offsets": lambda p: {"row_offsets": p.row_offsets - 1000},
    "offsets that fall": lambda p: {"row_offsets": p.row_offsets.flip(0)},
}


@every_level
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_weight_is_refused_by_every_kernel(level, what):
    packed = native.pack(draw_weight((4, 70), 0.5, torch.float32, 1))
    damaged = dataclasses.replace(packed, **DAMAGE[what](packed))
    A, B = draw((2, 70), 0), draw((4, 1), 0)
    calls = (
        lambda: native.expand(damaged, torch.empty(4, 70), level=level),
        lambda: native.effective_weight(damaged, A, B, torch.empty(4, 70), with_base=True, level=level),
        lambda: native.add_factor_gradients(draw((4, 70), 1), 0, damaged, A, B, A.clone(), B.clone(), level=level),
        lambda: native.matvec(draw((1, 70), 1), damaged, None, level=level),
        lambda: native.matvec(draw((3, 70), 1), damaged, None, level=level),
    )
    for call in calls:
        with pytest.raises(SppError, match="damaged"):
            call()


@every_level
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_bf16_weight_is_refused_for_any_number_of_tokens(level, what):
    packed = native.pack(draw_weight((4, 70), 0.5, torch.bfloat16, 1))
    damaged = dataclasses.replace(packed, **DAMAGE[what](packed))
    for tokens in (1, 4, native.most_tokens(packed, torch.bfloat16, level=level)):
        with pytest.raises(SppError, match="damaged"):
            native.matvec(draw((tokens, 70), 1).bfloat16(), damaged, None, level=level)


@every_level
def test_a_token_does_not_depend_on_its_neighbours(level):
    """Rows of more than one segment, and rows and tokens that fill no group; one token alone takes another path."""
    packed = native.pack(draw_weight((9, 9000), 0.4, torch.bfloat16, 1))
    x = draw((native.most_tokens(packed, torch.bfloat16, level=level), 9000), 2).bfloat16()
    y = native.matvec(x, packed, None, level=level)
    for count in {2, 3, len(x) - 1} - {1}:
        assert native.matvec(x[:count].contiguous(), packed, None, level=level).equal(y[:count])
    exact = x.double() @ readable.unpack(packed).double().T
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.5)


def test_wrong_lengths_and_shapes_are_named():
    packed = native.pack(draw_weight((4, 70), 0.5, torch.float32, 1))
    out = torch.empty(4, 70)
    with pytest.raises(SppError, match="wrong length"):
        native.expand(dataclasses.replace(packed, bitmask=packed.bitmask[:, :2].contiguous()), out)
    with pytest.raises(SppError, match="wrong length"):
        native.expand(dataclasses.replace(packed, row_offsets=packed.row_offsets[:-1]), out)
    with pytest.raises(ValueError, match="out does not fit"):
        native.expand(packed, torch.empty(70, 4).T)
    with pytest.raises(ValueError, match="x does not fit"):
        native.matvec(torch.empty(5, 70), packed, None)  # fp32: at most 4 tokens
    for A, B in ((draw((2, 69), 0), draw((4, 1), 0)), (draw((2, 70), 0), draw((3, 1), 0)), (out[:0], draw((4, 1), 0))):
        with pytest.raises(ValueError, match=r"[AB] does not fit"):
            native.effective_weight(packed, A, B, out, with_base=True)
    with pytest.raises(ValueError, match="no instruction set of level 9"):
        native.expand(packed, out, level=9)
    with pytest.raises(ValueError, match="G does not fit"):
        native.add_factor_gradients(
            torch.empty(4, 70), 1, packed, draw((2, 70), 0), draw((4, 1), 0), out[:2], out[:, :1]
        )
    with pytest.raises(ValueError, match="a matrix can be packed"):
        native.pack(torch.empty(3))
    with pytest.raises(ValueError, match=r"torch\.float64"):
        native.pack(torch.ones(3, 3, dtype=torch.float64))
