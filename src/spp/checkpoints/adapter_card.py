"""The card of an adapter that `spp train` wrote, README.md: what it is, and how to load it with and without spp."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from spp.checkpoints.checkpoint import MANIFEST
from spp.checkpoints.companions import CARD
from spp.checkpoints.json_files import read_object, write_text
from spp.checkpoints.model_card import as_code

_TEMPLATE = "adapter_card.md.j2"
_SETTINGS = ("r", "lora_rank", "directions", "scale", "learning_rate", "batch_size", "seed")


def write_adapter_card(folder: Path) -> None:
    """Write the card from the adapter's manifest, `spp.json`, instead of the one that PEFT writes."""
    manifest = read_object(folder / MANIFEST)
    environment = Environment(
        loader=PackageLoader("spp.checkpoints"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = as_code
    settings = [(name.replace("_", " "), manifest["settings"].get(name)) for name in _SETTINGS]
    facts = [("data", manifest["data"]), ("steps", manifest["steps"]), ("tokens", manifest["tokens"]), *settings]
    metadata = ModelCardData(library_name="peft", tags=["spp", "sparse", "adapter"])
    card = environment.get_template(_TEMPLATE).render(
        card_data=metadata.to_yaml(),
        base=manifest["base"]["model"],
        facts=[(label, value) for label, value in facts if value is not None],
    )
    write_text(folder / CARD, card)
