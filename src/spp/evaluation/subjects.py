"""The models that an evaluation is about: looked up by name, and checked as far as possible without loading them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spp.adapters.attach import check_adapter
from spp.adapters.factors import SETTINGS, read_settings
from spp.checkpoints.hub import resolve_model
from spp.errors import UsageError, raise_problems
from spp.evaluation.options import EvalOptions


@dataclass(frozen=True)
class Subject:
    """One model to score: the options for it alone, and its folder, looked up once."""

    options: EvalOptions
    folder: Path


def subjects_of(options: EvalOptions) -> dict[str, Subject]:
    """The models to score by the name that the user gave, checked as far as possible without loading them."""
    subjects: dict[str, Subject] = {}
    problems: list[str] = []
    for name in (options.model, *options.others):
        if name in subjects:
            problems.append(f"model {name!r} is named twice")
        try:
            subjects[name] = _subject(name, options)
        except UsageError as error:
            problems.append(str(error))
    raise_problems(problems)
    return subjects


def _subject(name: str, options: EvalOptions) -> Subject:
    model, adapter = name, options.adapter
    if adapter is None and (Path(name) / SETTINGS).is_file():
        adapter = Path(name)
        model = read_settings(adapter).get("base_model_name_or_path")
        if not isinstance(model, str) or not model:
            raise UsageError(f"adapter {name} does not say which model it is for; pass the model, and --adapter {name}")
        try:
            folder = resolve_model(model, code=options.trust_remote_code)
        except UsageError as error:
            raise UsageError(
                f"adapter {name} is for the model {model!r}: {error}; pass the model itself, and --adapter {name}"
            ) from None
    else:
        folder = resolve_model(model, code=options.trust_remote_code)
    if adapter is not None:
        check_adapter(adapter, model, folder)
    return Subject(options.model_copy(update={"model": model, "adapter": adapter, "others": ()}), folder)
