"""Damage to one file or one option: structured mutations that a parser survives, and raw ones that it does not.

Each function takes the path (or the value) and a `random.Random`, and returns a phrase that says what it did.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", " ", "x", "x" * 10_000, "\ud800", "\0", "../../x", "/", "1", "nan", "2:4", "None", "float32",
    [], {}, [[]], [None], [1, 2], ["a", 1], {"a": 1}, {"": None}, [[1, [2]]],
)  # fmt: skip
"""What a value in a JSON file becomes."""

DEEP = 100_000

_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [" + ",".join([f"*{before}"] * 9) + "]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)

SNIPPETS = (
    "", "[]", "null", "- a\n- b\n", "seed: [1, 2]\n", "seed: {a: 1}\n", "seed: 2026-13-45\n", "seed: 2026-01-01\n",
    "pattern: 2:4\n", "window: 1:30\n", "seed: 1\nseed: 2\n", "max-steps: 1\nmax_steps: 2\n", "seed: .inf\n",
    "seed: !!python/object:os.system x\n", "seed: " + "9" * 6000 + "\n", "seed: " + "[" * 5000 + "]" * 5000 + "\n",
    "seed: .nan\n", "seed: 1e999\n", "learning-rate: 1e-400\n", "? [a]\n: 1\n", "1: 2\n", "null: 2\n", "\tseed: 1\n",
    "seed: 'x\n", 'seed: "\\ud800"\n', "%YAML 9.9\n---\nseed: 1\n", "---\nseed: 1\n---\nseed: 2\n", "seed: *x\n",
    "seed: &x [*x]\n", "unknown-option: 1\n", "model: dense\n", "<<: {seed: 1}\n", "<<: 3\n", _BOMB + "seed: *j\n",
    "seed: !!binary aGVsbG8=\n", "seed: !!set {a, b}\n", "seed: !!timestamp 2026\n", "data: ~\n", "dtype: no\n",
    "overwrite: 'yes'\n", "report-to: [a, [b]]\n",
)  # fmt: skip
"""Recipes."""

WORDS = (
    "", " ", "-1", "0", "1", "2", "3", "0.5", "1e308", "nan", "inf", "-inf", "1e400", "9" * 5000, "x" * 300, "x" * 5000,
    "~nosuchuser/x", "a\0b", "\udcff", "é", "0x10", "1_000", "\u0661", "2:4", "0:4", "4:4", "5:4", "0%", "100%", "101%",
    "nan%", "2:0", "99999999999:99999999999", "all", "auto", "none", "../..", ".", "/", "a/b/c/d", "a,b", ",", "a=b",
    "=", "--", "[1]", "{}", "null", "true", "x.yaml", "http://x/y", "\n", "cpu", "cuda:99", "meta", "float64",
    "magnitude", "wanda,ria", "q_proj", "(", "*", "prompt=text", "text=text,text=prompt", "python-stdlib", "block",
    "spp", "weights",
)  # fmt: skip
"""What an option's value becomes; with these numbers no command works for long."""


def json_file(path: Path, chance: random.Random) -> str:
    """One value, key or part of a JSON file."""
    try:
        tree = json.loads(path.read_text())
    except ValueError:  # lines of JSON
        return _json_line(path, chance)
    tree, phrase = mutated(tree, chance)
    path.write_text(_dumped(tree), encoding="utf-8", errors="surrogatepass")
    return phrase


def _json_line(path: Path, chance: random.Random) -> str:
    lines = path.read_text().splitlines()
    number = chance.randrange(len(lines))
    try:
        record, phrase = mutated(json.loads(lines[number]), chance)
    except ValueError:
        return raw(path, chance)
    lines[number] = _dumped(record)
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    return f"line {number + 1}: {phrase}"


def _dumped(tree: Any) -> str:
    """JSON, with `DEEP_VALUE` as that many nested lists, and non-finite numbers as Python's parser reads them."""
    text = json.dumps(tree, ensure_ascii=False).replace(f'"{_DEEP_MARK}"', "[" * DEEP + "]" * DEEP)
    return text.replace(f'"{_DIGITS_MARK}"', "9" * 6000)


