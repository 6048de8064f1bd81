"""What the dynamic linker sees of the extension: nothing that another library could replace."""

from __future__ import annotations

import subprocess
import sys

import pytest

from omega_qvla.runtime.kernels import cpu


@pytest.mark.skipif(sys.platform != "linux", reason="symbols are looked at with GNU nm")
def test_the_extension_shows_its_entry_and_nothing_else() -> None:
    """A renderer's libraries have a std::call_once too; taken in place of ours, it crashes."""
    path = cpu.extension().__file__
    assert path is not None
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == ["PyInit__cpu"]
