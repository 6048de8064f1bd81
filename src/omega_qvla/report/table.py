"""A saved comparison as plain text: rows of strings, and Markdown.

The caller decides how to print; nothing here knows a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omega_qvla.results.diagnostics import Diagnostics
from omega_qvla.results.rows import Row
from omega_qvla.results.speed import Contention, KernelSummary, PolicySpeed, Roofline

MISSING = "–"
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@dataclass(frozen=True)
class Table:
    """A heading, rows of equal length, and notes that belong below."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def results_table(results: Sequence[Row]) -> Table:
    """One line per recipe and condition: success, error, smoothness, bytes, time."""
    names = _names(results)
    header = ("recipe", "condition", "success (95 %)", "vs full precision", "action error")
    header += ("noise floor", "jerk ratio", "checkpoint", "resident", "ms/chunk")
    rows = tuple(
        (name, result.condition, *_measured(result))
        for name, result in zip(names, results, strict=True)
    )
    return Table(header, rows, _notes(results))


def task_table(results: Sequence[Row]) -> Table:
    """Successes and episodes of every task, one line per recipe and condition."""
    tasks = list(dict.fromkeys(task for result in results for task in result.success))
    rows = tuple(
        (name, result.condition, *(_count(result.success.get(task)) for task in tasks))
        for name, result in zip(_names(results), results, strict=True)
    )
    return Table(("recipe", "condition", *tasks), rows)


