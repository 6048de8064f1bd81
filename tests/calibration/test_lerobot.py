"""LeRobot datasets as observations: right frames, right names, the same for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omega_qvla as oq
from omega_qvla.calibration.lerobot import match_state
from omega_qvla.calibration.lerobot_metadata import read_dataset
from omega_qvla.calibration.observations import Observations
from omega_qvla.calibration.sampling import Span, plan_frames
from omega_qvla.errors import ObservationError, ResourceError
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.processing.normalization import Part, Parts, Unchanged

pytestmark = pytest.mark.long

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "robot_sim.PickNPlace"

Write = Callable[..., Any]
Shown = Callable[[np.ndarray], tuple[int, int, int]]


def place(observation: Any) -> tuple[int, int]:
    """(episode, frame), which the fixture's states carry."""
    return int(observation["state"][0]), int(observation["state"][3])


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize("stored_as", ["video", "image"])
def test_images_state_and_prompt_belong_to_the_same_planned_frame(
    write_dataset: Write, shown: Shown, version: str, stored_as: str
) -> None:
    written = write_dataset(version, stored_as=stored_as)
    observations = Observations.from_lerobot(written.root, limit=24, seed=3)
    spans = [Span(written.told[i], length) for i, length in enumerate(written.lengths)]
    assert [place(o) for o in observations] == plan_frames(spans, 24, seed=3)
    for observation in observations:
        episode, frame = place(observation)
        assert observation["images"].keys() == {"base", "wrist"}
        for camera, image in enumerate(observation["images"].values()):
            assert image.dtype == np.uint8 and image.shape == (48, 64, 3)
            assert shown(image) == (camera, episode, frame)
        assert observation["state"].dtype == np.float32
        assert observation["state"].tolist() == [
            episode,
            frame / 4,
            -episode / 2,
            frame,
            0.5,
            -0.25,
        ]
        assert observation["prompt"] == written.instructions[written.told[episode]]


def test_encoded_images_lose_nothing(write_dataset: Write) -> None:
    written = write_dataset("v2.1", stored_as="image")
    image = Observations.from_lerobot(written.root, limit=1)[0]["images"]["base"]
    assert set(np.unique(image)) == {20, 128, 235}


def test_load_recognises_a_dataset_and_tells_the_splits_apart(write_dataset: Write) -> None:
    written = write_dataset("v3.0")
    calibration = Observations.load(written.root)
    held_out = Observations.load(str(written.root), split="heldout")
    assert not {place(o) for o in calibration} & {place(o) for o in held_out}
    with pytest.raises(ObservationError, match=r"no split 'test'.*calibration, heldout"):
        Observations.load(written.root, split="test")


def test_the_layout_does_not_change_the_observations(write_dataset: Write, tmp_path: Path) -> None:
    """The same episodes, in one file each and concatenated, give the same frames and states."""
    two = Observations.load(write_dataset("v2.1", stored_as="image").root)
    one = two.fingerprint
    (tmp_path / "dataset").rename(tmp_path / "before")
    assert Observations.load(write_dataset("v3.0", stored_as="image").root).fingerprint == one


def test_a_streamed_set_is_the_same_set_in_memory(write_dataset: Write) -> None:
    streamed = Observations.load(write_dataset("v2.1").root)
    held = Observations(list(streamed))
    assert streamed.fingerprint == held.fingerprint
    assert streamed.spread(5).fingerprint == held.spread(5).fingerprint
    assert streamed[3:9:2].fingerprint == held[3:9:2].fingerprint
    assert np.array_equal(streamed[-1]["state"], held[-1]["state"])


def test_a_dataset_that_changes_meanwhile_is_refused(write_dataset: Write) -> None:
    written = write_dataset("v2.1", stored_as="image")
    observations = Observations.load(written.root)
    written.data(0).write_bytes(written.data(2).read_bytes())
    with pytest.raises(ObservationError, match="not what it was"):
        list(observations)


