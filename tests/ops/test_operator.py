"""The operator: the formula by hand, every back-end against it, three GEMMs, nothing of the weight's size saved."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from spp.ops import (
    BACKENDS,
    adapter_linear,
    autograd,
    merged_weight,
    native,
    pack,
    reference,
    spp_linear,
    torch_kernels,
    why_not,
)
from spp.patterns import NM
from spp.runtime.tensor_memory import LiveBytes

NATIVE = native.instructions() is not None
RUNS = [name for name in BACKENDS if why_not(name, torch.empty(1, 1)) is None]
FAST = [name for name in RUNS if name != "reference"]
# (O, I, R): R divides O; it does not; one group; a group per row; more rows than one block of the fast path. Then with
# K directions: R K divides O; it does not; one group; more rows than a block; the most directions.
SIZES = [(8, 12, 4), (7, 5, 3), (5, 9, 1), (6, 4, 6), (2100, 8, 16), (131, 3, 130)]
MIXED = [(8, 12, 2, 2), (11, 37, 2, 3), (5, 9, 1, 4), (2100, 70, 5, 4), (131, 3, 8, 16)]
SIZES += MIXED


def example(out_features, in_features, groups, directions=1, *, dtype=torch.float32, tokens=(2, 5), seed=0):
    """x, sparse W with zeros of both signs, A, B, bias; factors in fp32 (fp64 for fp64)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(out_features, in_features) * (torch.rand(out_features, in_features, generator=generator) < 0.5)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        normal(*tokens, in_features).to(dtype),
        weight.to(dtype),
        normal(groups * directions, in_features).to(wide),
        normal(out_features, directions).to(wide),
        normal(out_features).to(dtype),
    )


@pytest.fixture(params=["dense", "packed"])
def held(request):
    """How the operator gets the weight: as it is, or packed."""
    return {"dense": lambda weight: weight, "packed": pack}[request.param]


def gradients(function, x, weight, A, B, bias, scale=1.5):
    """The result and its gradients with respect to x, A, B and bias, under a fixed random cotangent."""
    x, A, B, bias = (tensor.clone().requires_grad_() for tensor in (x, A, B, bias))
    y = function(x, weight, A, B, scale, bias)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, A, B, bias), cotangent)]


def test_the_formula_gives_values_computed_by_hand():
    weight = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 4.0]])
    A = torch.tensor([[0.5, 1.0], [-1.0, 2.0]])
    B = torch.tensor([[1.0], [2.0], [0.25]])
    # O = 3, R = 2: g = floor(i * 2 / 3) = 0, 0, 1; s = 2.
    assert reference.row_groups(3, 2).tolist() == [0, 0, 1]
    delta = torch.tensor([[2 * 1 * 0.5 * 1, 0], [2 * 2 * 0.5 * 2, 2 * 3 * 1 * 2], [0, 2 * 4 * 2 * 0.25]])
    assert reference.delta_weight(weight, A, B, 2.0).equal(delta)
    assert reference.merged_weight(weight, A, B, 2.0).equal(weight + delta)
    x = torch.tensor([[1.0, -1.0]])
    bias = torch.tensor([0.5, 0.0, 0.0])
    by_hand = torch.tensor([[2.0 - 0 + 0.5, 6.0 - 15.0, 0.0 - 8.0]])
    for backend in RUNS:
        for w in (weight, pack(weight)):
            assert spp_linear(x, w, A, B, 2.0, bias, backend).equal(by_hand)
            assert spp_linear(x, w, A, B, 2.0, bias, backend, mode="split").equal(by_hand)
            assert adapter_linear(x, w, A, B, 2.0, backend).equal(x @ delta.T)


def test_the_formula_with_directions_gives_values_computed_by_hand():
    weight = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 4.0], [5.0, 6.0]])
    A = torch.tensor([[0.5, 1.0], [-1.0, 2.0], [1.0, 0.0], [0.25, 3.0]])  # two groups of two rows, two directions each
    B = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0], [-1.0, 2.0]])
    mixed = torch.tensor([[0.5, 1.0], [2 * 0.5 - 1, 2 * 1.0 + 2], [0.25, 3.0], [-1 + 2 * 0.25, 2 * 3.0]])
    x = torch.tensor([[1.0, -1.0]])
    for backend in RUNS:
        for w in (weight, pack(weight)):
            assert spp_linear(x, w, A, B, 2.0, None, backend).equal(x @ (weight + 2 * weight * mixed).T)


