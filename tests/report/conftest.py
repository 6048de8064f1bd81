from __future__ import annotations

import json

import pytest


def make_row(recipe, condition="plain", successes=90, **changes):
    """An invented row; such numbers exist only in these tests' temporary files."""
    return {
        "policy": "invented",
        "recipe": recipe,
        "condition": condition,
        "realizable": True,
        "success": {"a": [successes // 2, 50], "b": [successes - successes // 2, 50]},
        "success_mean": successes / 100,
        "success_ci95": [max(0.0, successes / 100 - 0.06), min(1.0, successes / 100 + 0.05)],
        "action_error": 0.004,
        "noise_floor": 0.3,
        "smoothness": 1.05,
        "checkpoint_bytes": 3_900_000,
        "resident_bytes": 4_400_000,
        "ms_per_chunk": 31.25,
        "seeds": list(range(50)),
        "smoke": True,
        "paired_vs_reference": None,
        **changes,
    }


@pytest.fixture
def row():
    return make_row


@pytest.fixture
def save(tmp_path):
    def write(*rows, **changes):
        path = tmp_path / "run.json"
        document = {"schema": 1, "policy": "invented", "rows": list(rows), **changes}
        path.write_text(json.dumps(document))
        return path

    return write


@pytest.fixture
def saved(row, save):
    paired = {"difference": -0.02, "ci95": [-0.05, 0.01], "mcnemar_p": 0.25, "episodes": 100}
    return save(
        row("fp32", successes=95, action_error=0.0, checkpoint_bytes=20_100_000),
        row("omega-w4a4", successes=93, paired_vs_reference=paired),
        row("fp32", "stress:30", successes=95, action_error=0.0),
        row("rtn", "stress:30", successes=0, action_error=0.8, realizable=False),
    )