def test_cameras_are_found_by_feature_and_by_short_name(write_dataset: Write) -> None:
    root = write_dataset("v2.1").root
    for name in ("wrist", "observation.images.wrist"):
        (observation,) = Observations.from_lerobot(root, cameras=[name], limit=1)
        assert observation["images"].keys() == {name}


def test_cameras_that_have_other_names_are_mapped_or_left_out(
    write_dataset: Write, shown: Shown
) -> None:
    choice = {"front": "wrist", "back": "observation.images.base", "none": None}
    root = write_dataset("v2.1").root
    (observation,) = Observations.from_lerobot(root, cameras=choice, limit=1)
    assert [shown(image)[0] for image in observation["images"].values()] == [1, 0]
    assert list(observation["images"]) == ["front", "back"]
    assert observation["image_masks"] == {"none": False}


def test_a_camera_without_counterpart_is_refused_naming_both_sides(write_dataset: Write) -> None:
    root = write_dataset("v2.1").root
    expected = (
        r"no camera 'top': the policy has 'base', 'top', the dataset 'observation\.images\.base', "
        r"'observation\.images\.wrist'.*--cameras top=observation\.images\.base"
    )
    with pytest.raises(ObservationError, match=expected):
        Observations.from_lerobot(root, cameras=["base", "top"])
    with pytest.raises(ObservationError, match="no camera 'nowhere'"):
        Observations.from_lerobot(root, cameras={"base": "nowhere"})
    with pytest.raises(ObservationError, match="no camera none"):
        Observations.from_lerobot(root, cameras={"base": None})


def write_modality(root: Path) -> None:
    """GR00T's names for the fixture's features."""
    content = {
        "state": {"arm": {"start": 0, "end": 4}, "hand": {"start": 4, "end": 6}},
        "video": {"ego": {"original_key": "observation.images.wrist"}},
        "annotation": {"human.task": {}},
    }
    (root / "meta/modality.json").write_text(json.dumps(content))


def test_gr00t_names_choose_cameras_and_parts_of_the_state(
    write_dataset: Write, shown: Shown
) -> None:
    root = write_dataset("v2.0").root
    write_modality(root)
    (observation,) = Observations.from_lerobot(root, state=["hand", "state.arm"], limit=1)
    assert list(observation["images"]) == ["ego"]
    assert shown(observation["images"]["ego"])[0] == 1
    whole = Observations.from_lerobot(root, cameras=["video.ego"], limit=1)[0]["state"]
    assert observation["state"].tolist() == [*whole[4:], *whole[:4]]


NAMED = ("x", "y", "z", "gripper")
"""What a policy calls the numbers of its state."""


def write_parts(root: Path, names: tuple[str, ...], widths: tuple[int, ...] = ()) -> None:
    """GR00T's names for the state, one after the other."""
    ends = np.cumsum(widths or [1] * len(names))
    starts = [0, *ends[:-1]]
    parts = {
        name: {"start": int(a), "end": int(b)}
        for name, a, b in zip(names, starts, ends, strict=True)
    }
    (root / "meta/modality.json").write_text(json.dumps({"state": parts}))


def names_in_info(root: Path, names: Any) -> None:
    """LeRobot's names for the state's numbers."""
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"]["observation.state"]["names"] = names
    path.write_text(json.dumps(info))


@pytest.fixture
def named_policy() -> NativePolicy:
    """The embedded policy, with names for its state as GR00T's checkpoints have them."""
    policy = oq.load_policy("builtin:tiny-pi05")
    parts = tuple(Part(name=name, normalization=Unchanged(width=1)) for name in NAMED)
    statistics = policy.processor.statistics.model_copy(update={"state": Parts(parts=parts)})
    policy.processor = replace(policy.processor, statistics=statistics)
    return policy


