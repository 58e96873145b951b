"""The model card of a merged model, README.md: how it was made, its figures, and the proof of its zeros.

Everything in it comes from the folder's side files, `spp.json` and `verification.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from jinja2 import Environment, PackageLoader, StrictUndefined

from spp.checkpoints.checkpoint import MANIFEST, VERIFICATION
from spp.checkpoints.companions import CARD
from spp.checkpoints.json_files import read_object, write_json, write_text
from spp.checkpoints.verification_record import replaced_tensors
from spp.errors import SppError, UsageError
from spp.patterns import parse_pattern

_TEMPLATE = "model_card.md.j2"
_OF_THE_BASE = ("license", "license_name", "license_link", "language")
_MODELS = {"dense": "dense", "pruned": "pruned", "reconstructed": "pruned + reconstructed", "spp": "this model"}


def write_model_card(folder: Path, figures: Mapping[str, Any] | None = None) -> None:
    """Write the card of a merged model.

    Args:
        folder: the model.
        figures: added to `spp.json` first: `perplexity` by model, and `evaluation`, its protocol.

    Raises:
        UsageError: the folder does not hold a merged model.
    """
    if figures:
        write_json(folder / MANIFEST, read_object(folder / MANIFEST) | {"figures": figures})
    write_text(folder / CARD, model_card(folder))


def model_card(folder: Path, name: str | None = None) -> str:
    """The text of a merged model's card, under its name in `spp.json` or another `name`.

    Raises:
        UsageError: the folder does not hold a merged model.
        SppError: its side files are damaged.
    """
    if not (folder / VERIFICATION).is_file():
        raise UsageError(f"{folder}: no {VERIFICATION} is there; only what spp merge or full training wrote has a card")
    manifest, verification = read_object(folder / MANIFEST), read_object(folder / VERIFICATION)
    try:
        return _rendered(manifest, verification, name or manifest["name"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SppError(
            f"{folder}: its {MANIFEST} and {VERIFICATION} are not as spp merge writes them ({error!r}); merge it again"
        ) from error


def _rendered(manifest: Mapping[str, Any], verification: Mapping[str, Any], name: str) -> str:
    figures = manifest.get("figures") or {}
    return rendered_card(
        _TEMPLATE,
        card_data=_metadata(manifest).to_yaml(),
        name=name,
        pattern=_pattern(manifest),
        in_full=manifest.get("method") == "full",
        facts=[(label, value) for label, value in _facts(manifest, verification) if value not in (None, "")],
        perplexity=_perplexities(figures),
        protocol=_protocol(figures),
        proof={
            **{key: verification[key] for key in ("zeros", "underflowed", "unchanged_share", "copied")},
            "merged": len(verification["tensors"]),
            "converted": len(verification["converted"]),
            "replaced": replaced_tensors(verification),
        },
    )


def rendered_card(template: str, **values: Any) -> str:
    """The text of a card, from a template of this folder, in which the filter `code` is `as_code`."""
    environment = Environment(
        loader=PackageLoader("spp.checkpoints"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = as_code
    return environment.get_template(template).render(**values)


def read_licence(folder: Path) -> dict[str, Any]:
    """Licence and language from a model's card, or from its `spp.json` if it has no card, as a pruned model.

    Empty if neither can be read.
    """
    card, manifest = folder / CARD, folder / MANIFEST
    try:
        known = metadata_load(card) if card.is_file() else read_object(manifest).get("licence")
    except Exception:  # whatever YAML can be wrong about; the card is not ours, and nothing depends on it
        known = None
    return {key: known[key] for key in _OF_THE_BASE if key in known} if isinstance(known, dict) else {}


def as_code(value: Any) -> str:
    """A value as Markdown code, with HTML, Markdown and table separators escaped."""
    return "`" + " ".join(str(value).replace("`", "'").replace("|", "\\|").split()) + "`"


def _metadata(manifest: Mapping[str, Any]) -> ModelCardData:
    """The metadata that the hub reads."""
    pattern = _pattern(manifest)
    tags = ["spp", "sparse", "pruned", *([pattern] if pattern else [])]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        ignore_metadata_errors=True,
        **manifest.get("licence", {}),
    )


def _pattern(manifest: Mapping[str, Any]) -> str | None:
    """The pattern if it is valid: the `spp.json` of the base may come from anybody."""
    try:
        return str(parse_pattern(str(manifest.get("pattern"))))
    except UsageError:
        return None


def _facts(manifest: Mapping[str, Any], verification: Mapping[str, Any]) -> list[tuple[str, Any]]:
    training = _object(manifest.get("training"))
    settings = _object(training.get("settings"))
    sparsity = manifest.get("sparsity")
    return [
        ("sparse base", manifest["base"]),
        ("pattern", _pattern(manifest)),
        ("sparsity of the pruned matrices", f"{sparsity:.2%}" if isinstance(sparsity, float) else None),
        ("criterion", manifest.get("criterion")),
        ("training data", training.get("data")),
        ("steps", training.get("steps")),
        ("tokens", training.get("tokens")),
        ("learning rate", settings.get("learning_rate")),
        ("seed", settings.get("seed")),
        ("dtype, rounding", f"{verification['dtype']}, {verification['rounding']}"),
        ("spp", manifest["version"]),
    ]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _perplexities(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = figures.get("perplexity") or {}
    return [(label, f"{found[name]:.4f}") for name, label in _MODELS.items() if found.get(name) is not None]


def _protocol(figures: Mapping[str, Any]) -> str:
    """The protocol in one sentence."""
    how = figures.get("evaluation")
    if not how:
        return ""
    cut = "each document by itself" if how["per_document"] else f"stride {how['stride']}, incomplete tail dropped"
    return (
        f"Perplexity per {how['unit']} of {as_code(how['source'])}, window {how['window']}, {cut}, computed in "
        f"{how['dtype']}."
    )
