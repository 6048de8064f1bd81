"""Cases of the comparison with openpi: shrunken policies, as its JAX trainer would save them.

Read by ``tests/openpi/record.py``, which runs in openpi's environment without this project, and by
the tests here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "parity" / "golden" / "openpi_jax"
TOKENIZER = Path(__file__).parents[1] / "parity" / "golden" / "tokenizer.model"

ASSET, STEP, HORIZON, ACTION_DIM, STATE, ROBOT = "my_robot", 29999, 6, 8, 5, 7
VOCABULARY, PROMPT_LENGTH, IMAGE, PATCH = 400, 64, 14, 7
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
PROMPTS = ("pick up the black bowl", "open_the drawer\nand close it ")

VISION = {"width": 16, "depth": 2, "mlp_dim": 24, "num_heads": 2}
BACKBONE = {"width": 32, "depth": 3, "mlp_dim": 24}
EXPERT = {"width": 16, "depth": 3, "mlp_dim": 24}
HEADS = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 8}


@dataclass(frozen=True)
class Case:
    """One policy.

    Attributes:
        name: of its directory.
        pi0: whether it is pi0 and not pi0.5.
        gemmas: sizes of backbone and expert; openpi's own ``dummy`` where there are none.
        loras: ``LoRAConfig`` of attention and of feed-forward, for backbone and for expert.
        average: whether the trainer averages its weights (EMA), and saves the average.
        dtype: of the saved weights; adapters stay float32, as in the trainer.
        state_in_prompt: ``discrete_state_input``.
        right: whether the third camera is there.
        orbax: options of Orbax's handler for the weights.
        golden: whether it is kept with the tests.
    """

    name: str
    pi0: bool = False
    gemmas: bool = True
    loras: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    average: bool = True
    dtype: str = "float32"
    state_in_prompt: bool = True
    right: bool = False
    orbax: dict[str, Any] = field(default_factory=dict)
    golden: bool = False

    @property
    def converts(self) -> bool:
        """Whether openpi's converter makes a PyTorch model of it: it has no adapters, and takes the
        backbone's heads to be as wide together as the backbone, as they are at full size."""
        return self.gemmas and not self.loras

    @property
    def training(self) -> dict[str, Any]:
        """Its training configuration, in our words."""
        told = {part: configs["attn"] for part, configs in self.loras.items()}
        return {
            "horizon": HORIZON,
            **({} if self.pi0 else {"state_in_prompt": self.state_in_prompt}),
            "state_dim": STATE,
            "robot_action_dim": ROBOT,
            "cameras": CAMERAS if self.right else CAMERAS[:2],
            "prompt_length": PROMPT_LENGTH,
            "asset_id": ASSET,
            **({"lora": told} if told else {}),
        }


_LORAS = {
    "backbone": {"attn": {"rank": 2, "alpha": 6.0}, "ffn": {"rank": 3, "alpha": 9.0}},
    "expert": {"attn": {"rank": 4, "alpha": 6.0, "rslora": True}, "ffn": {"rank": 2, "alpha": 1.0}},
}

CASES = (
    Case("full", golden=True),
    Case("lora", loras=_LORAS, average=False, dtype="bfloat16", state_in_prompt=False, golden=True),
    Case("lora_of_the_backbone", loras={"backbone": _LORAS["backbone"]}, average=False, right=True),
    Case("dummy", gemmas=False, right=True),
    Case("bfloat16", average=False, dtype="bfloat16"),
    Case("zarr3", orbax={"use_zarr3": True}),
    Case("pi0", pi0=True, dtype="bfloat16", average=False, golden=True),
    Case("pi0_lora", pi0=True, loras=_LORAS, average=False, right=True),
)