@pytest.mark.parametrize("where", ["modality.json", "a list", "a mapping with a list"])
def test_the_state_is_put_in_the_policys_order_by_name(
    write_dataset: Write, named_policy: NativePolicy, where: str
) -> None:
    written = write_dataset("v2.1", state_width=4)
    theirs = ("gripper", "x", "y", "z")
    if where == "modality.json":
        write_parts(written.root, theirs)
    else:
        names_in_info(written.root, [*theirs] if where == "a list" else {"motors": [*theirs]})
    plain = Observations.from_lerobot(written.root)
    matched = Observations.from_lerobot(written.root, policy=named_policy)
    for as_stored, in_order in zip(plain, matched, strict=True):
        assert np.array_equal(in_order["state"], as_stored["state"][[1, 2, 3, 0]])
    assert matched.report is not None and matched.report.state == NAMED
    assert "the state is put in the policy's order, by name: x, y, z, gripper" in (
        matched.report.lines()
    )
    assert plain.report is not None and plain.report.state == theirs


def test_a_state_in_the_policys_order_is_left_alone(
    write_dataset: Write, named_policy: NativePolicy
) -> None:
    written = write_dataset("v3.0", state_width=4)
    write_parts(written.root, NAMED)
    matched = Observations.from_lerobot(written.root, policy=named_policy)
    assert matched.report is not None and not matched.report.remarks
    assert np.array_equal(matched[0]["state"], Observations.from_lerobot(written.root)[0]["state"])


def test_a_state_that_lacks_some_of_the_policys_names_is_refused_listing_both(
    write_dataset: Write, named_policy: NativePolicy
) -> None:
    written = write_dataset("v2.1", state_width=4)
    write_parts(written.root, ("gripper", "x", "y", "roll"))
    told = r"has no z of the policy's state \(x, y, z, gripper\); it has gripper, x, y, roll"
    with pytest.raises(ObservationError, match=told):
        Observations.from_lerobot(written.root, policy=named_policy)
    chosen = ["x", "y", "roll", "gripper"]
    observations = Observations.from_lerobot(written.root, policy=named_policy, state=chosen)
    assert observations.report is not None and list(observations.report.state) == chosen


def test_parts_of_several_numbers_are_matched_number_by_number(write_dataset: Write) -> None:
    written = write_dataset("v2.1")
    write_parts(written.root, ("gripper", "arm", "rest"), (1, 3, 2))
    parts, remarks = match_state(
        read_dataset(written.root), ("arm[0]", "arm[1]", "arm[2]", "gripper")
    )
    assert [(p.start, p.end) for p in parts] == [(1, 2), (2, 3), (3, 4), (0, 1)] and remarks


def test_names_that_have_nothing_in_common_are_taken_in_order(
    write_dataset: Write, named_policy: NativePolicy
) -> None:
    """``quantize`` then warns of it with both lists (``test_mismatch.py``)."""
    written = write_dataset("v2.1", state_width=4)
    names_in_info(written.root, ["a", "b", "c", "d"])
    observations = Observations.from_lerobot(written.root, policy=named_policy)
    assert observations.report is not None
    assert observations.report.state == ("a", "b", "c", "d") and not observations.report.remarks


def test_state_may_be_put_together_from_features(write_dataset: Write) -> None:
    root = write_dataset("v2.1").root
    (observation,) = Observations.from_lerobot(root, state=["action", "observation.state"], limit=1)
    assert observation["state"].shape == (8,)
    with pytest.raises(ObservationError, match=r"no state 'legs'; known: .*observation\.state"):
        Observations.from_lerobot(root, state=["legs"])


@pytest.mark.parametrize("options", [{"limit": 0}, {"instruction": " "}, {"split": "train"}])
def test_choices_that_mean_nothing_are_refused(
    write_dataset: Write, options: dict[str, Any]
) -> None:
    with pytest.raises(ObservationError):
        Observations.from_lerobot(write_dataset("v2.1").root, **options)


def test_the_report_says_what_was_taken(write_dataset: Write) -> None:
    observations = Observations.from_lerobot(write_dataset("v3.0").root, limit=6)
    assert observations.report is not None
    (line,) = observations.report.lines()
    assert line.startswith("6 calibration observations of 2 tasks from 3 episodes")


