from __future__ import annotations

import pytest

from omega_qvla.report.table import (
    comparison_table,
    human_bytes,
    kernel_table,
    latency_table,
    markdown,
    task_table,
)
from omega_qvla.results.rows import ReportError, load_results

UNMEASURED = ("success_mean", "success_ci95", "action_error", "noise_floor", "smoothness")
UNMEASURED += ("checkpoint_bytes", "resident_bytes", "ms_per_chunk")


def test_table_says_what_was_measured(saved):
    table = comparison_table(saved)
    cells = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert [line["recipe"] for line in cells] == ["fp32", "omega-w4a4", "fp32", "rtn *"]
    assert cells[0]["success (95 %)"] == "95.0 % [89.0, 100.0] 95/100"
    assert cells[1]["vs full precision"] == "-2.0 [-5.0, +1.0] p=0.25"
    assert cells[0]["vs full precision"] == "–"
    assert cells[0]["action error"] == "0"
    assert cells[3]["action error"] == "0.8"
    assert cells[1]["checkpoint"] == "3.90 MB"
    assert cells[1]["ms/chunk"] == "31.2"
    notes = " ".join(table.notes)
    assert all(word in notes for word in ("simulated", "smoke test", "stress", "McNemar"))


def test_what_was_not_measured_is_a_dash_not_a_number(row, save):
    missing = dict.fromkeys(UNMEASURED)
    table = comparison_table(save(row("fp32", success={}, smoke=False, **missing)))
    assert table.rows[0][2:] == ("–",) * 8
    assert table.notes == ()


def test_tasks_have_a_column_each(row, save):
    table = task_table(save(row("fp32"), row("rtn", success={"b": [1, 2]})))
    assert table.header == ("recipe", "condition", "a", "b")
    assert table.rows == (("fp32", "plain", "45/50", "45/50"), ("rtn", "plain", "–", "1/2"))


def test_several_policies_and_scopes_are_told_apart(row, save):
    table = comparison_table(save(row("rtn", scope="paper"), row("rtn", policy="other")))
    assert [line[0] for line in table.rows] == ["invented: rtn (paper)", "other: rtn"]


def test_markdown_is_aligned_and_escapes_bars(row, save):
    text = markdown(task_table(save(row("a|b"), row("a much longer name"))))
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
    with pytest.raises(ReportError, match="cannot read"):
        load_results(tmp_path / "missing.json")
    broken = tmp_path / "broken.json"
    for text, message in [("{", "not JSON"), ("[]", "no list of 'rows'"), ("{}", "'rows'")]:
        broken.write_text(text)
        with pytest.raises(ReportError, match=message):
            load_results(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match="not JSON"):
        load_results(broken)
    with pytest.raises(ReportError, match="schema 2"):
        load_results(save(row("fp32"), schema=2))
    with pytest.raises(ReportError, match="no rows"):
        load_results(save())
    with pytest.raises(ReportError, match="row 2: expected a mapping"):
        load_results(save(row("fp32"), 3))
    lacking = row("rtn")
    del lacking["action_error"]
    with pytest.raises(ReportError, match="row 2: key 'action_error' is missing"):
        load_results(save(row("fp32"), lacking))
    for change in ({"success": 3}, {"success": {"a": [1]}}, {"success_mean": "most"}):
        with pytest.raises(ReportError, match="row 1: a value has the wrong kind"):
            load_results(save(row("fp32", **change)))


def test_a_kernel_line_has_a_dash_for_a_peer_that_was_not_measured() -> None:
    entry = {"site": "layer", "gmacs": 123.4, "vs_fp32": 7.44, "vs_int8_dynamic": 1.326}
    full = {**entry, "vs_llama_cpp": 2.96, "share_of_peak": 0.523, "share_of_vpmaddubsw_peak": 0.65}
    table = kernel_table([entry, full])
    assert table.rows[0] == ("layer", "123", "7.4×", "1.33×", "–", "–", "–")
    assert table.rows[1] == ("layer", "123", "7.4×", "1.33×", "3.0×", "52%", "65%")
    assert len(table.header) == 7


def test_latency_is_judged_by_the_busy_tail_over_the_idle_median() -> None:
    entry = {
        "threads": 2, "idle_p50_us": 300.4, "idle_p99_us": 501.0, "busy_p50_us": 280.0,
        "busy_p99_us": 600.8, "busy_p99_over_idle_p50": 2.0,
    }  # fmt: skip
    (line,) = latency_table([entry]).rows
    assert line == ("2", "300", "501", "280", "601", "2.0×")
