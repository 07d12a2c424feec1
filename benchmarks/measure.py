"""What all benchmarks share: ours and a peer in one run, alternating, and the result as one JSON line."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

K = TypeVar("K")

REPEATS = 5  # of each side; medians are compared


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(
    runs: Mapping[K, Callable[[], Any]],
    *,
    repeats: int = REPEATS,
    measure: Callable[[Callable[[], Any]], float] = seconds,
    warm_up: bool = True,
) -> dict[K, float]:
    """Median of what `measure` says of each of `runs`, taken in turn, by default after one call of each to warm up.

    What else the machine does then falls on all alike.
    """
    for run in runs.values() if warm_up else ():
        run()
    values: dict[K, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            values[name].append(measure(run))
    return {name: statistics.median(measured) for name, measured in values.items()}


def report(
    name: str,
    *,
    ours: float,
    peer: float,
    unit: str,
    peer_is: str,
    ratio: float,
    bound: str,
    bounded: float | None = None,
    **conditions: Any,
) -> None:
    """Print a result as one JSON line, for people and for `benchmarks/run_all.py`.

    Args:
        name: Of the measurement, such as `loss/all sizes, B=256`.
        ours: Median of ours.
        peer: Median of the peer.
        unit: Of both.
        peer_is: What the peer is, in words.
        ratio: Ours by peer, or peer by ours, as `bound` reads.
        bound: What the ratio is to be, such as `<= 1.1` or `>= 2`; what follows says what else is bounded.
        bounded: That, where it is not the ratio.
        **conditions: What else decides the numbers: sizes, data, threads.
    """
    sign, limit = bound.split()[:2]
    value = ratio if bounded is None else bounded
    holds = value <= float(limit) if sign == "<=" else value >= float(limit)
    line = {"name": name, "ours": ours, "peer": peer, "unit": unit, "peer_is": peer_is, "ratio": ratio}
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in line.items()}
    print(json.dumps({**rounded, "bound": bound, "holds": holds, **conditions}), flush=True)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process grows at most while `run` runs; Linux alone."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = _peak()
    run()
    return _peak() - before


def in_fresh_process(script: str, *arguments: object) -> float:
    """The number that a script prints last. glibc gives back at once what is freed: what is resident is in use."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, script, *map(str, arguments)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def _peak() -> int:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
