"""Arguments that do not fit, and damaged packed weights, are one ValueError in every back-end that runs here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spp.ops import BACKENDS, adapter_linear, merged_weight, pack, packed_linear, spp_linear, unpack, why_not

ROWS, COLUMNS, GROUPS = 6, 40, 3


@pytest.fixture
def arguments():
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS) * (torch.rand(ROWS, COLUMNS) < 0.5)
    return {
        "x": torch.randn(2, COLUMNS),
        "weight": weight,
        "A": torch.randn(GROUPS, COLUMNS),
        "B": torch.randn(ROWS, 1),
    }


def here(name: str) -> bool:
    return why_not(name, torch.empty(1, 1)) is None


BACKENDS_HERE = [name for name in BACKENDS if here(name)]


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bias", lambda _: torch.zeros(ROWS + 1)),
        ("bias", lambda _: torch.zeros(1)),
        ("bias", lambda _: torch.zeros(ROWS, dtype=torch.int32)),
        ("A", lambda A: A[:, :-1]),
        ("A", lambda A: A.to(torch.int8)),
        ("A", lambda A: A.to(torch.complex64)),
        ("A", lambda A: A[0]),
        ("B", lambda B: B[:-1]),
        ("B", lambda B: B.bool()),
        ("B", lambda B: torch.zeros(ROWS, 0)),
        ("weight", lambda weight: weight.to(torch.int32)),
        ("weight", lambda weight: weight[None]),
        ("x", lambda x: x[:, :-1]),
        ("x", lambda x: x.long()),
        ("x", lambda x: x[0, 0]),
        ("scale", lambda _: 1.0),
    ],
)
def test_what_does_not_fit_is_a_value_error(arguments, backend, name, change):
    given = {**arguments, "scale": 1.0, name: change(arguments.get(name))}
    if name == "scale":
        assert spp_linear(**given, backend=backend).shape == (2, ROWS)
        return
    with pytest.raises(ValueError, match="expected"):
        spp_linear(**given, backend=backend)
    if name in ("A", "B", "weight"):
        with pytest.raises(ValueError, match="expected"):
            merged_weight(given["weight"], given["A"], given["B"], 1.0)
    if name != "bias":
        with pytest.raises(ValueError, match="expected"):
            adapter_linear(**given, backend=backend)


def row_moved(offsets):
    offsets = offsets.clone()
    offsets[1] += 1
    return offsets


def bit_set(mask, row, column):
    mask = mask.clone()
    mask[row, column // 32] ^= torch.tensor(1 << column % 32, dtype=torch.int32)
    return mask


DAMAGES = {
    "values of integers": ("values", lambda one: one.int()),
    "values in two dimensions": ("values", lambda one: one[None]),
    "values without dimension": ("values", lambda one: one.sum()),
    "a value less": ("values", lambda one: one[:-1]),
    "a value more": ("values", lambda one: torch.cat([one, one[:1]])),
    "a bitmask of 64 bits": ("bitmask", lambda one: one.long()),
    "a word less": ("bitmask", lambda one: one[:, :-1].contiguous()),
    "a bitmask without dimension": ("bitmask", lambda one: one.sum(dtype=torch.int32)),
    "a row of the bitmask less": ("bitmask", lambda one: one[:-1]),
    "another bit": ("bitmask", lambda one: bit_set(one, 0, 3)),
    "a bit beyond the columns": ("bitmask", lambda one: bit_set(bit_set(one, 0, 3), 0, COLUMNS + 1)),
    "offsets of 32 bits": ("row_offsets", lambda one: one.int()),
    "an offset less": ("row_offsets", lambda one: one[:-1]),
    "offsets without dimension": ("row_offsets", lambda one: one.sum()),
    "a moved row": ("row_offsets", row_moved),
    "rows that begin late": ("row_offsets", lambda one: one + 1),
}


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_packed_weight_is_never_computed_with(arguments, backend, damage):
    name, change = DAMAGES[damage]
    whole = pack(arguments.pop("weight"))
    damaged = replace(whole, **{name: change(getattr(whole, name))})
    with pytest.raises(ValueError, match="packed weight"):
        packed_linear(arguments["x"], damaged, backend=backend)
    with pytest.raises(ValueError, match="packed weight"):
        spp_linear(**arguments, weight=damaged, scale=1.0, backend=backend)
    with pytest.raises(ValueError, match="packed weight"):
        unpack(damaged)
    assert packed_linear(arguments["x"], whole, backend=backend).shape == (2, ROWS)


def test_a_packed_weight_has_a_bias_of_its_rows(arguments):
    whole = pack(arguments["weight"])
    for bias in (torch.zeros(1), torch.zeros(ROWS, dtype=torch.int64)):
        with pytest.raises(ValueError, match="expected a bias"):
            packed_linear(arguments["x"], whole, bias)
