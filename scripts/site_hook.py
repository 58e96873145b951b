"""What the documentation takes from the sources when it is built, so that it cannot say something else.

A page asks for it with a marker on a line of its own:

    <!-- options: prune -->                    the options of a command, from its parser
    <!-- recipe: paper -->                     a shipped recipe, with its comments
    <!-- fields: adapters/tuner/config.py SppConfig --> the fields of a dataclass, from their metadata or their option
    <!-- table: step of performance.md -->     a measured table of another page, which benchmarks/tables.py keeps
    <!-- notebook: notebooks/fine-tune.ipynb -->
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.exceptions import PluginError

import spp
from spp.adapters.options import AdapterSettings
from spp.cli.commands import COMMANDS
from spp.cli.parser import build_parser
from spp.pipeline import recipes

DOCS = Path(__file__).resolve().parents[1] / "docs"
SOURCES = Path(spp.__file__).resolve().parent
_OPTION = re.compile(r"(?<=[\s>])(--[a-z][\w-]*)(?=[\s<,])")
_MARKER = re.compile(r"^<!-- (options|recipe|fields|table|notebook): (.+?) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill the markers of one page; MkDocs calls this."""
    return filled(markdown)


def on_page_content(html: str, **_: object) -> str:
    """Keep options in one piece, which browsers break after a hyphen; MkDocs calls this."""
    return _OPTION.sub(r'<span class="option">\1</span>', html)


def filled(markdown: str) -> str:
    """The page with what its markers ask for.

    Raises:
        PluginError: a marker names what does not exist.
    """
    return _MARKER.sub(lambda found: _MAKERS[found[1]](found[2]), markdown)


def _options(command: str) -> str:
    _require(command in COMMANDS, f"no command {command!r}")
    groups = "\n\n".join(_option_groups(_parser(command)))
    return f'??? abstract "Options of `spp {command}`"\n\n{textwrap.indent(groups, "    ")}\n'


def _parser(command: str) -> argparse.ArgumentParser:
    [commands] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return commands.choices[command]


def _option_groups(parser: argparse.ArgumentParser) -> Iterator[str]:
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if "--help" not in action.option_strings]
        rows = [f"| `{_usage(action)}` | {_cell(_meaning(action))} |" for action in actions]
        title = str(group.title).replace("*", "\\*")
        if rows:
            yield "\n".join([f"**{title[0].upper()}{title[1:]}**\n", "| option | meaning |", "|---|---|", *rows])


def _usage(action: argparse.Action) -> str:
    flags = ", ".join(action.option_strings)
    value = action.metavar if isinstance(action.metavar, str) and action.nargs != 0 else ""
    several = {"+": f"{value} [{value} ...]", "*": f"[{value} ...]", "?": f"[{value}]"}
    return f"{flags} {several.get(str(action.nargs), value)}".strip()


def _meaning(action: argparse.Action) -> str:
    required = " (required)" if action.required and action.option_strings else ""
    return (action.help or "").replace("%%", "%") + required


def _recipe(name: str) -> str:
    _require(name in recipes.shipped_recipes(), f"no recipe {name!r}")
    text = (Path(recipes.__file__).parent / f"{name}.yaml").read_text(encoding="utf-8")
    return f"```yaml\n{text.rstrip()}\n```"


def _fields(where: str) -> str:
    """Read, not imported: PEFT would take most of the time that a build takes."""
    path, name = where.split()
    tree = ast.parse((SOURCES / path).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    rows = []
    for line in (line for found in classes for line in found.body):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(line.value, ast.Call):
            default, meaning = _field(line.value)
            rows.append(f"| `{line.target.id}` | {default} | {_cell(meaning)} |")
    _require(bool(rows), f"{where} describes no field")
    return "\n".join(["| field | default | |", "|---|---|---|", *rows])


def _field(call: ast.Call) -> tuple[str, str]:
    """Default and meaning of a field: `field(default=..., metadata={"help": ...})`, or `_option(name, more=...)`."""
    given = {word.arg: word.value for word in call.keywords}
    if call.args:
        option = AdapterSettings.model_fields[ast.literal_eval(call.args[0])]
        more = ast.literal_eval(given["more"]) if "more" in given else ""
        return f"`{option.default!r}`", f"{option.description}{more}"
    default = f"`{ast.unparse(given['default'])}`" if "default" in given else "empty"
    return default, ast.literal_eval(given["metadata"])["help"]


def _table(where: str) -> str:
    name, page = where.split(" of ")
    found = re.search(
        rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL
    )
    _require(bool(found), f"no table {name!r} in {page}")
    return found[1].strip() if found else ""


def _notebook(path: str) -> str:
    _require((DOCS / path).is_file(), f"no notebook {path!r}")
    cells = json.loads((DOCS / path).read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    shown = [
        f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
        for cell, text in zip(cells, texts, strict=True)
    ]
    return "\n\n".join(shown)


def _cell(text: str) -> str:
    """Text for a cell of a table, where a bar would end it, and `<` begin a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise PluginError(f"scripts/site_hook.py: {problem}")


_MAKERS: dict[str, Callable[[str], str]] = {
    "options": _options,
    "recipe": _recipe,
    "fields": _fields,
    "table": _table,
    "notebook": _notebook,
}