def test_frames_are_chosen_by_their_own_time_not_by_their_number(
    write_dataset: Write, shown: Shown
) -> None:
    """Some recorders stamp a row with the time after it: row f belongs to video frame f + 1."""
    import pyarrow as arrow
    from pyarrow import parquet

    written = write_dataset("v2.1", lengths=(40,), told=(0,))
    table = parquet.read_table(written.data(0))
    late = arrow.array([(f + 1) / 10 for f in range(40)], arrow.float32())
    place_of_time = table.schema.get_field_index("timestamp")
    parquet.write_table(table.set_column(place_of_time, "timestamp", late), written.data(0))
    observations = Observations.from_lerobot(written.root, limit=10)
    for observation in observations:
        assert shown(observation["images"]["base"])[2] == place(observation)[1] + 1


def test_a_policy_is_quantized_on_a_dataset(write_dataset: Write, policy: Pi05Policy) -> None:
    written = write_dataset(
        "v3.0",
        instructions=("press the button", "press the button"),
        states={},
    )
    write_modality(written.root)
    observations = Observations.from_lerobot(
        written.root, cameras=["base", "wrist"], state=["arm"], limit=4
    )
    quantized = oq.quantize(policy, observations, recipe="rtn", allow_mismatch=True)
    assert np.isfinite(quantized.sample_actions(observations[0])).all()


def test_without_the_extra_the_message_names_it(
    write_dataset: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    root = write_dataset("v2.1").root
    for name in ("pyarrow", "av"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ResourceError, match=r"pip install 'pyarrow>="):
                Observations.from_lerobot(root)


@pytest.fixture(scope="module")
def real() -> Observations:
    """The published GR-1 dataset: 5 episodes, one task each, H.264 with a keyframe in 250."""
    for name in ("pyarrow", "av"):
        pytest.importorskip(name, reason="the extra `data` is not installed")
    if not REAL.is_dir():
        pytest.skip(f"the dataset is not at {REAL}")
    return Observations.load(REAL)


def test_a_real_dataset_gives_every_task_its_share(real: Observations) -> None:
    assert len(real) == 64
    tasks = Counter(observation["task"] for observation in real)
    assert sorted(tasks.values()) == [12, 13, 13, 13, 13]
    assert all(text.startswith("pick the ") for text in tasks)
    first = real[0]
    assert first["images"]["ego_view"].shape == (256, 256, 3)
    assert first["state"].shape == (44,) and first["state"].dtype == np.float32


def test_frames_of_a_real_dataset_are_those_of_a_plain_forward_decode(real: Observations) -> None:
    """No seeking, no choice by time: frame f + 1, as this dataset's times begin at 1/fps."""
    import av
    from pyarrow import parquet

    states = np.stack(
        parquet.read_table(REAL / "data/chunk-000/episode_000002.parquet")[
            "observation.state"
        ].to_numpy()
    ).astype(np.float32)
    with av.open(
        str(REAL / "videos/chunk-000/observation.images.ego_view/episode_000002.mp4")
    ) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    mine = [o for o in real if "meat" in o["prompt"]]
    assert len(mine) >= 12
    for observation in mine:
        (row,) = np.flatnonzero((states == observation["state"]).all(axis=1))
        assert np.array_equal(observation["images"]["ego_view"], frames[row + 1])


def test_parts_of_a_real_state_are_cut_by_name(real: Observations) -> None:
    parts = Observations.from_lerobot(REAL, state=["waist", "left_arm"], limit=5)
    whole = Observations.from_lerobot(REAL, limit=5)
    for part, observation in zip(parts, whole, strict=True):
        state = observation["state"]
        assert np.array_equal(part["state"], np.concatenate([state[41:44], state[0:7]]))


def test_a_camera_that_a_real_dataset_only_declares_is_refused(real: Observations) -> None:
    with pytest.raises(ObservationError, match=r"egoview.*no video of it"):
        Observations.from_lerobot(REAL, cameras=["observation.images.egoview"])
