"""Training the values of a packed weight: the gradient by hand, every back-end, three GEMMs, nothing dense kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spp.errors import SppError
from spp.ops import BACKENDS, native, pack, packed_linear, spp_linear, torch_kernels, unpack, why_not
from spp.ops.packed import PackedWeight, unpack_mask
from spp.runtime.tensor_memory import LiveBytes

RUNS = [name for name in BACKENDS if why_not(name, torch.empty(1, 1)) is None]
FAST = [name for name in RUNS if name != "reference"]
LEVELS = [level for level in range(4) if native.instructions(level)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (O, I): less than a word; odd; whole words; more rows than one block of the gradient.
SIZES = [(8, 12), (7, 33), (5, 64), (2100, 70)]


def example(size, dtype=torch.float32, tokens=(2, 5), density=0.3, seed=0):
    """x, a packed W whose values are trained in fp32 (fp64 for fp64), and bias."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(size, generator=generator) * (torch.rand(size, generator=generator) < density)
    x = torch.randn(*tokens, size[1], generator=generator).to(dtype)
    return x, trained(pack(weight.to(wide))), torch.randn(size[0], generator=generator).to(dtype)


def trained(packed: PackedWeight) -> PackedWeight:
    return replace(packed, values=packed.values.detach().clone().requires_grad_())


def gradients(x, weight, bias, backend):
    """The result, and its gradients with respect to x, the values and bias, under a fixed random cotangent."""
    x, bias = (tensor.clone().requires_grad_() for tensor in (x, bias))
    y = packed_linear(x, weight, bias, backend)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, weight.values, bias), cotangent)]


@pytest.mark.parametrize("backend", RUNS)
def test_the_gradient_by_hand(backend):
    weight = trained(pack(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]])))
    x = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    packed_linear(x, weight, backend=backend).backward(torch.tensor([[1.0, 0.0], [1.0, -1.0]]))
    # dW = dY^T x = [[3, 30, 300], [-2, -20, -200]], of which the entries (0, 1), (1, 0) and (1, 2) are stored.
    assert weight.values.grad.tolist() == [30.0, -2.0, -200.0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", RUNS)
def test_it_is_the_gradient_of_masked_training(backend, size):
    x, weight, bias = example(size, torch.float64) if backend in ("reference", "torch") else example(size)
    dense = unpack(weight).detach().requires_grad_()
    y, dx, dvalues, dbias = gradients(x, weight, bias, backend)
    ours = F.linear(x.requires_grad_(), torch.where(dense == 0, 0.0, dense), bias.requires_grad_())
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    theirs = torch.autograd.grad(ours, (x, dense, bias), cotangent)
    torch.testing.assert_close((y, dx, dbias), (ours, theirs[0], theirs[2]))
    torch.testing.assert_close(dvalues, theirs[1][unpack_mask(weight)])
    assert not theirs[1][~unpack_mask(weight)].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("backend", RUNS)
def test_master_values_in_fp32_get_their_gradient_in_every_dtype(backend, dtype, tolerance):
    x, weight, bias = example((70, 130), dtype)
    found = gradients(x, weight, bias, backend)
    assert [one.dtype for one in found] == [dtype, dtype, torch.float32, dtype]
    exact = gradients(x.double(), trained(replace(weight, values=weight.values.double())), bias.double(), "reference")
    for one, other in zip(found, exact, strict=True):
        assert (one.double() - other).norm() / other.norm() < tolerance


@pytest.mark.parametrize("backend", FAST)
def test_a_value_that_became_zero_is_still_trained(backend):
    x, weight, bias = example((7, 33))
    with torch.no_grad():
        weight.values[3] = 0.0
    assert gradients(x, weight, bias, backend)[2][3] == gradients(x, weight, bias, "reference")[2][3] != 0


def test_the_gradient_passes_gradcheck():
    x, weight, bias = example((7, 33), torch.float64)

    def function(x, values, bias):
        return packed_linear(x, replace(weight, values=values), bias, "torch")

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), weight.values, bias.requires_grad_()))


@pytest.mark.parametrize("backend", FAST)
def test_a_step_takes_three_gemms(backend):
    x, weight, bias = example((40, 96), tokens=(64,))
    with FlopCounterMode(display=False) as counter:
        packed_linear(x.requires_grad_(), weight, bias, backend).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 64 * 40 * 96


@pytest.mark.parametrize("backend", FAST)
def test_nothing_of_the_dense_weights_size_is_saved_or_made(backend):
    x, weight, bias = example((2048, 1024), torch.bfloat16, tokens=(16,), density=0.25)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = packed_linear(x.requires_grad_(), weight, bias, backend)
    assert all(one.numel() <= max(weight.values.numel(), x.numel()) for one in saved)
    y.sum().backward()  # fills the scratch memory that layers share
    weight.values.grad = None
    with LiveBytes() as live:
        packed_linear(x, weight, bias, backend).sum().backward()
    assert weight.values.grad is not None
    if backend == "native":
        assert live.peak < 1.3 * weight.values.nbytes  # their gradient, and what is not of the weight's size


@pytest.mark.parametrize("backend", FAST)
def test_frozen_values_keep_no_input_alive(backend):
    x, weight, bias = example((40, 96), tokens=(64,))
    saved = []
    frozen = replace(weight, values=weight.values.detach())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        packed_linear(x.requires_grad_(), frozen, bias, backend)
    assert not any(one.data_ptr() == x.data_ptr() for one in saved)


@pytest.mark.parametrize("backend", FAST)
def test_no_tokens_give_zero_gradients(backend):
    x, weight, bias = example((7, 33), tokens=(0,))
    assert not gradients(x, weight, bias, backend)[2].any()


@pytest.mark.parametrize("backend", FAST)
def test_gradients_of_several_batches_are_summed(backend):
    x, weight, bias = example((2100, 70))
    packed_linear(x, weight, bias, backend).sum().backward()
    once = weight.values.grad.clone()
    packed_linear(x, weight, bias, backend).sum().backward()
    torch.testing.assert_close(weight.values.grad, 2 * once)


def test_an_adapter_does_not_train_the_values_in_silence():
    x, weight, _ = example((8, 12))
    with pytest.raises(ValueError, match="gives the weight no gradient; freeze it"):
        spp_linear(x, weight, torch.ones(2, 12), torch.ones(8, 1), 1.0, backend="torch")


@pytest.mark.parametrize("level", LEVELS, ids=native.instructions)
@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 140)),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(0, 10**6),
)
def test_compressing_rows_has_the_bits_of_torch(level, shape, density, dtype, values_dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = pack((torch.rand(shape, generator=generator) < density).to(values_dtype))
    first = seed % shape[0]
    G = torch.randn(shape[0] - first, shape[1], generator=generator).to(dtype)
    ours, theirs = (replace(kept, values=kept.values.clone()) for _ in range(2))
    native.compress(G, first, ours, level=level)
    torch_kernels.compress(G, first, theirs)
    assert ours.values.equal(theirs.values)


@pytest.mark.skipif(not LEVELS, reason="the native kernels were not built")
def test_rows_that_do_not_fit_are_refused():
    weight = pack(torch.ones(4, 70))
    for G, first in ((torch.ones(4, 69), 0), (torch.ones(4, 70), 1), (torch.ones(70, 4).T, 0), (torch.ones(1, 70), -1)):
        with pytest.raises(ValueError, match="G does not fit|rows that are contiguous"):
            native.compress(G, first, weight)
    with pytest.raises(SppError, match="damaged"):
        native.compress(torch.ones(4, 70), 0, replace(weight, values=weight.values[1:]))
