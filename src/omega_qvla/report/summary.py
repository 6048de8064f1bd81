"""What a report says in words: a headline and a paragraph, composed from the numbers alone.

Every sentence is there because a value is, and changes with it.  Which recipe the words are about
is a rule, not a choice: of the first policy's recipes that exist as integers of about four bits,
the one whose largest action error over the conditions is smallest; where no error was measured the
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omega_qvla.report.sources import Sources
from omega_qvla.report.words import (
    NO_BREAK,
    condition_words,
    error_words,
    listing,
    points,
    quantity,
    row_name,
    share,
    size_words,
)
from omega_qvla.results.rows import Row

SIGNIFICANT = 0.05
_FEW = 3
"""Rivals that are named one by one."""


@dataclass(frozen=True)
class Summary:
    """The words at the top of a report; facts are (figure, what it is)."""

    headline: str
    sentences: tuple[str, ...]
    facts: tuple[tuple[str, str], ...] = ()


def summarise(sources: Sources) -> Summary:
    """Headline and sentences of a report."""
    chosen = _chosen(sources.results)
    sentences = [] if chosen is None else _about(chosen, sources.results)
    sentences += _speed(sources)
    if chosen is None or not sentences:
        return Summary(_plain_headline(sources), tuple(sentences or _inventory(sources)))
    return Summary(
        _headline(chosen, sources.results), tuple(sentences), tuple(_facts(chosen, sources))
    )


def _facts(row: Row, sources: Sources) -> list[tuple[str, str]]:
    """The few figures that most readers came for."""
    facts: list[tuple[str, str]] = []
    reference = _reference(row, sources.results)
    condition = condition_words(row.condition)
    if row.success_mean is not None:
        beside = ""
        if reference is not None and reference.success_mean is not None:
            beside = f"; full precision {share(reference.success_mean)}"
        count = quantity(row.episodes, "episode")
        facts.append((share(row.success_mean), f"of {count} solved, {condition}{beside}"))
    if row.action_error is not None and row.noise_floor:
        floor = f"the policy's own spread is {error_words(row.noise_floor)}"
        facts.append((error_words(row.action_error), f"action error, {condition}; {floor}"))
    if row.checkpoint_bytes and reference is not None and reference.checkpoint_bytes:
        before = size_words(reference.checkpoint_bytes)
        facts.append((size_words(row.checkpoint_bytes), f"on disk; full precision {before}"))
    for source, speeds in sources.policy_speeds:
        slow = next((speed for speed in speeds if speed.precision in ("fp32", "bf16")), None)
        fast = next((speed for speed in speeds if speed is not slow and speed.total_ms > 0), None)
        if slow is not None and fast is not None:
            ratio = f"{slow.total_ms / fast.total_ms:.1f}×"
            facts.append((ratio, f"as fast as {slow.precision}: {fast.policy}, {source.machine}"))
    return facts


def _chosen(results: Sequence[Row]) -> Row | None:
    """The row the words are about."""
    rows = [row for row in results if row.realizable and not row.is_full_precision]
    rows = [row for row in rows if row.policy == rows[0].policy]
    four = [row for row in rows if row.bits_per_weight is None or row.is_four_bits] or rows
    finished = [row for row in four if not row.unfinished] or four
    plain = [row for row in finished if row.condition == "plain"] or finished
    if not plain:
        return None
    # Closed loop says more than open loop: where both are there, of those that were simulated.
    pool = [row for row in plain if row.success_mean is not None] or plain
    measured = [row for row in pool if row.action_error is not None]
    return min(measured, key=lambda row: _worst(row, finished)) if measured else pool[0]


def _worst(row: Row, results: Sequence[Row]) -> float:
    """The largest action error of a row's recipe over the conditions."""
    about = row.recipe, row.scope
    return max(r.action_error or 0.0 for r in results if (r.recipe, r.scope) == about)


def _reference(row: Row, results: Sequence[Row]) -> Row | None:
    """Full precision in the same condition, or plain: injected outliers change no function."""
    same = (row.policy, row.scope or "all")
    found = {
        other.condition: other
        for other in reversed(results)
        if other.is_full_precision and (other.policy, other.scope or "all") == same
    }
    return found.get(row.condition) or found.get("plain")


def _headline(row: Row, results: Sequence[Row]) -> str:
    reference = _reference(row, results)
    several = len({other.policy for other in results}) > 1
    name = f"{row_name(row)} on {row.policy}" if several else row_name(row)
    if (
        row.success_mean is not None
        and reference is not None
        and reference.success_mean is not None
    ):
        pair = (
            f"{share(row.success_mean)} solved, {share(reference.success_mean)} in full precision"
        )
        smaller = _smaller(row, reference)
        return f"{name}: {pair}" + (f", {smaller}" if smaller else "")
    if row.success_mean is not None:
        return f"{name}: {share(row.success_mean)} of episodes solved"
    if row.action_error is not None and row.noise_floor:
        return (
            f"{name}: action error {error_words(row.action_error)}, "
            f"{_relation(row.action_error, row.noise_floor)}"
        )
    return f"{row_name(row)} on {row.policy}"


