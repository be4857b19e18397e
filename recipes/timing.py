"""Times of contenders that take turns, so that a slow moment of the machine hits all alike."""

import statistics
from collections.abc import Callable
from typing import Any


def take_turns(
    contenders: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float], least: float = 0.01
) -> dict[str, list[float]]:
    """Seconds a call of each contender, once for every turn; a turn is as many calls as take ``least`` seconds."""
    calls = {}
    for name, call in contenders.items():
        call()
        start = clock()
        call()
        calls[name] = max(1, int(least / max(clock() - start, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            start = clock()
            for _ in range(calls[name]):
                call()
            seconds[name].append((clock() - start) / calls[name])
    return seconds


def summary(values: list[float], digits: int) -> dict[str, float]:
    """Median, rounded to ``digits``, and the spread (max - min) / median."""
    median = statistics.median(values)
    return {"median": round(median, digits), "spread": round((max(values) - min(values)) / median, 3)}
