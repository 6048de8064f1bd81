"""GR00T N1.5 as the rest of the project sees it."""

from __future__ import annotations

from omega_qvla.policies.family import CheckpointLayout, Family, LiberoConvention
from omega_qvla.policies.gr00t_n15.checkpoints.isaac import stream_gr00t
from omega_qvla.policies.gr00t_n15.checkpoints.lerobot import stream_lerobot_groot
from omega_qvla.policies.gr00t_n15.checkpoints.releases import is_gr00t, is_lerobot_n1_7
from omega_qvla.policies.gr00t_n15.config import EMBODIMENTS, Gr00tN15Config
from omega_qvla.policies.gr00t_n15.network import dropped_parameters
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.gr00t_n15.processing import Gr00tProcessor, identity_statistics
from omega_qvla.policies.processing.tokenizers import ByteTokenizer


def _sized(config: Gr00tN15Config, embodiments: int = EMBODIMENTS) -> Gr00tN15Policy:
    """A policy that reads bytes, tensors on the meta device.

    Its parameters are those of a checkpoint with this many embodiments, of which some are kept.
    """
    config = config.model_copy(update={"prompt_length": 256})
    processor = Gr00tProcessor(config, identity_statistics(config), ByteTokenizer())
    dropped = dropped_parameters(config, embodiments)
    return Gr00tN15Policy.of_processor(processor, dropped_parameters=dropped)


FAMILY = Family(
    policy=Gr00tN15Policy,
    title="GR00T N1.5",
    sizes={
        "gr00t-n1.5": lambda: _sized(Gr00tN15Config.full()),
        # As it runs LIBERO: two cameras, eight steps, one embodiment.
        "gr00t-n1.5-libero": lambda: _sized(Gr00tN15Config.libero()),
        "tiny-gr00t": lambda: _sized(Gr00tN15Config.tiny(vocabulary=ByteTokenizer.size), 1),
    },
    embedded={"tiny-gr00t": "tiny_gr00t"},
    layouts=(
        CheckpointLayout(
            "LeRobot's groot",
            stream_lerobot_groot,
            frozenset({"tokenizer", "embodiment", "ignore_settings", "base", "tied"}),
            lerobot_type="groot",
            reads=lambda content: not is_lerobot_n1_7(content),
        ),
        CheckpointLayout(
            "Isaac-GR00T's",
            stream_gr00t,
            frozenset({"tokenizer", "embodiment", "data_config", "tied"}),
            is_gr00t,
        ),
    ),
    libero=LiberoConvention(
        execute=1,
        max_steps={"spatial": 220, "object": 280, "goal": 600, "long": 1000},
        gripper="opening",
        seed=0,
    ),
)
