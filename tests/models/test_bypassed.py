"""Linear layers whose own forward is not what uses their weight: found, and left without adapter and packing."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny_model_of
from torch import Tensor, nn
from torch.nn import functional as F

import spp
from spp.models.architecture import bypassed_linears, decoder_blocks, prunable_linears, prunable_matrices
from spp.models.bypassed import bypassed, computes_otherwise, read_directly
from spp.models.packed_linear import PackedLinear


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Linear(4, 4)


class Reader(nn.Module):
    """Uses the weights of its layers in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.asked, self.multiplied, self.cut = (nn.Linear(4, 4) for _ in range(4))
        self.inner = Holder()
        self.reset_weights()

    def reset_weights(self) -> None:
        nn.init.zeros_(self.called.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x).to(self.asked.weight.dtype)
        x = self.asked(x.reshape(-1, self.asked.weight.shape[1]))
        if self.training:
            x = F.linear(x, self.multiplied.weight)
        return self.cut(x) + F.linear(x, self.cut.weight[:2]).sum() + x @ self.inner.deep.weight


def test_what_multiplies_by_a_weight_is_told_from_what_asks_for_its_dtype() -> None:
    reader = Reader()
    assert read_directly(reader) == {reader.multiplied, reader.inner.deep}
    assert read_directly(nn.Sequential(reader)) == {reader.multiplied, reader.inner.deep}


def test_multi_head_attention_reads_the_weight_of_its_projection() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert attention.out_proj in read_directly(attention)


class Rewritten(nn.Linear):
    """The same in other words."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * super().forward(x)


class Picky(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError("only for four dimensions")


@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_of_its_own_is_judged_by_what_it_computes(bias: bool) -> None:
    assert not computes_otherwise(nn.Linear(8, 8, bias=bias))
    assert not computes_otherwise(Rewritten(8, 8, bias=bias))
    assert computes_otherwise(Scaled(8, 8, bias=bias))
    assert computes_otherwise(Picky(8, 8, bias=bias))
    assert not computes_otherwise(Rewritten(8, 8, bias=bias, device="meta"))


def test_a_class_is_judged_while_a_model_is_built_on_the_meta_device() -> None:
    class New(Rewritten):
        pass

    with torch.device("meta"):
        assert not computes_otherwise(New(8, 8))


MAMBA_2 = ["mamba2", "bamba", "falcon_h1", "nemotron_h", "zamba2"]
READ = dict.fromkeys(MAMBA_2, {"out_proj"}) | {
    "mamba": {"x_proj", "dt_proj", "out_proj"},
    "jamba": {"dt_proj"},
    "gemma3n_text": {"correction_coefs", "prediction_coefs"},
    "deepseek_v4": {"o_a_proj"},
}


@pytest.mark.parametrize("family", READ)
def test_families_with_such_layers(family: str) -> None:
    """They are no targets, and are not packed, but are matrices that can be pruned."""
    model = tiny_model_of(family)
    found = bypassed_linears(model)
    assert {name.rpartition(".")[2] for name in found} == READ[family]
    assert not found.keys() & prunable_linears(model).keys()
    prefix, blocks = decoder_blocks(model)
    matrices = [one.name for index, block in enumerate(blocks) for one in prunable_matrices(f"{prefix}.{index}", block)]
    assert found.keys() <= set(matrices)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in READ])
def test_families_without(family: str) -> None:
    assert not bypassed_linears(tiny_model_of(family))


def test_a_packed_model_keeps_such_layers_dense_and_computes_in_another_dtype() -> None:
    model = tiny_model_of("mamba")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter[:, ::2] = 0
    tokens = torch.arange(3, 43).view(1, 40)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        packed = spp.pack_(model)(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(packed, expected)
    kinds = {name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, PackedLinear)}
    assert kinds == {"in_proj"}


def test_reasons_are_said() -> None:
    reader = Reader()
    assert bypassed(reader)[reader.multiplied] == "the model reads its weight without calling it"
    assert "Scaled, has a forward of its own" in next(iter(bypassed(nn.Sequential(Scaled(4, 4))).values()))
