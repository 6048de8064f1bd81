"""The thread pool of the C++ kernels, compiled into a program of its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
SHORTEST = 64
"""Calls made alone after the first wait (``csrc/pool.cpp``)."""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_after_a_worker_was_late_calls_are_made_alone_for_a_while(tmp_path: Path) -> None:
    program = tmp_path / "pool_trust"
    main = Path(__file__).with_name("pool_trust.cpp")
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{SOURCES}")
    subprocess.run(
        ["g++", *flags, main, SOURCES / "pool.cpp", "-o", program], check=True, timeout=300
    )
    done = subprocess.run([program], capture_output=True, text=True, check=True, timeout=120)
    first, second = map(int, done.stdout.split())
    # That the program ends shows that help is asked for again.  On a busy machine a worker may not
    # wake up in time when it is, which makes the spell longer, never shorter.
    assert first >= SHORTEST
    assert second >= 2 * SHORTEST, "a second wait must cost trust for longer"
