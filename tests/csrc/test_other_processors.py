"""The kernels of processors the tests do not run on: compiled for them and run in an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.emulated

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-static")


def compile_for_arm(folder: Path) -> Path:
    """The comparison program for 64-bit Arm; only the NEON file may use the dot product."""
    objects = []
    for source in ("linear", "pool", "generic", "neon"):
        target = folder / f"{source}.o"
        extra = ("-march=armv8.2-a+dotprod",) if source == "neon" else ()
        subprocess.run(
            [
                CROSS,
                *FLAGS,
                *extra,
                "-DW4A4_TESTED=kNeonDot",
                "-c",
                SOURCES / f"{source}.cpp",
                "-o",
                target,
            ],
            check=True,
            timeout=300,
        )
        objects.append(target)
    program = folder / "compare"
    main = Path(__file__).with_name("compare_paths.cpp")
    subprocess.run(
        [
            CROSS,
            *FLAGS,
            "-DW4A4_TESTED=kNeonDot",
            f"-I{SOURCES}",
            main,
            *objects,
            "-o",
            program,
            "-pthread",
        ],
        check=True,
        timeout=300,
    )
    return program


@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)),
    reason=f"needs {CROSS} and {EMULATOR} (tools/emulator.sh installs both)",
)
def test_neon_gives_the_bits_of_plain_c_on_an_emulated_processor(tmp_path: Path) -> None:
    program = compile_for_arm(tmp_path)
    done = subprocess.run(
        [EMULATOR, "-cpu", "max", program], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "neon-dotprod 5000\n"
    old = subprocess.run(
        [EMULATOR, "-cpu", "cortex-a53", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert (old.returncode, old.stdout) == (0, ""), "a processor without it must not be given it"
