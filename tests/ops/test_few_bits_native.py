"""The C++ kernels for few-bit survivors, at every instruction set of this machine, against the readable formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from few_bit_cases import PATTERNS, draw_few_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import LEVELS, NASTY, at_the_edge, bits

from spp.errors import SppError
from spp.ops import native
from spp.ops.few_bit_matmul import MOST_ROUNDED, few_bit_matmul, round_tokens, rounded_product, rounding_bound
from spp.ops.few_bits import BITS, GROUPS
from spp.ops.native import few_bits as kernels

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPSILON = torch.finfo(torch.float32).eps

needs_kernels = pytest.mark.skipif(not LEVELS, reason="the native kernels were not built")
every_level = pytest.mark.parametrize("level", LEVELS, ids=native.instructions)

shapes = st.tuples(st.integers(1, 7), st.one_of(st.integers(1, 300), st.sampled_from([64, 128, 192, 4096, 4100, 8256])))
weights = {"shape": shapes, "width": st.sampled_from(BITS), "group": st.sampled_from(GROUPS)}
weights |= {"pattern": st.sampled_from(PATTERNS), "seed": st.integers(0, 10**6)}


def draw(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


@every_level
@settings(max_examples=60, deadline=None)
@given(**weights, dtype=st.sampled_from(DTYPES))
def test_expanding_has_the_bits_of_the_reference(level, shape, width, group, pattern, seed, dtype):
    weight, dense = draw_few_bits(shape, width, group, pattern, seed)
    out = torch.full(shape, 7.0, dtype=dtype)
    kernels.expand(weight, out, level=level)
    assert bits(out).equal(bits(dense.to(dtype)))
    first = seed % shape[0]
    rows = torch.full((shape[0] - first, shape[1]), 7.0, dtype=dtype)
    kernels.expand(weight, rows, first, level=level)
    assert bits(rows).equal(bits(out[first:]))


@every_level
@settings(max_examples=80, deadline=None)
@given(
    **weights,
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, MOST_ROUNDED),
    size=st.sampled_from([1e-30, 1, 100]),
)
def test_products_are_those_of_rounded_tokens(level, shape, width, group, pattern, seed, dtype, tokens, size):
    weight, dense = draw_few_bits(shape, width, group, pattern, seed)
    x, bias = (draw((tokens, shape[1]), seed) * size).to(dtype), draw((shape[0],), seed + 1)
    y = kernels.matvec(x, weight, bias, level=level)
    rounded = rounded_product(x.double(), weight, bias)  # in fp64, so that the result is not rounded again
    scale = x.double().abs() @ dense.abs().T + bias.double().abs()
    sums = (2 * math.sqrt(shape[1]) + 4) * EPSILON + torch.finfo(dtype).eps
    assert y.dtype == dtype and ((y.double() - rounded).abs() <= sums * scale + 1e-30).all()
    exact = x.double() @ dense.T + bias.double()
    assert ((y.double() - exact).abs() <= rounding_bound(x, weight) + sums * scale + 1e-30).all()


@every_level
@settings(max_examples=40, deadline=None)
@given(**weights, tokens=st.integers(1, MOST_ROUNDED))
def test_tokens_that_are_not_finite_give_nan_and_leave_others_alone(level, shape, width, group, pattern, seed, tokens):
    weight, _ = draw_few_bits(shape, width, group, pattern, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.tensor(NASTY)[torch.randint(len(NASTY), (tokens, shape[1]), generator=generator)]
    x[0] = draw((shape[1],), seed)
    y = kernels.matvec(x, weight, None, level=level)
    finite = x.isfinite().all(dim=1)
    assert y[~finite].isnan().all()
    assert not y[finite].isnan().any()
    assert y[0].equal(kernels.matvec(x[:1].contiguous(), weight, None, level=level)[0])


def test_tokens_are_rounded_to_127_steps_of_each_group():
    x = torch.zeros(1, 130)
    x[0, :4] = torch.tensor([2.54, -2.54, 0.031, -1.0])
    x[0, 129] = 1e-45
    q, s = round_tokens(x, 128)
    assert q.shape == (1, 256) and q[0, :4].tolist() == [127, -127, 2, -50] and not q[0, 4:].any()
    assert s[0, 0] == torch.tensor(2.54) / 127 and s[0, 1] == 0
    assert round_tokens(torch.tensor([[1.0, math.inf]]), 64)[1].isnan().all()


@every_level
def test_results_do_not_depend_on_the_number_of_threads(level):
    weight, _ = draw_few_bits((101, 4500), 4, 128)
    x = draw((3, 4500))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = torch.empty(weight.shape)
            kernels.expand(weight, out, level=level)
            results.append((out, kernels.matvec(x, weight, None, level=level)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@every_level
@pytest.mark.parametrize("width", BITS)
@pytest.mark.parametrize("columns", [1, 31, 33, 64, 95, 128, 192])
@pytest.mark.parametrize("pattern", ["none", "half", "all"])
def test_nothing_is_read_or_written_beyond_the_end(level, width, columns, pattern):
    for group in GROUPS:
        weight, dense = draw_few_bits((3, columns), width, group, pattern)
        edged = {name: at_the_edge(t) if t.numel() else t for name, t in weight.tensors().items()}
        edged = dataclasses.replace(weight, **edged)
        out = at_the_edge(torch.zeros(3, columns))
        kernels.expand(edged, out, level=level)
        assert out.equal(dense.float())
        for tokens in (1, MOST_ROUNDED):
            x, bias = at_the_edge(draw((tokens, columns))), at_the_edge(draw((3,)))
            kernels.matvec(x, edged, bias, level=level)


DAMAGE = {
    "bits too many": lambda w: {"bitmask": w.bitmask.index_fill(0, torch.tensor([1]), -1)},
    "bits too many in the last row": lambda w: {"bitmask": w.bitmask.index_fill(0, torch.tensor([3]), -1)},
    "bits too few": lambda w: {"bitmask": w.bitmask.index_fill(0, torch.tensor([2]), 0)},
    "codes cut off": lambda w: {"codes": at_the_edge(w.codes[:-40])},
    "no padding": lambda w: {"codes": w.codes[:10].clone()},
    "offsets beyond the codes": lambda w: {"row_offsets": w.row_offsets + 10**6},
    "offsets near the largest number": lambda w: {"row_offsets": w.row_offsets + 2**62},
    "negative offsets": lambda w: {"row_offsets": w.row_offsets - 1000},
    "offsets that fall": lambda w: {"row_offsets": w.row_offsets.flip(0)},
}


@every_level
@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("width", [8, 4, 3])
@pytest.mark.parametrize(("columns", "pattern"), [(70, "half"), (8256, "half"), (256, "2:4"), (4288, "2:4")])
def test_a_damaged_weight_is_refused(level, what, width, columns, pattern):
    weight, _ = draw_few_bits((4, columns), width, 128, pattern)
    damaged = dataclasses.replace(weight, **DAMAGE[what](weight))
    for call in (
        lambda: kernels.expand(damaged, torch.empty(4, columns), level=level),
        lambda: kernels.matvec(draw((1, columns)), damaged, None, level=level),
        lambda: kernels.matvec(draw((4, columns)), damaged, None, level=level),
    ):
        with pytest.raises(SppError, match=r"damaged|not a sound few-bit weight"):
            call()


@every_level
@settings(max_examples=100, deadline=None)
@given(width=st.sampled_from(BITS), columns=st.sampled_from([60, 128, 4224, 4300]), data=st.data())
def test_any_damage_is_refused_or_harmless(level, width, columns, data):
    """Random bits anywhere: an error, or some result; never a read or a write elsewhere, which the edges would show."""
    weight, _ = draw_few_bits((3, columns), width, 128, data.draw(st.sampled_from(PATTERNS)))
    tensors = {name: t.clone() for name, t in weight.tensors().items() if t.numel()}
    for _ in range(data.draw(st.integers(1, 4))):
        raw = tensors[data.draw(st.sampled_from(sorted(tensors)))].view(-1).view(torch.uint8)
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = dataclasses.replace(weight, **{name: at_the_edge(t) for name, t in tensors.items()})
    for call in (
        lambda: kernels.expand(damaged, at_the_edge(torch.zeros(3, columns)), level=level),
        lambda: kernels.matvec(at_the_edge(draw((2, columns))), damaged, None, level=level),
    ):
        try:
            call()
        except SppError as error:
            assert "damaged" in str(error)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(130,), (4, 130), (2, 3, 130), (0, 130), (1, 1, 130)])
@pytest.mark.parametrize("exact", [False, True])
def test_the_product_is_near_the_exact_one(dtype, shape, exact):
    weight, dense = draw_few_bits((9, 130), 4, 128)
    x, bias = draw(shape).to(dtype), draw((9,))
    wanted = x.double() @ dense.T + bias.double()
    scale = x.double().abs() @ dense.abs().T + bias.double().abs()
    rounds = not exact and 0 < x.numel() // 130 <= MOST_ROUNDED
    bound = rounding_bound(x.reshape(-1, 130), weight).view(wanted.shape) if rounds else 0.0
    for backend in ("auto", "reference"):
        y = few_bit_matmul(x, weight, bias, exact=exact, backend=backend)
        assert y.dtype == dtype and y.shape == wanted.shape
        # The dense W is rounded to x's dtype, too.
        assert ((y.double() - wanted).abs() <= bound + 4 * max(torch.finfo(dtype).eps, EPSILON) * scale).all()


def test_rounding_is_used_for_few_tokens_alone():
    weight, dense = draw_few_bits((64, 512), 8, 128)
    x = draw((5, 512))
    exact = x @ dense.float().T
    for tokens, rounds in ((4, True), (5, False)):
        error = (few_bit_matmul(x[:tokens], weight, backend="reference") - exact[:tokens]).abs().max()
        assert (error > 1e-3) == rounds


def test_gradients_go_through_the_dense_weight():
    weight, dense = draw_few_bits((9, 130), 4, 128)
    x, bias = draw((2, 130)).requires_grad_(), draw((9,)).requires_grad_()
    few_bit_matmul(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, dense.float().sum(dim=0).expand(2, -1))
    assert bias.grad is not None and bias.grad.tolist() == [2.0] * 9


def test_more_rows_than_are_expanded_at_once():
    weight, dense = draw_few_bits((300, 4096), 2, 128)
    x, bias = draw((6, 4096)), draw((300,))
    torch.testing.assert_close(few_bit_matmul(x, weight, bias), x @ dense.float().T + bias, rtol=1e-4, atol=1e-3)


def test_what_does_not_fit_is_named():
    weight, _ = draw_few_bits((4, 70), 4, 64)
    for x in (torch.ones(3, 71), torch.ones(3, 70, dtype=torch.int32), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"expected x \(\.\.\., 70\) of floats"):
            few_bit_matmul(x, weight)
    with pytest.raises(ValueError, match=r"expected a bias \(4,\) of floats; found \(5,\)"):
        few_bit_matmul(torch.ones(3, 70), weight, torch.ones(5))
    with pytest.raises(ValueError, match="native cannot be used: .*float64"):
        few_bit_matmul(torch.ones(3, 70).double(), weight, backend="native")
    with pytest.raises(ValueError, match="back-end 'triton' is unknown"):
        few_bit_matmul(torch.ones(3, 70), weight, backend="triton")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SppError, match="not a sound few-bit weight: .*codebook is"):
        few_bit_matmul(torch.ones(3, 70), dataclasses.replace(weight, bits=3))
    with pytest.raises(ValueError, match="expected all tensors on one device; found x on meta"):
        few_bit_matmul(torch.ones(3, 70, device="meta"), weight)


@needs_kernels
def test_kernels_name_what_does_not_fit():
    weight, _ = draw_few_bits((4, 70), 4, 64)
    with pytest.raises(ValueError, match="x does not fit"):
        kernels.matvec(torch.ones(5, 70), weight, None)
    with pytest.raises(ValueError, match="bias does not fit"):
        kernels.matvec(torch.ones(2, 70), weight, torch.ones(3))
    with pytest.raises(ValueError, match="out does not fit"):
        kernels.expand(weight, torch.empty(3, 70), 2)
    with pytest.raises(ValueError, match="no instruction set of level 9"):
        kernels.expand(weight, torch.empty(4, 70), level=9)


def test_without_the_library_the_dense_weight_is_multiplied(monkeypatch):
    monkeypatch.setattr(native, "why_not_loaded", "it was not built")
    weight, dense = draw_few_bits((4, 70), 4, 64)
    x = draw((2, 70))
    torch.testing.assert_close(few_bit_matmul(x, weight), x @ dense.float().T)
    with pytest.raises(ValueError, match="native cannot be used: it was not built"):
        few_bit_matmul(x, weight, backend="native")
