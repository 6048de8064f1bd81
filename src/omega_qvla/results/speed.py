"""Measured speed of kernels and policies, and the least time that a device allows."""

from __future__ import annotations

from typing import Literal

from omega_qvla.results.document import Count, Document, Measured, Part


class LayerRate(Part):
    """Of a layer's row what a roofline is drawn from, on a processor or a GPU.

    Attributes:
        kernel: what computed.
        M: rows.
        gmacs: 10⁹ multiply-adds a second.
        weights_in_cache: false: every call reads another copy of the weight.
    """

    kernel: str
    M: Count
    gmacs: Measured
    weights_in_cache: bool = False


class LayerRates(Document):
    """Of measured layers what a roofline is drawn from.

    Attributes:
        machine: the processor, or the GPU.
        threads: of the processor; a GPU has none.
        peak_gmacs: by instruction set, with operands in registers.
        memory_gbytes: 10⁹ bytes a second.
        rows: the layers.
    """

    machine: str
    threads: Count | None = None
    peak_gmacs: dict[str, Measured]
    memory_gbytes: Measured
    rows: list[LayerRate]


class KernelRow(Part):
    """One layer and one peer.

    Attributes:
        site: the layers it belongs to.
        M, N, K: the layer: y [M, N] = x [M, K] Wᵀ.
        group: input channels per weight scale; null: one scale per output.
        activation: `static` or `per_token` scales.
        kernel: instruction set of ours, `torch fp32`, `torch int8 dynamic` or, with `--llama-cpp`,
            `llama.cpp Q4_0`.
        threads: of every peer.
        rounds: turns that every peer took.
        weights_in_cache: false: every call reads another copy of the weight.
        median_us: median over `rounds`, peers taking turns.
        gmacs: 10⁹ multiply-adds a second.
        vs_fp32, vs_int8_dynamic: how many times faster than that peer.
        vs_llama_cpp: the same; null where it was not measured or its format cannot hold the layer.
        share_of_peak, share_of_vpmaddubsw_peak: of what the path's own instructions, or AVX2's,
            reach with operands in registers; ours only.
    """

    site: str
    M: Count
    N: Count
    K: Count
    group: Count | None
    activation: str
    kernel: str
    threads: Count
    rounds: Count
    weights_in_cache: bool
    median_us: Measured
    gmacs: Measured
    vs_fp32: Measured
    vs_int8_dynamic: Measured
    vs_llama_cpp: Measured | None
    share_of_peak: Measured | None
    share_of_vpmaddubsw_peak: Measured | None


class KernelSummary(Part):
    """All layers of a site: sums of medians.

    Attributes:
        site: the layers.
        gmacs, vs_fp32, vs_int8_dynamic: as of a row.
        vs_llama_cpp, share_of_peak, share_of_vpmaddubsw_peak: as of a row; absent where a layer of
            the site has none.
    """

    site: str
    gmacs: Measured
    vs_fp32: Measured
    vs_int8_dynamic: Measured
    vs_llama_cpp: Measured | None = None
    share_of_peak: Measured | None = None
    share_of_vpmaddubsw_peak: Measured | None = None


class Contention(Part):
    """A call of about 0.3 ms, alone and with every core kept busy by other processes.

    Attributes:
        threads: of the call.
        calls: how many were made.
        idle_p50_us, idle_p99_us: alone.
        busy_p50_us, busy_p99_us: with every core busy.
        busy_p99_over_idle_p50: what a robot sees at worst, over what it is used to.
    """

    threads: Count
    calls: Count
    idle_p50_us: Measured
    idle_p99_us: Measured
    busy_p50_us: Measured
    busy_p99_us: Measured
    busy_p99_over_idle_p50: Measured


class KernelBench(Document):
    """What `bench kernels` measured.

    Attributes:
        machine: the processor.
        threads: of every peer.
        torch, library: versions.
        peak_gmacs: by instruction set, with operands in registers.
        memory_gbytes: 10⁹ bytes a second.
        int8_engine: of torch.
        llama_cpp: its version; null where it was not measured.
        rows: one per layer and peer.
        summary: one per site.
        contention: one per number of threads.
    """

    machine: str
    threads: Count
    torch: str
    library: str
    peak_gmacs: dict[str, Measured]
    memory_gbytes: Measured
    int8_engine: str
    llama_cpp: str | None
    rows: list[KernelRow]
    summary: list[KernelSummary]
    contention: list[Contention]


class PolicySpeed(Part):
    """One policy in one precision.

    Attributes:
        policy: what was loaded.
        precision: `fp32` or `w4a4`.
        source: where from.
        threads: of torch and of the integer kernels.
        kernel: `torch`, or the integer kernels.
        vision_ms, prefix_ms, denoise_ms, total_ms: medians of one chunk and its parts.
        rounds: chunks that were timed.
        load_s: load, hash check included, files in the page cache.
        weight_bytes_read: weights read for one chunk, the action head once per step.
        checkpoint_bytes: on disk; for `random:` policies what the bf16 checkpoint would take.
        prefix_tokens, horizon, steps: its size.
        peak_rss_bytes: high-water mark of the whole process, libraries included.
    """

    policy: str
    precision: str
    source: str
    threads: Count
    kernel: str
    vision_ms: Measured
    prefix_ms: Measured
    denoise_ms: Measured
    total_ms: Measured
    rounds: Count
    load_s: Measured
    weight_bytes_read: Count
    checkpoint_bytes: Count
    prefix_tokens: Count
    horizon: Count
    steps: Count
    peak_rss_bytes: Count | None


class PolicyBench(Document):
    """What `bench policy` measured.

    Attributes:
        machine: the processor.
        threads: of every row.
        torch, library: versions.
        rows: one per precision.
    """

    machine: str
    threads: Count
    torch: str
    library: str
    rows: list[PolicySpeed]


class DeviceFigures(Part):
    """Published figures of a device, dense, a multiply-add being two operations.

    Attributes:
        key: what `--roofline` calls it.
        title: what it is called.
        memory_gbytes: 10⁹ bytes a second.
        int8_tops, bf16_tflops: 10¹² operations a second.
        source: where the figures are from.
    """

    key: str
    title: str
    memory_gbytes: Measured
    int8_tops: Measured
    bf16_tflops: Measured
    source: str


class LeastTime(Part):
    """The least time of one policy in one precision.

    Attributes:
        policy, precision: what was counted; `bf16`, or `w4a4`.
        vision_ms, prefix_ms, denoise_ms, total_ms: bounds, not times.
        bound_by: of each part `memory` or `compute`.
        weight_bytes_read: weights read for one chunk.
        integer_gmacs, float_gmacs: 10⁹ multiply-adds of quantized linears, and of everything else.
    """

    policy: str
    precision: str
    vision_ms: Measured
    prefix_ms: Measured
    denoise_ms: Measured
    total_ms: Measured
    bound_by: dict[str, str]
    weight_bytes_read: Count
    integer_gmacs: Measured
    float_gmacs: Measured


class Roofline(Document):
    """The least time a chunk can take on a device: a calculation.

    Attributes:
        library: version.
        calculation: nothing was measured.
        device: the device.
        weights: `stored`: the artifact's own bytes; else for which recipe they were predicted.
        prefix_tokens, horizon, steps: the chunk's size.
        rows: one per precision.
    """

    library: str
    calculation: Literal[True]
    device: DeviceFigures
    weights: str
    prefix_tokens: Count
    horizon: Count
    steps: Count
    rows: list[LeastTime]
