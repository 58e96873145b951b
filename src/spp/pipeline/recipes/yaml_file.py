"""YAML as recipes need it: plain values by name, and what YAML would change or drop without a word is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from spp.errors import UsageError, shown
from spp.runtime.files import reading

_TIMESTAMP, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "int", "float"))


class _Loader(yaml.SafeLoader):
    """Has no dates, as no option is one: `2024-01-01` is the name of a folder. Refuses doubled keys and 2:4 as 124."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping; a key that occurs twice is an error, where YAML's last one would win."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name = option_name(key.value)
            if name in lines and key.tag != "tag:yaml.org,2002:merge":
                raise ConstructorError(
                    None, None, f"{shown(name)} is there twice, first in line {lines[name]}", key.start_mark
                )
            lines[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def number(self, node: Any) -> Any:
        """An integer or a float; a pattern is none."""
        if ":" in node.value:
            seen = self.construct_yaml_int(node) if node.tag == _INT else self.construct_yaml_float(node)
            raise ConstructorError(
                None,
                None,
                f'YAML reads {shown(node.value)} as the number {seen}; quote it: "{node.value[:20]}"',
                node.start_mark,
            )
        return self.construct_yaml_int(node) if node.tag == _INT else self.construct_yaml_float(node)


for _tag in (_INT, _FLOAT):
    _Loader.add_constructor(_tag, _Loader.number)


def option_name(key: Any) -> str:
    """The name of an option in Python: hyphens and underscores are the same."""
    return str(key).replace("-", "_")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        UsageError: there is none, or it is no YAML that a recipe may hold; the message names the line.
    """
    try:
        with reading(path, "valid YAML", "see the shipped recipes for the form"):
            return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"recipe {path}: not valid YAML: {_reason(error.__cause__ or error)}") from error


def _reason(error: BaseException) -> str:
    """What is wrong, and in which line."""
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.MarkedYAMLError) and mark is not None:
        return f"line {mark.line + 1}: {error.problem}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply; a recipe has `option: value` lines"
    if "digits" in str(error):
        return "it holds a number of more digits than any option has"
    return (str(error) or type(error).__name__).splitlines()[0]
