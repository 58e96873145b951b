"""Flags as users of other tools write them, turned into ours: underscores, and the names of Trainer, TRL and PEFT."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Sequence
from typing import NoReturn, Protocol

from spp.options import OTHER_NAMES, RENAMED

ACCUMULATION = "--gradient-accumulation-steps"
_PER_DEVICE, _BATCH, _DEVICE_BATCH = "--per-device-train-batch-size", "--batch-size", "--device-batch-size"

# What has no flag of the same meaning, and what to write instead.
_INSTEAD = {
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "fp32": "--dtype float32",
    "load-in-4bit": "--quantize nf4",
    "load-in-8bit": "--quantize int8",
    "warmup-steps": "--warmup-ratio, a share of all steps",
    "lora-alpha": "--scale, which is lora_alpha / lora_r",
    "sparsity-ratio": "--pattern, such as 50%",
    "sparsity": "--pattern, such as 50%",
    "overwrite-output-dir": "--overwrite",
    "resume-from-checkpoint": "the same command again: it resumes by itself",
}


class Refuse(Protocol):
    """A function that ends the program with a message."""

    def __call__(self, message: str) -> NoReturn: ...


class OtherFlags:
    """Turns one command's words into ours.

    Args:
        flags: the command's flags, with `--`.
        positional: its positional arguments, in order.
        refuse: called for words that contradict each other.

    Attributes:
        notes: what was understood as something else, a phrase each.
    """

    def __init__(self, flags: Collection[str], positional: Sequence[str], refuse: Refuse) -> None:
        self._flags, self._positional, self._refuse = flags, positional, refuse
        self.notes: list[str] = []

    def ours(self, words: Sequence[str]) -> list[str]:
        """The same words with our names."""
        split = list(_split(words))
        values = {flag: value for flag, value, _ in split if value is not None}
        given = {flag for flag, *_ in split}
        kept: list[str] = []
        leading: list[str] = []
        trailing: list[str] = []
        for flag, value, equals in split:
            name = OTHER_NAMES.get(flag.removeprefix("--"), "") if flag.startswith("--") else ""
            place = {"model": leading, "out": trailing}.get(name) if name in self._positional else None
            if flag in (ACCUMULATION, _PER_DEVICE) and _DEVICE_BATCH in self._flags:
                continue
            if flag not in self._flags and place is not None and value is not None:
                place.append(value)
                self.notes.append(f"{flag} is {name.upper()}, without a flag, here")
            elif flag not in self._flags and f"--{name}" in self._flags:
                kept += _joined(f"--{name}", value, equals)
                self.notes.append(f"{flag} is called --{name} here")
            else:
                kept += _joined(flag, value, equals)
        return [*leading, *kept, *self._batch(given, values), *trailing]

    def _batch(self, given: Collection[str], values: dict[str, str]) -> list[str]:
        """Our sizes of batches, for the Trainer's: ours is what one optimizer step sees, over all processes."""
        if _DEVICE_BATCH not in self._flags or not {ACCUMULATION, _PER_DEVICE} & set(given):
            return []
        own = _PER_DEVICE if _PER_DEVICE in given else _DEVICE_BATCH
        if _PER_DEVICE in given and _DEVICE_BATCH in given:
            self._refuse(f"{_PER_DEVICE} and {_DEVICE_BATCH} are the same; leave one of them out")
        if own not in given:
            self._refuse(
                f"{ACCUMULATION} needs {_DEVICE_BATCH} N here: {_BATCH} is N times the steps, over all processes; "
                f"or leave it out, and pass {_BATCH}"
            )
        device, steps = self._count(own, values), self._count(ACCUMULATION, values)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        words = [] if own == _DEVICE_BATCH else [_DEVICE_BATCH, str(device)]
        if _BATCH in given:
            if ACCUMULATION in given and values.get(_BATCH) != str(device * steps * processes):
                self._refuse(
                    f"{_BATCH} {values.get(_BATCH)} is not {own} {device} x {ACCUMULATION} {steps} x {processes} "
                    "processes; leave one of them out"
                )
        else:
            words += [_BATCH, str(device * steps * processes)]
        self.notes.append(
            f"{own} {device} x {ACCUMULATION} {steps} x {processes} processes is "
            f"{_BATCH} {values.get(_BATCH, device * steps * processes)} {_DEVICE_BATCH} {device} here"
        )
        return words

    def _count(self, flag: str, values: dict[str, str]) -> int:
        text = values.get(flag, "1")
        if not text.isascii() or not text.isdigit() or not 0 < len(text) < 10 or int(text) < 1:
            self._refuse(f"{flag} must be a whole number, 1 or more, but it is {text[:40]!r}")
        return int(text)

    def suggestions(self, words: Sequence[str]) -> str:
        """What flags that are not known may have meant, to be put behind them; empty if that cannot be guessed."""
        found = {word: self._suggestion(word.split("=", 1)[0]) for word in words if word.startswith("--")}
        return "".join(f"; for {word}, {text}" for word, text in found.items() if text)

    def _suggestion(self, flag: str) -> str:
        name = flag.removeprefix("--")
        if name in RENAMED or name.removeprefix("no-") in RENAMED:
            return ""  # said elsewhere
        if name in _INSTEAD:
            return f"write {_INSTEAD[name]}"
        other = f"--{OTHER_NAMES.get(name, '')}"
        close = [other] if other in self._flags else difflib.get_close_matches(flag, self._flags, n=1)
        return f"did you mean {close[0]}?" if close else ""


def _joined(flag: str, value: str | None, equals: bool) -> list[str]:
    return [flag] if value is None else [f"{flag}={value}"] if equals else [flag, value]


def _split(words: Sequence[str]) -> Iterator[tuple[str, str | None, bool]]:
    """Each flag with hyphens for underscores, its value if it has one, and whether `=` joins them; then other words."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            yield from ((one, None, False) for one in [word, *rest])
            return
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            yield word, None, False
        elif equals:
            yield name.replace("_", "-"), value, True
        elif rest and not rest[0].startswith("--"):
            yield name.replace("_", "-"), rest.pop(0), False
        else:
            yield name.replace("_", "-"), None, False