@pytest.mark.parametrize("backend", RUNS)
def test_factors_may_have_any_strides(backend):
    x, weight, A, B, bias = example(8, 12, 2, 2)
    strided = [factor.T.contiguous().T for factor in (A, B)]
    expected = gradients(lambda *a: spp_linear(*a, backend), x, weight, A, B, bias)
    for ours, theirs in zip(
        gradients(lambda *a: spp_linear(*a, backend), x, weight, *strided, bias), expected, strict=True
    ):
        assert ours.equal(theirs)


@given(st.integers(1, 5), st.integers(0, 20), st.integers(1, 12), st.integers(0, 10**6))
def test_one_group_is_hira(directions, more, in_features, seed):
    _, weight, A, B, _ = example(directions + more, in_features, 1, directions, dtype=torch.float64, seed=seed)
    torch.testing.assert_close(reference.delta_weight(weight, A, B, 0.5), weight * (0.5 * B @ A), rtol=0, atol=1e-12)


@given(st.integers(1, 300), st.integers(1, 300))
def test_groups_are_those_of_the_paper_where_r_divides_o_and_nearly_equal_elsewhere(rank, more):
    out_features = rank + more
    groups = reference.row_groups(out_features, rank)
    sizes = groups.bincount(minlength=rank)
    assert int(sizes.max()) - int(sizes.min()) <= 1
    assert groups.equal(groups.sort().values)
    even = reference.row_groups(rank * 3, rank)
    assert even.equal(torch.arange(rank).repeat_interleave(3))
    first, last = more // 3, out_features - more // 3
    pieces = list(torch_kernels.pieces(out_features, rank, first, last, 128))
    walked = torch.cat([torch.full((rows.stop - rows.start,), group) for group, rows in pieces])
    assert walked.equal(groups[first:last])


@pytest.mark.parametrize("size", SIZES[:4] + MIXED[:3])
@pytest.mark.parametrize("part", ["fused", "split", "adapter"])
def test_gradients_pass_gradcheck(size, part, held):
    """In fp64, which the native kernels do not have."""
    x, weight, A, B, bias = example(*size, dtype=torch.float64)
    weight = held(weight)
    inputs = [tensor.requires_grad_() for tensor in (x, A, B, bias)]

    def call(x, A, B, bias):
        if part == "adapter":
            return adapter_linear(x, weight, A, B, 0.7, "torch")
        return spp_linear(x, weight, A, B, 0.7, bias, "torch", mode=part)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("mode", ["fused", "split"])
@pytest.mark.parametrize("size", SIZES)
def test_in_float64_it_is_the_reference(size, mode, held):
    x, weight, A, B, bias = example(*size, dtype=torch.float64)
    fast = gradients(lambda *a: spp_linear(*a, "torch", mode=mode), x, held(weight), A, B, bias)
    for ours, theirs in zip(fast, gradients(reference.spp_linear, x, weight, A, B, bias), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["fused", "split"])
