"""A simulator of the user's own, as its user types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gymnasium", reason="the simulator is an optional extra")

import omega_qvla as oq
from omega_qvla.cli import main
from omega_qvla.environments import action_limits, begin, carry_out

MODULE = '''
import gymnasium
import numpy as np
from gymnasium import spaces

class Wait(gymnasium.Env):
    """Solved after a number of steps that the seed draws, unless that takes too long."""

    def __init__(self, task):
        self.task = task
        self.action_space = spaces.Box(-0.5, 0.5, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.goal = 0, int(self.np_random.integers(3, 12))
        return self.see(), {}

    def step(self, action):
        assert action.dtype == np.float32 and np.abs(action).max() <= 0.5
        self.count += 1
        solved = self.count == self.goal
        return self.see(), 0.0, solved, self.count == 7, {"is_success": solved}

    def see(self):
        picture = np.full((84, 84, 3), self.count, np.uint8)
        return {
            "images": {"base": picture, "wrist": picture},
            "state": np.zeros(4, np.float32),
            "prompt": f"{self.task} the door",
        }

class Wide(Wait):
    def __init__(self, task):
        super().__init__(task)
        self.action_space = spaces.Box(-1, 1, (7,), np.float32)
'''

POLICY = "builtin:tiny-pi05"


def run(arguments):
    """Exit status of a command."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code or 0


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder of the user's module, which is where commands are typed."""
    (tmp_path / "my_robot.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_environment_of_the_users_own_is_evaluated_and_resumed(here, capsys):
    command = ["eval", POLICY, "--env", "my_robot:Wait", "--tasks", "open,push", "--seed", "10"]
    command += ["--workers", "1", "--out", "kept", "--json", "row.json"]
    assert run([*command, "--episodes", "2"]) == 0
    assert run([*command, "--episodes", "3", "--resume", "--overwrite"]) == 0
    row = json.loads((here / "row.json").read_text())["row"]
    goals = [int(np.random.Generator(np.random.PCG64(s)).integers(3, 12)) for s in (10, 11, 12)]
    expected = [sum(goal <= 7 for goal in goals), 3]
    assert row["success"] == {"open": expected, "push": expected}
    assert (row["environment"], row["execute"]) == ("my_robot:Wait", 5)
    (journal,) = (here / "kept" / "journals").iterdir()
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert lines[0]["environment"] == "my_robot:Wait"
    assert [line["steps"] for line in lines[1:3]] == [min(goal, 7) for goal in goals[:2]]
    assert len(lines) == 7
    assert f"open{' ' * 20} {expected[0]}/3" in capsys.readouterr().out


def test_python_gives_the_row_of_the_command(here):
    found = oq.evaluate(POLICY, "my_robot:Wait", tasks=["open"], episodes=2, seed=10, execute=4)
    goals = [int(np.random.Generator(np.random.PCG64(s)).integers(3, 12)) for s in (10, 11)]
    assert found.row.success == {"open": (sum(goal <= 7 for goal in goals), 2)}
    assert (found.row.environment, found.row.execute) == ("my_robot:Wait", 4)


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--env", "my_robot:Wait"], 2, "needs --tasks"),
        (["--env", "my_robot", "--tasks", "open"], 2, "MODULE:CALLABLE"),
        (["--env", "metaworld", "--execute", "2"], 2, "--execute is for your own"),
        (["--env", "no_robot:Wait", "--tasks", "open"], 3, "No module named 'no_robot'"),
        (["--env", "my_robot:Wide", "--tasks", "open"], 2, "have 4 numbers"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(here, capsys, arguments, status, told):
    assert run(["eval", POLICY, "--episodes", "1", "--workers", "1", *arguments]) == status
    assert told in " ".join(capsys.readouterr().err.split())


def test_the_environment_of_the_documentation_is_one():
    text = (Path(__file__).parents[3] / "docs" / "evaluate-your-robot.md").read_text("utf-8")
    example = {}
    exec(text.partition("```python\n")[2].partition("```")[0], example)
    env = example["Reach"]("open")
    low, _ = action_limits(env)
    for _ in range(2):
        first = begin(env, 3)["state"]
        assert np.abs(first[:3]).max() <= 0.3
    steps = [np.clip(-first, -0.05, 0.05)] * 3 + [np.zeros(4, np.float32)] * 300
    assert len(low) == 4 and carry_out(env, steps).steps <= 200
    assert np.array_equal(begin(env, 3)["state"], first)
