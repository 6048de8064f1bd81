"""Fair times on a noisy machine: everything compared runs in turn, in one process or in several.

A machine that slows down for a second slows whatever happens to run.  Taking turns (A B C A B C …)
spreads that over all, and medians over rounds forget it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

from omega_qvla.errors import RecipeError


def take_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call in every round, by name.

    Raises:
        RecipeError: fewer than one round.
    """
    if rounds < 1:
        raise RecipeError(f"rounds={rounds}: at least one is needed to measure anything")
    for _ in range(warm_up):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = perf_counter()
            call()
            times[name].append(perf_counter() - begin)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median seconds by name."""
    return {name: median(values) for name, values in times.items()}


def percentile(values: list[float], fraction: float) -> float:
    """The smallest value that at least ``fraction`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]
