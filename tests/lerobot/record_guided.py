"""Records what LeRobot's own real-time chunking makes of recorded pi05 policies.

Runs in an environment with LeRobot, never with this project.  The job is JSON on standard input:
``{"records": FOLDER, "out": FILE}``; ``record.py`` has put the cases of ``guided_cases.py`` into
the folder.  The file has

* ``CASE/normalized``: the longest left-over as LeRobot's rollout brings it into the network's
  units, made relative to the new state where actions are relative;
* ``CASE/SETTING``: the normalized chunks of both observations that continue it;
* ``step/SETTING``: the guided velocities of ``RTCProcessor`` alone, at all ``STEP_TIMES``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from guided_cases import (
    GUIDED,
    SETTINGS,
    STEP_SETTINGS,
    STEP_TIMES,
    Setting,
    previous,
    step_tensors,
)
from lerobot_cases import ACTION_WIDTH, HORIZON, Case, noise, observations, weight
from record import LeRobot, pipelines_of, settings


def configuration(setting: Setting) -> Any:
    """LeRobot's own."""
    from lerobot.configs.types import RTCAttentionSchedule
    from lerobot.policies.rtc import RTCConfig

    return RTCConfig(
        prefix_attention_schedule=RTCAttentionSchedule[setting.schedule.upper()],
        max_guidance_weight=setting.max_guidance_weight,
        execution_horizon=setting.execution_horizon,
    )


def steps(setting: Setting) -> Tensor:
    """Guided velocities at all times, [times, batch, horizon, width]."""
    from lerobot.policies.rtc import RTCProcessor

    processor = RTCProcessor(configuration(setting))
    given = {key: torch.from_numpy(value) for key, value in step_tensors(setting).items()}
    found = [
        processor.denoise_step(
            x_t=given["x"],
            prev_chunk_left_over=given["previous"],
            inference_delay=setting.delay,
            time=time,
            original_denoise_step_partial=lambda x: given["v"],
        )
        for time in STEP_TIMES
    ]
    return torch.stack(found).detach()


def normalized(case: Case, checkpoint: Path) -> Tensor:
    """The longest left-over in the network's units, as LeRobot's rollout re-anchors it."""
    from lerobot.policies.rtc import reanchor_relative_rtc_prefix
    from lerobot.processor import (
        NormalizerProcessorStep,
        RelativeActionsProcessorStep,
        TransitionKey,
        create_transition,
    )

    before, _ = pipelines_of(checkpoint)
    normalizer = next(s for s in before.steps if isinstance(s, NormalizerProcessorStep))
    relative = next(
        (s for s in before.steps if isinstance(s, RelativeActionsProcessorStep) and s.enabled), None
    )
    rows = []
    for seen, actions in zip(observations(case), torch.from_numpy(previous(HORIZON)), strict=True):
        if relative is None:
            rows.append(normalizer(create_transition(action=actions))[TransitionKey.ACTION])
            continue
        state = torch.from_numpy(seen["state"])
        rows.append(reanchor_relative_rtc_prefix(actions, state, relative, normalizer, "cpu"))
    return torch.stack(rows)


def chunks(lerobot: LeRobot, case: Case, directory: Path) -> dict[str, Tensor]:
    """Everything of one case."""
    policy = lerobot.model.PI05Policy(settings(lerobot, case)).eval()
    with torch.no_grad():
        for name, tensor in policy.state_dict().items():
            drawn = weight(name.removeprefix("model."), tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(drawn))
    shown = load_file(directory / "inputs")
    left_over = normalized(case, directory / "checkpoint")
    found = {f"{case.name}/normalized": left_over.contiguous()}
    for setting in SETTINGS:
        policy.config.rtc_config = configuration(setting)
        policy.init_rtc_processor()
        with torch.no_grad():
            chunk = policy.model.sample_actions(
                list(shown["pixels"].unbind(1)),
                list(shown["cameras"].unbind(1)),
                shown["tokens"],
                shown["mask"],
                noise=torch.from_numpy(noise()),
                inference_delay=setting.delay,
                prev_chunk_left_over=left_over[:, : setting.left],
            )
        found[f"{case.name}/{setting.name}"] = chunk[..., :ACTION_WIDTH].contiguous()
    return found


def main(job: dict[str, str]) -> None:
    torch.set_num_threads(1)
    records = Path(job["records"])
    lerobot = LeRobot(records / "tokenizer", "pi05")
    found = {f"step/{setting.name}": steps(setting) for setting in STEP_SETTINGS}
    for case in GUIDED:
        found |= chunks(lerobot, case, records / case.name)
    assert all(np.isfinite(tensor.numpy()).all() for tensor in found.values())
    versions = json.dumps({"lerobot": lerobot.version, "torch": torch.__version__})
    save_file(found, job["out"], metadata={"versions": versions})


if __name__ == "__main__":
    main(json.load(sys.stdin))
