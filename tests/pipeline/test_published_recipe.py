"""`recipes/paper.yaml` against the published algorithm, written down as plainly as it can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from spp.data.examples import Example, collate
from spp.models.architecture import prunable_linears
from spp.pipeline.recipes import load_recipe
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune
from spp.training import trainer
from spp.training.new_adapter import target_layers, with_new_adapter
from spp.training.options import TrainOptions
from spp.training.train import train
from spp.training.training_data import training_examples

STEPS = 20


class Published(nn.Module):
    """x W^T + s * dropout(x) (repeat_interleave(A) * B * W)^T, R = 16, s = lora_alpha 16 / lora_r 8."""

    def __init__(self, base: nn.Linear, A: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", base.weight.detach())
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(torch.zeros(len(base.weight), 1))

    def forward(self, x: Tensor) -> Tensor:
        delta = self.A.repeat_interleave(len(self.weight) // len(self.A), dim=0) * self.B * self.weight
        return F.linear(x, self.weight) + F.linear(F.dropout(x, 0.05, self.training), delta) * (16 / 8)


@pytest.fixture
def same_dropout(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Dropout that depends on how many there were before; returns what starts the count again."""
    count = 0

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        nonlocal count
        if not training or not p:
            return x
        count += 1
        kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(count)) >= p
        return x * kept / (1 - p)

    def restart() -> None:
        nonlocal count
        count = 0

    monkeypatch.setattr(F, "dropout", dropout)
    return restart


def published(
    model: PreTrainedModel, first: dict[str, Tensor], batches: list[list[Example]]
) -> tuple[list[float], dict[str, Published]]:
    """Losses, and the layers afterwards.

    AdamW, lr 4e-3, weight decay 0.001, warm-up over 3 % of the steps, then a linear fall to 0.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = {name: Published(layer, first[name]) for name, layer in prunable_linears(model).items()}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, weight_decay=0.001)
    warm = math.ceil(0.03 * STEPS)
    model.train()
    losses = []
    for step, examples in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (step / warm if step < warm else (STEPS - step) / (STEPS - warm))
        batch = collate(examples)
        # Sixteen batches of eight; the loss is the mean over all tokens of a step.
        parts = [{name: tensor[first : first + 8] for name, tensor in batch.items()} for first in range(0, 128, 8)]
        tokens = (batch["labels"][:, 1:] != -100).sum()
        total = 0.0
        for part in parts:
            longest = int(part["attention_mask"].sum(dim=1).max())
            part = {name: tensor[:, :longest] for name, tensor in part.items()}
            logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), part["labels"][:, 1:].flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, layers


def test_the_first_losses_are_those_of_the_published_algorithm(
    tmp_path: Path,
    tiny_checkpoint: Path,
    stories: Path,
    same_dropout: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruned = tmp_path / "pruned"
    prune(PruneOptions.build({"model": str(tiny_checkpoint), "out": pruned, "criterion": "magnitude"}))
    documents = stories.read_text().splitlines()
    stories.write_text("\n".join([*documents, *documents[:56]]) + "\n")  # two whole steps an epoch
    recipe = load_recipe("paper", TrainOptions)
    values = {**recipe, "model": str(pruned), "out": tmp_path / "adapter", "data": str(stories), "window": 64}
    options = TrainOptions.build({**values, "max_steps": STEPS, "device": "cpu", "dtype": "float32"})
    assert (options.batch_size, options.dropout, options.r, options.seed) == (128, 0.05, 16, 42)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)

    model = load()
    set_seed(options.seed)
    adapted = with_new_adapter(model, target_layers(model, "all-linear"), options)
    first = {
        name.removeprefix("base_model.model."): layer.spp_A["default"].weight.detach()
        for name, layer in adapted.named_modules()
        if hasattr(layer, "spp_A")
    }
    steps: list[list[int]] = []
    real = trainer.SppTrainer.compute_loss

    def recorded(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not steps or len(steps[-1]) == 128:
            steps.append([])
        steps[-1].extend(inputs["examples"].tolist())
        return real(self, model, inputs, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SppTrainer, "compute_loss", recorded)
        report = train(options)
    examples, _ = training_examples(options, Path(options.model), 64, 96)
    same_dropout()
    losses, layers = published(load(), first, [[examples[number] for number in numbers] for numbers in steps])
    assert len(losses) == STEPS
    torch.testing.assert_close(
        torch.tensor([loss for _, loss in report.losses]), torch.tensor(losses), rtol=1e-5, atol=0
    )
    trained = load_file(report.out / "adapter_model.safetensors")
    assert len(trained) == 2 * len(layers)
    for name, layer in layers.items():
        A, B = (trained[f"base_model.model.{name}.spp_{factor}.weight"] for factor in "AB")
        # Adam divides by the gradients' size, so that rounding decides where they are nearly nothing.
        for found, start, expected in ((A, first[name], layer.A.detach()), (B, torch.zeros_like(B), layer.B.detach())):
            assert (expected - start).abs().max() > 4e-3  # more than a step
            assert (found - expected).norm() < 0.05 * (expected - start).norm(), name
