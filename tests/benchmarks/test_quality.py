"""The comparison of fine-tuning methods: zeros are kept, baselines are what they claim, rows have what they need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import HiraConfig, PeftModel, get_peft_model
from torch import nn

from benchmarks import common, quality, rates
from benchmarks.baselines.finetuning import HalfSpp, Lora, MaskedLora, MaskedWeight, Replaced, replace_linears
from benchmarks.evaluated_models import EvaluatedModel
from scripts import make_synthetic_model
from spp.models.architecture import prunable_linears
from spp.models.packed_linear import PackedLinear


def sparse_layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    layer.weight.data[torch.rand(8, 12) < 0.5] = 0.0
    return layer


@pytest.mark.parametrize("kind", [Lora, MaskedLora, HalfSpp, MaskedWeight])
def test_what_is_deployed_has_the_zeros(kind: type[Replaced]) -> None:
    base = sparse_layer()
    layer, x = kind(base), torch.randn(3, 12)
    torch.testing.assert_close(layer(x), base(x))  # before training, nothing has changed
    for parameter in layer.parameters():
        parameter.data.normal_()
    assert not layer.deployed()[base.weight == 0].any()
    dense = bool(layer.weight()[base.weight == 0].any())
    assert dense == (kind is Lora)  # which is masked only afterwards
    layer.eval()
    torch.testing.assert_close(layer(x), x @ layer.deployed().T + base.bias)


def test_by_hand() -> None:
    base = nn.Linear(2, 2, bias=False)
    base.weight.data = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    layer = MaskedLora(base, rank=1)
    layer.A.data, layer.B.data = torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0], [-1.0]])
    assert layer.weight().tolist() == [[1 + 2, 0.0], [2 - 2, 3 - 20]]


@pytest.fixture
def small(tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluatedModel:
    """The only model that there is."""
    folder = tmp_path / "dense"
    assert make_synthetic_model.main(["--gigabytes", "0.001", str(folder)]) == 0
    texts = {"calibration": str(stories), "evaluation": str(stories)}
    sizes = {"window": 16, "limit": 8, "samples": 4, "tokens_per_step": 64}
    evaluated = EvaluatedModel(name="small", model=str(folder), **sizes, **texts)
    for module in (quality, rates):
        monkeypatch.setattr(module, "evaluated_models", lambda *_: [evaluated])
    return evaluated


def test_a_row_for_each_method_and_seed(small: EvaluatedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "quality.csv"
    options = ["--pattern", "2:4", "--steps", "2", "--seeds", "0", "1", "--threads", "1", "--csv", str(path)]
    methods = ["SPP", "SPP + both", "HiRA", "masked full"]
    quality.main([*options, "--method", *methods])
    rows = common.read_rows(path)
    assert [(row["method"], row["seed"]) for row in rows] == [(name, seed) for name in methods for seed in "01"]
    for row in rows:
        assert float(row["learning_rate"]) in quality.METHODS[row["method"]].rates
        assert float(row["perplexity"]) > 1 and int(row["trainable"]) > 0
    trainable = {row["method"]: int(row["trainable"]) for row in rows}
    assert trainable["SPP"] < trainable["HiRA"] < trainable["masked full"]
    monkeypatch.setattr(quality, "Cell", lambda *_: pytest.fail("all of it has been measured"))
    quality.main([*options, "--method", *methods])
    assert common.read_rows(path) == rows


def test_equal_seconds(small: EvaluatedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "quality.csv"
    monkeypatch.setattr(quality, "steps_within", lambda cell, method, seconds: 3 if method.teacher else int(seconds))
    options = ["--pattern", "2:4", "--seconds", "2", "--seeds", "0", "--threads", "1", "--csv", str(path)]
    quality.main([*options, "--method", "SPP", "SPP + both"])
    assert [(row["method"], row["steps"]) for row in common.read_rows(path)] == [("SPP", "2"), ("SPP + both", "3")]


def test_steps_by_their_time(small: EvaluatedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(quality, "fit", lambda *args: made.append(args[-1]))
    monkeypatch.setattr(quality, "_seconds", lambda _: 5.0 * len(made) + 2.0 * sum(made))  # 5 s once, 2 s a step
    cell = quality.Cell(small, "2:4", tmp_path)
    assert quality.steps_within(cell, quality.METHODS["SPP"], 30) == 15


def test_rates_are_tried_to_the_end(small: EvaluatedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rates.csv"
    options = ["--pattern", "2:4", "--steps", "2", "--rate", "0.01", "0.1", "--threads", "1", "--csv", str(path)]
    rates.main([*options, "--folder", str(tmp_path / "models")])
    rows = common.read_rows(path)
    assert [(row["method"], row["learning_rate"]) for row in rows] == [
        (method, rate) for method in ("SPP", "full") for rate in ("0.01", "0.1")
    ]
    assert len({row["loss"] for row in rows}) == 4 and len({row["start_loss"] for row in rows}) == 1
    assert [row["trainable"] for row in rows[:2]] < [row["trainable"] for row in rows[2:]]
    monkeypatch.setattr(rates, "fit", lambda *_: pytest.fail("all of it has been measured"))
    rates.main([*options, "--folder", str(tmp_path / "models")])


def test_in_bfloat16_weights_stay_in_float32(small: EvaluatedModel, tmp_path: Path) -> None:
    cell = quality.Cell(replace(small, dtype=torch.bfloat16), "2:4", tmp_path)
    model, _ = quality.fit(cell, quality.METHODS["masked full"], 0.01, 0, 2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    in_full = quality.Cell(small, "2:4", tmp_path)
    assert cell.validation(model) == pytest.approx(in_full.validation(model), rel=1e-2)
    assert cell.validation(model) != in_full.validation(model)


def deployed(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a trained model after merging."""
    if isinstance(model, PeftModel):
        return {name: layer.weight for name, layer in prunable_linears(model.merge_and_unload()).items()}
    packed = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    return packed or {name: layer.deployed() for name, layer in model.named_modules() if isinstance(layer, Replaced)}


@pytest.mark.parametrize("name", [name for name, method in quality.METHODS.items() if not method.reconstructed])
def test_every_method_keeps_zeros(small: EvaluatedModel, tmp_path: Path, name: str) -> None:
    cell = quality.Cell(small, "2:4", tmp_path)
    base = prunable_linears(cell.start(reconstructed=False))
    weights = deployed(quality.fit(cell, quality.METHODS[name], 0.01, 0, 2)[0])
    assert weights.keys() == base.keys()
    for layer, weight in weights.items():
        assert not weight[base[layer].weight == 0].any(), layer
        assert not weight.equal(base[layer].weight), layer


def test_hira_is_pefts_own(small: EvaluatedModel, tmp_path: Path) -> None:
    cell = quality.Cell(small, "2:4", tmp_path)
    model = quality.METHODS["HiRA"].adapt(cell.start(reconstructed=False))
    assert type(model) is type(get_peft_model(cell.start(reconstructed=False), HiraConfig(task_type="CAUSAL_LM")))
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2 * len(prunable_linears(cell.dense))


def test_replacing_freezes_the_rest(small: EvaluatedModel, tmp_path: Path) -> None:
    model = quality.Cell(small, "2:4", tmp_path).start(reconstructed=False)
    linears = len(prunable_linears(model))
    replace_linears(model, MaskedWeight)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == linears
