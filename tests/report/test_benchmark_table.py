"""The benchmark's page: who is marked, who is out of the contest, what was not measured."""

from __future__ import annotations

import pytest

from omega_qvla.report.benchmark_table import benchmark_tables, drift_table, error_table
from omega_qvla.results.reading import load_comparison


@pytest.fixture
def cells(row, save):
    def measured(recipe, error, *, bits=4.16, ratio=None, **changes):
        typical = {"typical_ratio": None, "typical_ci95": None}
        versus = ratio and {"ratio": sum(ratio) / 2, "ci95": list(ratio), **typical}
        return row(
            recipe,
            action_error=error,
            bits_per_weight=bits,
            error_vs_default=versus,
            **changes,
        )

    path = save(
        row("fp32", successes=95, action_error=0.0),
        measured("level", 0.010, ratio=(0.8, 1.3)),
        measured("worse", 0.050, ratio=(2.0, 9.0)),
        measured("wide", 0.001, bits=8.7, ratio=(0.05, 0.3)),
        measured("wide-level", 0.013, bits=8.7, ratio=(0.9, 1.1)),
        measured("simulated", 0.002, realizable=False, ratio=(0.1, 0.4)),
        measured("omega-w4a4-static", 0.012),
        measured("omega-w4a4-static", 0.011, condition="stress:30"),
        row("fp32", policy="other", action_error=0.0, success={}, success_mean=None),
    )
    tables = benchmark_tables(load_comparison(path).rows)
    assert set(tables) == {"invented", "other"}
    return {
        name: {line[0]: dict(zip(table.header, line, strict=True)) for line in table.rows}
        for name, table in tables.items()
    }


def test_the_lowest_error_of_four_bit_integers_is_marked(cells):
    plain = {recipe: line["plain"] for recipe, line in cells["invented"].items()}
    assert plain["level"] == "90.0 % · 0.01 ◂ ="
    assert plain["worse"] == "90.0 % · 0.05"
    assert plain["wide"] == "90.0 % · 0.001"
    assert plain["wide-level"] == "90.0 % · 0.013"
    assert plain["simulated *"] == "90.0 % · 0.002"
    assert plain["omega-w4a4-static"] == "90.0 % · 0.012"
    assert plain["fp32"] == "95.0 % · 0"
    assert cells["invented"]["omega-w4a4-static"]["stress:30"] == "90.0 % · 0.011 ◂"


def test_what_was_not_measured_is_a_dash(cells):
    assert cells["invented"]["level"]["stress:30"] == "–"
    assert cells["invented"]["fp32"]["bits/weight"] == "–"
    assert cells["other"]["fp32"]["plain"] == "– · 0"


def test_errors_and_drift_have_their_intervals(row, read):
    measured = row(
        "rtn",
        action_error=0.02,
        action_error_ci95=[0.01, 0.04],
        error_vs_default={
            "ratio": 2.5,
            "ci95": [1.5, 4.0],
            "typical_ratio": 3.5,
            "typical_ci95": [2.5, 5.0],
        },
        action_errors=[0.015, 0.001, 0.004],
        drift={"25": {"median_m": 0.0123, "p90_m": 0.05, "episodes": 90}},
    )
    results = read(row("fp32", action_error=0.0), measured, row("gptq", drift=None))
    errors, drift = error_table(results), drift_table(results)
    assert errors.rows[0][:4] == ("rtn", "plain", "0.02", "[0.01, 0.04]")
    assert errors.rows[0][4:] == ("2.50", "[1.5, 4]", "0.012", "3.50", "[2.5, 5]")
    assert errors.rows[1][3:] == ("–",) * 6
    assert drift.header == ("recipe", "condition", "after 25 steps")
    assert drift.rows == (("rtn", "plain", "1.2 (5.0), 90 episodes"),)
