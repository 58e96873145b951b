"""Read the next item in a thread while the present one is processed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def read_ahead(read: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[tuple[Item, Value]]:
    """Yield each item with the result of `read`, which already runs in a thread for the next item."""
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(read, item) for item in items[:1]]
        for item, following in zip_longest(items, [[item] for item in items[1:]]):
            value = coming.pop().result()
            coming += [reader.submit(read, one) for one in following or ()]
            yield item, value
            del value  # or it would be in memory beside the next one