_DEEP_MARK, _DIGITS_MARK = "deep-value", "digits-value"


def mutated(tree: Any, chance: random.Random) -> tuple[Any, str]:
    """A JSON value with one change somewhere in it."""
    places = list(_places(tree))
    if not places:
        value = chance.choice(VALUES)
        return value, f"all of it is {_short(value)}"
    owner, key = chance.choice(places)
    kind = chance.choice(
        ("value", "value", "value", "value", "delete", "rename", "deep", "digits", "swap", "longer", "negative")
    )
    if kind == "delete":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        new = chance.choice(("", "x", "\ud800", str(key) + "x", "a.b.999999999", "model.layers." + "9" * 5000 + ".x"))
        owner[new] = owner.pop(key)
        return tree, f"key {key} is called {_short(new)}"
    elif kind in ("deep", "digits"):
        owner[key] = _DEEP_MARK if kind == "deep" else _DIGITS_MARK
    elif kind == "swap":
        other, name = chance.choice(places)
        owner[key] = json.loads(json.dumps(other[name]))
    elif kind == "longer" and isinstance(owner[key], list | str):
        owner[key] = owner[key] * 3
    elif kind == "negative" and isinstance(owner[key], int | float):
        owner[key] = -owner[key] if chance.random() < 0.5 else owner[key] * 1000 + 1
    else:
        owner[key] = value = chance.choice(VALUES)
        return tree, f"{key} is {_short(value)}"
    return tree, f"{kind} {key}"


def _places(tree: Any, depth: int = 0) -> Any:
    if isinstance(tree, dict | list) and depth < 8:
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key], depth + 1)


def _short(value: Any) -> str:
    return ascii(value)[:40] if not isinstance(value, int) or abs(value) < 10**30 else "a huge integer"


def safetensors_header(path: Path, chance: random.Random) -> str:
    """One value in the header of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, phrase = mutated(json.loads(content[8 : 8 + length]), chance)
    text = _dumped(header).encode(errors="surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return f"header: {phrase}"


def safetensors_length(path: Path, chance: random.Random) -> str:
    """The length of the header."""
    content = path.read_bytes()
    length = chance.choice((0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1, len(content), len(content) - 8))
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    return f"header length {length}"


def safetensors_tensor(path: Path, chance: random.Random) -> str:
    """A tensor's name, dtype, shape or values, in a file that is whole."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    changes: dict[str, Callable[[], Any]] = {
        "nan": lambda: _filled(tensor, chance, float("nan")),
        "infinite": lambda: _filled(tensor, chance, float("inf")),
        "huge": lambda: _filled(tensor, chance, 1e30),
        "zero": lambda: torch.zeros_like(tensor),
        "0-d": lambda: tensor.flatten()[:1].reshape(()).clone(),
        "empty": lambda: tensor[:0].clone(),
        "flat": lambda: tensor.flatten(),
        "transposed": lambda: tensor.mT.contiguous() if tensor.ndim > 1 else tensor[None],
        "shorter": lambda: tensor[:-1].clone(),
        "longer": lambda: torch.cat([tensor, tensor]),
        "3-d": lambda: tensor[None].clone(),
        "int64": lambda: tensor.to(torch.int64),
        "uint8": lambda: tensor.to(torch.uint8),
        "bool": lambda: tensor.to(torch.bool),
        "float64": lambda: tensor.to(torch.float64),
        "float8": lambda: tensor.to(torch.float8_e4m3fn),
        "complex": lambda: tensor.to(torch.complex64),
        "negative": lambda: -tensor if tensor.is_floating_point() else tensor.flip(0),
        "removed": lambda: None,
        "all removed": lambda: None,
        "renamed": lambda: None,
        "doubled": lambda: None,
    }
    kind = chance.choice(list(changes))
    if kind == "all removed":
        tensors.clear()
    elif kind == "renamed":
        tensors[chance.choice(("x", name + "x", name.replace("0", "7"), "", "a" * 5000, "..", "\u00e9"))] = tensors.pop(
            name
        )
    elif kind == "doubled":
        tensors[name + ".copy"] = tensor.clone()
    elif kind == "removed":
        del tensors[name]
    else:
        tensors[name] = changes[kind]()
    save_file({key: one.contiguous() for key, one in tensors.items()}, path, metadata)
    return f"{name} is {kind}"


