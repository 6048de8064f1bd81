"""Which frames are chosen: over tasks, over whole episodes, the same ones for the same seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla.calibration.sampling import Span, plan_frames

EPISODES = st.lists(
    st.builds(Span, stratum=st.integers(0, 4), length=st.integers(0, 60)), max_size=12
)
SEEDS = st.integers(0, 2**32)


@given(spans=EPISODES, count=st.integers(1, 90), seed=SEEDS)
def test_a_plan_is_sorted_inside_the_episodes_and_as_long_as_they_allow(
    spans: list[Span], count: int, seed: int
) -> None:
    plan = plan_frames(spans, count, seed)
    assert plan == sorted(set(plan))
    assert all(0 <= frame < spans[episode].length for episode, frame in plan)
    room = sum(max(span.length // 2, min(span.length, 1)) for span in spans)
    assert len(plan) == min(count, room)


@given(spans=EPISODES, count=st.integers(1, 90), seed=SEEDS)
def test_the_same_seed_gives_the_same_plan_and_the_splits_never_meet(
    spans: list[Span], count: int, seed: int
) -> None:
    plan = plan_frames(spans, count, seed)
    held_out = plan_frames(spans, count, seed, "heldout")
    assert plan == plan_frames(spans, count, seed)
    assert not set(plan) & set(held_out)
    assert len(held_out) == sum(spans[episode].length > 1 for episode, _ in plan)


@given(
    lengths=st.lists(st.integers(40, 90), min_size=4, max_size=9),
    count=st.integers(1, 40),
    seed=SEEDS,
)
def test_tasks_and_their_episodes_get_equal_shares(
    lengths: list[int], count: int, seed: int
) -> None:
    """Episodes are long enough here for any share; then no two shares differ by more than one."""
    spans = [Span(i % 3, length) for i, length in enumerate(lengths)]
    plan = plan_frames(spans, count, seed)
    tasks = Counter({task: 0 for task in range(3)})
    tasks.update(spans[episode].stratum for episode, _ in plan)
    assert max(tasks.values()) - min(tasks.values()) <= 1
    for task in range(3):
        members = [i for i, span in enumerate(spans) if span.stratum == task]
        shares = Counter(dict.fromkeys(members, 0))
        shares.update(episode for episode, _ in plan if episode in members)
        assert max(shares.values()) - min(shares.values()) <= 1


def test_what_a_short_task_cannot_give_others_give() -> None:
    plan = plan_frames([Span("short", 4), Span("long", 100)], 20, seed=0)
    assert Counter(episode for episode, _ in plan) == {0: 2, 1: 18}


@given(length=st.integers(20, 500), count=st.integers(2, 10), seed=SEEDS)
def test_frames_of_one_episode_are_evenly_spaced_from_its_beginning_to_its_end(
    length: int, count: int, seed: int
) -> None:
    frames = [frame for _, frame in plan_frames([Span("task", length)], count, seed)]
    spacing = length / count
    gaps = np.diff(frames)
    assert gaps.max() - gaps.min() <= 1  # whole frames: a spacing of 7.5 is 7 or 8
    assert frames[0] < spacing + 1 and frames[-1] > length - 1 - spacing - 1


@given(episodes=st.integers(2, 40), seed=SEEDS)
def test_one_frame_per_episode_still_covers_beginning_middle_and_end(
    episodes: int, seed: int
) -> None:
    """The M phases lie one in each M-th of the episode, whichever episode gets which."""
    spans = [Span(i, 100 * episodes) for i in range(episodes)]
    frames = sorted(frame for _, frame in plan_frames(spans, episodes, seed))
    assert [frame // 100 for frame in frames] == list(range(episodes))


def test_another_seed_chooses_other_frames() -> None:
    spans = [Span(i % 2, 300) for i in range(6)]
    plans = {tuple(plan_frames(spans, 12, seed)) for seed in range(8)}
    assert len(plans) == 8


@pytest.mark.parametrize("spans", [[], [Span("task", 0)]])
def test_nothing_gives_an_empty_plan(spans: list[Span]) -> None:
    assert plan_frames(spans, 8, seed=0) == []
