"""What an artifact says of itself, without a tensor being read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import omega_qvla as oq
from omega_qvla.artifact import read_artifact, verify_artifact, write_artifact
from omega_qvla.artifact.layout import TensorSpec
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ArtifactError
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.engine import QuantizedPolicy
from omega_qvla.runtime.inspection import inspect_artifact, site_failures

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def native(
    small_policy: Pi05Policy, few: Observations, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    made = oq.quantize(small_policy, few, "omega-w4a4-no-prior")
    assert isinstance(made, QuantizedPolicy)
    return made.save_pretrained(tmp_path_factory.mktemp("native") / "artifact")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a module of the user's own: a linear with a bias and one without."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8, bias=False))
    policy = oq.TorchPolicy(
        module,
        backbone=r"0|2",
        sample=lambda model, observation, _noise, _clock: model(observation["x"]),
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    data = [{"x": torch.randn(3, 16, generator=generator)} for _ in range(3)]
    made = oq.quantize(policy, data, "omega-w4a4-no-prior")
    assert isinstance(made, QuantizedPolicy)
    return made.save_pretrained(tmp_path_factory.mktemp("foreign") / "artifact")


@pytest.mark.parametrize("name", ["native", "foreign"])
def test_inspecting_reads_no_tensor(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The tensor files have their sizes and nothing else, and the table is the same."""
    artifact = read_artifact(request.getfixturevalue(name))
    whole = inspect_artifact(artifact.root)
    for path in artifact.root.iterdir():
        there = tmp_path / path.name
        if path.suffix == ".safetensors":
            there.write_bytes(bytes(path.stat().st_size))
        elif path.is_file():
            there.write_bytes(path.read_bytes())
        else:
            there.mkdir()
            for file in path.iterdir():
                (there / file.name).write_bytes(file.read_bytes())
    assert inspect_artifact(tmp_path) == whole
    assert not verify_artifact(tmp_path).ok
    with (tmp_path / "model-00001-of-00001.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="bytes, found"):
        inspect_artifact(tmp_path)


def test_the_table_is_that_of_the_loaded_policy(native: Path) -> None:
    size = sum(path.stat().st_size for path in native.rglob("*") if path.is_file())
    expected = oq.load(native).memory_report(directory_bytes=size)
    assert inspect_artifact(native).memory == expected


def test_a_policy_knows_its_layout_without_unpacking_a_weight(native: Path) -> None:
    loaded = oq.load(native)
    found = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in loaded.tensors().items()}
    assert loaded.layout() == found == read_artifact(native).manifest.layout


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any], Tensors], Any]) -> Path:
    """The same artifact with other content, consistent in itself."""
    artifact = read_artifact(source)
    config, tensors = dict(artifact.config), dict(artifact.tensors)
    config["sites"] = [dict(site) for site in config["sites"]]
    change(config, tensors)
    write_artifact(target, config=config, tensors=tensors, processor=artifact.processor, card="")
    return target


CHANGES: dict[str, tuple[Callable[[dict[str, Any], Tensors], Any], str]] = {
    "a site without its record": (lambda c, _: c["sites"].pop(), "in no site"),
    "a site twice": (lambda c, _: c["sites"].append(c["sites"][0]), "in two sites"),
    "a missing tensor": (lambda c, t: t.pop(f"{c['sites'][0]['name']}.transform"), "is missing"),
    "another shape": (
        lambda c, t: t.update({f"{c['sites'][0]['name']}.weight_scale": torch.ones(3)}),
        r"is float32 \[3\], expected float32 \[",
    ),
    "another type": (
        lambda c, t: t.update({(n := f"{c['sites'][0]['name']}.transform"): t[n].float()}),
        "expected bfloat16",
    ),
    "an additional tensor": (
        lambda c, t: t.update({f"{c['sites'][0]['name']}.other": torch.ones(3)}),
        "is not one that its site has",
    ),
    "more outputs than are stored": (
        lambda c, _: c["sites"][0].update(splits=[99]),
        "expected|outputs",
    ),
    "the weight beside its integers": (
        lambda c, t: t.update({f"{c['sites'][0]['linears'][0]}.weight": torch.ones(3)}),
        "is not one that its site has",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("name", ["native", "foreign"])
def test_sites_are_verified_with_the_module_and_without(
    name: str, case: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(name)
    assert site_failures(source) == []
    change, message = CHANGES[case]
    bad = rewritten(source, tmp_path / "bad", change)
    assert verify_artifact(bad).ok
    (failure,) = site_failures(bad)
    with pytest.raises(ArtifactError, match=message):
        raise ArtifactError(failure.reason)


def test_a_journal_holds_the_tensors_that_the_artifact_will_have(
    small_policy: Pi05Policy, few: Observations, tmp_path: Path
) -> None:
    recipe = Recipe.load("svdquant")
    made = oq.quantize(small_policy, few, recipe, work_directory=tmp_path / "journal")
    made.save_pretrained(tmp_path / "out")
    artifact, kept = read_artifact(tmp_path / "out").tensors, {}
    for path in sorted((tmp_path / "journal").glob("site-*.safetensors")):
        kept |= load_file(path)
    sites = {site.site.name for site in made.sites}
    assert kept.keys() == {name for name in artifact if name.rpartition(".")[0] in sites}
    assert all(torch.equal(kept[name], artifact[name]) for name in kept)
