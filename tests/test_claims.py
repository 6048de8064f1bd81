"""One writer per output: who comes second is told who was first, and a kill leaves no lock."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from omega_qvla.claims import Claim
from omega_qvla.errors import OutputError, ResourceError

pytestmark = pytest.mark.long

HOLD = """
import sys, time
from omega_qvla.claims import Claim
with Claim(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
TURNS = """
import sys
from pathlib import Path
from omega_qvla.claims import Claim
from omega_qvla.errors import OutputError
out, inside, rounds, won = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), 0
for _ in range(rounds):
    try:
        with Claim(out):
            inside.touch(exist_ok=False)  # fails if another is here
            inside.unlink()
            won += 1
    except OutputError:
        pass
print(won)
"""


def holder_of(out: Path) -> subprocess.Popen[str]:
    """A process that has claimed ``out``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_who_comes_second_is_told_who_was_first(tmp_path: Path) -> None:
    process = holder_of(tmp_path / "out")
    try:
        with pytest.raises(OutputError) as refused:
            Claim(tmp_path / "out")
        message = str(refused.value)
        assert f"process {process.pid} on {os.uname().nodename} since 2" in message
        assert "Claim(sys.argv[1])" in message and "another output" in message
    finally:
        process.kill()
        process.wait()


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    process = holder_of(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Claim(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_names_of_one_place_are_one_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    with Claim("link"):
        for name in ("real", tmp_path / "real", "./link", tmp_path / "real" / ".." / "link"):
            with pytest.raises(OutputError):
                Claim(name)
        with Claim("other"):
            pass


def test_a_claim_makes_the_folders_it_needs_and_removes_those_left_empty(tmp_path: Path) -> None:
    with Claim(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with Claim(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "result").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "result"]


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    start, threads = Barrier(8), 8

    def take(_: int) -> Claim | None:
        start.wait()
        try:
            return Claim(tmp_path / "out")
        except OutputError as refused:
            assert f"process {os.getpid()} " in str(refused)
            return None

    with ThreadPoolExecutor(threads) as pool:
        taken = [claim for claim in pool.map(take, range(threads)) if claim is not None]
    assert len(taken) == 1
    taken[0].release()
    taken[0].release()  # twice does no harm
    assert list(tmp_path.iterdir()) == []


def test_two_are_never_inside_while_lock_files_come_and_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TURNS, str(tmp_path / "out"), str(tmp_path / "inside"), "2000"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    won = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes) and max(won) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reason", ["no locks", "read-only"])
def test_a_place_that_cannot_be_locked_is_refused_by_name(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(37 if reason == "no locks" else 30, reason)

    module, name = (fcntl, "flock") if reason == "no locks" else (os, "open")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, refuse)
        with pytest.raises(ResourceError, match=rf"out.*{reason}"):
            Claim(tmp_path / "out")