def markdown(table: Table) -> str:
    """A Markdown table, padded so that it also reads well as plain text, and its notes."""
    lines = [_cells(row) for row in (table.header, *table.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    text = [_join(line, widths) for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([*text, *([""] if notes else []), *notes]) + "\n"


def human_bytes(count: int | None) -> str:
    """Decimal units with three significant digits: 4200000 → ``4.20 MB``."""
    if count is None:
        return MISSING
    for size, unit in _UNITS:
        if count >= size:
            value = count / size
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    return f"{count} B"


def _names(results: Sequence[Row]) -> list[str]:
    """Recipe names, marked when simulated and prefixed with the policy when there are several."""
    several = len({result.policy for result in results}) > 1
    return [
        (f"{result.policy}: " if several else "")
        + result.recipe
        + ("" if result.scope in (None, "all") else f" ({result.scope})")
        + simulated_mark(result)
        + (", unfinished" if result.unfinished else "")
        for result in results
    ]


def simulated_mark(result: Row) -> str:
    """What follows the name of a recipe whose integers cannot be multiplied as stored."""
    return "" if result.realizable else " *"


def _measured(result: Row) -> tuple[str, ...]:
    return (
        _success(result),
        _difference(result),
        error_text(result.action_error),
        error_text(result.noise_floor),
        MISSING if result.smoothness is None else f"{result.smoothness:.2f}",
        human_bytes(result.checkpoint_bytes),
        human_bytes(result.resident_bytes),
        MISSING if result.ms_per_chunk is None else f"{result.ms_per_chunk:.1f}",
    )


def _success(result: Row) -> str:
    if result.success_mean is None or result.success_ci95 is None:
        return MISSING
    low, high = result.success_ci95
    interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * result.success_mean:.1f} % {interval} {result.solved}/{result.episodes}"


def _difference(result: Row) -> str:
    paired = result.paired_vs_reference
    if paired is None:
        return MISSING
    low, high = paired.ci95
    interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * paired.difference:+.1f} {interval} p={paired.mcnemar_p:.2g}"


def error_text(value: float | None) -> str:
    """An action error with three significant digits."""
    return MISSING if value is None else "0" if value == 0 else f"{value:.3g}"


def _count(counts: tuple[int, int] | None) -> str:
    return MISSING if counts is None else f"{counts[0]}/{counts[1]}"


def _notes(results: Sequence[Row]) -> tuple[str, ...]:
    notes: list[str] = []
    if any(not result.realizable for result in results):
        notes.append("recipes marked *: simulated, their integers cannot be multiplied as stored")
    if any(result.paired_vs_reference for result in results):
        notes.append(
            "vs full precision: points on the same seeds, 95 % interval, McNemar's exact p"
        )
    if any(result.condition.startswith("stress") for result in results):
        notes.append("stress: the same function with planted outliers, not a real checkpoint")
    if any(result.smoke and result.episodes for result in results):
        notes.append("smoke test: fewer than 100 episodes per task, too few for a claim")
    return tuple(notes)


def _cells(row: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in row]


def _join(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "| " + " | ".join(padded) + " |"


def kernel_table(summary: Sequence[KernelSummary]) -> Table:
    """One line per site of ``bench kernels``: sums over its layers."""
    header = ("layers of", "GMAC/s", "vs torch fp32", "vs torch int8", "vs llama.cpp Q4_0")
    header += ("of peak", "of vpmaddubsw")
    rows = tuple(
        (
            entry.site,
            f"{entry.gmacs:.0f}",
            f"{entry.vs_fp32:.1f}×",
            f"{entry.vs_int8_dynamic:.2f}×",
            MISSING if entry.vs_llama_cpp is None else f"{entry.vs_llama_cpp:.1f}×",
            _percent(entry.share_of_peak),
            _percent(entry.share_of_vpmaddubsw_peak),
        )
        for entry in summary
    )
    return Table(header, rows)


def latency_table(contention: Sequence[Contention]) -> Table:
    """One line per number of threads: a brief call alone, and with every core kept busy."""
    header = ("threads", "idle median µs", "idle p99 µs", "busy median µs", "busy p99 µs")
    header += ("busy p99 / idle median",)
    return Table(
        header,
        tuple(
            (
                str(entry.threads),
                f"{entry.idle_p50_us:.0f}",
                f"{entry.idle_p99_us:.0f}",
                f"{entry.busy_p50_us:.0f}",
                f"{entry.busy_p99_us:.0f}",
                f"{entry.busy_p99_over_idle_p50:.1f}×",
            )
            for entry in contention
        ),
    )


def policy_table(rows: Sequence[PolicySpeed]) -> Table:
    """One line per precision of ``bench policy``."""
    header = ("policy", "precision", "kernel", "vision ms", "prefix ms", "denoise ms", "chunk ms")
    header += ("peak resident", "load s", "checkpoint", "weights read")
    return Table(
        header,
        tuple(
            (
                row.policy,
                row.precision,
                row.kernel,
                f"{row.vision_ms:.0f}",
                f"{row.prefix_ms:.0f}",
                f"{row.denoise_ms:.0f}",
                f"{row.total_ms:.0f}",
                human_bytes(row.peak_rss_bytes),
                f"{row.load_s:.1f}",
                human_bytes(row.checkpoint_bytes),
                human_bytes(row.weight_bytes_read),
            )
            for row in rows
        ),
    )


def bound_table(found: Roofline) -> Table:
    """One line per precision of ``bench policy --roofline``."""
    header = ("policy", "precision", "vision ms", "prefix ms", "denoise ms", "chunk ms")
    device = found.device
    return Table(
        (*header, "weights read", "integer GMAC", "other GMAC"),
        tuple(
            (
                row.policy,
                row.precision,
                f"{row.vision_ms:.2f} ({row.bound_by['vision']})",
                f"{row.prefix_ms:.2f} ({row.bound_by['prefix']})",
                f"{row.denoise_ms:.2f} ({row.bound_by['denoise']})",
                f"{row.total_ms:.2f}",
                human_bytes(row.weight_bytes_read),
                f"{row.integer_gmacs:.0f}",
                f"{row.float_gmacs:.0f}",
            )
            for row in found.rows
        ),
        (
            f"a calculation, not a measurement: nothing is faster than this on {device.title}",
            f"{device.memory_gbytes:g} GB/s, int8 {device.int8_tops:g} TOPS, bfloat16 "
            f"{device.bf16_tflops:g} TFLOPS ({device.source})",
            f"weights of W4A4 as {found.weights}; {found.prefix_tokens} prefix tokens, "
            f"horizon {found.horizon}, {found.steps} denoising steps",
        ),
    )


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{share:.0%}"


def site_table(found: Diagnostics) -> Table:
    """The sites of saved diagnostics by component: where the error is and what the ranges are."""
    header = ("component", "sites", "worst site", "its error", "adds itself")
    header += ("peak/rms before", "after the transform")
    rows: list[tuple[str, ...]] = []
    for component in dict.fromkeys(site.component for site in found.sites):
        sites = [site for site in found.sites if site.component == component]
        worst = max(sites, key=lambda site: site.worst_local or 0.0)
        before = max(crest(site.absmax, site.rms) for site in sites)
        after = max(crest(site.transformed_absmax, site.transformed_rms) for site in sites)
        rows.append(
            (
                component,
                str(len(sites)),
                worst.name,
                error_text(worst.worst or 0.0),
                error_text(worst.worst_local or 0.0),
                f"{before:.1f}",
                f"{after:.1f}",
            )
        )
    action = f"action error {error_text(found.action_error)}"
    floor = f"noise floor {error_text(found.noise_floor)}"
    return Table(header, tuple(rows), (f"{action}, {floor}",))


def crest(largest: Sequence[float], rms: Sequence[float]) -> float:
    """Largest value over root mean square, the worst step's; 0 where nothing was seen."""
    pairs = zip(largest, rms, strict=True)
    return max((peak / mean for peak, mean in pairs if mean > 0), default=0.0)
