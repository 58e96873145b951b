"""Base of all option sets, and the sets that several commands share.

Every option is defined once, in the `options.py` of the room whose work it directs; the command line, recipe files and
the Python API all read that definition. None of these modules imports torch or transformers, so that `spp --help` is
instant. Options are frozen; pydantic checks all of them at once, and `build` turns what it finds into one `UsageError`
that lists every problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from spp.errors import UsageError, raise_problems
from spp.patterns import parse_pattern


def _checked_pattern(text: str) -> str:
    try:
        return str(parse_pattern(text))
    except UsageError as error:
        raise ValueError(str(error)) from None


PatternText = Annotated[str, AfterValidator(_checked_pattern)]


class Options(BaseModel):
    """Base of all option sets: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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


def _describe(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{name}: no such option"
    if problem["type"] == "missing":
        return f"{name}: is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own words, which show the value already
        # Of a check over several options, the name is empty.
        return message if message.startswith(name) else f"{name}: {message}"
    return f"{name}: {message[0].lower()}{message[1:]}, but it is {problem['input']!r}"


class LoadingOptions(Options):
    """How models are loaded."""

    device: str = Field("auto", description="where to compute: auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype to compute in; auto is the checkpoint's own on an accelerator and float32 on a CPU, "
        "where it is faster and holds bfloat16 weights exactly",
    )
    trust_remote_code: bool = Field(False, description="run Python code that the model's repository brings along")


class OutputOptions(Options):
    """What happens to an output folder that exists."""

    overwrite: bool = Field(False, description="replace the output folder if it is not empty")


class WindowSettings(Options):
    """Windows of text, for calibration, training and evaluation."""

    window: int | None = Field(
        None, ge=2, description="tokens per window (default: 2048, or the model's context if shorter)"
    )


class SeedSettings(Options):
    """Randomness."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of sampling, initialisation, order and rounding")
