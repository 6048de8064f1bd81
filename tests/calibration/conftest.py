"""LeRobot datasets of the tests' own making."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_dataset import Written, what_is_shown


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., Written]:
    """Writes a dataset: version, and changes of ``Written``'s defaults."""
    for name in ("pyarrow", "av", "PIL"):
        pytest.importorskip(name, reason="the extra `data` is not installed")

    def write(version: str = "v2.1", **changes: Any) -> Written:
        return Written(tmp_path / "dataset", version, **changes).write()

    return write


@pytest.fixture
def shown() -> Callable[[np.ndarray], tuple[int, int, int]]:
    """Reads (camera, episode, frame) off an image."""
    return what_is_shown
