"""Block reconstruction, alone and on a pruned block of every tiny family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIGS
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spp.errors import SppError
from spp.models.architecture import Matrix, decoder_blocks, prunable_matrices
from spp.patterns import NM
from spp.pruning import reconstruction
from spp.pruning.criteria import magnitude
from spp.pruning.options import BlockPart
from spp.pruning.reconstruction import Fit, Reconstruction, reconstruct

MakeModel = Callable[..., PreTrainedModel]
WEIGHTS = Reconstruction(parameters="weights", epochs=5)
SPP = Reconstruction(parameters="spp", epochs=5, r=4)
BOTH = [pytest.param(WEIGHTS, id="weights"), pytest.param(SPP, id="spp")]


@dataclass
class Case:
    """A pruned block, and what it ought to give."""

    name: str
    block: nn.Module
    inputs: list[Tensor]
    arguments: dict[str, Any]
    targets: list[Tensor]

    @property
    def matrices(self) -> list[Matrix]:
        return prunable_matrices(self.name, self.block)

    def run(self, block: Callable[..., Any], batch: int) -> Tensor:
        output = block(self.inputs[batch].clone(), **self.arguments)
        return output[0] if isinstance(output, tuple) else output

    def reconstruct(self, settings: Reconstruction) -> dict[BlockPart, Fit]:
        batches = range(len(self.inputs))
        return reconstruct(self.name, self.block, self.run, self.targets.__getitem__, batches, self.matrices, settings)

    def error(self) -> float:
        """The relative error as the block stands, by the definition."""
        with torch.no_grad():
            outputs = torch.cat([self.run(self.block, batch).float() for batch in range(len(self.inputs))])
        targets = torch.cat(self.targets).float()
        return float((outputs - targets).square().sum() / targets.square().sum())


class Linear(nn.Module):
    """A block that is one linear layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_features, out_features, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.up(hidden)


def prune(matrices: list[Matrix]) -> None:
    for matrix in matrices:
        matrix.weight.copy_(magnitude.prune(matrix.weight, None, NM(2, 4)).weight)


def linear_case(batches: int = 4, tokens: int = 64) -> Case:
    torch.manual_seed(0)
    block = Linear(8, 5)
    # Correlated inputs: else the optimum of what survives is what it was.
    inputs = [torch.randn(tokens, 8) @ (torch.eye(8) + 0.3) for _ in range(batches)]
    with torch.no_grad():
        targets = [block(given) for given in inputs]
    case = Case("block", block, inputs, {}, targets)
    prune(case.matrices)
    return case


