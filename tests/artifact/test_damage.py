"""Damaged, incomplete and hostile directories: refused, with the place and the reason."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from omega_qvla.artifact import read_artifact, verify_artifact, write_artifact
from omega_qvla.errors import ArtifactError, NotAnArtifactError
from omega_qvla.files import ContainedDirectory, DamageError

CONFIG, MANIFEST, CARD = "omega_config.json", "manifest.json", "README.md"


def refused(root: Path, *parts: str, without_hashes: bool = False) -> None:
    """Load (with and without hashes, where structure alone must tell) and verify all refuse."""
    for verify in (True, False) if without_hashes else (True,):
        with pytest.raises(ArtifactError) as caught:
            read_artifact(root, verify=verify)
        for part in parts:
            assert part in str(caught.value)
    report = verify_artifact(root)
    assert not report.ok
    text = "\n".join(str(failure) for failure in report.failures)
    for part in parts:
        assert part in text


def shard_of(root: Path, tensor: str) -> Path:
    return root / json.loads((root / MANIFEST).read_bytes())["tensors"][tensor]["file"]


# --- not an artifact -------------------------------------------------------------------------


def test_paths_that_are_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_text("x")
    for path in (tmp_path / "file", tmp_path / "empty", tmp_path / "other", tmp_path / "none",
                 "a\0b", "x" * 5000):  # fmt: skip
        for action in (read_artifact, verify_artifact):
            with pytest.raises(NotAnArtifactError):
                action(path)


# --- bit flips -------------------------------------------------------------------------------


def test_every_bit_of_manifest_and_configuration_counts(saved: Path, kit: ModuleType) -> None:
    """Not a sample: one bit of every eleventh byte of the small files, all refused."""
    for name in (CONFIG, MANIFEST, CARD, "processor/stats.json"):
        data = (saved / name).read_bytes()
        for position in range(0, len(data), 11):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            (saved / name).write_bytes(damaged)
            with pytest.raises(ArtifactError):
                read_artifact(saved)
        (saved / name).write_bytes(data)
    assert verify_artifact(saved).ok


def test_a_flip_names_its_tensor_and_verify_lists_all(saved: Path, kit: ModuleType) -> None:
    for tensor in ("layer.transform", "embedding"):
        path = shard_of(saved, tensor)
        header, body = kit.split_shard(path.read_bytes())
        damaged = bytearray(body)
        damaged[header[tensor]["data_offsets"][0]] ^= 1
        path.write_bytes(kit.join_shard(header, bytes(damaged)))
    (saved / CARD).write_text("# a Policy\n")
    with pytest.raises(ArtifactError, match="SHA-256"):
        read_artifact(saved)
    report = verify_artifact(saved)
    assert {(f.file, f.tensor) for f in report.failures} == {
        (CARD, None),
        (shard_of(saved, "layer.transform").name, "layer.transform"),
        (shard_of(saved, "embedding").name, "embedding"),
    }
    assert report.to_json()["failures"][0].keys() == {"file", "tensor", "reason"}
    read_artifact(saved, verify=False)  # hashes are all that tells


# --- strictness ------------------------------------------------------------------------------


def edit_header(root: Path, tensor: str, kit: ModuleType, edit: Callable[[dict[str, Any]], Any]):
    path = shard_of(root, tensor)
    header, body = kit.split_shard(path.read_bytes())
    edit(header)
    path.write_bytes(kit.join_shard(header, body))


def test_missing_tensor(saved: Path, kit: ModuleType) -> None:
    edit_header(saved, "embedding", kit, lambda header: header.update(x=header.pop("embedding")))
    with pytest.raises((KeyError, ArtifactError)):
        kit.reseal(saved)
    manifest = json.loads((saved / MANIFEST).read_bytes())
    manifest["files"][shard_of(saved, "embedding").name]["size"] = (
        shard_of(saved, "embedding").stat().st_size
    )
    kit.seal(manifest)
    (saved / MANIFEST).write_bytes(kit.canonical(manifest))
    refused(saved, "'embedding'", "expected I8 [5, 7], found no such tensor", without_hashes=True)
    assert "expected no such tensor, found I8 [5, 7]" in str(verify_artifact(saved).failures)


def test_additional_tensor(saved: Path, kit: ModuleType) -> None:
    extra = {"shape": [0], "dtype": "I8"}

    def edit(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for entry in header.values())
        header["stowaway"] = {**extra, "data_offsets": [end, end]}

    edit_header(saved, "embedding", kit, edit)
    kit.reseal(saved)
    refused(saved, "'stowaway'", "expected no such tensor, found I8 [0]", without_hashes=True)


def test_misshaped_tensor(saved: Path, kit: ModuleType) -> None:
    edit_header(saved, "embedding", kit, lambda h: h["embedding"].update(shape=[7, 5]))
    kit.reseal(saved)
    refused(saved, "'embedding'", "expected I8 [5, 7], found I8 [7, 5]", without_hashes=True)


def test_mistyped_tensor(saved: Path, kit: ModuleType) -> None:
    edit_header(saved, "embedding", kit, lambda h: h["embedding"].update(dtype="U8"))
    kit.reseal(saved)
    refused(saved, "'embedding'", "expected I8 [5, 7], found U8 [5, 7]", without_hashes=True)


HEADER_EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown dtype": (lambda e: e.update(dtype="F8_E4M3"), "dtype: expected one of"),
    "boolean dtype": (lambda e: e.update(dtype="BOOL"), "found BOOL [5, 7]"),
    "dtype of another kind": (lambda e: e.update(dtype=["I8"]), "dtype: expected one of"),
    "huge extent": (lambda e: e.update(shape=[2**62, 4]), "shape: expected"),
    "overflowing product": (lambda e: e.update(shape=[2**30] * 8), "shape: expected"),
    "overflowing strides": (lambda e: e.update(shape=[0, 2**39, 2**39]), "shape: expected"),
    "negative extent": (lambda e: e.update(shape=[-5, -7]), "shape: expected"),
    "boolean extent": (lambda e: e.update(shape=[True, 35]), "shape: expected"),
    "float extent": (lambda e: e.update(shape=[5.0, 7]), "shape: expected"),
    "nine dimensions": (lambda e: e.update(shape=[5, 7] + [1] * 7), "shape: expected"),
    "too large for its bytes": (lambda e: e.update(shape=[6, 7]), "expected 42 bytes"),
    "reversed offsets": (lambda e: e["data_offsets"].reverse(), "data_offsets"),
    "three offsets": (lambda e: e["data_offsets"].append(9), "data_offsets"),
    "negative offset": (lambda e: e.update(data_offsets=[-35, 0]), "data_offsets"),
    "beyond the file": (
        lambda e: e.update(data_offsets=[2**40, 2**40 + 35]), "expected at data offset",
    ),
    "overlap": (lambda e: e.update(data_offsets=[0, 35]), "expected at data offset"),
    "additional field": (lambda e: e.update(x=1), "expected data_offsets, dtype and shape"),
    "missing field": (lambda e: e.pop("dtype"), "expected data_offsets, dtype and shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADER_EDITS)
def test_malformed_headers(saved: Path, kit: ModuleType, case: str) -> None:
    edit, message = HEADER_EDITS[case]
    edit_header(saved, "embedding", kit, lambda header: edit(header["embedding"]))
    fix_sizes(saved, kit)
    refused(saved, shard_of(saved, "embedding").name, "embedding", message, without_hashes=True)


def fix_sizes(root: Path, kit: ModuleType) -> None:
    """File sizes and hashes of the manifest, but not the tensors'."""
    manifest = json.loads((root / MANIFEST).read_bytes())
    tensors, manifest["tensors"] = manifest["tensors"], {}
    (root / MANIFEST).write_bytes(kit.canonical(manifest))
    kit.reseal(root)
    manifest = {**json.loads((root / MANIFEST).read_bytes()), "tensors": tensors}
    kit.seal(manifest)
    (root / MANIFEST).write_bytes(kit.canonical(manifest))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested deeper"),
        (b'{"a":' * 33, "nested deeper"),
        (b'{"a":[' + b"[]," * 600_000 + b"[]]}", "elements"),
        (b'{"\\"' + b'\\"' * 600_000, "elements"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"a": {"b": 1, "b": 1}}', "duplicate key 'b'"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b"", "not valid JSON"),
        (b'{"a": "' + b"x" * (9 << 20) + b'"}', "at most"),
    ],
)
@pytest.mark.parametrize("name", [CONFIG, MANIFEST])
def test_hostile_json_is_bounded(saved: Path, name: str, text: bytes, message: str) -> None:
    (saved / name).write_bytes(text)
    refused(saved, name, message, without_hashes=True)


