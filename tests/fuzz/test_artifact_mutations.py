"""A short run of the artifact fuzzer; ``benchmarks/fuzz_artifact.py`` runs the full counts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.long

KIT = Path(__file__).parents[2] / "benchmarks" / "fuzz_artifact.py"


@pytest.fixture(scope="module")
def kit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_artifact", KIT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_artifact"] = module
    spec.loader.exec_module(module)
    return module


def test_damaged_directories_end_in_our_errors(kit: ModuleType, tmp_path: Path) -> None:
    """Mutated directories: no crash, no hang, load and verify agree, both outcomes occur."""
    result = kit.run_mutations(tmp_path, 400, seed=7)
    assert result.problems == []
    assert result.rounds == 400 and result.refused > 300 and result.accepted > 0


def test_every_bit_flip_is_found(kit: ModuleType, tmp_path: Path) -> None:
    """One bit anywhere in the artifact: found by the default load and by verify."""
    result = kit.run_flips(tmp_path, 300, seed=7)
    assert result.problems == []
    assert result.refused == result.rounds == 300
