"""One run of `benchmarks/streaming.py` in a process of its own: prune a model, and see where the time goes.

Takes a JSON list: the options of `spp prune`, threads or null, and the number of the block in which to die or null.
Prints one JSON object.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import spp
from spp.models.blockwise.block_calls import BlockCalls
from spp.pruning.pruned_blocks import PrunedBlocks
from spp.pruning.steps import Steps
from spp.runtime.devices import pick_device
from spp.runtime.memory import peak_memory_bytes


class Stopwatch:
    """Adds up the seconds that functions take.

    Args:
        device: where they compute; on a GPU, calls return before they are done.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which the watch runs with."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self._now() - began

        return run

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def run(values: dict[str, Any], threads: int | None, last_block: int | None = None) -> dict[str, Any]:
    """Prune; die by SIGKILL when `last_block` has been written, and not yet been noted as finished.

    Returns:
        seconds of all; of it forward_seconds, passes through blocks with the statistics of their inputs, and
        criterion_seconds, from statistics to pruned weights; and peak_bytes, the process's resident memory
        at its highest, or on a GPU what its tensors took there.
    """
    if threads:
        torch.set_num_threads(threads)
    options = spp.PruneOptions.build(values)
    device = pick_device(options.device)
    forward, criterion = Stopwatch(device), Stopwatch(device)
    BlockCalls.run = forward.timed(BlockCalls.run)
    Steps.run = criterion.timed(Steps.run)
    if last_block is not None:
        PrunedBlocks.keep = _dying(PrunedBlocks.keep, last_block, device)
    report = spp.prune(options)
    return {
        "seconds": report.seconds,
        "forward_seconds": forward.seconds,
        "criterion_seconds": criterion.seconds,
        "peak_bytes": peak_memory_bytes(device),
    }


def _dying(keep: Callable[..., Any], last_block: int, device: torch.device) -> Callable[..., Any]:
    """The method, after which the process is gone, having said how much memory it had."""

    def keep_or_die(blocks: PrunedBlocks, index: int) -> Any:
        kept = keep(blocks, index)
        if index == last_block:
            print(json.dumps({"peak_bytes": peak_memory_bytes(device)}), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return kept

    return keep_or_die


if __name__ == "__main__":
    print(json.dumps(run(*json.loads(sys.argv[1]))))