@pytest.mark.parametrize("version", [2, 10**30])
def test_a_newer_format_says_so(saved: Path, version: int) -> None:
    (saved / CONFIG).write_text(json.dumps({"format_version": version, "new": {}}))
    (saved / MANIFEST).write_text("{}")
    refused(saved, "is newer than this library reads (1): update", without_hashes=True)


@pytest.mark.parametrize("version", [None, "1", 0, -1, True, 1.0])
def test_a_format_version_that_is_none(saved: Path, version: Any) -> None:
    (saved / CONFIG).write_text(json.dumps({"format_version": version}))
    refused(saved, "format_version", without_hashes=True)


@pytest.mark.parametrize("tensor", ["layer.weight_scale", "layer.transform", "layer.bias"])
def test_nan_with_correct_hashes_is_refused(saved: Path, kit: ModuleType, tensor: str) -> None:
    path = shard_of(saved, tensor)
    header, body = kit.split_shard(path.read_bytes())
    damaged, end = bytearray(body), header[tensor]["data_offsets"][1]
    damaged[end - 2 : end] = b"\xff\x7f"  # NaN in the last item, for every float format here
    path.write_bytes(kit.join_shard(header, bytes(damaged)))
    kit.reseal(saved)
    refused(saved, tensor, "NaN", without_hashes=True)


