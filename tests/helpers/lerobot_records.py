"""Starts ``record.py`` for every case, each part with the LeRobot whose behaviour it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

from lerobot_cases import BEFORE, CASES, CURRENT, MIDDLE, NEWER, OLD

TESTS = Path(__file__).parents[1]
TOKENIZER = TESTS / "parity" / "golden" / "tokenizer.model"
PACKAGES: dict[str, tuple[str, ...]] = {
    OLD: ("lerobot==0.4.4", "draccus==0.10.0"),
    MIDDLE: ("lerobot==0.5.0", "draccus==0.10.0", "transformers==5.3.0"),
    BEFORE: ("lerobot==0.5.1", "draccus==0.10.0", "transformers==5.3.0"),
    CURRENT: (),
    NEWER: ("transformers==5.6.0",),
}
"""What takes the place of LeRobot 0.6.1's own environment.  draccus writes ``config.json``;
transformers from 5.4 on scales embeddings, which LeRobot 0.5 does itself."""

ALL = ("save", "see", "act", "finish")
RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    # 0.4.4's network needs a transformers that was never released: 0.6.1's stands in for it.
    (OLD, OLD, ("save", "see")),
    (OLD, CURRENT, ("act",)),
    (OLD, OLD, ("finish",)),
    (MIDDLE, MIDDLE, ALL),
    (BEFORE, BEFORE, ALL),
    (CURRENT, CURRENT, ALL),
    (NEWER, NEWER, ALL),
)
"""The release that writes a checkpoint, the one that runs, and the parts it runs."""


def write_records(python: Path, out: Path, cases: Collection[str]) -> None:
    """Checkpoints and records of these cases, in ``out``.

    pip brings ``PACKAGES`` into ``out/releases``, without what they depend on: they run with the
    libraries of LeRobot's environment.

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
        path = [TESTS / "helpers", *_packages(python, runner, out / "releases")]
        around = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(map(str, path)),
        }
        job = {"out": str(out), "tokenizer": str(TOKENIZER), "parts": parts, "cases": names}
        command = [str(python), str(TESTS / "lerobot" / "record.py")]
        subprocess.run(command, input=json.dumps(job), text=True, check=True, env=around)


def _packages(python: Path, release: str, folder: Path) -> list[Path]:
    """The folder with the packages of a release, fetched once; none where it needs none."""
    if not PACKAGES[release]:
        return []
    code = folder / release.replace(" ", "-")
    if not code.exists():
        partial = code.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*command, str(partial), *PACKAGES[release]], check=True)
        partial.rename(code)
    return [code]
