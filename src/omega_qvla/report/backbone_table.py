"""Recipes on the backbone with real weights, one line each."""

from __future__ import annotations

from omega_qvla.report.table import MISSING, Table, human_bytes
from omega_qvla.results.backbone import BackboneBench, BackboneRow


def backbone_table(found: BackboneBench) -> Table:
    """KL and perplexity of every recipe, with what it stores."""
    header = ("recipe", "bits/weight", "decoder", "KL", "95 %", "over default's", "95 %")
    rows = tuple(_line(row) for row in found.rows)
    notes = (
        f"{found.model}, {found.chunks} chunks of {found.tokens} tokens ({found.split}); "
        f"perplexity in full precision {found.perplexity:.2f}",
        "KL of the next token's distribution from full precision's, nats per token; intervals: "
        "bootstrap over chunks, those of ratios paired",
    )
    if any(not row.realizable for row in found.rows):
        notes += ("*: simulated, its integers cannot be multiplied as stored",)
    return Table((*header, "perplexity"), rows, notes)


def _line(row: BackboneRow) -> tuple[str, ...]:
    versus = row.kl_vs_default
    return (
        row.recipe + ("" if row.realizable else " *"),
        f"{row.bits_per_weight:.2f}",
        human_bytes(row.decoder_bytes),
        f"{row.kl:.3f}",
        f"[{row.kl_ci95[0]:.3f}, {row.kl_ci95[1]:.3f}]",
        MISSING if versus is None else f"{versus.ratio:.2f}",
        MISSING if versus is None else f"[{versus.ci95[0]:.2f}, {versus.ci95[1]:.2f}]",
        f"{row.perplexity:,.1f}",
    )
