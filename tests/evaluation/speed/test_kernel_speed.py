"""What the kernel benchmark reports follows from what it measured."""

from __future__ import annotations

import pytest

from omega_qvla.errors import RecipeError, ResourceError
from omega_qvla.evaluation.speed import kernel_speed, timing
from omega_qvla.evaluation.speed.kernel_speed import Shape, measure_shape, summarise
from omega_qvla.runtime.kernels import cpu

needs_kernels = pytest.mark.skipif(
    cpu.instruction_set() is None, reason="installed without a C++ compiler"
)


def test_peers_take_turns_and_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(timing, "perf_counter", lambda: clock[0])

    def call(name: str, seconds: float) -> None:
        order.append(name)
        clock[0] += seconds

    calls = {"a": lambda: call("a", 1.0), "b": lambda: call("b", 3.0)}
    times = timing.take_turns(calls, rounds=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert times == {"a": [1.0, 1.0], "b": [3.0, 3.0]}
    assert timing.medians({"a": [5.0, 1.0, 2.0]}) == {"a": 2.0}
    assert timing.percentile([float(i) for i in range(100)], 0.99) == 99.0


def test_no_round_is_refused() -> None:
    with pytest.raises(RecipeError, match="rounds=0"):
        timing.take_turns({}, rounds=0)


@needs_kernels
@pytest.mark.parametrize("group", [None, 64])
def test_a_row_per_peer_with_ratios_of_the_medians(group: int | None) -> None:
    shape = Shape("test", 3, 40, 70, static=True, group=group)
    peaks = {name: 1e9 for name in cpu.instruction_sets()}
    rows = measure_shape(shape, rounds=1, threads=1, peaks=peaks, cold_bytes=1 << 12)
    ours, fp32, int8 = rows
    assert [row["kernel"] for row in rows[1:]] == ["torch fp32", "torch int8 dynamic"]
    assert ours["kernel"] == cpu.instruction_set()
    assert ours["vs_fp32"] == pytest.approx(fp32["median_us"] / ours["median_us"])
    assert ours["vs_int8_dynamic"] == pytest.approx(int8["median_us"] / ours["median_us"])
    assert ours["gmacs"] == pytest.approx(3 * 40 * 70 / ours["median_us"] / 1e3)
    assert ours["share_of_peak"] == pytest.approx(ours["gmacs"])
    assert fp32["share_of_peak"] is None and not ours["weights_in_cache"]
    assert {"M", "N", "K", "threads", "median_us"} <= set(ours)


def test_a_summary_adds_up_times_and_work() -> None:
    def row(kernel: str, macs: int, microseconds: float) -> dict:
        gmacs = macs / microseconds / 1e3
        return {
            "site": "s", "M": macs, "N": 1, "K": 1, "kernel": kernel, "median_us": microseconds,
            "gmacs": gmacs, "vs_fp32": 8.0 if macs == 1000 else 2.0, "vs_int8_dynamic": 1.0,
            "share_of_peak": gmacs / 10, "share_of_vpmaddubsw_peak": None, "vs_llama_cpp": None,
        }  # fmt: skip

    rows = [row("ours", 1000, 1.0), row("ours", 3000, 2.0), row("torch fp32", 1000, 8.0)]
    (entry,) = summarise(rows)
    assert entry["gmacs"] == pytest.approx(4000 / 3.0 / 1e3)
    assert entry["vs_fp32"] == pytest.approx((8.0 * 1.0 + 2.0 * 2.0) / 3.0)
    assert entry["share_of_peak"] == pytest.approx(entry["gmacs"] / 10)
    assert "share_of_vpmaddubsw_peak" not in entry and "vs_llama_cpp" not in entry


@needs_kernels
def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(ResourceError, match="cores"):
        measure_shape(Shape("t", 1, 32, 64), rounds=1, threads=999, peaks={})


def test_without_kernels_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_extension", None)
    with pytest.raises(ResourceError, match=r"g\+\+"):
        measure_shape(Shape("t", 1, 32, 64), rounds=1, threads=1, peaks={})


@needs_kernels
def test_contention_reports_both_conditions() -> None:
    found = kernel_speed.measure_contention(calls=5, threads=1)
    assert found["busy_p99_over_idle_p50"] == pytest.approx(
        found["busy_p99_us"] / found["idle_p50_us"]
    )
