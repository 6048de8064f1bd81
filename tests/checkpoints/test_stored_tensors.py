"""safetensors in one file or many: index and files must tell the same story."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from omega_qvla.checkpoints.files import contained_file, read_json
from omega_qvla.checkpoints.stored_tensors import INDEX, WEIGHTS, find_tensors
from omega_qvla.checkpoints.weight_store import MappedWeights
from omega_qvla.errors import PolicyError

pytestmark = pytest.mark.long

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4), "c": torch.zeros(5, 1)}
MAP = {"a": FIRST, "b": SECOND, "c": SECOND}


def write_index(directory: Path, weight_map: Any) -> None:
    content = {"metadata": {"total_size": 60}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(content))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": TENSORS["a"]}, tmp_path / FIRST)
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / SECOND)
    write_index(tmp_path, MAP)
    return tmp_path


def test_every_tensor_is_found_in_its_shard_and_read_when_asked_for(sharded: Path) -> None:
    found = find_tensors(sharded)
    assert {name: header.shape for name, header in found.headers.items()} == {
        "a": (2, 3),
        "b": (4,),
        "c": (5, 1),
    }
    store = MappedWeights(found.places)
    assert all(torch.equal(store.read(name), TENSORS[name]) for name in TENSORS)


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / WEIGHTS)
    found = find_tensors(tmp_path)
    assert {place.file.name for place in found.places.values()} == {WEIGHTS}


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        (MAP | {"a": "absent.safetensors"}, r"names absent\.safetensors, which is not there"),
        ({"a": FIRST, "b": SECOND}, "does not list c, which is in"),
        (MAP | {"d": SECOND}, f"d is not in {SECOND}"),
        (MAP | {"b": FIRST}, f"b is in {SECOND}, the index says {FIRST}"),
        (MAP | {"a": "../a.safetensors"}, "a shard is a .safetensors file of the same directory"),
        (MAP | {"a": "/etc/passwd"}, "a shard is"),
        (MAP | {"a": "sub/a.safetensors"}, "a shard is"),
        (MAP | {"a": "x\\a.safetensors"}, "not there|out of the directory"),
        (MAP | {"a": "pytorch_model.bin"}, "a shard is"),
        (MAP | {"a": 3}, "a shard is"),
        ({}, "no 'weight_map'"),
        ([], "no 'weight_map'"),
        (None, "no 'weight_map'"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    weight_map: Any, expected: str, sharded: Path
) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(PolicyError, match=expected):
        find_tensors(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, sharded / FIRST)
    with pytest.raises(PolicyError, match=f"b is in {FIRST} and in {SECOND}"):
        find_tensors(sharded)


def test_a_half_downloaded_shard_is_refused_by_name_and_size(sharded: Path) -> None:
    path = sharded / SECOND
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(PolicyError, match=rf"{SECOND}.*bytes are damaged or half-downloaded"):
        find_tensors(sharded)


def test_a_pointer_of_git_lfs_is_refused_with_the_remedy(tmp_path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (tmp_path / WEIGHTS).write_text(text)
    with pytest.raises(PolicyError, match=r"git lfs pull"):
        find_tensors(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PolicyError, match=r"git lfs pull"):
        read_json(tmp_path, "config.json")


def test_an_unfinished_download_is_called_so(tmp_path: Path) -> None:
    (tmp_path / f"{WEIGHTS}.incomplete").write_bytes(b"x")
    with pytest.raises(PolicyError, match="download was not finished"):
        find_tensors(tmp_path)


def test_weights_and_index_side_by_side_are_ambiguous(sharded: Path) -> None:
    save_file(TENSORS, sharded / WEIGHTS)
    with pytest.raises(PolicyError, match="holds both"):
        find_tensors(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "policy.pt", "last.ckpt", "w eights.pth"])
def test_formats_that_run_code_are_refused_with_the_command_that_converts_them(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(PolicyError, match=r"runs code when it is opened.*\n.*save_file") as caught:
        find_tensors(tmp_path)
    assert str(caught.value).endswith(f"'{tmp_path / name}'" if " " in name else name)


def test_the_converting_command_converts(tmp_path: Path) -> None:
    import subprocess
    import sys

    torch.save({"state_dict": {"a": TENSORS["a"], "tied": TENSORS["a"]}}, tmp_path / "policy.pt")
    with pytest.raises(PolicyError) as caught:
        find_tensors(tmp_path)
    command = str(caught.value).split("\n", 1)[1].replace("python3", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    store = MappedWeights(find_tensors(tmp_path).places)
    assert torch.equal(store.read("a"), TENSORS["a"])
    assert torch.equal(store.read("tied"), TENSORS["a"])


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/hostname", "a/../../x", ".", "..", "", "a//b", "a\\b", "a\0b"]
)
def test_a_name_that_leads_out_of_the_directory_opens_nothing(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "policy"
    inside.mkdir()
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(PolicyError, match="leads out of the directory"):
        contained_file(inside, name)


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "policy"
    inside.mkdir()
    save_file(TENSORS, tmp_path / "secret.safetensors")
    (inside / WEIGHTS).symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(PolicyError, match="link that leads out"):
        find_tensors(inside)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(TENSORS, blobs / "abc")
    (snapshot / WEIGHTS).symlink_to("../../blobs/abc")
    assert set(find_tensors(snapshot).headers) == set(TENSORS)


def test_a_pipe_does_not_block_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(PolicyError, match="not a regular file"):
        find_tensors(tmp_path)


def test_a_link_to_itself_or_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).symlink_to(tmp_path / WEIGHTS)
    with pytest.raises(PolicyError, match="cannot read"):
        find_tensors(tmp_path)


def test_a_file_that_goes_away_after_the_check_is_a_clear_error(sharded: Path) -> None:
    store = MappedWeights(find_tensors(sharded).places)
    (sharded / FIRST).unlink()
    with pytest.raises(PolicyError, match=f"cannot read a from .*{FIRST}"):
        store.read("a")


def test_two_tensors_of_one_new_name_are_refused(sharded: Path) -> None:
    with pytest.raises(PolicyError, match="holds x twice, as a and b"):
        find_tensors(sharded).renamed(lambda name: "x")
