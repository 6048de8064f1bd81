"""Recipes on the backbone with real weights."""

from __future__ import annotations

from omega_qvla.results.document import Count, Document, Measured, MeasuredInterval, Part
from omega_qvla.results.rows import ErrorRatio


class BackboneRow(Part):
    """One recipe.

    Attributes:
        recipe: its name.
        recipe_hash: content hash of the recipe as it was run.
        realizable: false: a simulation, whose integers cannot be multiplied as stored.
        kl: Kullback-Leibler divergence of the next token's distribution from that of full
            precision, KL(full precision ‖ recipe) in nats, mean over tokens.
        kl_ci95: bootstrap over the chunks of text.
        kls: what each chunk adds to `kl`; they sum to it.
        kl_vs_default: `kl` over that of the default recipe on the same chunks; absent without that
            row and in it.
        perplexity: of the text.
        bits_per_weight: bits stored for the decoder's weights over their number.
        decoder_bytes: all that is stored for the decoder's linears, transforms included.
        quantize_s: seconds that quantizing took.
        ms_per_chunk: median time of one chunk through the decoder; a simulation's says nothing.
    """

    recipe: str
    recipe_hash: str
    realizable: bool
    kl: Measured
    kl_ci95: MeasuredInterval
    kls: list[Measured]
    kl_vs_default: ErrorRatio | None = None
    perplexity: Measured
    bits_per_weight: Measured
    decoder_bytes: Count
    quantize_s: Measured
    ms_per_chunk: Measured


class BackboneBench(Document):
    """Recipes on SmolLM2-135M.

    Attributes:
        model: name of the model file.
        weights: SHA-256 of the weights, dequantized.
        calibration, text: SHA-256 of the tokens calibrated on and measured on.
        split: which part of the text was measured on: `test`, or `selection`, on which recipes
            are chosen.
        chunks, tokens: how many were measured on, and how many tokens each has.
        perplexity: of the text in full precision.
        ms_per_chunk: median time of one chunk through the decoder in full precision.
        threads: that computed.
        machine: the processor.
        library: what measured, with its version.
        command: what to type for the same rows.
        rows: one per recipe.
    """

    model: str
    weights: str
    calibration: str
    text: str
    split: str
    chunks: Count
    tokens: Count
    perplexity: Measured
    ms_per_chunk: Measured
    threads: Count
    machine: str
    library: str
    command: str
    rows: list[BackboneRow]
