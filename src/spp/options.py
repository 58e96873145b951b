"""Base of all option sets, and the sets that several commands share.

Every option is defined once, in the `options.py` of the folder whose work it directs; the command line, recipe files
and the Python API all read that definition. None of these modules imports torch or transformers, so `spp --help` is
instant. Options are frozen; pydantic checks all of them at once, and `build` raises one `UsageError` that lists every
problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError
from pydantic.config import JsonDict

from spp.errors import UsageError, raise_problems
from spp.patterns import Pattern, parse_pattern


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

_NOT_OF_THE_RESULT = "not_of_the_result"
NOT_OF_THE_RESULT: JsonDict = {_NOT_OF_THE_RESULT: True}
"""Extra of a field: a result does not depend on the option itself; it says where or how, or names an input."""

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class Options(BaseModel):
    """Base of all option sets: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
            problems = [_describe(problem) for problem in error.errors()]
            raise_problems(problems)
            raise AssertionError("a validation error without a problem") from error


def no_such_option(name: str) -> str:
    """The message for an unknown option; it gives the present name of one that was renamed."""
    new = RENAMED.get(name.replace("_", "-"))
    return f"no such option; it is called {new} now" if new else "no such option"


def _describe(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{name}: {no_such_option(name)}"
    if problem["type"] == "missing":
        return f"{name}: is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own message, which already shows the value
        # A check over several options has an empty name.
        return message if message.startswith(name) else f"{name}: {message}"
    return f"{name}: {message[0].lower()}{message[1:]}, but it is {problem['input']!r}"


class LoadingOptions(Options):
    """Loading models."""

    device: str = Field(
        "auto",
        description="where to compute: auto, cpu, cuda, cuda:1, mps",
        json_schema_extra={"metavar": "DEVICE"} | NOT_OF_THE_RESULT,
    )
    dtype: DtypeName = Field(
        "auto",
        description="dtype to compute in; auto is the checkpoint's own on an accelerator and float32 on a CPU, "
        "where it is faster and represents bfloat16 weights exactly",
    )
    trust_remote_code: bool = Field(False, description="run Python code from the model's repository")


class OutputOptions(Options):
    """Output."""

    overwrite: bool = Field(
        False, description="replace the output folder if it is not empty", json_schema_extra=NOT_OF_THE_RESULT
    )


class WindowSettings(Options):
    """Windows of text."""

    window: int | None = Field(
        None, ge=2, description="tokens per window (default: 2048, or the model's context if shorter)"
    )


class SeedSettings(Options):
    """Randomness."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of sampling, initialization, order and rounding")
