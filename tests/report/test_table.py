from __future__ import annotations

import pytest

from omega_qvla.errors import ResultError
from omega_qvla.report.table import (
    human_bytes,
    kernel_table,
    latency_table,
    markdown,
    results_table,
    task_table,
)
from omega_qvla.results.reading import load_comparison
from omega_qvla.results.speed import Contention, KernelSummary

UNMEASURED = ("success_mean", "success_ci95", "action_error", "noise_floor", "smoothness")
UNMEASURED += ("checkpoint_bytes", "resident_bytes", "ms_per_chunk")


def test_table_says_what_was_measured(saved):
    table = results_table(load_comparison(saved).rows)
    cells = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert [line["recipe"] for line in cells] == ["fp32", "omega-w4a4-static", "fp32", "rtn *"]
    assert cells[0]["success (95 %)"] == "95.0 % [89.0, 100.0] 95/100"
    assert cells[1]["vs full precision"] == "-2.0 [-5.0, +1.0] p=0.25"
    assert cells[0]["vs full precision"] == "–"
    assert cells[0]["action error"] == "0"
    assert cells[3]["action error"] == "0.8"
    assert cells[1]["checkpoint"] == "3.90 MB"
    assert cells[1]["ms/chunk"] == "31.2"
    notes = " ".join(table.notes)
    assert all(word in notes for word in ("simulated", "smoke test", "stress", "McNemar"))


def test_what_was_not_measured_is_a_dash_not_a_number(row, read):
    missing = dict.fromkeys(UNMEASURED)
    table = results_table(read(row("fp32", success={}, smoke=False, **missing)))
    assert table.rows[0][2:] == ("–",) * 8
    assert table.notes == ()


def test_tasks_have_a_column_each(row, read):
    table = task_table(read(row("fp32"), row("rtn", success={"b": [1, 2]})))
    assert table.header == ("recipe", "condition", "a", "b")
    assert table.rows == (("fp32", "plain", "45/50", "45/50"), ("rtn", "plain", "–", "1/2"))


def test_several_policies_and_scopes_are_told_apart(row, read):
    table = results_table(read(row("rtn", scope="paper"), row("rtn", policy="other")))
    assert [line[0] for line in table.rows] == ["invented: rtn (paper)", "other: rtn"]


def test_markdown_is_aligned_and_escapes_bars(row, read):
    text = markdown(task_table(read(row("a|b"), row("a much longer name"))))
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == {"|", "-"}
    assert "a\\|b" in lines[2]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "–"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994_000, "9.99 MB"),
        (9_996_000, "10.0 MB"),
        (20_100_000, "20.1 MB"),
        (123_456_789, "123 MB"),
        (7_200_000_000, "7.20 GB"),
    ],
)
def test_bytes_have_three_digits(count, text):
    assert human_bytes(count) == text


def test_bad_files_are_refused_with_the_place(row, save, tmp_path):
    with pytest.raises(ResultError, match="no such file"):
        load_comparison(tmp_path / "missing.json")
    broken = tmp_path / "broken.json"
    for text, message in [("{", "not JSON"), ("[]", "no saved result"), ("{}", "no known kind")]:
        broken.write_text(text)
        with pytest.raises(ResultError, match=message):
            load_comparison(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match="not JSON"):
        load_comparison(broken)
    with pytest.raises(ResultError, match="schema 2"):
        load_comparison(save(row("fp32"), schema=2))
    with pytest.raises(ResultError, match="no rows"):
        load_comparison(save())
    with pytest.raises(ResultError, match=r"run\.json, rows\.1: .* dictionary"):
        load_comparison(save(row("fp32"), 3))
    lacking = row("rtn")
    del lacking["action_error"]
    with pytest.raises(ResultError, match=r"rows\.1\.action_error: Field required"):
        load_comparison(save(row("fp32"), lacking))
    for change, place in (
        ({"success": 3}, "success"),
        ({"success": {"a": [1]}}, r"success\.a\.1"),
        ({"success_mean": "most"}, "success_mean"),
        ({"episodes": 7}, "7 episodes, but 100 over all tasks"),
    ):
        with pytest.raises(ResultError, match=place):
            load_comparison(save(row("fp32", **change)))


def test_a_kernel_line_has_a_dash_for_a_peer_that_was_not_measured() -> None:
    entry = {"site": "layer", "gmacs": 123.4, "vs_fp32": 7.44, "vs_int8_dynamic": 1.326}
    full = {**entry, "vs_llama_cpp": 2.96, "share_of_peak": 0.523, "share_of_vpmaddubsw_peak": 0.65}
    table = kernel_table([KernelSummary(**entry), KernelSummary(**full)])
    assert table.rows[0] == ("layer", "123", "7.4×", "1.33×", "–", "–", "–")
    assert table.rows[1] == ("layer", "123", "7.4×", "1.33×", "3.0×", "52%", "65%")
    assert len(table.header) == 7


def test_latency_is_judged_by_the_busy_tail_over_the_idle_median() -> None:
    entry = {
        "threads": 2, "calls": 400, "idle_p50_us": 300.4, "idle_p99_us": 501.0,
        "busy_p50_us": 280.0, "busy_p99_us": 600.8, "busy_p99_over_idle_p50": 2.0,
    }  # fmt: skip
    (line,) = latency_table([Contention(**entry)]).rows
    assert line == ("2", "300", "501", "280", "601", "2.0×")
