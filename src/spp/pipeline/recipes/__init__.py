"""Recipes: options in a YAML file, with the names of the command line; those that come with spp are here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from spp.errors import UsageError, raise_problems
from spp.options import Options, no_such_option
from spp.pipeline.options import RunOptions
from spp.training.options import TrainOptions

_FOLDER = Path(__file__).parent


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_recipe(recipe: str, options: type[Options] = RunOptions) -> dict[str, Any]:
    """Read a recipe for a command: a YAML file, or the name of a shipped one.

    A recipe is written for `spp run`; `spp train` uses only its options of training.

    Raises:
        UsageError: there is no such recipe, it is not a mapping, or it has an unknown option.
    """
    path = Path(recipe)
    if not path.is_file():
        path = _FOLDER / f"{recipe}.yaml"
    if not path.is_file():
        raise UsageError(f"recipe {recipe!r}: no such file, and the shipped ones are {', '.join(shipped_recipes())}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path}: not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"recipe {path}: expected `option: value` lines, found a {type(values).__name__}")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = [name for name in values if name not in RunOptions.model_fields]
    raise_problems([f"recipe {path}: {name}: {no_such_option(name)}" for name in unknown])
    if options is TrainOptions and "train" in values:
        values["data"] = values.pop("train")
    return {name: value for name, value in values.items() if name in options.model_fields}