def _filled(tensor: Any, chance: random.Random, value: float) -> Any:
    changed = tensor.clone()
    if changed.is_floating_point() and changed.numel():
        changed.view(-1)[chance.randrange(changed.numel())] = value
    return changed


def raw(path: Path, chance: random.Random) -> str:
    """A file that is cut, longer, empty or of other bytes."""
    content = path.read_bytes()
    kind = chance.choice(
        ("empty", "cut", "cut", "bytes", "flipped", "flipped", "longer", "bom", "latin", "blank", "nul", "html")
    )
    cut = chance.randrange(max(len(content), 1))
    made = {
        "empty": b"",
        "cut": content[:cut],
        "bytes": chance.randbytes(64),
        "flipped": bytes([*content[:cut], *(byte ^ 0x80 for byte in content[cut : cut + 1]), *content[cut + 1 :]]),
        "longer": content + b"\x00\xff{}[" * 3,
        "bom": b"\xef\xbb\xbf" + content,
        "latin": "é".encode("latin-1") * 50,
        "blank": b" \n\t\n" * 20,
        "nul": b"\x00" * 200,
        "html": b"<!doctype html><html><body>404</body></html>",
    }
    kind = chance.choice((*made, "cut", "flipped"))
    path.write_bytes(made[kind])
    return f"raw: {kind}" + (f" at {cut}" if kind in ("cut", "flipped") else "")


def special(path: Path, chance: random.Random) -> str:
    """No regular file any more, or none."""
    content, elsewhere = path.read_bytes(), path.with_name("elsewhere")
    path.unlink()

    def linked() -> None:
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)

    def unreadable() -> None:
        path.write_bytes(content)
        path.chmod(0)

    kinds: dict[str, Callable[[], Any]] = {
        "missing": lambda: None,
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a link to nothing": lambda: path.symlink_to(elsewhere),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to its folder": lambda: path.symlink_to(path.parent),
        "a link": linked,
        "unreadable": unreadable,
    }
    kind = chance.choice(list(kinds))
    kinds[kind]()
    return kind


def recipe(path: Path, chance: random.Random) -> str:
    """Another recipe."""
    text = chance.choice(SNIPPETS)
    path.write_text(text)
    return f"recipe {text[:40]!r}"


def table(path: Path, chance: random.Random) -> str:
    """A cell of a CSV file."""
    lines = path.read_text().splitlines()
    number = chance.randrange(min(len(lines), 3))
    cells = lines[number].split(",")
    cells[chance.randrange(len(cells))] = word = chance.choice(
        ("", "nan", "-1", "1e999", '"', "x" * 200_000, "é", "a\0", "0", "inf")
    )
    lines[number] = ",".join(cells)
    path.write_text("\n".join(lines))
    return f"line {number + 1}: a cell is {word[:20]!r}"


TEMPLATES = (
    "", "{% for %}", "{{ x.y.z }}", "{{ messages[99] }}", "{% while 1 %}", "{{ raise_exception('no') }}", "{{ 1/0 }}",
    "{{ 'x' * 10**12 }}",
)  # fmt: skip
"""Chat templates."""


def template(path: Path, chance: random.Random) -> str:
    """Another chat template."""
    text = chance.choice(TEMPLATES)
    path.write_text(text)
    return f"template {text!r}"


def file(path: Path, chance: random.Random) -> str:
    """Damage of a kind that suits the file."""
    tensors = (safetensors_header, safetensors_tensor)
    suits: dict[str, tuple[Callable[[Path, random.Random], str], ...]] = {
        ".json": (json_file,) * 6,
        ".jsonl": (json_file,) * 4,
        ".safetensors": (*tensors, *tensors, safetensors_length),
        ".yaml": (recipe,) * 8,
        ".csv": (table,) * 3,
        ".jinja": (template,) * 3,
    }
    return chance.choice((*suits.get(path.suffix, ()), raw, special))(path, chance)
