"""The baselines compute what they stand for: the published variants are SPP, and PEFT's layers train their factors."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import published, stock_peft
from benchmarks.common import sparse_weight
from spp.ops import reference

VARIANTS = pytest.mark.parametrize("variant", [published.variant1, published.variant2])


def problem(dtype: torch.dtype, shape: tuple[int, int] = (48, 40), rank: int = 16) -> tuple[torch.Tensor, ...]:
    """x (2, 5, I), W, A, B, bias, and dY; half of W is zero."""
    torch.manual_seed(0)
    out_features, in_features = shape
    weight = sparse_weight(*shape, 0.5, torch.float64) * 50
    shapes = ((2, 5, in_features), (rank, in_features), (out_features, 1), (out_features,), (2, 5, out_features))
    x, A, B, bias, dy = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    tensors = [tensor.to(dtype) for tensor in (x, weight, A, B, bias, dy)]
    for trained in (tensors[0], *tensors[2:5]):
        trained.requires_grad_()
    return tuple(tensors)


@VARIANTS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_published_variant_is_the_formula(variant, dtype, tolerance):
    x, weight, A, B, bias, dy = problem(dtype)
    found = variant(x, weight, A, B, 1.5, bias)
    expected = reference.spp_linear(x, weight, A, B, 1.5, bias)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 50)
    trained = (x, A, B, bias)
    gradients = torch.autograd.grad(found, trained, dy)
    for gradient, right in zip(gradients, torch.autograd.grad(expected, trained, dy), strict=True):
        torch.testing.assert_close(gradient, right, rtol=tolerance, atol=tolerance * 500)


@VARIANTS
def test_published_variant_runs_under_autocast(variant):
    x, weight, A, B, bias, _ = problem(torch.float32)
    half = [tensor.detach().to(torch.bfloat16) for tensor in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        found = variant(half[0], half[1], A, B, 1.5, half[2])
    assert found.dtype == torch.bfloat16
    expected = reference.spp_linear(half[0].float(), half[1].float(), A, B, 1.5, half[2].float())
    assert (found - expected).norm() < 0.02 * expected.norm()


@VARIANTS
def test_published_variant_needs_equal_groups(variant):
    x, weight, A, B, _, _ = problem(torch.float32, shape=(20, 24))
    with pytest.raises(ValueError, match="R = 16 and O = 20"):
        variant(x, weight, A, B, 2.0)


def test_hira_is_stock_and_trains():
    weight = sparse_weight(32, 24, 0.5, torch.float32) * 50
    model = stock_peft.hira(weight)
    x = torch.randn(7, 24)
    A, B = (dict(model.named_parameters())[f"base_model.model.linear.hira_{name}.default"] for name in "AB")
    assert A.shape == (16, 24) and B.shape == (32, 16)
    torch.testing.assert_close(model(x), x @ (weight + weight * (B @ A)).T)
    assert stock_peft.trained(model) == [A, B]
    assert all(gradient.any() for gradient in torch.autograd.grad(model(x).sum(), [A, B]))


def test_lora_is_stock_and_shares_the_weight():
    weight = torch.randn(32, 24)
    model = stock_peft.lora(weight)
    x = torch.randn(7, 24)
    A, B = stock_peft.trained(model)
    assert A.shape == (16, 24) and B.shape == (32, 16) and B.any()
    torch.testing.assert_close(model(x), x @ (weight + 8 / 16 * B @ A).T)
    assert model.base_model.model.linear.base_layer.weight.data_ptr() == weight.data_ptr()