def family_case(model: PreTrainedModel, batches: int = 3) -> Case:
    """The first decoder block of a tiny model, with larger weights, so that the block is more than its residual."""
    prefix, (block, *_) = decoder_blocks(model)
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        calls.append((hidden.clone(), rest))

    hook = block.register_forward_pre_hook(record, with_kwargs=True)
    tokens = torch.randint(3, 96, (batches, 2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for matrix in prunable_matrices(prefix, block):
            matrix.weight.mul_(8)
        for batch in tokens:
            model(input_ids=batch, use_cache=False)
    hook.remove()
    case = Case(f"{prefix}.0", block, [hidden for hidden, _ in calls], calls[0][1], [])
    with torch.no_grad():
        case.targets = [case.run(block, batch) for batch in range(batches)]
    prune(case.matrices)
    return case


def parameters(block: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in block.named_parameters()}


def assert_zeros_kept(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    for name, weight in before.items():
        zeros = after[name][weight == 0]
        assert not zeros.any(), name
        assert not torch.signbit(zeros).any(), name


@pytest.mark.parametrize("settings", BOTH)
@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_every_family(tiny_model: MakeModel, family: str, settings: Reconstruction) -> None:
    case = family_case(tiny_model(family))
    before, error = parameters(case.block), case.error()
    fits = case.reconstruct(settings)
    after = parameters(case.block)
    assert list(fits) == ["block"]
    assert fits["block"].before == pytest.approx(error, rel=1e-4)
    assert fits["block"].after == pytest.approx(case.error(), rel=1e-4)
    assert fits["block"].after < (0.9 if settings is WEIGHTS else 0.995) * fits["block"].before
    assert_zeros_kept(before, after)
    tuned = {name for name, weight in before.items() if not weight.equal(after[name])}
    owners = {module: name for name, module in case.block.named_modules()}
    assert tuned == {f"{owners[matrix.owner]}.weight" for matrix in case.matrices}


@pytest.mark.parametrize("settings", BOTH)
@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_part_by_part(tiny_model: MakeModel, family: str, settings: Reconstruction) -> None:
    case = family_case(tiny_model(family))
    before = parameters(case.block)
    fits = case.reconstruct(replace(settings, parts=("attention",)))
    tuned = {name for name, weight in parameters(case.block).items() if not weight.equal(before[name])}
    assert tuned
    assert all("attn" in name or "attention" in name for name in tuned)
    fits |= case.reconstruct(replace(settings, parts=("mlp",)))
    assert fits["mlp"].before == pytest.approx(fits["attention"].after, rel=1e-4)
    assert fits["mlp"].after < fits["mlp"].before < fits["attention"].before
    assert_zeros_kept(before, parameters(case.block))


def test_parts_are_tuned_in_the_order_given() -> None:
    case = linear_case()
    assert list(case.reconstruct(replace(WEIGHTS, parts=("attention", "mlp")))) == ["mlp"]  # it has no attention


def test_approaches_the_least_squares_optimum_of_the_survivors() -> None:
    case = linear_case()
    keep = case.matrices[0].weight != 0
    inputs, targets = torch.cat(case.inputs).double(), torch.cat(case.targets).double()
    case.reconstruct(Reconstruction(epochs=300, learning_rate=0.05))
    for row, kept, target in zip(case.matrices[0].weight, keep, targets.T, strict=True):
        best = torch.linalg.lstsq(inputs[:, kept], target[:, None]).solution[:, 0]
        torch.testing.assert_close(row[kept].double(), best, rtol=0, atol=2e-3)


def one_weight_case(weight: float, given: float, target: float, dtype: torch.dtype = torch.float32) -> Case:
    """y = w x, beside a zero that has an input, too."""
    block = Linear(2, 1).to(dtype)
    with torch.no_grad():
        block.up.weight.copy_(torch.tensor([[weight, 0.0]]))
    inputs, targets = torch.tensor([[given, 5 * given]], dtype=dtype), torch.tensor([[target]], dtype=dtype)
    return Case("block", block, [inputs], {}, [targets])


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_one_step_by_hand(unit: float) -> None:
    """Adam's first step is the learning rate, here times w's RMS, 2, whatever the activations are measured in."""
    case = one_weight_case(2.0, unit, 3 * unit)
    fit = case.reconstruct(Reconstruction(epochs=1, learning_rate=0.1))["block"]
    assert case.matrices[0].weight[0, 0].item() == pytest.approx(2.2)
    assert case.matrices[0].weight[0, 1].item() == 0
    assert fit.before == pytest.approx(1 / 9)
    assert fit.after == pytest.approx(0.64 / 9)


def test_the_rate_falls_linearly() -> None:
    """Far from the target the gradient hardly changes, so that a step is as long as the rate: 0.2, 0.15, 0.1, 0.05."""
    case = one_weight_case(2.0, 1.0, 1e4)
    case.reconstruct(Reconstruction(epochs=4, learning_rate=0.1))
    assert case.matrices[0].weight[0, 0].item() == pytest.approx(2.5, abs=1e-3)


def test_steps_too_small_for_bfloat16_add_up() -> None:
    """From 1 the next number is 1.0078: steps of 0.001 and less lead there only where they are kept in fp32."""
    case = one_weight_case(1.0, 1.0, 100.0, torch.bfloat16)
    case.reconstruct(Reconstruction(epochs=20, learning_rate=0.001))
    assert case.matrices[0].weight[0, 0].item() == 1.0078125


def test_spp_gives_a_merged_weight() -> None:
    """Every row's change, over its weight, is B times the A of its group: of one group, rows are multiples."""
    case = linear_case()
    before = case.matrices[0].weight.clone()
    case.reconstruct(replace(SPP, r=1))
    ratio = torch.where(before == 0, torch.nan, case.matrices[0].weight / before - 1)
    for column in ratio.T:
        others = column[~column.isnan()]
        assert others.numel() < 2 or others.any()
    both = ~ratio[0].isnan() & ~ratio[1].isnan()
    quotient = ratio[0][both] / ratio[1][both]
    torch.testing.assert_close(quotient, quotient[:1].expand_as(quotient), rtol=1e-2, atol=0)


@pytest.mark.parametrize("change", [{"r": 2}, {"directions": 2}, {"scale": 1.0}, {"seed": 1}], ids=str)
def test_every_setting_of_the_factors_counts(change: dict[str, Any]) -> None:
    usual, other = linear_case(), linear_case()
    settings = replace(SPP, r=1)
    fits = [case.reconstruct(one)["block"] for case, one in ((usual, settings), (other, replace(settings, **change)))]
    assert fits[0].before == fits[1].before  # the factors start at W' = W
    assert not usual.matrices[0].weight.equal(other.matrices[0].weight)


@pytest.mark.parametrize("settings", BOTH)
def test_gradients_reach_the_survivors_only(settings: Reconstruction, monkeypatch: pytest.MonkeyPatch) -> None:
    case = linear_case()
    weight = case.matrices[0].weight
    seen: list[Tensor] = []
    gradient_of = torch.autograd.grad

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.extend(gradients := gradient_of(*args, **kwargs))
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", record)
    before = weight.clone()
    case.reconstruct(replace(settings, epochs=1))
    assert case.block.get_parameter("up.weight").grad is None
    if settings is WEIGHTS:
        for gradient in seen:
            assert not gradient[before == 0].any()
            assert gradient[before != 0].all()
    else:
        assert {gradient.shape for gradient in seen} == {(4, 8), (5, 1)}


@pytest.mark.parametrize("settings", BOTH)
def test_same_arguments_same_bits(tiny_model: MakeModel, settings: Reconstruction) -> None:
    case, again = family_case(tiny_model("llama")), family_case(tiny_model("llama"))
    case.reconstruct(settings)
    torch.rand(3)  # whatever the global generator has been used for
    again.reconstruct(settings)
    for name, weight in parameters(case.block).items():
        assert weight.equal(parameters(again.block)[name]), name


def test_the_seed_and_the_name_decide_spp(tiny_model: MakeModel) -> None:
    def tuned(**changes: Any) -> Tensor:
        case = linear_case()
        case.name = changes.pop("name", "block")
        case.reconstruct(replace(SPP, **changes))
        return case.matrices[0].weight

    assert not tuned().equal(tuned(seed=1))
    assert not tuned().equal(tuned(name="other"))


@pytest.mark.parametrize("settings", BOTH)
def test_never_worse(settings: Reconstruction) -> None:
    case = linear_case()
    before = parameters(case.block)
    fit = case.reconstruct(replace(settings, learning_rate=50.0, epochs=1))["block"]
    assert fit.after == fit.before > 0
    assert parameters(case.block)["up.weight"].equal(before["up.weight"])


@pytest.mark.parametrize("settings", BOTH)
def test_nothing_to_mend(settings: Reconstruction) -> None:
    case = linear_case()
    with torch.no_grad():
        case.targets = [case.run(case.block, batch) for batch in range(len(case.inputs))]
    before = parameters(case.block)
    assert case.reconstruct(settings) == {"block": Fit(before=0.0, after=0.0)}
    assert parameters(case.block)["up.weight"].equal(before["up.weight"])


def test_targets_of_zero_divide_nothing_by_zero() -> None:
    case = linear_case()
    case.targets = [torch.zeros_like(target) for target in case.targets]
    fit = case.reconstruct(WEIGHTS)["block"]
    assert 0 < fit.after < fit.before


@pytest.mark.parametrize("settings", BOTH)
def test_bfloat16(tiny_model: MakeModel, settings: Reconstruction) -> None:
    case = family_case(tiny_model("llama", dtype=torch.bfloat16))
    before = parameters(case.block)
    fit = case.reconstruct(settings)["block"]
    assert fit.after < 0.995 * fit.before
    assert fit.after == pytest.approx(case.error(), rel=1e-3)
    assert {weight.dtype for weight in parameters(case.block).values()} == {torch.bfloat16}
    assert_zeros_kept(before, parameters(case.block))


def test_experts_in_one_parameter() -> None:
    """Weights are tuned, also where a batch reaches only some experts; SPP leaves them alone."""
    torch.manual_seed(0)
    changes = {"num_local_experts": 4, "num_experts_per_tok": 1, "experts_implementation": "eager"}
    config = AutoConfig.for_model("mixtral", **(TINY_CONFIGS["mistral"] | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    case = family_case(model)
    experts = [matrix for matrix in case.matrices if matrix.expert is not None]
    assert experts
    before = parameters(case.block)
    case.reconstruct(replace(SPP, parts=("mlp",)))
    assert parameters(case.block)["mlp.experts.down_proj"].equal(before["mlp.experts.down_proj"])
    fits = case.reconstruct(WEIGHTS)
    assert fits["block"].after < fits["block"].before
    assert not parameters(case.block)["mlp.experts.down_proj"].equal(before["mlp.experts.down_proj"])
    assert_zeros_kept(before, parameters(case.block))


def test_an_expert_that_no_token_of_a_batch_reaches() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

        def forward(self, hidden: Tensor) -> Tensor:
            return self.mlp[int(hidden[0, 0] > 0)](hidden)

    torch.manual_seed(0)
    block = Switch()
    inputs = [torch.randn(32, 8) @ (torch.eye(8) + 0.3) for _ in range(4)]
    for index, given in enumerate(inputs):
        given[0, 0] = 1.0 if index % 2 else -1.0
    with torch.no_grad():
        targets = [block(given) for given in inputs]
    case = Case("block", block, inputs, {}, targets)
    prune(case.matrices)
    before = parameters(block)
    fit = case.reconstruct(WEIGHTS)["block"]
    assert fit.after < fit.before
    assert all(not weight.equal(before[name]) for name, weight in parameters(block).items())


@pytest.mark.parametrize("settings", BOTH)
@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_nan_in_the_calibration_data(where: str, settings: Reconstruction) -> None:
    case = linear_case()
    getattr(case, where)[1][3, 2] = torch.nan
    before = parameters(case.block)
    with pytest.raises(SppError, match=r"^block \(block\): .* NaN or infinite; check the model"):
        case.reconstruct(settings)
    assert parameters(case.block)["up.weight"].equal(before["up.weight"])


@pytest.mark.parametrize("settings", BOTH)
def test_divergence_names_the_remedy(settings: Reconstruction) -> None:
    case = linear_case()
    with pytest.raises(SppError, match=r"^block \(mlp\): .* NaN or infinite; lower --reconstruct-learning-rate"):
        case.reconstruct(replace(settings, parts=("mlp",), learning_rate=1e30))


def test_a_lost_zero_is_an_error_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = linear_case()
    before = parameters(case.block)
    monkeypatch.setattr(reconstruction, "canonical_zeros", lambda weight: torch.where(weight == 0, -0.0, weight))
    with pytest.raises(SppError, match=r"^block\.up\.weight: reconstruction would turn 20 zeros into something else"):
        case.reconstruct(WEIGHTS)
    assert parameters(case.block)["up.weight"].equal(before["up.weight"])