# --- files: missing, extra, special, outside -------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, MANIFEST, CARD, "processor/stats.json", "processor",
                                  "model-00001-of-00002.safetensors"])  # fmt: skip
def test_missing_files(saved: Path, name: str) -> None:
    path = saved / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(saved, name, without_hashes=True)


@pytest.mark.parametrize("name", ["x", ".hidden", "processor/x", "model-00004-of-00004.safetensors",
                                  "pytorch_model.bin", "a\nb", "\udcff"])  # fmt: skip
def test_additional_files(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"x")
    refused(saved, "not part of the artifact", without_hashes=True)
    json.dumps(verify_artifact(saved).to_json(), ensure_ascii=False).encode()  # printable


def make_special(path: Path, kind: str, outside: Path) -> None:
    """Put something that is no regular file at ``path``; ``outside`` holds its good bytes."""
    shutil.copy(path, outside)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        here = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)
    else:
        links = {"outside": outside, "relative": os.path.relpath(outside, path.parent),
                 "itself": path.name, "dangling": "nowhere", "device": "/dev/zero"}  # fmt: skip
        path.symlink_to(links[kind])


def opened_outside(root: Path, action: Callable[[], Any]) -> list[str]:
    """Everything opened while ``action`` runs that is not a plain name below the root."""
    seen: list[tuple[str, Any]] = []
    recording = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if recording and event == "open":
            seen.append((str(arguments[0]), arguments[2]))

    sys.addaudithook(hook)
    try:
        action()
    finally:
        recording = False
    ours = [(path, flags) for path, flags in seen if path != str(root)]
    return [path for path, flags in ours if "/" in path or path in (".", "..")
            or not flags & os.O_NOFOLLOW]  # fmt: skip


SPECIAL = ["fifo", "directory", "socket", "outside", "relative", "itself", "dangling", "device"]
FILES = [CONFIG, MANIFEST, CARD, "processor/stats.json", "model-00002-of-00002.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="sockets are bound through /proc")
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", FILES)
def test_special_files_and_links_are_refused_unopened(
    saved: Path, tmp_path: Path, name: str, kind: str
) -> None:
    make_special(saved / name, kind, tmp_path / "outside")
    assert not opened_outside(saved, lambda: refused(saved, name, without_hashes=True))


def test_a_linked_processor_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / "processor").rename(tmp_path / "elsewhere")
    (saved / "processor").symlink_to(tmp_path / "elsewhere")
    assert not opened_outside(saved, lambda: refused(saved, "processor", without_hashes=True))


