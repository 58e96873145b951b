"""Recipes: options in a YAML file, with the names of the command line; those that come with spp are here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spp.errors import UsageError, raise_problems, shown
from spp.options import Options, no_such_option
from spp.pipeline.options import RunOptions
from spp.pipeline.recipes.yaml_file import option_name, read_yaml
from spp.runtime.files import user_path
from spp.training.options import TrainOptions

_FOLDER = Path(__file__).parent
_BASED_ON = "based_on"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_recipe(recipe: str, options: type[Options] = RunOptions, *, method: str | None = None) -> dict[str, Any]:
    """Read a recipe for a command: a YAML file, or the name of a shipped one.

    A recipe is written for `spp run`; `spp train` uses only its options of training. `based-on` names another recipe,
    whose options it has where it says nothing.

    Args:
        recipe: see above.
        options: of the command.
        method: the method that was asked for, if any: a learning rate in the recipe is for the method there.

    Raises:
        UsageError: there is no such recipe, it is not a mapping, or it has an unknown option.
    """
    values = _values(recipe)
    if method not in (None, values.get("method", RunOptions.model_fields["method"].default)):
        values.pop("learning_rate", None)
    if options is TrainOptions and "train" in values:
        values["data"] = values.pop("train")
    return {name: value for name, value in values.items() if name in options.model_fields}


def _values(recipe: str, before: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The options in a recipe, over those of the one that it is based on, which may be based on another one."""
    path = user_path(recipe)
    if not path.exists():
        path = _FOLDER / f"{recipe}.yaml"
    if not path.exists():
        raise UsageError(f"recipe {recipe!r}: no such file, and the shipped ones are {', '.join(shipped_recipes())}")
    if path in before:
        raise UsageError(f"recipe {path} is based on itself: {' on '.join(map(str, (*before, path)))}")
    values = read_yaml(path)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UsageError(f"recipe {path}: expected `option: value` lines, found a {type(values).__name__}")
    values = {option_name(name): value for name, value in values.items()}
    base = values.pop(_BASED_ON, None)
    if not isinstance(base, str | None):
        raise UsageError(f"recipe {path}: based-on is {shown(base)}; name one recipe")
    known = RunOptions.model_fields
    raise_problems(
        [f"recipe {path}: {_brief(name)}: {no_such_option(name, known)}" for name in values if name not in known]
    )
    return values if base is None else {**_values(base, (*before, path)), **values}


def _brief(name: str) -> str:
    return name if len(name) < 60 else shown(name)
