"""Triton's interpreter, once for each file that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from interpreted_triton import Interpreter, interpreter


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    pytest.importorskip("triton", reason="Triton is not installed: make gpu")
    with interpreter() as running:
        yield running