@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_every_dtype_is_near_float64(backend, size, dtype, tolerance, mode, held):
    x, weight, A, B, bias = example(*size, dtype=dtype, tokens=(64,))
    exact = gradients(reference.spp_linear, *(tensor.double() for tensor in (x, weight, A, B, bias)))
    close = gradients(lambda *a: spp_linear(*a, backend, mode=mode), x, held(weight), A, B, bias)
    for ours, theirs in zip(close, exact, strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < tolerance


@pytest.mark.parametrize("mode", ["fused", "split"])
@pytest.mark.parametrize("backend", FAST)
def test_a_packed_weight_gives_the_bits_of_the_dense_one(backend, mode):
    x, weight, A, B, bias = example(70, 45, 4, dtype=torch.bfloat16)
    weight = torch.where(weight == 0, 0, weight)
    dense = gradients(lambda *a: spp_linear(*a, backend, mode=mode), x, weight, A, B, bias)
    packed = gradients(lambda *a: spp_linear(*a, backend, mode=mode), x, pack(weight), A, B, bias)
    for ours, theirs in zip(packed, dense, strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("backend", FAST)
def test_a_packed_weight_computes_in_the_dtype_of_x(backend):
    """bf16 values, fp32 x: each weight is exact in fp32, and W' is rounded to fp32, not to bf16."""
    x, weight, A, B, bias = example(70, 45, 4, dtype=torch.bfloat16)
    wide = gradients(lambda *a: spp_linear(*a, backend), x.float(), pack(weight), A, B, bias.float())
    exact = gradients(reference.spp_linear, x.double(), weight.double(), A.double(), B.double(), bias.double())
    for ours, theirs in zip(wide, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-5


def bits(tensor):
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(kind)


NASTY = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 3e38, -3e38, 1.0]


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
def test_nan_and_infinity_appear_only_where_they_must(backend, seed, dtype, packed):
    """The fast paths give NaN and infinity where they must, and no other."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.tensor(NASTY)[torch.randint(len(NASTY), shape, generator=generator)]

    weight, A, B = draw(7, 6).to(dtype), draw(3, 6), draw(7, 1)
    weight[2], weight[3] = 0.0, -0.0
    x, bias = draw(4, 6).to(dtype), draw(7).to(dtype)
    held = pack(weight) if packed else weight
    ours = gradients(lambda *a: spp_linear(*a, backend), x, held, A, B, bias)
    theirs = gradients(reference.spp_linear, x, weight, A, B, bias)
    for fast, plain in zip(ours[:2], theirs[:2], strict=True):  # y and dX are the same GEMMs of the same bits
        torch.testing.assert_close(fast, plain, equal_nan=True)
    for fast, plain in zip(ours[2:], theirs[2:], strict=True):
        # A BLAS may skip a product with zero that the reference makes NaN, but must not invent a NaN.
        assert fast[plain.isfinite()].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_gradients_of_zeros_are_zero_even_where_the_loss_blew_up(backend):
    x = torch.full((3, 4), math.inf)
    weight = torch.zeros(2, 4)
    A, B = torch.ones(1, 4, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    y = adapter_linear(x, weight, A, B, 1.0, backend)
    dA, dB = torch.autograd.grad(y, (A, B), torch.ones_like(y))
    assert not dA.any() and not dB.any()


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(2, 8)])
def test_a_pattern_survives_any_factors(pattern):
    _, weight, A, B, _ = example(16, 32, 4, seed=3)
    mask = pattern.keep_mask(weight.abs())
    weight = weight * mask  # half of these zeros are -0.0
    merged = reference.merged_weight(weight, 100 * A, -B, 2.0)
    assert not bits(merged)[weight == 0].any()
    assert pattern.violations(merged) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_merging_has_the_bits_of_the_reference(size, dtype, held):
    _, weight, A, B, _ = example(*size, dtype=dtype)
    A.requires_grad_()
    assert bits(merged_weight(held(weight), A, B, 1.5)).equal(bits(reference.merged_weight(weight, A.detach(), B, 1.5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_nasty_numbers_has_the_bits_of_the_reference(dtype, held):
    nasty = torch.tensor(NASTY)
    weight = nasty.repeat(20, 4).to(dtype)
    A = nasty.repeat_interleave(4).repeat(2, 1)
    B = nasty.repeat(2)[:, None]
    merged, expected = merged_weight(held(weight), A, B, 2.0), reference.merged_weight(weight, A, B, 2.0)
    assert merged.isnan().equal(expected.isnan())
    assert bits(merged.nan_to_num(7.0)).equal(bits(expected.nan_to_num(7.0)))
    assert not bits(merged)[weight == 0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_merging_into_another_dtype_has_the_bits_of_the_reference(weight_dtype, dtype, held):
    _, weight, A, B, _ = example(13, 33, 4, 2, dtype=weight_dtype)
    merged = merged_weight(held(weight), A, B, 1.5, dtype)
    assert merged.dtype == dtype
    assert bits(merged).equal(bits(reference.merged_weight(weight, A, B, 1.5, dtype)))
    wide = torch.promote_types(weight_dtype, torch.float32)
    assert bits(merged).equal(bits(reference.merged_weight(weight, A, B, 1.5, wide).to(dtype)))


def test_merging_a_transposed_weight_has_the_bits_of_the_reference(held):
    _, weight, A, B, _ = example(12, 8, 2, 2)
    assert bits(merged_weight(held(weight.T.contiguous().T), A, B, 2.0)).equal(
        bits(reference.merged_weight(weight, A, B, 2.0))
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("mode", "gemms"), [("fused", 3), ("split", 4)])
def test_a_step_takes_three_gemms_or_four_in_split_mode(backend, mode, gemms, held):
    tokens, out_features, in_features = 64, 48, 32
    x, weight, A, B, bias = example(out_features, in_features, 4, tokens=(tokens,))
    tensors = autograd.as_tensors(held(weight))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = autograd._linear(x, tensors, A, B, 1.5, bias, mode, backend)
    one = 2 * tokens * out_features * in_features
    assert counter.get_total_flops() == (gemms - 2) * one
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autograd._input_gradient(torch.ones_like(y), tensors, A, B, 1.5, mode, backend)
        autograd._factor_gradients(torch.ones_like(y), x, tensors, A, B, 1.5, backend)
    assert 2 * one <= counter.get_total_flops() < 2.2 * one


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("mode", ["fused", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_saved_but_the_arguments(backend, mode, dtype, held):
    x, weight, A, B, bias = example(64, 48, 4, dtype=dtype)
    weight = held(weight)
    x, A, B = (tensor.requires_grad_() for tensor in (x, A, B))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        spp_linear(x, weight, A, B, 2.0, bias, backend, mode=mode)
    arguments = {tensor.data_ptr() for tensor in (x, A, B, *autograd.as_tensors(weight))}
    assert saved and {tensor.data_ptr() for tensor in saved} <= arguments


@pytest.mark.parametrize("backend", [name for name in FAST if name != "torch"])
@pytest.mark.parametrize("mode", ["fused", "split"])
def test_what_lives_within_the_operator_is_little_more_than_one_weight(backend, mode, held):
    """At most 1.2 dense weights at once besides arguments and results, counted op by op."""
    x, weight, A, B, bias = example(4096, 512, 16, dtype=torch.bfloat16, tokens=(8,))
    tensors = autograd.as_tensors(held(weight))
    peaks = []

    def count():  # in a thread of its own, which has no scratch memory yet
        with torch.no_grad(), LiveBytes() as live:
            y = autograd._linear(x, tensors, A, B, 1.5, bias, mode, backend)
            dx = autograd._input_gradient(y, tensors, A, B, 1.5, mode, backend)
            dA, dB = autograd._factor_gradients(y, x, tensors, A, B, 1.5, backend)
            peaks.append(live.peak - sum(result.nbytes for result in (y, dx, dA, dB)))

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    assert 1.0 < peaks[0] / weight.nbytes <= 1.2


@pytest.mark.parametrize("backend", RUNS)
def test_the_result_may_be_changed_in_place(backend):
    """Some models do (DeBERTa scales its keys); autograd forbids it for a view that a function returns."""
    x, weight, A, B, bias = example(6, 4, 2)
    A.requires_grad_()
    y = spp_linear(x, weight, A, B, 1.0, bias, backend=backend)
    y /= 2
    y.sum().backward()
    assert A.grad is not None and A.grad.any()


@pytest.mark.parametrize("backend", FAST)
def test_without_gradients_none_are_computed(backend, monkeypatch):
    x, weight, A, B, _ = example(12, 8, 3)
    x.requires_grad_()
    monkeypatch.setattr(autograd, "_factor_gradients", None)  # calling it would fail
    spp_linear(x, weight, A, B, 1.0, backend=backend).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("backend", FAST)
def test_no_tokens_give_an_empty_output_and_zero_gradients(backend):
    x, weight, A, B, bias = example(6, 4, 2, tokens=(0,))
    y, dx, dA, dB, _ = gradients(lambda *a: spp_linear(*a, backend), x, weight, A, B, bias)
    assert y.shape == (0, 6) and dx.shape == (0, 4) and not dA.any() and not dB.any()


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_a_transposed_weight_gives_the_same_results(backend):
    x, weight, A, B, bias = example(10, 6, 4)
    stored = weight.T.contiguous()  # as GPT-2's Conv1D has it
    ours = gradients(lambda *a: spp_linear(*a, backend), x, stored.T, A, B, bias)
    for view, plain in zip(ours, gradients(reference.spp_linear, x, weight, A, B, bias), strict=True):
        torch.testing.assert_close(view, plain)


@pytest.mark.parametrize("backend", RUNS)
def test_autocast_computes_in_its_dtype_with_fp32_factors(backend):
    x, weight, A, B, bias = example(32, 16, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(lambda *a: spp_linear(*a, backend), x, weight, A, B, bias)
    assert ours[0].dtype == torch.bfloat16 and [grad.dtype for grad in ours[1:4]] == [torch.float32] * 3
    for low, exact in zip(ours[:4], gradients(reference.spp_linear, x, weight, A, B, bias), strict=False):
        assert (low.float() - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("backend", RUNS)
def test_split_mode_shows_updates_that_bf16_weights_cannot(backend, held):
    """A change of 2^-10 is less than half a step of bf16: rounded away in W', and there in x Delta^T."""
    x, weight, _, _, _ = example(32, 64, 1, dtype=torch.bfloat16, tokens=(100,))
    A, B = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).sign(), torch.full((32, 1), 2.0**-10)
    base = torch.nn.functional.linear(x.float(), weight.float())
    fused = spp_linear(x.float(), weight.float(), A, B, 1.0, backend=backend)
    assert not torch.allclose(fused, base, rtol=1e-4)  # fp32 has the bits for it
    weight = held(weight)
    y = {mode: spp_linear(x, weight, A, B, 1.0, backend=backend, mode=mode) for mode in ("fused", "split")}
    unchanged = spp_linear(x, weight, A, torch.zeros(32, 1), 1.0, backend=backend)
    assert y["fused"].equal(unchanged)
    # It shows in entries of y that are small enough to have the bits for it.
    update = fused - base
    assert ((y["split"] - unchanged).float() * update).sum() > 0.2 * update.square().sum()


def test_a_trained_weight_takes_the_reference():
    x, weight, A, B, _ = example(6, 4, 2)
    weight.requires_grad_()
    spp_linear(x, weight, A, B, 1.0).sum().backward()
    assert weight.grad is not None and weight.grad.any()
    with pytest.raises(ValueError, match="gives the weight no gradient"):
        spp_linear(x, weight, A, B, 1.0, backend="torch")


@pytest.mark.skipif(not NATIVE, reason="the native kernels were not built")
def test_an_explicit_backend_never_falls_back():
    x, weight, A, B, _ = example(6, 4, 2)
    with pytest.raises(ValueError, match="native cannot be used: .* transposed"):
        spp_linear(x, weight.T.contiguous().T, A, B, 1.0, backend="native")
    with pytest.raises(ValueError, match=r"native cannot be used: .* torch\.float64"):
        spp_linear(x.double(), weight.double(), A, B, 1.0, backend="native")


def test_misuse_is_named():
    x, weight, A, B, _ = example(6, 4, 2)
    with pytest.raises(ValueError, match="mode 'both' is unknown"):
        spp_linear(x, weight, A, B, 1.0, mode="both")
    with pytest.raises(ValueError, match=r"A \(2, 5\)"):
        spp_linear(x, weight, torch.ones(2, 5), B, 1.0)
    with pytest.raises(ValueError, match=r"B \(1, 6\)"):
        spp_linear(x, weight, A, B.T, 1.0)
    with pytest.raises(ValueError, match="R K <= O"):
        spp_linear(x, weight, torch.ones(7, 4), B, 1.0)
    with pytest.raises(ValueError, match="'gpu' is unknown"):
        spp_linear(x, weight, A, B, 1.0, backend="gpu")
