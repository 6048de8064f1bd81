"""What every native family promises, and the tables that name them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.adaptive_norms import AdaptiveNorms
from omega_qvla.policies.base import HasEmbedding, linears_of, sites_of
from omega_qvla.policies.families import FOLDERS, families
from omega_qvla.policies.full_precision import policy_skeleton, sizes, stream_policy
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.gr00t_n15.processing import Gr00tProcessor, identity_statistics
from omega_qvla.policies.layers.step_table import HasStepTable
from omega_qvla.policies.native import NativePolicy

PACKAGE = Path(oq.__file__).parent
POLICIES = PACKAGE / "policies"
TINY = ("tiny-pi05", "tiny-pi0", "tiny-gr00t")


def observations(policy: NativePolicy, count: int = 1) -> Observations:
    config = policy.config
    size = config.vision.image_size
    return Observations.random(config.cameras, config.state_dim, count=count, size=size)


@pytest.mark.parametrize("name", list(sizes()))
def test_a_description_rebuilds_the_same_structure(name: str) -> None:
    policy = stream_policy(f"random:{name}")
    assert isinstance(policy, HasEmbedding)
    assert isinstance(policy, HasStepTable) == isinstance(policy, AdaptiveNorms)
    config, files = policy.describe()
    rebuilt = policy_skeleton(policy.family, config, files)
    shapes = [{n: p.shape for n, p in x.module.named_parameters()} for x in (policy, rebuilt)]
    assert shapes[0] == shapes[1]
    assert rebuilt.describe() == (config, files)
    assert [site.name for site in sites_of(rebuilt)] == [site.name for site in sites_of(policy)]


@pytest.mark.parametrize("name", list(sizes()))
def test_stages_read_every_linear_they_quantize_and_all_paths_exist(name: str) -> None:
    policy = stream_policy(f"random:{name}")
    for stage in policy.stages():
        for path in stage.reads:
            policy.module.get_submodule(path)
        for site in stage.sites:
            assert linears_of(policy.module, site)
            for linear in site.linears:
                assert any(linear == p or linear.startswith(f"{p}.") for p in stage.reads), linear


@pytest.mark.parametrize("name", list(sizes()))
def test_stages_read_every_parameter_but_those_of_unused_kinds(name: str) -> None:
    """A streamed policy has nothing in memory that its stages do not ask for."""
    policy = stream_policy(f"random:{name}")
    read = {path for stage in policy.stages() for path in stage.reads}
    unread = {
        parameter
        for parameter, _ in policy.module.named_parameters()
        if not any(parameter.startswith(f"{path}.") for path in read)
    }
    assert unread == set()


@pytest.mark.parametrize("name", TINY)
def test_a_random_policy_is_the_same_for_the_same_name_and_acts(name: str) -> None:
    first, second = (oq.load_policy(f"random:{name}") for _ in range(2))
    (observation,) = observations(first)
    noise = np.zeros(first.noise_shape, np.float32)
    chunk = first.sample_actions(observation, noise)
    assert np.array_equal(chunk, second.sample_actions(observation, noise))
    assert chunk.shape == (first.config.horizon, first.config.robot_action_dim)
    assert np.isfinite(chunk).all()


def test_padding_of_the_action_vector_is_no_part_of_a_chunk(
    small_gr00t: NativePolicy, few: Observations, noise: np.ndarray
) -> None:
    config = small_gr00t.config.model_copy(update={"robot_action_dim": 3})
    module = small_gr00t.clone().module
    module.config = config
    statistics = identity_statistics(config)
    processor = Gr00tProcessor(config, statistics, small_gr00t.processor.tokenizer)
    policy = Gr00tN15Policy(module, processor)
    whole = small_gr00t.sample_normalized(few[0], noise)
    assert torch.equal(policy.sample_normalized(few[0], noise), whole[:, :3])
    assert policy.sample_actions(few[0], noise).shape == (4, 3)


@pytest.mark.parametrize("name", TINY)
def test_noise_is_drawn_from_the_generator_and_checked(name: str) -> None:
    policy = oq.load_policy(f"random:{name}")
    (observation,) = observations(policy)
    chunks = [
        policy.sample_actions(observation, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(chunks[0], chunks[1]) and not np.array_equal(chunks[0], chunks[2])
    for bad, told in ((np.zeros((1, 2)), "shape"), (np.full(policy.noise_shape, np.nan), "NaN")):
        with pytest.raises(ObservationError, match=told):
            policy.sample_actions(observation, bad)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PolicyError, match=r"'other'.*pi05, pi0, gr00t_n15"):
        policy_skeleton("other", {}, {})


@pytest.mark.parametrize("family", list(families()))
def test_a_description_that_is_not_one_is_refused(family: str) -> None:
    with pytest.raises(PolicyError, match="description is invalid"):
        policy_skeleton(family, {"family": family}, {})


@pytest.mark.parametrize("name", TINY)
def test_another_number_of_steps_changes_the_clock_and_no_weight(name: str) -> None:
    policy = oq.load_policy(f"random:{name}")
    other = policy.with_steps(3)
    assert (other.steps, policy.steps != 3) == (3, True)
    assert other.describe()[0]["steps"] == 3
    for ours, theirs in zip(policy.module.parameters(), other.module.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    with pytest.raises(PolicyError, match="at least one"):
        policy.with_steps(0)


def imported(folder: Path) -> set[str]:
    """Names below ``policies`` that the files of a folder import."""
    text = "\n".join(path.read_text("utf-8") for path in sorted(folder.rglob("*.py")))
    return set(re.findall(r"omega_qvla\.policies\.(\w+)", text))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_family_imports_no_other_family(folder: str) -> None:
    found = imported(POLICIES / folder)
    assert folder in found
    assert found & set(FOLDERS) == {folder}


@pytest.mark.parametrize("folder", ["layers", "processing", "paligemma"])
def test_what_families_share_imports_no_family(folder: str) -> None:
    assert imported(POLICIES / folder) & set(FOLDERS) == set()


def test_formats_of_checkpoints_import_no_policy() -> None:
    assert imported(PACKAGE / "checkpoints") == set()


def test_nothing_outside_its_folder_switches_on_the_name_of_a_family() -> None:
    """What differs between families is told by the registry; training has its own two learners,
    and the instrument that injects outliers knows the networks."""
    named = re.compile(rf"""["']({"|".join(families())})["']""")
    own = ("policies/families.py", "evaluation/outlier_paths.py", "training/")
    own = (*own, *(f"policies/{folder}/" for folder in FOLDERS))
    sources = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    outside = {name: path for name, path in sources.items() if not name.startswith(own)}
    assert [name for name, path in outside.items() if named.search(path.read_text("utf-8"))] == []
