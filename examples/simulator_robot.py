"""The simulator as the robot: drives Meta-World in real time from a policy behind a socket.

    omega-qvla quantize builtin:tiny-pi05 --out out/tiny
    omega-qvla serve out/tiny &
    python examples/simulator_robot.py ws://127.0.0.1:8000 --task drawer-open-v3 --rate 10

The robot moves at its rate whether or not actions have arrived, as a real one does: chunks are
computed while earlier ones are carried out.  Where they overlap they are blended; with --continued
the server makes each one continue the one before (real-time chunking).  A tick without an action
holds still.  A rate that the server cannot keep up with shows as late ticks.
Serve builtin:tiny-pi05 on another port to compare with full precision.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from omega_qvla.evaluation.simulators.metaworld import MetaWorldEnv
from omega_qvla.evaluation.simulators.metaworld_tasks import ACTION_DIM
from omega_qvla.serving.client import RemotePolicy, drive
from omega_qvla.serving.client.action_queue import Blending

GRIPPER = ACTION_DIM - 1
"""Opens or closes: a decision, not a quantity to average."""


class SimulatedRobot:
    """Meta-World behind the two methods a robot needs."""

    def __init__(self, task: str, seed: int) -> None:
        self._env = MetaWorldEnv(task)
        self._env.reset(seed=seed)
        self.max_steps = self._env.max_steps

    def observe(self) -> Mapping[str, Any]:
        """Two camera images, the state and the instruction."""
        return self._env.observe()

    def act(self, action: np.ndarray) -> bool:
        """One control step; whether the task is solved."""
        return self._env.advance(action)[0]

    def close(self) -> None:
        """Free the renderer."""
        self._env.close()


def main() -> None:
    """Run one episode per seed and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="ws://HOST:PORT of omega-qvla serve")
    parser.add_argument("--task", default="drawer-open-v3")
    parser.add_argument("--rate", type=float, default=10.0, help="control steps a second")
    parser.add_argument("--seeds", type=int, default=1, help="episodes")
    parser.add_argument("--continued", action="store_true", help="real-time chunking")
    parser.add_argument("--token", help="what the server asks for")
    options = parser.parse_args()
    # Meta-World's actions are differences of position: holding still is zero, not the last action.
    blending = Blending(
        ticks=0 if options.continued else 2,
        switched=(GRIPPER,),
        late="hold",
        hold_action=(0.0,) * ACTION_DIM,
        continued=options.continued,
    )
    with RemotePolicy(options.address, token=options.token) as policy:
        horizon = policy.noise_shape[0]
        for seed in range(options.seeds):
            robot = SimulatedRobot(options.task, seed)
            report = drive(
                robot,
                policy,
                rate_hz=options.rate,
                ticks=robot.max_steps,
                ask_below=max(2, horizon - 2),
                blending=blending,
            )
            robot.close()
            print(json.dumps({"task": options.task, "seed": seed, **report.summary()}))


if __name__ == "__main__":
    main()
