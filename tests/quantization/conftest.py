"""What the tests of quantizing on a GPU share."""

from __future__ import annotations

import pytest
from stand_in_device import GPU, StandIn

from omega_qvla import api


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """``device="cuda"`` finds the stand-in; enter it to use it."""
    monkeypatch.setattr(api, "find_gpu", lambda _: GPU)
    return StandIn()
