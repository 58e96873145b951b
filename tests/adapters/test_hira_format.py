"""SPP's factors as HiRA's and back: by hand, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spp.adapters.factors import Factors
from spp.adapters.hira_format import factors_of_hira, hira_rank, hira_tensors, read_hira
from spp.errors import SppError, UsageError
from spp.ops import merged_weight


def drawn(out_features: int, in_features: int, groups: int, directions: int, **changes) -> Factors:
    generator = torch.Generator().manual_seed(out_features)
    A = torch.randn(groups * directions, in_features, generator=generator)
    B = torch.randn(out_features, directions, generator=generator)
    return Factors(**{"A": A, "B": B, "scale": 2.0, **changes})


def pairs(factors: dict[str, Factors]) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = hira_tensors(factors)
    key = "base_model.model.{}.hira_{}"
    return {module: (tensors[key.format(module, "A")], tensors[key.format(module, "B")]) for module in factors}


def assert_same(found: dict[str, Factors], wanted: dict[str, Factors]) -> None:
    assert found.keys() == wanted.keys()
    for module, one in wanted.items():
        assert found[module].scale == one.scale, module
        assert found[module].A.equal(one.A) and found[module].B.equal(one.B), module


def test_factors_go_to_the_columns_of_their_groups_whatever_the_sizes():
    """Five rows in two groups: floor(i * 2 / 5) is 0, 0, 0, 1, 1."""
    A = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    B = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 10.0]])
    found_a, found_b = pairs({"m": Factors(A, B, 0.5)})["m"]
    assert found_a.equal(A)
    assert found_b.tolist() == [
        [0.5, 1.0, 0, 0],
        [1.5, 2.0, 0, 0],
        [2.5, 3.0, 0, 0],
        [0, 0, 3.5, 4.0],
        [0, 0, 4.5, 5.0],
    ]


def test_modules_of_lower_rank_are_filled_with_zeros():
    factors = {"wide": drawn(12, 3, 3, 2), "narrow": drawn(8, 5, 2, 1)}
    assert hira_rank(factors) == 6
    A, B = pairs(factors)["narrow"]
    assert A.shape == (6, 5) and B.shape == (8, 6)
    assert A[2:].count_nonzero() == B[:, 2:].count_nonzero() == 0


@pytest.mark.parametrize("scale", [2.0, 0.25, 3.0, 0.1])
def test_hira_gives_the_same_weights(scale):
    one = drawn(11, 7, 4, 2, scale=scale)
    A, B = pairs({"m": one})["m"]
    weight = torch.randn(11, 7, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(
        weight + weight * (B.double() @ A.double()), merged_weight(weight, one.A, one.B, scale), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("groups", "directions"), [(1, 1), (4, 1), (3, 4), (5, 2), (11, 1)])
def test_a_round_trip_is_bit_exact(groups, directions, dtype):
    one = drawn(22, 9, groups, directions)
    factors = {"m": Factors(one.A.to(dtype), one.B.to(dtype), 2.0)}
    found = factors_of_hira(pairs(factors), shapes={"m": (groups, directions)}, scale=2.0)
    assert_same(found, factors)
    assert found["m"].B.dtype == dtype


def test_the_shape_is_found_where_nothing_tells_it():
    factors = {"a": drawn(24, 6, 4, 3, scale=1.0), "b": drawn(10, 6, 4, 2, scale=1.0)}
    assert_same(factors_of_hira(pairs(factors)), factors)


@pytest.mark.parametrize("scale", [3.0, 0.1, 1e30])
def test_a_scale_that_cannot_be_divided_out_stays_in_b(scale):
    """Merging multiplies B by the scale in fp32 first, and so did the conversion."""
    one = drawn(40, 6, 8, 2, scale=scale)
    found = factors_of_hira(pairs({"m": one}), shapes={"m": (8, 2)}, scale=scale)["m"]
    weight = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * 0.02
    merged = merged_weight(weight, one.A, one.B, scale)
    assert merged_weight(weight, found.A, found.B, found.scale).equal(merged)


def test_b_of_the_published_start_keeps_its_shape():
    one = drawn(16, 6, 4, 2, B=torch.zeros(16, 2))
    assert_same(factors_of_hira(pairs({"m": one}), shapes={"m": (4, 2)}, scale=2.0), {"m": one})


def test_hira_of_rank_16_and_below_is_spp_with_one_group():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(16, 5, generator=generator), torch.randn(20, 16, generator=generator)
    found = factors_of_hira({"m": (A, B)})["m"]
    assert (found.groups, found.directions) == (1, 16)
    weight = torch.randn(20, 5, generator=generator).double()
    expected = weight + weight * (B.double() @ A.double())
    torch.testing.assert_close(merged_weight(weight, found.A, found.B, found.scale), expected)


def test_hira_that_no_factors_express_is_refused_by_name():
    dense = (torch.ones(17, 5), torch.ones(20, 17))
    with pytest.raises(UsageError, match=r"layers\.1: .* rank 17 is above 16.* \(1 of 2 modules\)"):
        factors_of_hira({"layers.0": (torch.ones(4, 5), torch.ones(20, 4)), "layers.1": dense})


def test_modules_that_need_different_directions_are_refused_by_name():
    many_groups = pairs({"m": drawn(40, 5, 20, 1, scale=1.0)})["m"]
    with pytest.raises(UsageError, match="grouped fits 1 directions and whole fits 16"):
        factors_of_hira({"grouped": many_groups, "whole": (torch.ones(16, 5), torch.ones(40, 16))})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"m.hira_A": (4, 5)}, r"lacks 1 tensors, e\.g\. m\.hira_B"),
        ({"m.hira_A": (4, 5), "m.hira_B": (6, 4), "m.hira_embedding_A": (1, 1)}, r"no factors, e\.g\. m\.hira_emb"),
        ({"m.hira_A": (4, 5), "m.hira_B": (6, 3)}, r"m has A \(4, 5\) of torch.float32 and B \(6, 3\)"),
        ({"m.hira_A": (4, 5, 1, 1), "m.hira_B": (6, 4, 1, 1)}, r"m has A \(4, 5, 1, 1\)"),
    ],
    ids=["missing", "extra", "shapes", "convolution"],
)
def test_files_with_other_tensors_than_linear_hira_are_refused(tmp_path, tensors, message):
    with pytest.raises(SppError, match=message):
        read_hira({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path)
