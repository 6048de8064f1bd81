"""Starts ``record.py`` for every case, each part with the LeRobot whose behaviour it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

from lerobot_cases import BEFORE, CASES, CURRENT, MIDDLE, OLD

TESTS = Path(__file__).parents[1]
TOKENIZER = TESTS / "parity" / "golden" / "tokenizer.model"
DRACCUS = "draccus==0.10.0"
"""What the older releases write ``config.json`` with."""

ALL = ("save", "see", "act", "finish")
RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    # 0.4.4's network needs a transformers that was never released: 0.6.1's stands in for it.
    (OLD, OLD, ("save", "see")),
    (OLD, CURRENT, ("act",)),
    (OLD, OLD, ("finish",)),
    (MIDDLE, MIDDLE, ALL),
    (BEFORE, BEFORE, ALL),
    (CURRENT, CURRENT, ALL),
)
"""The release that writes a checkpoint, the one that runs, and the parts it runs."""


def write_records(python: Path, out: Path, cases: Collection[str]) -> None:
    """Checkpoints and records of these cases, in ``out``.

    Of older releases only the code is needed: pip brings it into ``out/releases``, and it runs with
    the libraries of LeRobot's environment.

    Args:
        python: that of an environment with LeRobot 0.6.1.
        out: a folder; what it holds of these cases is replaced.
        cases: names.

    Raises:
        CalledProcessError: pip or LeRobot failed.
    """
    for name in cases:
        shutil.rmtree(out / name, ignore_errors=True)
    for writer, runner, parts in RUNS:
        names = [case.name for case in CASES if case.written_by == writer and case.name in cases]
        if not names:
            continue
        code = None if runner == CURRENT else str(_release(python, runner, out / "releases"))
        job = {"out": str(out), "tokenizer": str(TOKENIZER), "code": code}
        argument = json.dumps({**job, "parts": parts, "cases": names})
        around = {**os.environ, "PYTHONPATH": str(TESTS / "helpers"), "HF_HUB_OFFLINE": "1"}
        command = [str(python), str(TESTS / "lerobot" / "record.py"), argument]
        subprocess.run(command, check=True, env=around)


def _release(python: Path, version: str, folder: Path) -> Path:
    """The code of an older release."""
    code = folder / version
    if not code.exists():
        partial = folder / f"{version}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        wanted = [f"lerobot=={version}", DRACCUS]
        subprocess.run([*command, str(partial), *wanted], check=True)
        partial.rename(code)
    return code