ESCAPES = [
    "../outside", "../../outside", "/etc/hostname", "processor/../../outside", "processor/..", "..",
    ".", "", "processor/", "processor//stats.json", "processor/./stats.json", "./README.md",
    "processor/a/b", "Processor/x", "README.md/", "README.md/../README.md",
    "processor/../README.md",
    "a\0b", "\0", "model-00001-of-00001.safetensors/x", "~/x", "C:\\x", "..\\outside",
    "processor\\x",
    "processor/\u2215x", "\uff0e\uff0e/x", "%2e%2e/x", "file:///etc/hostname", "x" * 300,
    "processor/" + "x" * 300, "processor/-x", "processor/.x", "model-1-of-1.safetensors",
    "model-00009-of-00002.safetensors", "model-00001-of-00002.safetensors ", "\ud800", "x\n",
]  # fmt: skip


@pytest.mark.parametrize("place", ["additional file", "renamed file", "file of a tensor"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_names_in_the_manifest_cannot_leave_the_directory(
    saved: Path, tmp_path: Path, kit: ModuleType, escape: str, place: str
) -> None:
    (tmp_path / "outside").write_bytes((saved / "processor/stats.json").read_bytes())
    manifest = json.loads((saved / MANIFEST).read_bytes())
    if place == "file of a tensor":
        manifest["tensors"]["embedding"]["file"] = escape
    elif place == "additional file":
        manifest["files"][escape] = manifest["files"]["processor/stats.json"]
    else:
        manifest["files"][escape] = manifest["files"].pop("processor/stats.json")
    kit.seal(manifest)
    (saved / MANIFEST).write_bytes(kit.canonical(manifest))
    assert not opened_outside(saved, lambda: refused(saved, MANIFEST, without_hashes=True))


@pytest.mark.parametrize("escape", [e for e in ESCAPES if "/" in e or e in (".", "..", "", "a\0b")])
def test_the_directory_itself_opens_nothing_outside(tmp_path: Path, escape: str) -> None:
    """Below the manifest's checks: even an unchecked name cannot leave."""
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "outside").write_text("x")
    with ContainedDirectory(inner) as folder, pytest.raises(DamageError):
        folder.open(escape)


def test_a_file_replaced_while_opening_is_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = os.stat(tmp_path)
    regular = os.stat_result((stat.S_IFREG | 0o644, *tuple(other)[1:]))
    monkeypatch.setattr("omega_qvla.files.os.stat", lambda *_, **__: regular)
    with ContainedDirectory(saved) as folder, pytest.raises(DamageError, match="was replaced"):
        folder.open(CARD)


def test_a_file_that_shrinks_while_reading_is_refused(saved: Path) -> None:
    with ContainedDirectory(saved) as folder:
        file = folder.open(CARD)
        os.truncate(saved / CARD, 2)
        with pytest.raises(DamageError, match="ends at byte 2"):
            file.read(1 << 20)


def test_a_linked_root_and_a_relative_path_are_fine(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(saved)
    monkeypatch.chdir(saved)
    for path in (tmp_path / "link", Path(), "."):
        assert torch.equal(read_artifact(path).tensors["empty"], torch.zeros(0, 4))


def test_reading_leaks_no_descriptors(saved: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        verify_artifact(saved)
        artifact = read_artifact(saved)
    del artifact
    (saved / CARD).unlink()
    for _ in range(5):
        with pytest.raises(ArtifactError):
            read_artifact(saved)
    assert len(os.listdir("/dev/fd")) == before


def test_a_boolean_that_is_neither_true_nor_false_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "a"
    flags = torch.tensor([True, False, True])
    write_artifact(root, config={}, tensors={"flags": flags}, processor={}, card="")
    assert torch.equal(read_artifact(root).tensors["flags"], flags)
    path = shard_of(root, "flags")
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    with pytest.raises(ArtifactError, match=r"flags.*neither 0 nor 1"):
        read_artifact(root, verify=False)
