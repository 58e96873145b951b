"""Base of all option sets, and the sets that several commands share.

Every option is defined once, in the `options.py` of the folder whose work it directs; the command line, recipe files
and the Python API all read that definition. None of these modules imports torch or transformers, so `spp --help` is
instant. Options are frozen; pydantic checks all of them at once, and `build` raises one `UsageError` that lists every
problem.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, field_validator
from pydantic.config import JsonDict

from spp.errors import UsageError, raise_problems, shown
from spp.patterns import Pattern, parse_pattern
from spp.runtime.files import not_text, user_path


def _as_pattern(value: Any) -> Pattern:
    if isinstance(value, Pattern):
        return value
    try:
        return parse_pattern(str(value))
    except UsageError as error:
        raise ValueError(str(error)) from None


PatternOption = Annotated[Pattern, PlainValidator(_as_pattern), PlainSerializer(str, return_type=str)]
"""A `Pattern`; its text form, such as `2:4`, is accepted too, and is what JSON holds."""

RENAMED = {"packing": "join-documents"}
"""Old name of an option -> its present name."""

OTHER_NAMES = {
    "num-train-epochs": "epochs",
    "num-epochs": "epochs",
    "per-device-train-batch-size": "device-batch-size",
    "micro-batch-size": "device-batch-size",
    "max-length": "window",
    "max-seq-length": "window",
    "max-tokens": "max-new-tokens",
    "lr": "learning-rate",
    "lr-scheduler-type": "schedule",
    "save-total-limit": "keep",
    "completion-only-loss": "completion-only",
    "lora-r": "r",
    "lora-dropout": "dropout",
    "lora-target-modules": "target-modules",
    "torch-dtype": "dtype",
    "nsamples": "samples",
    "seqlen": "window",
    "sparsity-type": "pattern",
    "prune-method": "criterion",
    "dataset-name": "data",
    "model-name-or-path": "model",
    "output-dir": "out",
}
"""Name of an option in the Trainer, TRL, PEFT or published scripts of pruning -> the name that it has here."""

_NOT_OF_THE_RESULT = "not_of_the_result"
NOT_OF_THE_RESULT: JsonDict = {_NOT_OF_THE_RESULT: True}
"""Extra of a field: a result does not depend on the option itself; it says where or how, or names an input."""

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


Samples = Annotated[int, Field(ge=1, description="calibration windows")]
"""How many windows of text statistics are taken from."""


def listed_names(text: str) -> list[str]:
    """The names in an option's value that lists some, separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def is_one_of(full: str, names: Iterable[str]) -> bool:
    """Whether a module or a tensor is meant by one of some names, which are full or the last parts of full ones."""
    return any(full == name or full.endswith(f".{name}") for name in names)


class Options(BaseModel):
    """Base of all option sets: frozen; an unknown name, a number that is not finite, or what is no text is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, str | Path) and (problem := not_text(str(one))):
                raise ValueError(f"{shown(str(one))}: {problem}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        """Home folders are looked up, and integers fit into 64 bits, which is what tensors and libraries have."""
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"input should fit into 64 bits, but it is {shown(value)}")
        try:
            return user_path(value) if isinstance(value, Path) else value
        except UsageError as error:
            raise ValueError(str(error)) from None

    def of_the_result(self) -> dict[str, Any]:
        """The options that a result depends on, as JSON values.

        All but those that say where or how, and those that name an input, which counts for what it holds.
        """
        extras = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        others = {name for name, extra in extras.items() if isinstance(extra, dict) and _NOT_OF_THE_RESULT in extra}
        return self.model_dump(mode="json", exclude=others)

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """Make the options from plain values.

        Raises:
            UsageError: names every unknown option and every bad value, with the value seen.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = _one_each(error.errors(include_url=False))
            raise_problems([_describe(problem, cls.model_fields) for problem in problems])
            raise AssertionError("a validation error without a problem") from error


