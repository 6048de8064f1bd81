"""The memory table is sums and ratios; both counts are checked by hand."""

from __future__ import annotations

from omega_qvla.runtime.memory import ComponentMemory, summarise


def test_rows_merge_by_name_and_the_paper_counts_only_its_linears() -> None:
    summary = summarise(
        [
            ComponentMemory("backbone", 1000, 500, 2000, paper_scope=True),
            ComponentMemory("vision", 100, 200, 200),
            ComponentMemory("backbone", 10, 20, 20),
        ]
    )
    assert [row["name"] for row in summary["components"]] == ["backbone", "vision"]
    backbone = summary["components"][0]
    assert (backbone["params"], backbone["bytes"], backbone["reference_bytes"]) == (1010, 520, 2020)
    assert backbone["bits"] == round(8 * 520 / 1010, 4)
    assert (summary["total_bytes"], summary["reference_bytes"]) == (720, 2220)
    assert summary["reduction"] == round(1 - 720 / 2220, 6)
    assert summary["paper_scope_reduction"] == 0.75


def test_nothing_counted_has_no_reduction() -> None:
    summary = summarise([ComponentMemory("empty", 0, 0, 0)])
    assert summary["reduction"] is None and summary["paper_scope_reduction"] is None
    assert summary["components"][0]["bits"] == 0.0