def _smaller(row: Row, reference: Row) -> str:
    if not row.checkpoint_bytes or not reference.checkpoint_bytes:
        return ""
    saved = 1 - row.checkpoint_bytes / reference.checkpoint_bytes
    if abs(saved) < 0.005:
        return "of the same size"
    return f"{100 * abs(saved):.0f}{NO_BREAK}% {'smaller' if saved >= 0 else 'larger'}"


def _relation(error: float, floor: float) -> str:
    if error < floor:
        return (
            f"{floor / error:.0f} times below the policy's own spread" if error else "none at all"
        )
    return f"{error / floor:.1f} times the policy's own spread"


def _about(chosen: Row, results: Sequence[Row]) -> list[str]:
    """What was found of the chosen recipe under every condition, and how its rivals did."""
    mine = [
        row
        for row in results
        if (row.policy, row.recipe, row.scope) == (chosen.policy, chosen.recipe, chosen.scope)
    ]
    sentences = [sentence for row in mine for sentence in _closed_loop(row, results)]
    for row in mine:
        if row.action_error is not None and row.noise_floor:
            sentences.append(
                f"Its action error ({condition_words(row.condition)}) is "
                f"{error_words(row.action_error)}, {_relation(row.action_error, row.noise_floor)}."
            )
        sentences += _rivals(row, results)
    reference = _reference(chosen, results)
    if reference is not None and chosen.checkpoint_bytes and reference.checkpoint_bytes:
        sentences.append(
            f"On disk it takes {size_words(chosen.checkpoint_bytes)} instead of "
            f"{size_words(reference.checkpoint_bytes)}."
        )
    if any(row.smoke and row.episodes for row in mine):
        sentences.append(
            "With fewer than 100 episodes per task these success rates are a smoke test, not a "
            "measurement."
        )
    return sentences


def _closed_loop(row: Row, results: Sequence[Row]) -> list[str]:
    if row.success_mean is None or row.success_ci95 is None:
        return []
    low, high = row.success_ci95
    text = (
        f"{row_name(row)} ({condition_words(row.condition)}) solves {row.solved} of {row.episodes} "
        f"episodes, {share(row.success_mean)} (95 % interval {share(low)} to {share(high)})"
    )
    reference = _reference(row, results)
    if reference is not None and reference.success_mean is not None:
        text += f"; full precision {reference.solved} of {reference.episodes}"
    paired = row.paired_vs_reference
    if paired is not None:
        low, high = paired.ci95
        p_value = paired.mcnemar_p
        text += (
            f". On the same seeds that is {points(paired.difference)} points "
            f"({points(low)} to {points(high)}, McNemar's exact p = {p_value:.2g}): "
            + _verdict(paired.difference, p_value)
        )
    return [f"{text}."]


def _verdict(difference: float, p_value: float) -> str:
    if p_value >= SIGNIFICANT:
        return "no difference is shown"
    return "a loss that chance does not explain" if difference < 0 else "a gain"


def _rivals(row: Row, results: Sequence[Row]) -> list[str]:
    """How the other recipes did under the same condition, best first."""
    others = [
        other
        for other in results
        if other.policy == row.policy
        and other.condition == row.condition
        and (other.scope or "all") == (row.scope or "all")
        and other.recipe != row.recipe
        and not other.is_full_precision
        and other.action_error is not None
    ]
    if not others or row.action_error is None:
        return []
    others.sort(key=lambda other: other.action_error or 0.0)
    told = [f"{row_name(other)} {error_words(other.action_error)}" for other in others]
    where = f"Beside it, {condition_words(row.condition)}"
    if len(told) <= _FEW:
        return [f"{where}: {listing(told)}."]
    better = sum((other.action_error or 0.0) < row.action_error for other in others)
    rank = f"{better} of them smaller" if better else "none of them smaller"
    return [f"{where}: {len(told)} recipes from {told[0]} to {told[-1]}, {rank}."]


def _speed(sources: Sources) -> list[str]:
    sentences: list[str] = []
    for source, rows in sources.policy_speeds:
        reference = next((row for row in rows if row.precision in ("fp32", "bf16")), None)
        for row in rows:
            if reference is None or row is reference or row.total_ms <= 0:
                continue
            ratio = reference.total_ms / row.total_ms
            sentences.append(
                f"One action chunk of {row.policy} takes {row.total_ms:,.0f} ms in {row.precision} "
                f"and {reference.total_ms:,.0f} ms in {reference.precision} ({ratio:.1f} times, "
                f"{source.machine})."
            )
    return sentences


def _plain_headline(sources: Sources) -> str:
    if sources.diagnostics:
        first = sources.diagnostics[0]
        return f"Inside {first.recipe} on {first.policy}"
    if sources.results:
        return f"Results of {sources.results[0].policy}"
    if sources.policy_speeds or sources.kernel_speeds:
        return "Speed"
    return "Memory"


def _inventory(sources: Sources) -> list[str]:
    sentences = [
        f"{found.recipe} ({condition_words(found.condition)}) has an action error of "
        f"{error_words(found.action_error)}, {_relation(found.action_error, found.noise_floor)}, "
        f"over {found.observations} held-out observations."
        for found in sources.diagnostics
        if found.noise_floor > 0
    ]
    return sentences or ["No quantized policy was compared with full precision in these files."]