def no_such_option(name: str, known: Iterable[str] = ()) -> str:
    """The message for an unknown option, with the name that was meant, as far as that can be guessed.

    Args:
        name: the unknown name, with hyphens or underscores.
        known: the names that there are.
    """
    written = name.replace("_", "-")
    if new := RENAMED.get(written):
        return f"no such option; it is called {new} now"
    names = [one.replace("_", "-") for one in known]
    if (other := OTHER_NAMES.get(written)) in names:
        return f"no such option; it is called {other} here"
    close = difflib.get_close_matches(written, names, n=1)
    return f"no such option; did you mean {close[0]}?" if close else "no such option"


def _one_each(problems: Iterable[Any]) -> list[Any]:
    """The problems, with one for a value that is none of the types of its option in place of one for each type."""
    found: list[Any] = []
    for problem in problems:
        option, type_ = problem["loc"][:1], problem["loc"][1:]
        if not (type_ and isinstance(type_[0], str)):  # a number is a place in a list
            found.append(problem)
        elif found and found[-1]["loc"] == option:
            found[-1]["msg"] += f" or {problem['msg'].removeprefix('Input should be ')}"
        else:
            found.append({**problem, "loc": option})
    return found


def _describe(problem: Any, known: Iterable[str]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    name = name if len(name) < 80 else shown(name)
    if problem["type"] == "extra_forbidden":
        return f"{name}: {no_such_option(name, known)}"
    if problem["type"] == "missing":
        return f"{name}: is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own message, which already shows the value
        # A check over several options has an empty name.
        return message if message.startswith(name) else f"{name}: {message}"
    return f"{name}: {message[0].lower()}{message[1:]}, but it is {shown(problem['input'])}"


class LoadingOptions(Options):
    """Loading models."""

    device: str = Field(
        "auto",
        description="where to compute: auto, cpu, cuda, cuda:1, mps",
        json_schema_extra={"metavar": "DEVICE"} | NOT_OF_THE_RESULT,
    )
    dtype: DtypeName = Field(
        "auto",
        description="dtype to compute in; auto is the checkpoint's own on an accelerator and float32 on a CPU, which "
        "represents bfloat16 weights exactly, but trains them in bfloat16 if it has instructions for that",
    )
    trust_remote_code: bool = Field(False, description="run Python code from the model's repository")


class OutputOptions(Options):
    """Output."""

    overwrite: bool = Field(
        False, description="replace the output folder if it is not empty", json_schema_extra=NOT_OF_THE_RESULT
    )


_COLUMNS = ("text", "prompt", "completion", "instruction", "input", "output", "messages", "system", "tools")


class TableSettings(Options):
    """Tables of data."""

    columns: str | None = Field(
        None,
        description="names that the fields of a record have in the data, such as prompt=question,completion=answer",
        json_schema_extra={"metavar": "FIELD=NAME,..."},
    )

    @field_validator("columns")
    @classmethod
    def _are_pairs(cls, value: str | None) -> str | None:
        for field, name in _pairs(value or ""):
            if field not in _COLUMNS or not name:
                raise ValueError(
                    f"columns has {shown(field + '=' + name if name else field)}; write FIELD=NAME, separated by "
                    f"commas, where FIELD is one of {', '.join(_COLUMNS)}"
                )
        if value is not None and len(fields := [field for field, _ in _pairs(value)]) > len(set(fields)):
            raise ValueError(f"columns names a field twice: {value}")
        return value

    @property
    def column_names(self) -> dict[str, str]:
        """Field of a record -> the name that it has in the data."""
        return dict(_pairs(self.columns or ""))


def _pairs(text: str) -> list[tuple[str, str]]:
    parts = (part.partition("=") for part in text.split(",")) if text else ()
    return [(field.strip(), name.strip()) for field, _, name in parts]


class WindowSettings(Options):
    """Windows of text."""

    window: int | None = Field(
        None, ge=2, description="tokens per window (default: 2048, or the model's context if shorter)"
    )


class SeedSettings(Options):
    """Randomness."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of sampling, initialization, order and rounding")
