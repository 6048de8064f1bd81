"""Full disks and killed writers: the previous output loads at every instant."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from omega_qvla import files
from omega_qvla.artifact import (
    planned_bytes,
    read_artifact,
    tensors,
    verify_artifact,
    write_artifact,
)
from omega_qvla.claims import Claim
from omega_qvla.errors import NotAnArtifactError, OmegaError, OutputError, ResourceError

pytestmark = pytest.mark.long


@pytest.fixture
def second(example: dict[str, Any]) -> dict[str, Any]:
    return {**example, "card": "# second\n", "max_shard_bytes": 64}


def files_at_most(size: int) -> Any:
    """No file of this process can grow beyond ``size`` bytes: the system refuses each write."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))


def test_writes_refused_at_fifty_offsets_leave_the_previous_output(
    tmp_path: Path, example: dict[str, Any], kit: ModuleType
) -> None:
    """By the system itself, in the library's files and in ours."""
    target = tmp_path / "out"
    second = {**example, "tensors": {"w": torch.arange(3000)}, "card": "x" * 30_000}
    write_artifact(tmp_path / "complete", **second)
    complete = kit.snapshot(tmp_path / "complete")
    old = write_artifact(target, **example)
    longest = max(len(data) for data in complete.values())
    try:
        for offset in [1000 + (longest - 1000) * i // 50 for i in range(50)]:
            files_at_most(offset)
            with pytest.raises(ResourceError, match=r"File too large.*untouched"):
                write_artifact(target, **second)
            assert sorted(os.listdir(tmp_path)) == ["complete", "out"]
            assert read_artifact(target).content_hash == old
    finally:
        files_at_most(resource.RLIM_INFINITY)
    write_artifact(target, **second)
    assert kit.snapshot(target) == complete


@pytest.mark.parametrize("full", ["write_bytes", "save_file"])
def test_a_full_disk_is_called_so(
    tmp_path: Path, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        if full == "save_file":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = Path if full == "write_bytes" else tensors
    with monkeypatch.context() as patch:
        patch.setattr(owner, full, refuse)
        with pytest.raises(ResourceError, match=r"the disk is full.*untouched"):
            write_artifact(tmp_path / "out", **example)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failures_of_fsync_are_not_swallowed(
    tmp_path: Path, example: dict[str, Any], second: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, code: int,
) -> None:  # fmt: skip
    """At every fsync of a save, the one after the swap included."""
    target = tmp_path / "out"
    old = write_artifact(target, **example)
    for failing in range(100):
        left = failing

        def sync(_: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", sync)
            try:
                write_artifact(target, **second)
            except ResourceError:
                assert os.listdir(tmp_path) == ["out"]
                assert read_artifact(target).content_hash == old
                continue
        break
    assert 8 < failing < 100
    assert read_artifact(target).content_hash != old


def test_preflight_names_needed_and_available(
    tmp_path: Path, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    old = write_artifact(tmp_path / "out", **example)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(ResourceError, match=r"needed [\d,]+ bytes, available 1,000"):
        write_artifact(tmp_path / "out", **example)
    with pytest.raises(ResourceError, match="needed 1,001 bytes"):
        files.preflight_disk(tmp_path / "not" / "yet" / "there", 1001)
    files.preflight_disk(tmp_path / "not" / "yet" / "there", 1000)
    assert read_artifact(tmp_path / "out").content_hash == old


def test_preflight_asks_for_at_least_what_is_written(
    tmp_path: Path, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kit: ModuleType
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "omega_qvla.artifact.directory.preflight_disk", lambda _, needed: asked.append(needed)
    )
    many = {f"layer.{i}.mlp.gate_up_proj.weight_scale": torch.ones(1) for i in range(500)}
    for held in ({}, example["tensors"], many):
        target = tmp_path / f"{len(asked)}"
        write_artifact(target, **{**example, "tensors": held})
        written = sum(len(data) for data in kit.snapshot(target).values())
        assert written <= asked[-1] <= written + (64 << 10)  # whole blocks


def test_the_planned_bytes_are_those_that_are_written(
    tmp_path: Path, example: dict[str, Any], kit: ModuleType
) -> None:
    for limit in (1, 100, 1 << 20):
        plan = {name: tensors.spec_of(name, t) for name, t in example["tensors"].items()}
        given = {**example, "max_shard_bytes": limit}
        planned = planned_bytes(**{**given, "tensors": plan})
        write_artifact(tmp_path / "out", **given)
        assert planned == sum(len(data) for data in kit.snapshot(tmp_path / "out").values())


def test_foreign_directories_are_never_replaced(tmp_path: Path, example: dict[str, Any]) -> None:
    cases = {
        "photos": ["cat.jpg"],
        "mixed": ["omega_config.json", "manifest.json", "thesis.tex"],
        "nested": ["manifest.json", "processor/deep/notes.txt"],
        "weights": ["model-00001-of-00001.safetensors"],
        "card": ["README.md"],
    }
    for name, paths in cases.items():
        for path in paths:
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text("mine")
        with pytest.raises(NotAnArtifactError, match="is not replaced"):
            write_artifact(tmp_path / name, **example)
        assert all((tmp_path / name / path).read_text() == "mine" for path in paths)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotAnArtifactError):
        write_artifact(tmp_path / "file", **example)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == sorted([*cases, "file"])


def test_empty_new_damaged_and_linked_destinations(tmp_path: Path, example: dict[str, Any]) -> None:
    (tmp_path / "empty").mkdir()
    write_artifact(tmp_path / "empty", **example)
    write_artifact(tmp_path / "new" / "deep", **example)
    write_artifact(tmp_path / "damaged", **example)
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    write_artifact(tmp_path / "damaged", **example)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write_artifact(tmp_path / "link", **{**example, "card": "through the link"})
    assert (tmp_path / "link").is_symlink()
    for name in ("empty", "new/deep", "damaged", "link"):
        assert verify_artifact(tmp_path / name).ok
    assert (tmp_path / "empty" / "README.md").read_text() == "through the link"


def test_unwritable_places_are_our_error(tmp_path: Path, example: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(OmegaError):
            write_artifact(target, **example)
    assert os.listdir(tmp_path) == ["file"]


# Every system call of a save that changes the disk, in turn, becomes a kill -9.
KILLER = """
import json, os, shutil, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from omega_qvla.artifact import read_artifact, tensors, verify_artifact, write_artifact

folder = Path(sys.argv[1])
target = folder / "out"
OLD = dict(config={"a": 1}, tensors={"w": torch.arange(40)}, processor={"s": b"1"}, card="old")
NEW = dict(config={"a": 2}, tensors={"w": torch.arange(90), "v": torch.ones(3)},
           processor={"s": b"2", "t": b"3"}, card="new", max_shard_bytes=100)
new = write_artifact(folder / "reference", **NEW)
reference = {p.name: p.read_bytes() for p in (folder / "reference").rglob("*") if p.is_file()}

def deadly(point):
    count = 0
    def wrap(function):
        def call(*arguments, **keywords):
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return call
    for name in ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "open", "chmod"):
        setattr(os, name, wrap(getattr(os, name)))
    tensors.save_file = wrap(tensors.save_file)
    Path.write_bytes = wrap(Path.write_bytes)

seen = {"old": 0, "new": 0, "between": 0}
for point in range(1, 1000):
    shutil.rmtree(target, ignore_errors=True)
    old = write_artifact(target, **OLD)
    child = os.fork()
    if child == 0:
        deadly(point)
        write_artifact(target, **NEW)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    seen["between"] += not target.exists()
    found = read_artifact(target).content_hash
    assert found in (old, new) and verify_artifact(target).ok
    seen["old" if found == old else "new"] += 1
    if point % 3 == 0:
        write_artifact(target, **OLD)
        assert read_artifact(target).content_hash == old
    write_artifact(target, **NEW)
    assert {p.name: p.read_bytes() for p in target.rglob("*") if p.is_file()} == reference
    assert sorted(os.listdir(folder)) == ["out", "reference"], os.listdir(folder)
print(json.dumps({"points": point - 1, **seen}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_every_step_of_a_save(tmp_path: Path) -> None:
    """What was there before or the new one loads, even from between the two renames."""
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["points"] > 40 and seen["old"] > 20 and seen["new"] > 0
    assert seen["between"] == 1


WRITER = """
import sys, torch
from omega_qvla.artifact import write_artifact
tensors = {f"w{i}": torch.full((1 << 16,), i) for i in range(8)}
print("ready", flush=True)
i = 0
while True:
    i += 1
    write_artifact(sys.argv[1], config={"i": i}, tensors=tensors, processor={}, card="")
"""


def test_kill_from_outside_at_random_times(tmp_path: Path, example: dict[str, Any]) -> None:
    """A writer that saves in a loop is killed whenever; whatever was last saved loads."""
    target = tmp_path / "out"
    write_artifact(target, **example)
    for delay in (0.03, 0.111):
        command = [sys.executable, "-c", WRITER, str(target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        assert verify_artifact(target).ok
        read_artifact(target)
    write_artifact(target, **example)
    assert os.listdir(tmp_path) == ["out"]


def test_an_artifact_is_not_written_where_another_is_at_work(
    tmp_path: Path, example: dict[str, Any]
) -> None:
    write_artifact(tmp_path / "out", **example)
    changed = {**example, "card": "another"}
    with Claim(tmp_path / "out") as claim:
        with pytest.raises(OutputError, match=f"process {os.getpid()} "):
            write_artifact(tmp_path / "out", **changed)
        assert (tmp_path / "out" / "README.md").read_text() == example["card"]
        written = write_artifact(tmp_path / "out", **changed, claim=claim)
    assert read_artifact(tmp_path / "out").content_hash == written


def test_artifacts_saved_at_once_are_one_of_them_and_whole(
    tmp_path: Path, example: dict[str, Any]
) -> None:
    start = Barrier(4)

    def save(number: int) -> str | None:
        start.wait()
        try:
            return write_artifact(tmp_path / "out", **{**example, "card": f"{number}"})
        except OutputError:
            return None

    with ThreadPoolExecutor(4) as pool:
        hashes = [one for one in pool.map(save, range(4)) if one is not None]
    assert read_artifact(tmp_path / "out").content_hash in hashes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
