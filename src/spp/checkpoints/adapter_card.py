"""The card of an adapter that `spp train` wrote, README.md: what it is, and how to load it with and without spp."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from spp.checkpoints.checkpoint import MANIFEST
from spp.checkpoints.companions import CARD
from spp.checkpoints.json_files import read_object, write_text
from spp.checkpoints.model_card import rendered_card

_TEMPLATE = "adapter_card.md.j2"
_SETTINGS = ("r", "lora_rank", "directions", "scale", "learning_rate", "batch_size", "seed")


def write_adapter_card(folder: Path) -> None:
    """Write the card from the adapter's manifest, `spp.json`, instead of the one that PEFT writes."""
    manifest = read_object(folder / MANIFEST)
    settings = [(name.replace("_", " "), manifest["settings"].get(name)) for name in _SETTINGS]
    facts = [("data", manifest["data"]), ("steps", manifest["steps"]), ("tokens", manifest["tokens"]), *settings]
    metadata = ModelCardData(library_name="peft", tags=["spp", "sparse", "adapter"])
    card = rendered_card(
        _TEMPLATE,
        card_data=metadata.to_yaml(),
        base=manifest["base"]["model"],
        convertible=not read_object(folder / "adapter_config.json").get("target_parameters"),  # HiRA knows no experts
        facts=[(label, value) for label, value in facts if value is not None],
    )
    write_text(folder / CARD, card)
