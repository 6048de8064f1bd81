"""Steps that openpi's JAX trainer saved, against the actions that openpi computed with them.

How they were made is in ``docs/parity.md``; ``make test-openpi`` compares with openpi itself.
"""

from __future__ import annotations

import pytest
from openpi_cases import CASES, GOLDEN, Case
from openpi_parity import compare

KEPT = [case for case in CASES if case.golden]


@pytest.mark.parametrize("case", KEPT, ids=[case.name for case in KEPT])
def test_a_step_of_the_jax_trainer_gives_openpis_actions(case: Case) -> None:
    found = compare(GOLDEN / case.name, case)
    assert found.within_bounds(), found


@pytest.mark.parametrize("case", KEPT, ids=[case.name for case in KEPT])
def test_a_step_is_small(case: Case) -> None:
    assert (
        sum(path.stat().st_size for path in (GOLDEN / case.name).rglob("*") if path.is_file())
        <= 300_000
    )
