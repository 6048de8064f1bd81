"""What a report says first: a headline, three numbers and a sentence, composed from saved numbers.

They are about one recipe on one policy, under the first of its conditions: the recipe that was
asked for, else the default where it is there, else the only one.  How others did stands in figures
and tables, and never in its place: of several without the default none is at the top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omega_qvla.errors import ResultError, did_you_mean
from omega_qvla.report.sources import Sources
from omega_qvla.report.words import (
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
_FACTS = 3
_BASELINE = "rtn"
"""The recipe that others are compared with in words: round to nearest."""
_FEW_EPISODES = 100
"""Of a row; fewer are told as a count, more as a share."""


@dataclass(frozen=True)
class Summary:
    """The words at the top of a report; facts are (figure, what it is)."""

    headline: str
    sentence: str
    facts: tuple[tuple[str, str], ...] = ()


def summarise(sources: Sources, recipe: str | None = None, default: str | None = None) -> Summary:
    """The words at the top of a report.

    Args:
        recipe: whose rows they are about; it has to be there.
        default: whose they are about where none is asked for and it is there.

    Raises:
        ResultError: the recipe that was asked for has no row; names those that have.
    """
    row = _chosen(sources.results, recipe, default)
    if row is None:
        return _without_rows(sources)
    facts = [*_facts(row, sources.results), *_speed_facts(sources)]
    return Summary(_headline(row, sources.results), _sentence(row, sources), tuple(facts[:_FACTS]))


def sentence_of(results: Sequence[Row], preferred: str) -> str:
    """The result of a comparison in a line, about the preferred recipe where it is there."""
    row = _chosen(results, None, preferred)
    if row is None:
        return f"{_several(results)}; none of them is {preferred}"
    return f"{_headline(row, results)}. {_sentence(row, Sources(results=list(results)))}".strip()


def _chosen(results: Sequence[Row], recipe: str | None, default: str | None) -> Row | None:
    """The row the words are about."""
    rows = [row for row in results if not row.is_full_precision]
    if recipe is not None:
        known = list(dict.fromkeys(row.recipe for row in rows))
        rows = [row for row in rows if row.recipe == recipe]
        if not rows:
            raise ResultError(
                f"these files have no row of the recipe {recipe!r}{did_you_mean(recipe, known)}; "
                f"they have {', '.join(known) or 'none'}"
            )
    candidates = [row for row in rows if row.recipe == default] or rows
    if len({row.recipe for row in candidates}) > 1:
        return None
    finished = [row for row in candidates if not row.unfinished] or candidates
    plain = [row for row in finished if row.condition == "plain"] or finished
    return plain[0] if plain else None


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
    name = f"{row_name(row)} on {row.policy}"
    if row.success_mean is not None:
        text = f"{name}: {_solved(row)} solved"
        if reference is not None and reference.success_mean is not None:
            text += f", {_solved(reference)} in full precision"
        return text
    if row.action_error is not None and row.noise_floor:
        relation = _relation(row.action_error, row.noise_floor)
        return f"{name}: action error {error_words(row.action_error)}, {relation}"
    return name


def _facts(row: Row, results: Sequence[Row]) -> list[tuple[str, str]]:
    reference = _reference(row, results)
    condition = condition_words(row.condition)
    facts: list[tuple[str, str]] = []
    if row.success_mean is not None:
        what = f"{quantity(row.episodes, 'episode')} solved, {condition}"
        if row.success_ci95 is not None:
            low, high = row.success_ci95
            what += f"; 95 % interval {share(low)} to {share(high)}"
        what += "; a smoke test, no measurement" if row.smoke else ""
        facts.append((_solved(row), what))
    if row.action_error is not None:
        what = f"action error, {condition}"
        if row.action_errors:
            what += f", over {quantity(len(row.action_errors), 'held-out observation')}"
        what += f"; noise floor {error_words(row.noise_floor)}" if row.noise_floor else ""
        facts.append((error_words(row.action_error), what))
    if row.checkpoint_bytes:
        what = "on disk"
        if reference is not None and reference.checkpoint_bytes:
            what += f"; full precision {size_words(reference.checkpoint_bytes)}"
        facts.append((size_words(row.checkpoint_bytes), what))
    return facts


def _speed_facts(sources: Sources) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for source, speeds in sources.policy_speeds:
        slow = next((speed for speed in speeds if speed.precision in ("fp32", "bf16")), None)
        fast = next((speed for speed in speeds if speed is not slow and speed.total_ms > 0), None)
        if slow is not None and fast is not None:
            ratio = f"{slow.total_ms / fast.total_ms:.1f}×"
            facts.append((ratio, f"as fast as {slow.precision}: {fast.policy}, {source.machine}"))
    return facts


def _sentence(row: Row, sources: Sources) -> str:
    """How sure one can be of it: seed by seed, or beside round to nearest."""
    paired = row.paired_vs_reference
    if paired is not None:
        low, high = paired.ci95
        return (
            f"Against full precision on the same seeds: {points(paired.difference)} points "
            f"({points(low)} to {points(high)}), {_verdict(paired.difference, paired.mcnemar_p)} "
            f"(McNemar's exact p = {paired.mcnemar_p:.2g})."
        )
    baseline = next(
        (
            other.action_error
            for other in sources.results
            if (other.policy, other.condition, other.recipe)
            == (row.policy, row.condition, _BASELINE)
        ),
        None,
    )
    if baseline is not None and row.recipe != _BASELINE:
        return f"Round to nearest ({_BASELINE}) has an action error of {error_words(baseline)}."
    return ""


def _verdict(difference: float, p_value: float) -> str:
    if p_value >= SIGNIFICANT:
        return "not significantly different"
    return f"significantly {'worse' if difference < 0 else 'better'}"


def _solved(row: Row) -> str:
    if row.episodes < _FEW_EPISODES:
        return f"{row.solved} of {row.episodes}"
    return share(row.success_mean or 0.0)


def _relation(error: float, floor: float) -> str:
    if not error:
        return "none at all"
    if error < floor:
        return f"{floor / error:.0f} times below the policy's own spread"
    return f"{error / floor:.1f} times the policy's own spread"


def _several(results: Sequence[Row]) -> str:
    count = len({row.recipe for row in results if not row.is_full_precision})
    policies = dict.fromkeys(row.policy for row in results)
    return f"{quantity(count, 'recipe')} on {listing(policies)}"


def _without_rows(sources: Sources) -> Summary:
    """Of files without rows of a recipe that the words could be about."""
    facts = tuple(_speed_facts(sources)[:_FACTS])
    found = next((one for one in sources.diagnostics if one.noise_floor > 0), None)
    if found is not None and not sources.results:
        sentence = (
            f"Its action error ({condition_words(found.condition)}) is "
            f"{error_words(found.action_error)}, "
            f"{_relation(found.action_error, found.noise_floor)}, over "
            f"{quantity(found.observations, 'held-out observation')}."
        )
        return Summary(f"Inside {found.recipe} on {found.policy}", sentence, facts)
    sentence = "No quantized policy was compared with full precision in these files."
    if any(not row.is_full_precision for row in sources.results):
        sentence = "Name one of them to put it here: omega-qvla report --recipe NAME."
        return Summary(_several(sources.results), sentence, facts)
    if sources.results:
        return Summary(f"Results of {sources.results[0].policy}", sentence, facts)
    fast = bool(sources.policy_speeds or sources.kernel_speeds)
    return Summary("Speed" if fast else "Memory", "" if fast else sentence, facts)
